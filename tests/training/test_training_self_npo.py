"""Self-NPO runs: who is asked what, rows that do not depend on their batch, exact resumes, and what is left in the pipeline."""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import ASKED, KINDS, NUM_FRAMES, tiny_pipeline
from torch import nn
from training.runs import batch, history, lora, losses, moved_lora, pairs, trainer

from mmalign import DiffusionDPOConfig, SelfNPOConfig, SelfNPOPipeline, SelfNPOTrainer
from mmalign.training.following import FollowingReference

PROMPTS = ["a red shirt", "a blue bag on white", "a green dress", "black sneaker on red background", "a dress"]


def options(folder: Path | str, **given: Any) -> dict[str, Any]:
    small = {
        "max_steps": 2,
        "per_device_train_batch_size": 2,
        "logging_steps": 1,
        "save_strategy": "no",
        "solver_steps": 2,
    }
    return small | {"output_dir": str(folder), "use_cpu": True, "disable_tqdm": True, "resolution": 16} | given


def self_npo(folder: Path | str, kind: str = "sd", *, data: Any = None, peft_config: Any = "lora", **given: Any) -> Any:
    """A trainer on PROMPTS."""
    return SelfNPOTrainer(
        model=SelfNPOPipeline.from_pipe(tiny_pipeline(kind)),
        args=SelfNPOConfig(**options(folder, **given)),
        train_dataset=PROMPTS if data is None else data,
        peft_config=lora() if peft_config == "lora" else peft_config,
    )


def rows_of(run: Any, items: Any = (0, 1), epoch: int = 0) -> Any:
    inputs = run.collate([run._train.dataset[item] for item in items])
    return run.row_losses(run.model, inputs, epoch=epoch, data=run._train).loss.detach()


def draw(pipe: Any, guidance: float = 3.0) -> np.ndarray:
    given: dict[str, Any] = {"num_inference_steps": 2, "output_type": "np", "height": 16, "width": 16}
    name = type(pipe).__name__
    given |= {"true_cfg_scale": guidance, "negative_prompt": ""} if "Flux" in name else {"guidance_scale": guidance}
    given |= ASKED["wan"] if "Wan" in name else {"num_frames": NUM_FRAMES} if "Cog" in name else {}
    pipe.set_progress_bar_config(disable=True)
    out = pipe("a red shirt", generator=torch.Generator().manual_seed(0), **given)
    return np.asarray(out.images if hasattr(out, "images") else out.frames)


@pytest.mark.parametrize("kind", KINDS)
def test_every_family_learns_a_negative_side_and_draws_with_it(kind: str, tmp_path: Path) -> None:
    pipe, plain = SelfNPOPipeline.from_pipe(tiny_pipeline(kind)), tiny_pipeline(kind)
    result = pipe.align(
        PROMPTS,
        peft_config=lora(),
        **options(tmp_path, learning_rate=0.05, target_guidance_scale=-4.0, **ASKED.get(kind, {})),
    )
    assert len([entry for entry in result.history if "loss" in entry]) == 2
    guided = draw(pipe)
    assert np.abs(guided - draw(plain)).max() > 1e-5
    if kind != "flux":
        assert np.array_equal(draw(pipe, 1.0), draw(plain, 1.0))
    # What the run left in its folder is the same side.
    other = SelfNPOPipeline.from_pipe(plain)
    other.load_negative(tmp_path)
    assert np.abs(draw(other) - guided).max() < 1e-6
    assert "A negative side of" in (tmp_path / "README.md").read_text()


@pytest.mark.parametrize("reference", ["frozen", "ema"])
def test_training_all_weights_leaves_the_base_where_it_was(reference: str, tmp_path: Path) -> None:
    pipe, plain = SelfNPOPipeline.from_pipe(tiny_pipeline("sd")), tiny_pipeline("sd")
    pipe.align(PROMPTS, peft_config=None, **options(tmp_path, learning_rate=0.01, target_model=reference))
    for name, value in plain.unet.state_dict().items():
        assert torch.equal(pipe.unet.state_dict()[name], value)
    guided = draw(pipe)
    assert np.array_equal(draw(pipe, 1.0), draw(plain, 1.0)) and np.abs(guided - draw(plain)).max() > 1e-5
    other = SelfNPOPipeline.from_pipe(plain)
    other.load_negative(tmp_path)
    assert np.array_equal(draw(other), guided)


