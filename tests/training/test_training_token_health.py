"""The panel of models that answer counts right, and each named warning comes of its own history and of no other."""

from typing import Any

import pytest
import torch

from mmalign.likelihood.answers import AnswerScores
from mmalign.training.token_health import token_findings, token_panel
from mmalign.training.token_measurement import AnswerMeasurement

HEALTHY = {
    "rewards/chosen": 0.1,
    "rewards/margins": 0.3,
    "rewards/accuracies": 0.7,
    "rewards/saturated": 0.1,
    "learning_rate": 1e-5,
}
FALLING, RISING = [-0.1, -0.2, -0.3, -0.4, -0.5], [1e-7, 2e-7, 3e-7, 4e-7, 5e-7]


def entries(number: int = 5, **series: Any) -> list[dict[str, float]]:
    """A history; a list is a value a step."""
    named = {name if name == "learning_rate" else f"rewards/{name}": values for name, values in series.items()}
    return [HEALTHY | {k: v[i] if isinstance(v, list) else v for k, v in named.items()} for i in range(number)]


@pytest.mark.parametrize(
    ("series", "names"),
    [
        ({}, []),
        ({"chosen": FALLING}, ["both-less-likely"]),
        ({"chosen": FALLING[::-1]}, []),
        ({"chosen": [0.01, *FALLING[1:]]}, []),
        ({"chosen": FALLING, "accuracies": 0.4}, []),
        ({"saturated": 0.6}, ["saturated"]),
        ({"saturated": [1.0, 0.0, 0.0, 0.0, 0.0]}, []),
        ({"margins": -5e-5}, ["no-signal"]),
        ({"margins": [0.0, 0.0, 0.0, 0.0, 0.01]}, []),
        ({"margins": 0.0, "learning_rate": RISING}, []),
    ],
)
def test_a_crafted_history_triggers_its_warning_and_no_other(series: dict[str, Any], names: list[str]) -> None:
    assert [finding.name for finding in token_findings(entries(**series))] == names


def test_only_the_last_entries_count_and_there_must_be_enough() -> None:
    bad = entries(saturated=0.9)
    assert token_findings(bad[:4]) == [] and token_findings([*bad, *entries()]) == []
    between = [entry for pair in zip(bad, [{"eval_loss": 0.5}] * 5, strict=True) for entry in pair]
    assert [finding.name for finding in token_findings(between)] == ["saturated"]


def measurement(sides: int, label: list[float]) -> AnswerMeasurement:
    """Two answers of two tokens each, and a place before them that is not counted."""
    told = torch.tensor([[0.0, -1.0, -2.0], [0.0, -3.0, -5.0]])
    counted = torch.tensor([[False, True, True]]).expand(2, 3)
    scores = AnswerScores(told, entropy=counted * 2.0, kl=counted * 0.5)
    reference = torch.tensor([[0.0, -1.5, -2.5], [0.0, -3.0, -4.0]])
    return AnswerMeasurement(scores, reference, counted.float(), counted, counted, torch.tensor(label))


def test_the_panel_of_a_pair() -> None:
    found = token_panel(measurement(2, [1.0]), torch.tensor([0.4]), beta=2.0)
    assert found == {
        "loss": (pytest.approx(0.4), 1.0),
        "rewards/chosen": (2.0, 1.0),
        "rewards/rejected": (-2.0, 1.0),
        "rewards/margins": (4.0, 1.0),
        "rewards/accuracies": (1.0, 1.0),
        "rewards/saturated": (0.0, 1.0),
        "logps/chosen": (-3.0, 1.0),
        "logps/rejected": (-8.0, 1.0),
        # Of tokens, not of rows.
        "entropy": (8.0, 4.0),
        "kl": (2.0, 4.0),
    }
    tied = token_panel(measurement(2, [1.0]), torch.tensor([0.4]), beta=0.0)
    assert tied["rewards/accuracies"] == (0.5, 1.0)


def test_the_panel_of_single_answers_tells_liked_ones_from_others() -> None:
    found = token_panel(measurement(1, [0.0, 1.0]), torch.tensor([0.4, 0.6]), beta=2.0)
    assert found["rewards/chosen"] == (-2.0, 1.0) and found["rewards/rejected"] == (2.0, 1.0)
    assert "rewards/margins" not in found
    alike = token_panel(measurement(1, [1.0, 1.0]), torch.tensor([0.4, 0.6]), beta=2.0)
    assert alike["rewards/chosen"] == (0.0, 2.0) and "rewards/rejected" not in alike
