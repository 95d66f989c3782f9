"""A comparison by a reward that the data carry: no model is run, and the strengths are those of the column."""

from pathlib import Path
from typing import Any

import pytest
import torch
from training.runs import history, pairs, trainer

ROWS = [
    {"caption": row["prompt"], "jpg_0": row["chosen"], "jpg_1": row["rejected"], "label_0": 1.0}
    | {"ps_score_0": 0.3 * number, "ps_score_1": 0.7}
    for number, row in enumerate(pairs())
]
GAPS = torch.tensor([row["ps_score_0"] - row["ps_score_1"] for row in ROWS], dtype=torch.float64)


@pytest.fixture(autouse=True)
def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    import mmalign.training.prepare as module

    monkeypatch.setattr(module, "scorer", None)


@pytest.mark.parametrize(
    ("comparison", "strength"),
    [
        ("relabel", torch.ones(6)),
        ("bradley_terry", 2 * torch.sigmoid(GAPS.abs()) - 1),
        ("smoothed", 10 * torch.tanh(GAPS.abs() / 1.5 / 2)),
    ],
)
def test_two_steps_by_the_data_s_own_rewards(comparison: str, strength: torch.Tensor, tmp_path: Path) -> None:
    run = trainer(tmp_path, "smpo", data=ROWS, comparison=comparison, scorer="column:ps_score")
    compared = run._train.dataset.compared
    assert torch.equal(compared.first, (GAPS < 0).long()) and compared.num_flipped == 3
    torch.testing.assert_close(compared.strength.double(), strength.double(), rtol=1e-6, atol=1e-6)
    run.train()
    assert len(history(run)) == 2
    if comparison == "smoothed":
        assert run._train.normalizer.scorer_name == "column:ps_score"


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        ({}, {"scorer": "column:score"}, "scorer='column:score': the data have no such column; they have column:ps_sc"),
        ({"ps_score_1": None}, {}, "1 pairs have no 'ps_score' of both pictures, the first is row 2: fill the column"),
        (
            {"ps_score_1": None, "label_0": 0.5},
            {"keep_human_ties": True},
            "1 pairs have no 'ps_score' of both pictures, the first is row 2",
        ),
    ],
)
def test_what_has_no_reward_is_named(
    change: dict[str, Any], options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    rows = [*ROWS[:2], ROWS[2] | change, *ROWS[3:]]
    given = {"comparison": "relabel", "scorer": "column:ps_score"} | options
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, "smpo", data=rows, **given)


def test_a_tie_that_is_dropped_needs_no_reward_and_data_without_any_say_so(tmp_path: Path) -> None:
    rows = [*ROWS[:2], ROWS[2] | {"ps_score_1": None, "label_0": 0.5}, *ROWS[3:]]
    given = {"comparison": "relabel", "scorer": "column:ps_score"}
    assert len(trainer(tmp_path, "smpo", data=rows, **given)._train.dataset) == 5
    with pytest.raises(ValueError, match="they have no reward column"):
        trainer(tmp_path, "smpo", **given)