@pytest.mark.parametrize(
    ("scale", "dropout", "teacher", "student"),
    [(1.0, 0.0, "prompts", "prompts"), (0.0, 0.0, "empty", "prompts"), (-4.0, 1.0, "both", "empty")],
)
def test_reference_and_student_are_told_what_they_should_be(
    scale: float, dropout: float, teacher: str, student: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = self_npo(tmp_path, target_guidance_scale=scale, prompt_dropout=dropout)
    told: dict[bool, set[str]] = {True: set(), False: set()}
    empty, predict = run._train.empty.prompt_embeds[0], run.denoiser.predict

    def watched(module: nn.Module, x: Any, t: Any, conditioning: Any) -> Any:
        kinds = {"empty" if torch.equal(row, empty) else "prompts" for row in conditioning.prompt_embeds}
        told[torch.is_grad_enabled()] |= kinds
        return predict(module, x, t, conditioning)

    run.model._predict = run.denoiser.predict = watched
    rows_of(run)
    assert told[False] == ({"empty", "prompts"} if teacher == "both" else {teacher}) and told[True] == {student}
    told[True].clear()
    # Evaluation keeps every prompt.
    rows_of(run, epoch=-1)
    assert told[True] == {"prompts"}


@pytest.mark.parametrize("source", ["noise", "images"])
def test_a_rows_loss_does_not_depend_on_its_batch_but_on_its_epoch(source: str, tmp_path: Path) -> None:
    run = self_npo(tmp_path, source=source, data=pairs() if source == "images" else None, peft_config=moved_lora())
    together = rows_of(run, (0, 1, 2, 3))
    torch.testing.assert_close(rows_of(run, (2,)), together[2:3], rtol=1e-4, atol=1e-6)
    assert not torch.allclose(rows_of(run, (2,), epoch=1), together[2:3], rtol=1e-3)
    torch.testing.assert_close(rows_of(run, (2,), epoch=-1), rows_of(run, (0, 2), epoch=-1)[1:], rtol=1e-4, atol=1e-6)


def test_paths_from_pictures_start_at_the_preferred_ones(tmp_path: Path) -> None:
    rows = pairs()
    run = self_npo(tmp_path / "one", source="images", data=rows)
    kept = rows_of(run)
    other = [{**row, "rejected": row["rejected"].transpose(0)} for row in rows]
    torch.testing.assert_close(rows_of(self_npo(tmp_path / "two", source="images", data=other)), kept)
    changed = [{**row, "chosen": row["chosen"].transpose(0)} for row in rows]
    assert not torch.allclose(rows_of(self_npo(tmp_path / "three", source="images", data=changed)), kept, rtol=1e-5)


@pytest.mark.parametrize(("full", "reference"), [(False, "ema"), (True, "ema"), (True, "frozen")])
def test_a_resumed_run_goes_on_exactly(full: bool, reference: str, tmp_path: Path) -> None:
    given = {
        "target_model": reference,
        "learning_rate": 0.02,
        "max_steps": 4,
        "save_strategy": "steps",
        "save_steps": 2,
    }
    given |= {"peft_config": None if full else "lora", "prompt_dropout": 0.5}
    whole = self_npo(tmp_path / "whole", **given)
    whole.train()
    assert len(set(history(whole))) == 4
    again = self_npo(tmp_path / "again", **given)
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert history(again)[-2:] == history(whole)[-2:]
    for one, two in zip(again.network.parameters(), whole.network.parameters(), strict=True):
        assert torch.equal(one, two)


def test_the_reference_follows_from_the_start_on() -> None:
    network = nn.Linear(2, 1, bias=False)
    with torch.no_grad():
        network.weight.fill_(1.0)
    follower = FollowingReference(network, 0.9)
    expected = 1.0
    for value in (2.0, 4.0, -3.0):
        with torch.no_grad():
            network.weight.fill_(value)
        follower.on_step_end(None, None, None)
        expected = 0.9 * expected + 0.1 * value
    with follower.in_place():
        torch.testing.assert_close(network.weight, torch.full((1, 2), expected))
    assert (network.weight == -3).all()
    network(torch.ones(1, 2)).sum().backward()
    assert network.weight.grad is not None


def test_the_targets_of_a_following_reference_move(tmp_path: Path) -> None:
    """After a step the student's loss differs between the two references, and not before."""
    frozen, ema = (self_npo(tmp_path / name, target_model=name, learning_rate=0.05) for name in ("frozen", "ema"))
    torch.testing.assert_close(rows_of(frozen), rows_of(ema))
    for run in (frozen, ema):
        run.train()
    assert history(frozen)[0] == history(ema)[0] and not torch.allclose(rows_of(frozen), rows_of(ema), rtol=1e-6)


def test_held_out_prompts_are_evaluated(tmp_path: Path) -> None:
    pipe = SelfNPOPipeline.from_pipe(tiny_pipeline("sd"))
    given = options(tmp_path, eval_strategy="steps", eval_steps=1)
    result = pipe.align(PROMPTS, eval_dataset=["a blue bag", "green"], peft_config=lora(), **given)
    told = [entry["eval_loss"] for entry in result.history if "eval_loss" in entry]
    assert len(told) == 2 and result.metrics["eval_loss"] == told[-1]


def test_what_has_no_effect_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="target_decay has no effect with target_model='frozen'"):
        SelfNPOConfig(**options(tmp_path, target_decay=0.9))
    with pytest.raises(ValueError, match="solver_steps must be at least 1"):
        SelfNPOConfig(**options(tmp_path, solver_steps=0))
    with pytest.raises(ValueError, match="source must be one of 'noise', 'images'"):
        SelfNPOConfig(**options(tmp_path, source="video"))
    with pytest.raises(ValueError, match="leave ref_model out"):
        SelfNPOTrainer(
            model=tiny_pipeline("sd"),
            args=SelfNPOConfig(**options(tmp_path)),
            train_dataset=PROMPTS,
            ref_model=tiny_pipeline("sd"),
        )
    pipe = SelfNPOPipeline.from_pipe(tiny_pipeline("sd"))
    pipe.align(PROMPTS, peft_config=lora(), **options(tmp_path / "run"))
    with pytest.raises(ValueError, match="has a negative side already"):
        pipe.align(PROMPTS, **options(tmp_path / "run2"))


