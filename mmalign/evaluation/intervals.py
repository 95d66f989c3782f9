"""Intervals for means of clustered comparisons: the pictures of one prompt stand or fall together.

Shapes: N rows (comparisons), K clusters (prompts), R resamples.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

Array = npt.NDArray[np.float64]

MIN_CLUSTERS = 20  # below this the bootstrap's percentiles are too narrow, and Student's t takes over
MIN_EVIDENCE = 20  # effective wins, and losses, below which the percentiles of a proportion are off; Wilson takes over
_SMALLEST_P = 1e-12  # what lies below is rounding
_CHUNK = 4_000_000  # resampled indices held at once


@dataclass(frozen=True, slots=True)
class Interval:
    """An interval with its method ("bootstrap", "student", "wilson", "none"), and the p-value that goes with it.

    p_value: two-sided, against a mean of 0, or of ½ for a proportion: 1 − the highest confidence at which the interval of the
    same method leaves that value out, so it is at most 1 − confidence only where the interval does. For the bootstrap it is the
    larger of this and of Student's t with the clustered standard error, which alone tells it where no resample reaches that
    value: in the far tails that a correction for several p-values looks at.
    """

    low: float
    high: float
    p_value: float
    method: str


@dataclass(frozen=True, slots=True)
class Clusters:
    """N rows summed by cluster: `index` (N,) names each row's cluster, `sizes` (K,) counts the rows of each."""

    index: npt.NDArray[np.intp]
    sizes: Array

    @property
    def count(self) -> int:
        return len(self.sizes)

    def sums(self, values: Array) -> Array:
        """(N,) → (K,)"""
        return np.bincount(self.index, weights=values, minlength=self.count).astype(np.float64)


def as_scores(values: Any, name: str) -> Array:
    """Scores as a finite float64 vector; a row that is not a finite number is named in the error."""
    if isinstance(values, torch.Tensor):
        values = values.detach().cpu().double().numpy()
    scores = np.asarray(values, dtype=np.float64)
    if scores.ndim != 1 or len(scores) == 0:
        raise ValueError(f"{name} must be a non-empty vector of scores, got shape {scores.shape}.")
    bad = np.flatnonzero(~np.isfinite(scores))
    if len(bad):
        rows = ", ".join(map(str, bad[:10])) + (", …" if len(bad) > 10 else "")
        raise ValueError(f"{name} has {len(bad)} of {len(scores)} scores that are NaN or infinite, in rows {rows}.")
    return scores


def as_clusters(ids: Sequence[Any] | npt.NDArray[Any], num_rows: int) -> Clusters:
    """Group rows by cluster id (usually the prompt, or its number)."""
    if isinstance(ids, torch.Tensor):
        ids = ids.cpu().numpy()
    labels = np.asarray(ids)
    if labels.ndim != 1 or labels.dtype.kind not in "biufUS":
        raise TypeError("clusters must be one number or one string a row, such as the prompt or its index.")
    if len(labels) != num_rows:
        raise ValueError(f"clusters names {len(labels)} rows, but there are {num_rows} scores.")
    _, index, sizes = np.unique(labels, return_inverse=True, return_counts=True)
    return Clusters(index.astype(np.intp), sizes.astype(np.float64))


def clustered_standard_error(values: Array, clusters: Clusters) -> float:
    """Standard error of the mean of all rows when rows of one cluster may depend on each other; NaN for one cluster."""
    if clusters.count < 2:
        return math.nan
    residuals = clusters.sums(values - values.mean())
    return float(np.sqrt(clusters.count / (clusters.count - 1) * np.sum(residuals**2)) / len(values))


