"""The health panel counts right, and each named warning comes of its own history and of no other."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from training.runs import batch, history, moved_lora, pairs, trainer

from mmalign.training import health

HEALTHY = {
    "rewards/accuracies": 0.6,
    "excess/chosen": -0.001,
    "excess/rejected": 0.002,
    "excess/chosen_relative": -0.01,
    "z/saturated": 0.1,
    "z/mean_square": 0.3,
    "target/path_mismatch": 1e-6,
    "learning_rate": 1e-5,
}


def entries(number: int = 5, **series: Any) -> list[dict[str, float]]:
    """A history; a list is a value a step."""
    return [HEALTHY | {k: v[i] if isinstance(v, list) else v for k, v in series.items()} for i in range(number)]


CRAFTED: dict[str, dict[str, Any]] = {
    "both-worse": {"excess/chosen": [0.01, 0.012, 0.014, 0.016, 0.018], "excess/rejected": 0.05},
    "winner-lost": {"excess/chosen_relative": 0.25},
    "saturated": {"z/saturated": 0.6},
    "landing": {"target/path_mismatch": 0.02},
    "no-signal": {"z/mean_square": 1e-8},
}


@pytest.mark.parametrize("name", CRAFTED)
def test_a_crafted_history_triggers_its_warning_and_no_other(name: str) -> None:
    found = health.findings(entries(**{key.replace("__", "/"): value for key, value in CRAFTED[name].items()}))
    assert [finding.name for finding in found] == [name]
    assert len(found[0].message) > 20


@pytest.mark.parametrize(
    "series",
    [
        {},
        # Noise around zero, worse but falling, worse for the winner alone, worse while accuracy is poor.
        {"excess/chosen": [0.01, -0.01, 0.012, -0.02, 0.02], "excess/rejected": 0.05},
        {"excess/chosen": [0.018, 0.016, 0.014, 0.012, 0.01], "excess/rejected": 0.05},
        {"excess/chosen": [0.01, 0.012, 0.014, 0.016, 0.018], "excess/rejected": 0.0},
        {"excess/chosen": [0.01, 0.012, 0.014, 0.016, 0.018], "excess/rejected": 0.05, "rewards/accuracies": 0.4},
        # A learning rate that still rises from zero.
        {"z/mean_square": 1e-8, "learning_rate": [1e-7, 2e-7, 3e-7, 4e-7, 5e-7]},
        {"z/saturated": [1.0, 0.0, 0.0, 0.0, 0.0]},
    ],
    ids=["healthy", "noise", "falling", "winner-alone", "inaccurate", "warm-up", "one-step"],
)
def test_other_histories_trigger_nothing(series: dict[str, Any]) -> None:
    assert health.findings(entries(**series)) == []


def test_a_window_is_needed_and_evaluations_do_not_count() -> None:
    assert health.findings(entries(4, **{"z/saturated": 1.0})) == []
    evaluated = [{f"eval_{name}": value for name, value in entry.items()} for entry in entries(**{"z/saturated": 1.0})]
    assert health.findings(entries(4, **{"z/saturated": 1.0}) + evaluated) == []


def test_a_warning_is_said_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = trainer(tmp_path, beta=1e-4, max_steps=7)
    with caplog.at_level("WARNING", "mmalign"):
        run.train()
    said = [record.getMessage() for record in caplog.records if "no-signal" in record.getMessage()]
    assert len(said) == 1 and said[0].startswith("step 5, no-signal: policy and reference still agree")


def test_the_panel_is_what_it_says(tmp_path: Path) -> None:
    run = trainer(tmp_path, dtype=torch.float64, peft_config=moved_lora(), beta=300.0)
    loss, measured, pairs_ = run.pair_losses(run.model, batch(run, range(6)), epoch=0)
    told = health.panel(measured, pairs_, loss, beta=300.0, schedule=run._schedule)
    means = {name: total / weight for name, (total, weight) in told.items()}
    m, r = measured.policy_error.detach().chunk(2), measured.reference_error.chunk(2)
    gap = (m[0] - r[0]) - (m[1] - r[1])
    expected = {
        "loss": loss.mean(),
        "loss_minus_ln2": loss.mean() - math.log(2),
        "errors/chosen": m[0].mean(),
        "errors/rejected": m[1].mean(),
        "logps/chosen": -0.5 * m[0].mean(),
        "excess/chosen": (m[0] - r[0]).mean(),
        "excess/rejected": (m[1] - r[1]).mean(),
        "excess/chosen_relative": ((m[0] - r[0]) / r[0]).mean(),
        "rewards/chosen": -150 * (m[0] - r[0]).mean(),
        "rewards/margins": -150 * gap.mean(),
        "rewards/accuracies": (gap < 0).double().mean(),
        "implicit_acc": (gap < 0).double().mean(),
        "z/mean_square": (150 * gap).square().mean(),
        "z/saturated": ((150 * gap).abs() > 4).double().mean(),
        "strength/mean_abs": 1.0,
    }
    for name, value in expected.items():
        assert means[name] == pytest.approx(float(torch.as_tensor(value).detach()), rel=1e-9), name
    assert means["target/path_mismatch"] < 1e-12

    quarter = measured.point.timestep[:6] * 4 // 1000
    for k in range(4):
        name, inside = f"accuracy_by_time/{k + 1}_of_4", quarter == k
        assert (name in told) == bool(inside.any())
        if inside.any():
            assert means[name] == pytest.approx(float((gap < 0)[inside].double().mean()))
            assert told[name][1] == inside.sum()
            rms = measured.point.target.square().mean((1, 2, 3)).sqrt().view(2, 6)[:, inside].mean()
            assert means[f"target/rms_by_time/{k + 1}_of_4"] == pytest.approx(float(rms), rel=1e-6)


def test_ties_count_half(tmp_path: Path) -> None:
    run = trainer(tmp_path, max_steps=1)
    run.train()
    assert history(run, "rewards/accuracies") == [0.5] and history(run, "implicit_acc") == [0.5]


def test_the_official_landing_shows_in_the_panel(tmp_path: Path) -> None:
    exact, official = (
        trainer(tmp_path, "inpo", max_steps=1, inversion_eta=0.0, inversion_compat=compat)
        for compat in (None, "official-0.20")
    )
    exact.train()
    official.train()
    assert history(exact, "target/path_mismatch")[0] < 1e-5
    # τ is defined by x_t there, so the identity holds; what it says about the noise does not.
    assert history(official, "target/rms")[0] != pytest.approx(history(exact, "target/rms")[0], rel=1e-3)


def test_sums_over_steps_weigh_pairs_alike(tmp_path: Path) -> None:
    options: dict[str, Any] = {"dataloader_drop_last": False, "per_device_train_batch_size": 4, "learning_rate": 0.0}
    run = trainer(tmp_path, data=pairs(6), max_steps=2, logging_steps=2, peft_config=moved_lora(), **options)
    seen: list[float] = []
    plain = run.pair_losses

    def pair_losses(*args: Any, **kwargs: Any) -> Any:
        answer = plain(*args, **kwargs)
        seen.extend(answer[1].policy_error[: len(answer[0])].tolist())
        return answer

    run.pair_losses = pair_losses
    run.train()
    assert len(seen) == 6
    assert history(run, "errors/chosen")[0] == pytest.approx(sum(seen) / 6, rel=1e-6)