@pytest.mark.parametrize(
    ("name", "scale", "reference"), [("sd15", 0, "ema"), ("sdxl", -4, "ema"), ("paper", 1, "frozen")]
)
def test_presets_hold_the_published_constants(name: str, scale: float, reference: str, tmp_path: Path) -> None:
    args = SelfNPOConfig.preset(name, output_dir=str(tmp_path), use_cpu=True, fp16=False)
    assert (args.target_guidance_scale, args.target_model) == (scale, reference)
    assert (args.solver_steps, args.grid_points, args.prompt_dropout) == (5, 25, 0)


# Diffusion-NPO.


def test_swapped_pairs_turn_one_loss_into_the_other(tmp_path: Path) -> None:
    """σ(m) + σ(−m) = 1 for every pair, at the same noise."""
    usual = losses(trainer(tmp_path / "dpo", peft_config=moved_lora(), beta=50.0))
    swapped = losses(trainer(tmp_path / "npo", peft_config=moved_lora(), beta=50.0, swap_pairs=True))
    assert not torch.allclose(usual, swapped, rtol=1e-2)
    torch.testing.assert_close(torch.exp(-usual) + torch.exp(-swapped), torch.ones(2))


def test_swapped_runs_are_other_runs(tmp_path: Path) -> None:
    """No checkpoint, no kept reference error and no sides are shared; prepared data are not swapped twice."""
    usual, swapped = (trainer(tmp_path, swap_pairs=swap) for swap in (False, True))
    assert usual._train.fingerprint != swapped._train.fingerprint and usual._train.points != swapped._train.points
    one, two = batch(usual), batch(swapped)
    assert torch.equal(one["chosen"], two["rejected"]) and torch.equal(one["size_rejected"], two["size_chosen"])
    again = trainer(tmp_path, data=copy.copy(swapped._train), swap_pairs=True)
    assert torch.equal(batch(again)["chosen"], two["chosen"])
    assert "on swapped pairs" in swapped.args.describe() and DiffusionDPOConfig.presets["npo-sd15"]["beta"] == 1000


def test_a_negative_side_by_swapped_pairs_is_loaded_as_any(tmp_path: Path) -> None:
    run = trainer(tmp_path, swap_pairs=True, learning_rate=0.05, peft_config=moved_lora())
    run.train()
    run.save_model()
    assert "A negative side of" in (tmp_path / "README.md").read_text()
    pipe = SelfNPOPipeline.from_pipe(tiny_pipeline("sd"))
    base = draw(pipe)
    pipe.load_negative(tmp_path)
    assert np.abs(draw(pipe) - base).max() > 1e-3
