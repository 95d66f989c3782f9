"""Estimates, sample pictures, the card, what is printed, devices, and what happens when something is wrong."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import LoraConfig
from PIL import Image
from tiny import tiny_pipeline
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from training.runs import batch, config, history, lora, losses, moved_lora, pairs, pipeline, trainer

from mmalign.denoisers import Schedule, adapter_for
from mmalign.likelihood.config import InversionConfig
from mmalign.likelihood.reference import make_reference
from mmalign.training import health
from mmalign.training.card import public_name
from mmalign.training.devices import evaluating, networks, on_device, storable
from mmalign.training.estimate import duration, forward_equivalents, memory_of
from mmalign.training.measurement import Method, Pairs, draw, measure
from mmalign.training.progress import line
from mmalign.training.weights import load_trained, save_trained

# Estimates.


def test_memory_counts_weights_gradients_state_and_copy() -> None:
    network = nn.Sequential(nn.Linear(10, 10, bias=False), nn.Linear(10, 10, bias=False))
    network[0].requires_grad_(False)
    memory = memory_of(network, None, "adamw_torch")
    assert (memory.weights, memory.gradients, memory.optimizer, memory.reference) == (800, 400, 800, 0)
    assert memory_of(network, network, "adamw_bnb_8bit").total == 800 + 400 + 200 + 800
    assert memory_of(network, None, "adafactor").optimizer == 0
    assert "activations" in str(memory) and "reference" not in str(memory)


def test_forward_equivalents_are_those_of_the_published_costs() -> None:
    schedule = adapter_for(tiny_pipeline("sd")).schedule
    assert forward_equivalents(schedule, None, has_reference=True) == 4
    assert forward_equivalents(schedule, None, has_reference=False, recomputes=True) == 4
    ddim = forward_equivalents(schedule, InversionConfig(num_steps=10), has_reference=True)
    renoise = forward_equivalents(schedule, InversionConfig(num_steps=10, renoise_steps=1), has_reference=True)
    # The exact grid makes ⌈10(t+1)/1000⌉ moves, 5.5 on average; the published grids 6.38.
    assert ddim == pytest.approx(4 + 5.5) and renoise == pytest.approx(4 + 11)
    official = InversionConfig(num_steps=10, compat="official-0.20")
    assert forward_equivalents(schedule, official, has_reference=True) == pytest.approx(10.38, abs=0.01)
    assert forward_equivalents(schedule, InversionConfig(num_steps=10, solver="heun"), has_reference=True) == renoise


def test_the_estimate_and_the_settings_are_told_before_the_first_step(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "mmalign"):
        run = trainer(tmp_path, "smpo", disable_tqdm=False, max_steps=1)
        run.train()
    weights = sum(p.numel() * p.element_size() for p in run.network.parameters())
    told = [record.getMessage() for record in caplog.records]
    settings = next(i for i, text in enumerate(told) if text.startswith("smpo: latents=renoise"))
    estimate = next(i for i, text in enumerate(told) if text.startswith("memory: at least"))
    end = next(i for i, text in enumerate(told) if text.startswith("trained in"))
    assert settings < estimate < end
    assert "for errors summed over 256 elements" in told[settings]
    assert f"weights {weights / 1024:.0f} KiB" in told[estimate] and "for 1 steps of" in told[estimate] and "forward passes a batch" in told[estimate]
    assert "step 1/1  loss 0.6931" in told[end]


def test_without_a_bar_nothing_is_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    run = trainer(tmp_path, max_steps=1)
    monkeypatch.setattr(run, "one_forward", lambda: pytest.fail("timed"))
    with caplog.at_level(logging.INFO, "mmalign"):
        run.train()
    assert any(record.getMessage().startswith("step 1/1  loss") for record in caplog.records)


def test_timing_changes_no_loss(tmp_path: Path) -> None:
    runs = [trainer(tmp_path, disable_tqdm=quiet, peft_config=lora(lora_dropout=0.3)) for quiet in (True, False)]
    for run in runs:
        run.train()
    assert history(runs[0]) == history(runs[1])


def test_durations_and_lines_read_well() -> None:
    assert [duration(s) for s in (4, 89, 600, 5400, 36000)] == ["4 s", "89 s", "10 min", "1.5 h", "10.0 h"]
    logs = {"loss": 0.69, "rewards/accuracies": 0.5, "grad_norm": 1.25, "learning_rate": 1e-5, "errors/chosen": 3.0}
    assert line(logs, 3, 20) == "step 3/20  loss 0.6900  accuracy 0.50  gradient 1.2  lr 1e-05"
    assert line({"eval_loss": 0.5}, 3, 20) == "evaluation at step 3/20  loss 0.5000"


# Sample pictures.


def test_sample_pictures_are_drawn_and_change_nothing_else(tmp_path: Path) -> None:
    options = {"max_steps": 3, "learning_rate": 1e-2, "peft_config": lora(lora_dropout=0.3)}
    plain = trainer(tmp_path / "plain", **options)
    plain.train()
    prompts = ["a red shirt", "حذاء أحمر"]
    run = trainer(
        tmp_path / "drawn", validation_steps=2, validation_prompts=prompts, validation_inference_steps=2, **options
    )
    run.train()
    assert history(run) == history(plain)
    found = sorted((tmp_path / "drawn" / "samples").iterdir())
    assert [path.name for path in found] == ["step-000000.png", "step-000002.png"]
    first, later = (Image.open(path) for path in found)
    # One column before training, two afterwards, a row a prompt; small pictures are enlarged.
    assert (first.width, later.width) == (8 + 136, 8 + 2 * 136) and first.height == later.height > 2 * 128


# The card.


def card(folder: Path) -> tuple[dict[str, Any], str]:
    _, header, text = (folder / "README.md").read_text().split("---\n", 2)
    return yaml.safe_load(header), text


def test_the_card_says_what_was_done_without_machine_paths(tmp_path: Path) -> None:
    tiny_pipeline("sd").save_pretrained(tmp_path / "my-base")
    run = trainer(tmp_path / "run", "inpo", pipe=str(tmp_path / "my-base"), eval_dataset=pairs(3, seed=4))
    run.train()
    run.evaluate()
    run.save_model()
    header, text = card(tmp_path / "run")
    assert header["library_name"] == "diffusers" and header["pipeline_tag"] == "text-to-image"
    assert {"mmalign", "inpo", "lora", "diffusers-training"} <= set(header["tags"])
    # A local folder and rows in memory are no names on the Hub.
    assert "base_model" not in header and "datasets" not in header
    for part in ("# my-base aligned by DDIM-InPO", "hf.co/papers/2503.18454", "on `list`", '"eval_loss"', '"beta": 2000.0', "load_lora"):
        assert part in text
    assert str(tmp_path) not in (tmp_path / "run" / "README.md").read_text()
    logged = json.loads((tmp_path / "run" / "history.json").read_text())
    assert logged == run.state.log_history


def test_the_card_names_what_the_hub_knows(tmp_path: Path) -> None:
    run = trainer(tmp_path, peft_config=None, max_steps=1)
    run.pipe.register_to_config(_name_or_path="someone/base")
    object.__setattr__(run._train, "name", "someone/pairs")
    run.save_model()
    header, text = card(tmp_path)
    assert (header["base_model"], header["base_model_relation"]) == ("someone/base", "finetune")
    assert header["datasets"] == ["someone/pairs"] and "lora" not in header["tags"]
    assert "UNet2DConditionModel.from_pretrained(FOLDER, subfolder='unet')" in text
    assert [public_name(name) for name in ("/home/me/x", None, "a/b", "C:\\me")] == ["x", "unknown", "a/b", "C:\\me"]


def test_an_sft_card_speaks_of_no_pair_loss(tmp_path: Path) -> None:
    run = trainer(tmp_path, "sft", max_steps=1)
    run.train()
    run.save_model()
    text = card(tmp_path)[1]
    assert "denoising error" in text and "beta" not in text and "sigmoid" not in text


# Weights.


def test_weights_come_back_exactly_also_from_several_files(tmp_path: Path) -> None:
    for peft_config in (moved_lora(), None):
        run = trainer(tmp_path, peft_config=peft_config)
        folder = tmp_path / str(peft_config is None)
        save_trained(run.pipe, run.network, folder)
        before = {name: p.detach().clone() for name, p in run.network.named_parameters()}
        with torch.no_grad():
            for parameter in run.network.parameters():
                parameter.add_(1.0) if parameter.requires_grad else None
        load_trained(run.network, folder)
        assert all(torch.equal(p, before[name]) for name, p in run.network.named_parameters())
    run.network.save_pretrained(tmp_path / "sharded" / "unet", max_shard_size="100KB")
    assert len(list((tmp_path / "sharded" / "unet").glob("*.safetensors"))) > 1
    with torch.no_grad():
        run.network.conv_in.weight.zero_()
    load_trained(run.network, tmp_path / "sharded")
    assert torch.equal(run.network.conv_in.weight, before["conv_in.weight"])


def test_a_lora_is_float32_over_a_half_base_and_float64_over_a_double_one(tmp_path: Path) -> None:
    for dtype, expected in ((torch.bfloat16, torch.float32), (torch.float64, torch.float64)):
        run = trainer(tmp_path, dtype=dtype, max_steps=1)
        assert {p.dtype for p in run.network.parameters() if p.requires_grad} == {expected}
        run.train()
        assert history(run)[0] == pytest.approx(0.6931, abs=1e-3)


def test_bf16_gradients_are_those_of_float32_and_the_start_is_ln2(tmp_path: Path) -> None:
    grads = []
    for bf16 in (False, True):
        run = trainer(tmp_path, bf16=bf16)
        loss = losses(run, range(4))
        assert loss.dtype == torch.float32 and (loss - 0.693147).abs().max() < 1e-5
        loss.mean().backward()
        grads.append(torch.cat([p.grad.flatten() for n, p in run.network.named_parameters() if "lora_B" in n]))
    assert torch.cosine_similarity(*grads, dim=0) > 0.98


@pytest.mark.parametrize(
    ("peft_config", "message"),
    [
        ("adapter", "peft_config must be a peft.LoraConfig, got str"),
        (lora(bias="all"), "peft_config.bias is refused"),
        (lora(modules_to_save=["conv_in"]), "peft_config.modules_to_save is refused"),
    ],
)
def test_adapters_that_no_lora_file_can_hold_are_refused(peft_config: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, peft_config=peft_config)


# Devices.


def test_parts_go_to_a_device_and_back() -> None:
    parts = [nn.Linear(2, 2), nn.Linear(2, 2)]
    with pytest.raises(KeyError), on_device(parts, torch.device("cpu")):
        raise KeyError
    parts[0].train()
    parts[1].eval()
    with evaluating(parts):
        assert not any(part.training for part in parts)
    assert [part.training for part in parts] == [True, False]


class Doubles(TorchDispatchMode):
    """Finds float64 tensors on a device that has none."""

    def __init__(self, device: str) -> None:
        super().__init__()
        self.device, self.found = device, []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        outputs = result if isinstance(result, (tuple, list)) else [result]
        for output in outputs:
            if isinstance(output, torch.Tensor) and output.dtype == torch.float64 and output.device.type == self.device:
                self.found.append(str(func))
        return result


@pytest.mark.parametrize("kind", ["sd", "sd-v"])
@pytest.mark.parametrize("inversion", [None, InversionConfig(num_steps=2, renoise_steps=1)], ids=["forward", "renoise"])
def test_a_step_needs_no_float64_on_a_device_that_has_none(kind: str, inversion: Any) -> None:
    """The device "meta" stands in for MPS: shapes and dtypes are real there, values are not."""
    pipe = tiny_pipeline(kind)
    denoiser = adapter_for(pipe)
    reference = make_reference(denoiser.module, kind="copy")
    exact = denoiser.schedule
    denoiser.schedule = storable(exact, torch.device("mps"))
    assert denoiser.schedule.signal.dtype == torch.float32 and storable(exact, torch.device("cpu")) is exact
    torch.testing.assert_close(denoiser.schedule.noise.double(), exact.noise, rtol=1e-7, atol=0)
    denoiser.module.to("meta")
    reference.module.to("meta")
    text = denoiser.encode_prompt(["a red shirt"] * 4).to("meta")
    pairs_ = Pairs(torch.zeros(4, 4, 8, 8, device="meta"), text, [3, 8], torch.ones(2, device="meta"))
    drawn = draw([3, 8], seed=0, epoch=0, max_timestep=999, share_noise=True, share_eta_noise=False)

    def policy(x: torch.Tensor, t: torch.Tensor, conditioning: Any) -> torch.Tensor:
        return denoiser.predict(denoiser.module, x, t, conditioning)

    with Doubles("meta") as doubles:
        schedule = denoiser.schedule.to("meta")
        method = Method(inversion=inversion)
        measured = measure(denoiser, policy, denoiser.module, reference, pairs_, drawn, method, schedule=schedule)
        measured.policy_error.sum().backward()
    assert measured.policy_error.shape == (4,) and measured.policy_error.device.type == "meta"
    assert doubles.found == []


def test_a_float32_schedule_changes_losses_by_rounding_only(tmp_path: Path) -> None:
    for method in ("dpo", "smpo"):
        run = trainer(tmp_path, method, peft_config=moved_lora())
        _, exact, _ = run.pair_losses(run.model, batch(run), epoch=0)
        run.denoiser.schedule = run._schedule = storable(run.denoiser.schedule, torch.device("mps"))
        _, rounded, pairs_ = run.pair_losses(run.model, batch(run), epoch=0)
        torch.testing.assert_close(rounded.policy_error, exact.policy_error, rtol=1e-4, atol=1e-7)
        panel = health.panel(rounded, pairs_, torch.zeros(2), beta=1.0, schedule=run._schedule)
        assert panel["loss"] == (0.0, 2.0)


def test_the_network_goes_home_and_the_pipeline_is_ready_to_draw(tmp_path: Path) -> None:
    pipe = pipeline()
    run = trainer(tmp_path, pipe=pipe, learning_rate=1e-2, gradient_checkpointing=True)
    run.train()
    assert not any(module.training for module in pipe.unet.modules())
    assert not pipe.unet.is_gradient_checkpointing
    assert {next(part.parameters()).device.type for part in networks(pipe).values()} == {"cpu"}
    draws = [
        target("a red shirt", num_inference_steps=2, generator=torch.Generator().manual_seed(0), output_type="np").images
        for target in (pipe, tiny_pipeline("sd"))
    ]
    assert abs(draws[0] - draws[1]).max() > 1e-3


def test_the_network_is_ready_after_a_failure_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = trainer(tmp_path)
    monkeypatch.setattr(run, "_record", lambda *a, **k: (_ for _ in ()).throw(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        run.train()
    assert not run.network.training


def test_hooks_that_move_weights_are_refused(tmp_path: Path) -> None:
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module

    pipe = pipeline()
    add_hook_to_module(pipe.text_encoder, AlignDevicesHook(execution_device="cpu"))
    with pytest.raises(ValueError, match=r"text_encoder has offloading or casting hooks.*remove_all_hooks"):
        trainer(tmp_path, pipe=pipe)


def test_sharding_launchers_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mmalign.training.saving import SavingTrainer

    plain = SavingTrainer.create_accelerator_and_postprocess

    def sharded(self: Any) -> None:
        plain(self)
        self.is_fsdp_enabled = True

    monkeypatch.setattr(SavingTrainer, "create_accelerator_and_postprocess", sharded)
    pipe = pipeline()
    with pytest.raises(ValueError, match="DeepSpeed or FSDP, which are not supported yet"):
        trainer(tmp_path, pipe=pipe)
    assert not hasattr(pipe.unet, "peft_config") or not pipe.unet.peft_config


# What can be wrong.


def test_a_loss_that_is_not_finite_stops_the_run_and_names_rows(tmp_path: Path) -> None:
    run = trainer(tmp_path)
    plain = run.pair_losses

    def broken(model: Any, inputs: Any, **kwargs: Any) -> Any:
        loss, measured, pairs_ = plain(model, inputs, **kwargs)
        bad = torch.tensor([row == 4 for row in inputs["row"]])
        return torch.where(bad, torch.nan, loss), measured, pairs_

    run.pair_losses = broken
    with pytest.raises(FloatingPointError, match=r"not finite at step \d for rows \[4\]: lower the learning rate or beta"):
        run.args.max_steps = 3
        run.train()


def test_nan_latents_are_one_line_with_the_remedy(tmp_path: Path) -> None:
    pipe = pipeline()
    with torch.no_grad():
        pipe.vae.encoder.conv_in.weight.fill_(torch.nan)
    with pytest.raises(ValueError, match="NaN or infinite latents.*Run it in float32") as caught:
        trainer(tmp_path, pipe=pipe, cache_dir=str(tmp_path / "cache"))
    assert "\n" not in str(caught.value)


def test_a_corrupt_picture_drops_its_whole_row_and_training_goes_on(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
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
    for options in ({"data": []}, {"data": "no/such/folder/here"}, {"report_to": "no-such-logger"}, {"reference": "adapter", "peft_config": None}):
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
        options["ref_model"] = tiny_pipeline("sd", 1).unet.to(torch.float16 if options["ref_model"] == "half" else torch.float32)
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
    from mmalign import DiffusionDPOTrainer

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
    from mmalign.data import Normalizer

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
