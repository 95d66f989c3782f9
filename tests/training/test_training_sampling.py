"""Pairs drawn by their strength: the right share, unbiased sums, nobody twice, and the same draw after a stop."""

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from training.runs import history, lora, pairs, trainer

from mmalign.training.sampling import ShuffledByProbability, inclusion_probabilities

strengths = st.lists(st.floats(-10, 10, allow_subnormal=False), min_size=1, max_size=40).filter(any)


@settings(max_examples=200, deadline=None)
@given(strengths, st.floats(0.01, 0.99), st.integers(0, 10_000))
def test_as_many_as_asked_none_twice_and_in_proportion(values: list[float], share: float, seed: int) -> None:
    strength = torch.tensor(values, dtype=torch.float64)
    probabilities = inclusion_probabilities(strength, share)
    number = min(max(1, round(share * len(values))), int((strength != 0).sum()))
    assert probabilities.min() >= 0 and probabilities.max() <= 1 and (probabilities[strength == 0] == 0).all()
    assert float(probabilities.sum()) == pytest.approx(number)
    free = (probabilities < 1) & (probabilities > 0)
    ratio = probabilities[free] / strength[free].abs()
    torch.testing.assert_close(ratio, ratio[:1].expand_as(ratio), rtol=1e-9, atol=0)
    sampler = ShuffledByProbability(probabilities, seed, lambda: 0)
    drawn = list(sampler)
    assert len(drawn) == len(sampler) == number and len(set(drawn)) == number
    assert set((probabilities == 1).nonzero()[:, 0].tolist()) <= set(drawn)


def test_over_many_epochs_rows_come_as_often_as_they_should() -> None:
    strength = torch.tensor([0.0, 0.5, 1.0, -2.0, 4.0, 0.1, 9.0, -3.0])
    probabilities = inclusion_probabilities(strength, 0.5)
    epochs, value = 4000, torch.arange(8, dtype=torch.float64) * strength
    drawn = [list(ShuffledByProbability(probabilities, 3, lambda e=epoch: e)) for epoch in range(epochs)]  # type: ignore[misc]
    counts = torch.bincount(torch.tensor(drawn).flatten(), minlength=8) / epochs
    torch.testing.assert_close(counts.double(), probabilities, rtol=0, atol=4 * 0.5 / epochs**0.5)
    # Divided by how likely they were, values sum up to what they do over all rows.
    sums = torch.tensor([sum(float(value[row] / probabilities[row]) for row in rows) for rows in drawn])
    assert abs(sums.mean() - value.sum()) < 4 * sums.std() / epochs**0.5


def test_a_run_visits_fewer_pairs_and_weighs_them(tmp_path: Path, brightness: Any) -> None:
    options: dict[str, Any] = {"comparison": "smoothed", "num_train_epochs": 2, "max_steps": -1, "data": pairs(8)}
    run = trainer(tmp_path, "smpo", strength_sampling=0.5, **options)
    run.train()
    assert run.state.max_steps == 2 * 2
    strength = run._train.dataset.compared.strength.double()
    weights = torch.tensor([run._sampling_weights[row] for row in range(8)], dtype=torch.float64)
    probabilities = inclusion_probabilities(strength, 0.5)
    torch.testing.assert_close(weights, 0.5 / probabilities, rtol=1e-6, atol=0)
    inputs = next(iter(run.get_train_dataloader()))
    loss = run.pair_losses(run.model, inputs, epoch=run._epoch)[0]
    expected = (loss * weights[inputs["row"]].float()).mean()
    torch.testing.assert_close(run.compute_loss(run.model, inputs), expected)


def test_a_resumed_run_draws_the_same(tmp_path: Path, brightness: Any) -> None:
    asked: dict[str, Any] = {
        "comparison": "smoothed",
        "strength_sampling": 0.6,
        "data": pairs(8),
        "max_steps": 5,
        "learning_rate": 1e-2,
        "peft_config": lora(),
    }
    whole = trainer(tmp_path / "whole", "smpo", **asked)
    whole.train()
    saved: dict[str, Any] = {"save_strategy": "steps", "save_steps": 3}
    trainer(tmp_path / "cut", "smpo", **asked, **saved).train()
    resumed = trainer(tmp_path / "cut", "smpo", **asked, **saved)
    resumed.train(resume_from_checkpoint=str(tmp_path / "cut" / "checkpoint-3"))
    assert history(resumed) == pytest.approx(history(whole), abs=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"comparison": "human", "strength_sampling": 0.5}, "where pairs differ in strength"),
        ({"comparison": "smoothed", "scorer": "pickscore", "strength_sampling": 1.0}, "between 0 and 1"),
    ],
)
def test_what_cannot_be_sampled_is_refused(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, "smpo", **options)


def test_a_share_that_fills_no_batch_is_refused(tmp_path: Path, brightness: Any) -> None:
    with pytest.raises(ValueError, match="do not fill one batch of 2 with strength_sampling=0.1"):
        trainer(tmp_path, "smpo", comparison="smoothed", data=pairs(8), strength_sampling=0.1)
