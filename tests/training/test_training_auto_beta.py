"""beta='auto': the saturation it aims at, how β moves there and stays, and that a run with it resumes and is shared like any other."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from training import worker
from training.runs import batch, config, history, lora, moved_lora, pairs, trainer

from mmalign import losses
from mmalign.training.auto_beta import LARGEST_FACTOR, slope_of

GAP = torch.linspace(-3, 5, 400, dtype=torch.float64) * 1e-4
SINGLE = [key for key in losses.names() if not losses.get(key).unpaired and "denoiser" in losses.get(key).modalities]
REFUSED = {
    **dict.fromkeys(("simpo", "cpo", "mapo"), "measures log-ratios to a reference"),
    **dict.fromkeys(("aot", "aot_unpaired"), "sorts its batch"),
    "sft": "beta has no effect",
    "discopop": "needs a loss that falls at policy = reference",
}
AUTO: dict[str, Any] = {"beta": "auto", "learning_rate": 1e-3}


def slope(**options: Any) -> Any:
    args = config("dpo", "unused", beta="auto", **options)
    return slope_of(args, args.beta_saturation)


# What is aimed at.


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, lambda z: torch.tanh(z / 2)),
        # What has no β does not count, nor does a weight.
        ({"loss_type": ["sigmoid", "sft"], "loss_weights": [3.0, 0.5]}, lambda z: torch.tanh(z / 2)),
        ({"loss_type": "sdpo", "sdpo_mu": 0.9}, lambda z: torch.tanh(z / 2)),
        ({"loss_type": "hinge"}, lambda z: (z > 1).double()),
        ({"loss_type": "ipo"}, lambda z: (2 * z).clamp(max=1)),
        # −(1 − ε)σ(−z) − εσ(z), over its value at 0.
        ({"loss_type": "robust", "label_smoothing": 0.1}, lambda z: 0.8 * torch.tanh(z / 2)),
    ],
    ids=["logistic", "sum", "sdpo", "hinge", "ipo", "robust"],
)
@pytest.mark.parametrize("beta", [300.0, 5000.0])
def test_saturation_has_its_closed_form(options: dict[str, Any], expected: Any, beta: float) -> None:
    told = slope(**options).saturation(GAP, beta)
    assert told == pytest.approx(float(expected(beta * GAP.abs()).mean()), abs=1e-9)


@pytest.mark.parametrize("key", SINGLE)
def test_every_pair_loss_reaches_its_saturation_or_says_why_not(key: str) -> None:
    options: dict[str, Any] = {"loss_type": key} | ({"sdpo_mu": 0.9} if key == "sdpo" else {})
    if key in REFUSED:
        with pytest.raises(ValueError, match=REFUSED[key]):
            slope(**options)
        return
    found = slope(**options)
    beta = found.solve(GAP, 0.2, 1e-3, 1e9)
    # A link with a corner jumps by a pair.
    assert found.saturation(GAP, beta) == pytest.approx(0.2, abs=2 / len(GAP))


@settings(max_examples=10, deadline=None)
@given(st.sampled_from(["sigmoid", "hinge", "ipo", "exo_pair", "cdpo"]), st.floats(0.05, 0.9), st.floats(1e-6, 1e3))
def test_beta_scales_with_the_log_ratios_and_grows_with_the_saturation(key: str, target: float, scale: float) -> None:
    found = slope(loss_type=key)
    gap = GAP / GAP.abs().max() * scale
    beta = found.solve(gap, target, 1e-9, 1e12)
    assert found.solve(7 * gap, target, 1e-9, 1e12) == pytest.approx(beta / 7, rel=1e-5)
    assert found.saturation(gap, beta / 2) <= found.saturation(gap, beta) <= found.saturation(gap, 2 * beta)
    assert found.solve(gap, target, beta * 2, beta * 3) == beta * 2
    assert found.solve(gap, target, beta / 3, beta / 2) == beta / 2


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("dpo", {"beta": "car"}, "beta must be a number or 'auto', got 'car'"),
        ("dpo", {"beta_saturation": 0.3}, "beta_saturation has no effect with a fixed beta"),
        ("dpo", {"beta_calibration_steps": 9}, "beta_calibration_steps has no effect with a fixed beta"),
        ("dpo", {"beta": "auto", "beta_calibration_steps": 0}, "beta_calibration_steps must be at least 1"),
        ("dpo", {"beta": "auto", "beta_saturation": 1.0}, "beta_saturation must lie between 0 and 1"),
        ("dpo", {"beta": "auto", "loss_type": "robust", "label_smoothing": 0.45}, "saturation 0.1 at most"),
        ("sft", {"beta": "auto"}, "beta has no effect on supervised fine-tuning"),
        ("sft", {"beta_saturation": 0.3}, "beta_saturation has no effect on supervised fine-tuning"),
    ],
)
def test_what_has_no_effect_or_sense_is_refused(
    method: str, options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        config(method, tmp_path, **options)


def test_a_run_that_ends_before_beta_is_held_is_refused(tmp_path: Path) -> None:
    run = trainer(tmp_path, max_steps=6, warmup_steps=2, beta_calibration_steps=4, **AUTO)
    with pytest.raises(ValueError, match="held from step 6 on .* and the run has 6: lower beta_calibration_steps"):
        run.train()


# How β moves.


def gaps_seen(run: Any) -> list[torch.Tensor]:
    """strength · (ρ_w − ρ_l) of every training batch from now on."""
    seen: list[torch.Tensor] = []
    plain = run.pair_losses

    def pair_losses(*args: Any, **kwargs: Any) -> Any:
        answer = plain(*args, **kwargs)
        seen.append((answer[2].strength * answer[1].logps.margin).detach().double())
        return answer

    run.pair_losses = pair_losses
    return seen


def test_beta_waits_for_the_warm_up_moves_step_by_step_and_is_held(tmp_path: Path) -> None:
    run = trainer(tmp_path, max_steps=36, warmup_steps=3, beta_calibration_steps=30, **AUTO)
    seen = gaps_seen(run)
    run.train()
    betas = history(run, "beta")
    assert betas[:3] == [5000.0] * 3 and len(set(betas[32:])) == 1 and betas[32] == run.beta != 5000.0
    factors = [after / before for before, after in zip(betas, betas[1:], strict=False)]
    assert max(max(factors), 1 / min(factors)) == pytest.approx(LARGEST_FACTOR, rel=1e-9)
    # The last 20 of the 33 steps: what the definition says, by another road.
    window = torch.cat(seen[13:33]).abs()
    assert float(torch.tanh(run.beta * window / 2).mean()) == pytest.approx(0.2, abs=1e-6)
    # The margins that are logged are those of the β that was in force.
    assert history(run, "rewards/margins")[35] == pytest.approx(run.beta * float(seen[35].mean()), rel=1e-5)


def test_another_saturation_gives_another_beta(tmp_path: Path) -> None:
    def found(saturation: float) -> float:
        run = trainer(tmp_path, max_steps=4, beta_calibration_steps=3, beta_saturation=saturation, **AUTO)
        run.train()
        return float(run.beta)

    assert found(0.02) < found(0.9)


def test_nothing_moves_beta_while_policy_and_reference_agree(tmp_path: Path) -> None:
    run = trainer(tmp_path, max_steps=4, beta_calibration_steps=3, **AUTO | {"learning_rate": 0.0})
    run.train()
    assert history(run, "beta") == [5000.0] * 4


def test_a_beta_that_did_not_arrive_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = trainer(tmp_path, max_steps=4, beta_calibration_steps=3, beta_saturation=1e-6, **AUTO)
    with caplog.at_level("INFO", "mmalign"):
        run.train()
    assert "beta was still moving when it was held" in caplog.text and "beta is held at" in caplog.text


def test_a_smoothed_strength_counts(tmp_path: Path, brightness: Any) -> None:
    run = trainer(tmp_path, "smpo", comparison="smoothed", latents="forward", peft_config=moved_lora(), beta="auto")
    seen = gaps_seen(run)
    inputs = batch(run, range(4))
    run.compute_loss(run.model, inputs)
    assert run._auto_beta._step == pytest.approx(seen[0].abs().tolist(), rel=1e-6)
    assert len({round(strength, 6) for strength in inputs["strength"].tolist()}) > 1


# Kept and shared.


def test_a_resumed_run_repeats_losses_and_betas(tmp_path: Path) -> None:
    options: dict[str, Any] = AUTO | {"max_steps": 8, "warmup_steps": 1, "beta_calibration_steps": 6}
    options |= {"save_strategy": "steps", "save_steps": 3, "peft_config": lora(lora_dropout=0.2)}
    whole = trainer(tmp_path, **options)
    whole.train()
    (tmp_path / "checkpoint-8").rename(tmp_path / "gone-8")
    for last in (6, 3):
        run = trainer(tmp_path, **options)
        run.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{last}"))
        assert history(run) == pytest.approx(history(whole), abs=1e-6)
        assert history(run, "beta") == pytest.approx(history(whole, "beta"), rel=1e-6)
        assert run.beta == pytest.approx(whole.beta, rel=1e-6)
    manifest = json.loads((tmp_path / "checkpoint-3" / "manifest.json").read_text())
    assert "auto_beta.json" in manifest["files"] and manifest["facts"]["beta"] == "auto"
    with pytest.raises(ValueError, match="another beta_saturation"):
        other = trainer(tmp_path, **options, beta_saturation=0.4)
        other.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))


def test_two_processes_move_beta_as_one(tmp_path: Path) -> None:
    options: dict[str, Any] = AUTO | {"max_steps": 4, "beta_calibration_steps": 3, "data": pairs(8)}
    options |= {"dtype": torch.float64, "peft_config": moved_lora()}
    ranks = worker.together(2, tmp_path / "two", options)
    alone = trainer(tmp_path / "one", gradient_accumulation_steps=2, **options)
    alone.train()
    betas = [entry["beta"] for entry in ranks[0]["history"] if "beta" in entry]
    assert betas == pytest.approx(history(alone, "beta"), rel=1e-6) and len(set(betas)) > 1


def test_card_and_history_tell_the_beta_that_was_found(tmp_path: Path) -> None:
    run = trainer(tmp_path, max_steps=5, beta_calibration_steps=4, **AUTO)
    assert "beta then moves to a saturation of 0.2 and is held 4 steps after the warm-up" in run.args.describe()
    run.train()
    run.save_model()
    card = (tmp_path / "README.md").read_text()
    settings_ = json.loads(card.split("```json")[1].split("```")[0])
    assert settings_["beta"] == pytest.approx(run.beta, abs=1e-6) and not math.isclose(run.beta, 5000.0)
    assert json.loads((tmp_path / "history.json").read_text())[-2]["beta"] == run.beta
    assert json.loads((tmp_path / "auto_beta.json").read_text())["beta"] == run.beta


def test_a_fixed_beta_leaves_no_trace(tmp_path: Path) -> None:
    run = trainer(tmp_path)
    run.train()
    run.save_model()
    assert run.beta == 5000.0 and "beta" not in run.state.log_history[0]
    assert not (tmp_path / "auto_beta.json").exists()
