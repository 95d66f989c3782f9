"""Win rates of one model over another on the same prompts and seeds, told with their intervals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mmalign.evaluation.intervals import Array, Clusters, as_clusters, as_scores, mean_interval, proportion_interval


@dataclass(frozen=True, slots=True)
class WinRate:
    """Share of comparisons that side a wins, a tie counting ½, with its interval over prompts."""

    rate: float
    low: float
    high: float
    wins: int
    ties: int
    losses: int
    num_comparisons: int
    num_clusters: int
    confidence: float
    p_value: float  # two-sided, against 50 %, by the method of the interval (`intervals.Interval`)
    method: str  # of the interval: "bootstrap", "wilson", or "none" for a single cluster

    @property
    def shows_difference(self) -> bool:
        """Whether the interval leaves out 50 %."""
        return not self.low <= 0.5 <= self.high


@dataclass(frozen=True, slots=True)
class Difference:
    """A mean difference with its interval over prompts; the interval of a single cluster is (-inf, inf)."""

    value: float
    low: float
    high: float
    num_comparisons: int
    num_clusters: int
    confidence: float
    p_value: float  # two-sided, against zero, by the method of the interval

    @property
    def shows_difference(self) -> bool:
        """Whether the interval leaves out zero."""
        return not self.low <= 0.0 <= self.high


def win_rate(
    scores_a: Any,
    scores_b: Any,
    clusters: Sequence[Any],
    *,
    tie_margin: float = 0.0,
    num_resamples: int = 2000,
    confidence: float = 0.95,
    seed: int = 0,
) -> WinRate:
    """How often a beats b: (wins + ½ ties) / comparisons, with an interval that treats a prompt's rows as one draw.

    scores_a, scores_b: (N,) scores of the two sides, row by row on the same prompt and seed.
    clusters: (N,) prompt of each row; a prompt may have several rows (sampling seeds, training seeds).
    tie_margin: a row whose scores differ by no more than this is a tie.
    """
    outcomes, groups = _outcomes(scores_a, scores_b, clusters, tie_margin)
    found = proportion_interval(outcomes, groups, num_resamples=num_resamples, confidence=confidence, seed=seed)
    return WinRate(
        rate=float(outcomes.mean()),
        low=found.low,
        high=found.high,
        wins=int(np.sum(outcomes == 1.0)),
        ties=int(np.sum(outcomes == 0.5)),
        losses=int(np.sum(outcomes == 0.0)),
        num_comparisons=len(outcomes),
        num_clusters=groups.count,
        confidence=confidence,
        p_value=found.p_value,
        method=found.method,
    )


def paired_difference(
    scores_a: Any,
    scores_b: Any,
    clusters: Sequence[Any],
    *,
    num_resamples: int = 2000,
    confidence: float = 0.95,
    seed: int = 0,
) -> Difference:
    """Mean of a − b over rows, with an interval clustered by prompt. Shapes as in `win_rate`."""
    a, b, groups = _paired(scores_a, scores_b, clusters)
    values = a - b
    found = mean_interval(values, groups, num_resamples=num_resamples, confidence=confidence, seed=seed)
    return Difference(float(values.mean()), found.low, found.high, len(values), groups.count, confidence, found.p_value)


def share_difference(
    shares_a: Any,
    shares_b: Any,
    clusters: Sequence[Any],
    *,
    num_resamples: int = 2000,
    confidence: float = 0.95,
    seed: int = 0,
) -> Difference:
    """The same of scores in [0, 1], such as right and wrong; its interval has a width also where every row differs alike."""
    a, b, groups = _paired(shares_a, shares_b, clusters)
    if not all(side.min() >= 0 and side.max() <= 1 for side in (a, b)):
        raise ValueError("Shares lie between 0 and 1; for other scores there is paired_difference.")
    return _of_shares(a - b, groups, num_resamples=num_resamples, confidence=confidence, seed=seed)


def win_rate_difference(
    scores_x: Any,
    scores_y: Any,
    scores_base: Any,
    clusters: Sequence[Any],
    *,
    scores_base_y: Any = None,
    tie_margin: float = 0.0,
    num_resamples: int = 2000,
    confidence: float = 0.95,
    seed: int = 0,
) -> Difference:
    """Win rate of x over the base minus win rate of y over the base: is method x better than y?

    scores_x, scores_y, scores_base: (N,) scores of the three sides, row by row on the same prompt and seed. Prompts are
    resampled for both methods together, so what makes a prompt easy for both cancels.
    scores_base_y: the base of y, where it is another one than that of x.
    """
    x, groups = _outcomes(scores_x, scores_base, clusters, tie_margin)
    y, _ = _outcomes(scores_y, scores_base if scores_base_y is None else scores_base_y, clusters, tie_margin)
    return _of_shares(x - y, groups, num_resamples=num_resamples, confidence=confidence, seed=seed)


def check_tie_margin(tie_margin: float) -> None:
    if not tie_margin >= 0.0:
        raise ValueError(f"tie_margin must be zero or more, got {tie_margin}.")


def _of_shares(values: Array, clusters: Clusters, *, num_resamples: int, confidence: float, seed: int) -> Difference:
    """values: (N,) in [−1, 1]; moved to [0, 1] their mean is a proportion, and never gets an interval of no width."""
    moved = (values + 1) / 2
    found = proportion_interval(moved, clusters, num_resamples=num_resamples, confidence=confidence, seed=seed)
    low, high = 2 * found.low - 1, 2 * found.high - 1
    return Difference(float(values.mean()), low, high, len(values), clusters.count, confidence, found.p_value)


def _paired(scores_a: Any, scores_b: Any, clusters: Sequence[Any]) -> tuple[Array, Array, Clusters]:
    a, b = as_scores(scores_a, "The first side"), as_scores(scores_b, "The second side")
    if len(a) != len(b):
        raise ValueError(f"The two sides must be paired row by row, but they have {len(a)} and {len(b)} scores.")
    return a, b, as_clusters(clusters, len(a))


def _outcomes(scores_a: Any, scores_b: Any, clusters: Sequence[Any], tie_margin: float) -> tuple[Array, Clusters]:
    """(N,) outcomes: 1 where a wins, ½ for a tie, 0 where b wins."""
    check_tie_margin(tie_margin)
    a, b, groups = _paired(scores_a, scores_b, clusters)
    difference = a - b
    return np.where(np.abs(difference) <= tie_margin, 0.5, (difference > 0).astype(np.float64)), groups