def bootstrap_means(values: Array, clusters: Clusters, *, num_resamples: int, seed: int) -> Array:
    """(R,) means of `values` over clusters drawn with replacement, every row of a drawn cluster coming along."""
    rng = np.random.default_rng(seed)
    sums, count = clusters.sums(values), clusters.count
    means = np.empty(num_resamples)
    rows = max(1, _CHUNK // count)
    for start in range(0, num_resamples, rows):
        drawn = rng.integers(count, size=(min(rows, num_resamples - start), count))
        means[start : start + len(drawn)] = sums[drawn].sum(axis=1) / clusters.sizes[drawn].sum(axis=1)
    return means


def student_t(probability: float, degrees: int) -> float:
    """Quantile of Student's t, by halving."""
    if probability < 0.5:
        return -student_t(1 - probability, degrees)
    tails, low, high = 2 * (1 - probability), 0.0, 1.0
    while student_t_tails(high, degrees) > tails:
        low, high = high, 2 * high
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if student_t_tails(middle, degrees) > tails else (low, middle)
    return high


def student_t_tails(t: float, degrees: int) -> float:
    """P(|T| ≥ t) for t ≥ 0, to 1e-13: for whole degrees of freedom ν a finite sum in θ = atan(t / √ν).

    P(|T| < t) is sin θ · (1 + ½ cos²θ + ½·¾ cos⁴θ + …) for even ν, and 2/π · (θ + sin θ · (cos θ + ⅔ cos³θ + …)) for odd ν,
    each up to cos^(ν − 2) θ.
    """
    theta = math.atan(t / math.sqrt(degrees))
    odd, cosine = degrees % 2, math.cos(theta)
    term, total = cosine if odd else 1.0, 0.0
    for power in range(odd, degrees, 2):
        total += term
        term *= cosine**2 * (power + 1) / (power + 2)
    inside = 2 / math.pi * (theta + math.sin(theta) * total) if odd else math.sin(theta) * total
    return max(0.0, 1 - inside)


def mean_interval(values: Array, clusters: Clusters, *, num_resamples: int, confidence: float, seed: int) -> Interval:
    """Interval for the mean of unbounded values: cluster bootstrap percentiles, or Student's t below 20 clusters.

    One cluster says nothing about other prompts: (-inf, inf). Values that are all equal give an interval of no width.
    """
    check_options(num_resamples, confidence)
    mean = float(values.mean())
    if clusters.count < 2:
        return Interval(-math.inf, math.inf, 1.0, "none")
    if clusters.count < MIN_CLUSTERS:
        error = clustered_standard_error(values, clusters)
        half = student_t(0.5 + confidence / 2, clusters.count - 1) * error
        return Interval(mean - half, mean + half, _student_p(mean, error, clusters.count - 1), "student")
    means = bootstrap_means(values, clusters, num_resamples=num_resamples, seed=seed)
    low, high = _percentiles(means, confidence)
    student = _student_p(mean, clustered_standard_error(values, clusters), clusters.count - 1)
    return Interval(min(low, mean), max(high, mean), max(student, _bootstrap_p(means, 0.0)), "bootstrap")


def proportion_interval(
    outcomes: Array, clusters: Clusters, *, num_resamples: int, confidence: float, seed: int
) -> Interval:
    """Interval for the mean of outcomes in [0, 1].

    The percentiles of the cluster bootstrap are used where they can be trusted: 20 clusters, 20 effective wins and 20
    effective losses. Else (all wins would give an interval of no width) Wilson's score interval (1927) at the
    effective number of comparisons, with Student's t for the few clusters. One cluster gives (0, 1).
    """
    check_options(num_resamples, confidence)
    rate, count = float(outcomes.mean()), clusters.count
    if count < 2:
        return Interval(0.0, 1.0, 1.0, "none")
    effective = effective_comparisons(outcomes, clusters)
    evidence = effective * min(np.mean(outcomes > 0.5), np.mean(outcomes < 0.5))
    if count >= MIN_CLUSTERS and evidence >= MIN_EVIDENCE:
        means = bootstrap_means(outcomes, clusters, num_resamples=num_resamples, seed=seed)
        low, high = _percentiles(means, confidence)
        student = _student_p(rate - 0.5, clustered_standard_error(outcomes, clusters), count - 1)
        p_value, method = max(student, _bootstrap_p(means, 0.5)), "bootstrap"
    else:
        n = _wilson_comparisons(outcomes, effective)
        low, high = wilson(rate, n, student_t(0.5 + confidence / 2, count - 1))
        # Wilson's interval ends at ½ where |rate − ½| is z standard errors of a fair coin.
        p_value, method = _student_p(rate - 0.5, 0.5 / math.sqrt(n), count - 1), "wilson"
    return Interval(max(0.0, min(low, rate)), min(1.0, max(high, rate)), p_value, method)


def effective_comparisons(outcomes: Array, clusters: Clusters) -> float:
    """How many independent comparisons the N dependent ones are worth, N over the design effect.

    It lies between N (pictures of a prompt independent) and (Σ size)² / Σ size², which is K when all clusters are of
    one size (pictures of a prompt always agreeing); the latter is taken where the outcomes do not vary at all.
    """
    num_rows = len(outcomes)
    fewest = num_rows**2 / float(np.sum(clusters.sizes**2))
    independent = float(np.mean((outcomes - outcomes.mean()) ** 2)) / num_rows
    if independent == 0.0:
        return fewest
    design_effect = clustered_standard_error(outcomes, clusters) ** 2 / independent
    return float(np.clip(num_rows / design_effect, fewest, num_rows)) if design_effect > 0 else float(num_rows)


def check_options(num_resamples: int, confidence: float) -> None:
    if not 0.0 < confidence < 1.0:
        raise ValueError(f"confidence must lie between 0 and 1, got {confidence}.")
    if num_resamples < 100:
        raise ValueError(f"num_resamples must be at least 100 for percentiles to mean anything, got {num_resamples}.")


def _percentiles(means: Array, confidence: float) -> tuple[float, float]:
    low, high = np.quantile(means, [0.5 - confidence / 2, 0.5 + confidence / 2])
    return float(low), float(high)


def _bootstrap_p(means: Array, null: float) -> float:
    """Where `null` stands among the resampled means, read as `_percentiles` reads them; 0 where it lies beyond all of them."""
    places = np.arange(len(means))
    below = np.interp(null, np.sort(means), places)
    above = np.interp(-null, np.sort(-means), places)
    return float(min(1.0, 2 * min(below, above) / (len(means) - 1)))


def _student_p(distance: float, error: float, degrees: int) -> float:
    """No distance gives 1, whatever the error; a distance without any error gives the smallest value that is told."""
    if distance == 0:
        return 1.0
    return max(_SMALLEST_P, student_t_tails(abs(distance) / error if error > 0 else math.inf, degrees))


def wilson(rate: float, n: float, z: float) -> tuple[float, float]:
    """Wilson's interval for a share seen in n independent comparisons."""
    centre = (rate + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(rate * (1 - rate) / n + z * z / (4 * n * n))
    return centre - half, centre + half


def _wilson_comparisons(outcomes: Array, effective: float) -> float:
    """Ties, which vary less than wins and losses do, count as more comparisons.

    One win and one loss are added before the variance is taken: with 100 ties the interval is then 50 ± 1.4 %, in line
    with the rule of three, and five wins among them do not yet exclude 50 %, six do, as in a sign test.
    """
    smoothed = (effective * float(outcomes.mean()) + 1) / (effective + 2)
    spread = effective * float(np.mean((outcomes - smoothed) ** 2)) + smoothed**2 + (1 - smoothed) ** 2
    return effective * smoothed * (1 - smoothed) / (spread / (effective + 2))
