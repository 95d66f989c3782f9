"""Distances among the pictures of a side, and intervals for their means that keep what they promise."""

import numpy as np
import pytest

from mmalign.evaluation import paired_difference
from mmalign.evaluation.distances import distances


def drawn(rng, num_prompts, pictures):
    """Thumbnails of three values, a level of its own for each prompt; close enough together for a few near-duplicates."""
    level = np.repeat(rng.random((num_prompts, 1)), pictures, axis=0)
    return level + 0.05 * rng.normal(size=(num_prompts * pictures, 3))


def mean_of_distances(weights, thumbnails, prompts):
    """The mean over pictures of their distance to other prompts', each picture counting by its weight."""
    squared = np.mean((thumbnails[:, None] - thumbnails[None]) ** 2, axis=-1)
    others = (prompts[:, None] != prompts[None]) * weights[None]
    return np.average(np.sqrt((others * squared).sum(axis=1) / others.sum(axis=1)), weights=weights)


def test_influence_is_the_derivative_by_a_pictures_weight():
    prompts = np.array([0, 0, 0, 1, 2, 2, 3, 4, 4, 4])
    thumbnails = np.random.default_rng(0).random((10, 6))
    found, step = distances(thumbnails, prompts), 1e-6
    assert found.across_influence.mean() == pytest.approx(found.across.mean())
    mean = mean_of_distances(np.ones(10), thumbnails, prompts)
    for row in range(10):
        heavier = np.ones(10)
        heavier[row] += step
        slope = 10 * (mean_of_distances(heavier, thumbnails, prompts) - mean) / step
        assert found.across_influence[row] - mean == pytest.approx(slope, abs=1e-4)


def test_of_two_near_duplicates_each_makes_the_other_one():
    levels = np.array([0.1, 0.1, 0.5, 0.9, 0.9, 0.9])[:, None] * np.ones(3)
    found = distances(levels, np.arange(6))
    assert found.duplicate.tolist() == [1, 1, 0, 1, 1, 1]
    told = found.duplicate_influence - found.duplicate_influence[2]
    assert told == pytest.approx([2, 2, 0, 1, 1, 1]), "of three alike, one may go and the others stay what they are"
    assert found.duplicate_influence.mean() == pytest.approx(found.duplicate.mean())
    shared = distances(levels[:3], np.array([0, 0, 1]))
    assert shared.duplicate.tolist() == shared.duplicate_influence.tolist() == [0, 0, 0]


@pytest.mark.parametrize(("num_prompts", "pictures"), [(100, 1), (40, 3)])
def test_sides_that_do_not_differ_are_found_to_differ_in_one_of_twenty(num_prompts, pictures):
    """The plain values, as if they did not depend on each other, err in one of three (diversity), or eight (near-duplicates)."""
    rng, prompts, trials = np.random.default_rng(3), np.repeat(np.arange(num_prompts), pictures), 150
    errors = np.zeros(2)
    for _ in range(trials):
        ours, theirs = (distances(drawn(rng, num_prompts, pictures), prompts) for _ in range(2))
        for at, name in enumerate(("across_influence", "duplicate_influence")):
            found = paired_difference(getattr(ours, name), getattr(theirs, name), prompts, num_resamples=200)
            errors[at] += found.shows_difference
    assert (errors / trials <= 0.05 + 2.5 * np.sqrt(0.05 * 0.95 / trials)).all(), errors / trials
