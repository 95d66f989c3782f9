"""What can be wrong with data, models and arguments, and what a run says and leaves behind then."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from tiny import tiny_pipeline
from training.runs import config, history, losses, moved_lora, pairs, pipeline, trainer

from mmalign import DiffusionDPOTrainer
from mmalign.data import Normalizer
from mmalign.denoisers import Schedule


def test_a_loss_that_is_not_finite_stops_the_run_and_names_rows(tmp_path: Path) -> None:
    run = trainer(tmp_path)
    plain = run.pair_losses

    def broken(model: Any, inputs: Any, **kwargs: Any) -> Any:
        loss, measured, pairs_ = plain(model, inputs, **kwargs)
        bad = torch.tensor([row == 4 for row in inputs["row"]])
        return torch.where(bad, torch.nan, loss), measured, pairs_

    run.pair_losses = broken
    with pytest.raises(
        FloatingPointError, match=r"not finite at step \d for rows \[4\]: lower the learning rate or beta"
    ):
        run.args.max_steps = 3
        run.train()


def test_nan_latents_are_one_line_with_the_remedy(tmp_path: Path) -> None:
    pipe = pipeline()
    with torch.no_grad():
        pipe.vae.encoder.conv_in.weight.fill_(torch.nan)
    with pytest.raises(ValueError, match="NaN or infinite latents.*Run it in float32") as caught:
        trainer(tmp_path, pipe=pipe, cache_dir=str(tmp_path / "cache"))
    assert "\n" not in str(caught.value)


def test_a_corrupt_picture_drops_its_whole_row_and_training_goes_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = pairs(5)
    rows[2]["rejected"] = b"no picture"
    with caplog.at_level(logging.WARNING, "mmalign"):
        run = trainer(tmp_path, data=rows, max_steps=4)
    assert [run._train.dataset[item]["row"] for item in range(4)] == [0, 1, 3, 4]
    assert sum("row 2" in record.getMessage() for record in caplog.records) == 1
    run.train()
    assert len(history(run)) == 4
    whole = trainer(tmp_path, data=pairs(5))
    torch.testing.assert_close(losses(trainer(tmp_path, data=rows), (2, 3)), losses(whole, (3, 4)))


def test_a_failed_start_leaves_the_pipeline_as_it_was(tmp_path: Path) -> None:
    pipe = pipeline()
    flags = [p.requires_grad for p in pipe.unet.parameters()]
    for options in (
        {"data": []},
        {"data": "no/such/folder/here"},
        {"report_to": "no-such-logger"},
        {"reference": "adapter", "peft_config": None},
    ):
        with pytest.raises((ValueError, ImportError)):
            trainer(tmp_path, pipe=pipe, **options)
    assert not getattr(pipe.unet, "peft_config", None)
    assert [p.requires_grad for p in pipe.unet.parameters()] == flags
    trainer(tmp_path, pipe=pipe).train()
    with pytest.raises(ValueError, match=r"already carries adapter\(s\) default: fuse"):
        trainer(tmp_path, pipe=pipe)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"per_device_train_batch_size": 7}, "6 usable pairs do not fill one batch of 7"),
        ({"eval_dataset": "same"}, "eval_dataset is the training data"),
        ({"eval_strategy": "steps", "eval_steps": 1}, "eval_dataset"),
        ({"ref_model": "half"}, "ref_model has another dtype"),
        ({"loss_type": "mapo", "beta": 0.1, "ref_model": "other"}, "does not use ref_model"),
        ({"dtype": torch.bfloat16, "peft_config": None}, "would round small steps away"),
        ({"resolution": 15}, "multiples of 2"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_wrong_arguments_are_one_line(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    options = dict(options)
    if options.get("eval_dataset") == "same":
        options["eval_dataset"] = pairs()
    if "ref_model" in options:
        options["ref_model"] = tiny_pipeline("sd", 1).unet.to(
            torch.float16 if options["ref_model"] == "half" else torch.float32
        )
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, **options)


def test_another_reference_model_is_compared_with(tmp_path: Path) -> None:
    other = tiny_pipeline("sd", seed=1)
    run = trainer(tmp_path, ref_model=other)
    assert run.reference.kind == "copy" and run.reference.module is other.unet
    assert (losses(run) - 0.6931).abs().max() > 1e-2
    with pytest.raises(ValueError, match="shares"):
        pipe = pipeline()
        trainer(tmp_path, pipe=pipe, ref_model=pipe.unet)


def test_missing_data_are_asked_for(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="train_dataset is missing"):
        DiffusionDPOTrainer(pipeline(), config("dpo", tmp_path))


def test_evaluation_is_at_fixed_draws_and_takes_other_pairs(tmp_path: Path) -> None:
    run = trainer(tmp_path, eval_dataset=pairs(4, seed=7), peft_config=moved_lora())
    first = run.evaluate()
    torch.manual_seed(3)
    assert run.evaluate() == first
    other = run.evaluate(pairs(3, seed=8), metric_key_prefix="test")
    assert other["test_loss"] != first["eval_loss"]
    with pytest.raises(ValueError, match="ignore_keys"):
        run.evaluate(ignore_keys=["x"])
    with pytest.raises(ValueError, match="no eval_dataset"):
        trainer(tmp_path).evaluate()


def test_smoothing_is_fitted_on_training_pairs_and_saved(tmp_path: Path, brightness: Any) -> None:
    run = trainer(tmp_path, "smpo", comparison="smoothed", eval_dataset=pairs(4, seed=7), max_steps=1)
    assert run._eval.normalizer == run._train.normalizer
    run.train()
    run.save_model()
    assert Normalizer.load(tmp_path / "smoothing.json") == run._train.normalizer
    strengths = run._train.dataset.compared.strength
    scores = torch.stack([brightness.score([row["chosen"], row["rejected"]], []) for row in pairs()]).double()
    n = run._train.normalizer(scores)
    torch.testing.assert_close(strengths.double(), 10 * torch.tanh((n[:, 0] - n[:, 1]).abs() / 2), rtol=1e-5, atol=1e-6)


def test_bradley_terry_reads_the_scorers_scale(tmp_path: Path, brightness: Any) -> None:
    run = trainer(tmp_path, "smpo", comparison="bradley_terry")
    scores = torch.stack([brightness.score([row["chosen"], row["rejected"]], []) for row in pairs()]).double()
    expected = 2 * torch.sigmoid(100 * (scores[:, 0] - scores[:, 1]).abs()) - 1
    torch.testing.assert_close(run._train.dataset.compared.strength.double(), expected, rtol=1e-5, atol=1e-6)


def test_the_schedule_of_the_user_stays(tmp_path: Path) -> None:
    pipe = pipeline()
    before = Schedule.from_scheduler(pipe.scheduler).fingerprint()
    trainer(tmp_path, pipe=pipe).train()
    assert Schedule.from_scheduler(pipe.scheduler).fingerprint() == before


def test_any_lora_target_trains(tmp_path: Path) -> None:
    run = trainer(tmp_path, peft_config=LoraConfig(r=2, target_modules="all-linear", use_dora=False), max_steps=1)
    run.train()
    assert history(run)[0] == pytest.approx(0.6931, abs=1e-4)
