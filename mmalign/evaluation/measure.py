"""What scorers and picture statistics say of one side, and how two sides are compared by it.

Shapes: N pictures of a side, row by row on the same prompts and seeds as those of the other.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from mmalign.evaluation.drawing import Side, prompt_numbers
from mmalign.evaluation.holm import corrected
from mmalign.evaluation.image_statistics import STATISTICS, SideStatistics, drift, side_statistics
from mmalign.evaluation.intervals import Array, as_clusters, check_options, clustered_standard_error
from mmalign.evaluation.result import NOISE, PictureStatistic, ScorerResult, Summary
from mmalign.evaluation.scorers import score_files
from mmalign.evaluation.win_rate import Difference, check_tie_margin, paired_difference, win_rate
from mmalign.rewards.scorer import Scorer


@dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    """How scores are compared: when they are a tie, and how sure the intervals are."""

    tie_margin: float
    num_resamples: int
    confidence: float

    def __post_init__(self) -> None:
        check_tie_margin(self.tie_margin)
        check_options(self.num_resamples, self.confidence)


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredSide:
    """A side with everything that is compared of it."""

    side: Side
    scores: Mapping[str, Array]  # (N,) by the scorer's name
    statistics: SideStatistics

    @property
    def clusters(self) -> list[int]:
        return prompt_numbers(self.side.prompts)


def measure_side(side: Side, *, scorers: Sequence[Scorer], batch_size: int = 8, progress: bool = True) -> MeasuredSide:
    """Ask every scorer about every picture, and take the picture statistics."""
    scores = score_files(
        scorers,
        side.pictures,
        side.prompts,
        batch_size=batch_size,
        description=f"Scoring {side.label}",
        progress=progress,
    )
    return MeasuredSide(side=side, scores=scores, statistics=side_statistics(side.pictures, side.prompts))


def compare_scores(
    aligned: MeasuredSide, base: MeasuredSide, scorers: Sequence[Scorer], trained_on: Collection[str], rules: Rules
) -> tuple[ScorerResult, ...]:
    """What each scorer says of the two sides, its p-value corrected for the others."""
    clusters = aligned.clusters
    rates = [
        win_rate(
            aligned.scores[scorer.name],
            base.scores[scorer.name],
            clusters,
            tie_margin=rules.tie_margin,
            num_resamples=rules.num_resamples,
            confidence=rules.confidence,
        )
        for scorer in scorers
    ]
    seen = [scorer.name in trained_on for scorer in scorers]
    p_values = corrected([rate.p_value for rate in rates], seen)
    return tuple(
        ScorerResult(
            name=scorer.name,
            fingerprint=scorer.fingerprint,
            seen_in_training=seen[at],
            win_rate=rates[at],
            p_corrected=p_values[at],
            aligned=summarise(aligned.scores[scorer.name], clusters),
            base=summarise(base.scores[scorer.name], clusters),
            difference=score_difference(aligned.scores[scorer.name], base.scores[scorer.name], clusters, rules),
        )
        for at, scorer in enumerate(scorers)
    )


def compare_statistics(aligned: MeasuredSide, base: MeasuredSide, rules: Rules) -> tuple[PictureStatistic, ...]:
    """What changed in the pictures; a statistic that no picture has (diversity within prompts of one picture) is left out."""
    clusters, rows = np.array(aligned.clusters), []
    ours, theirs = aligned.statistics, base.statistics
    for name, values in theirs.values.items():
        has = np.isfinite(values)
        if not has.any():
            continue
        ours_told, theirs_told = (side.influences.get(name, side.values[name])[has] for side in (ours, theirs))
        spread = float(values[has].std())
        rows.append(
            PictureStatistic(
                name=name,
                description=STATISTICS[name].description,
                base=float(values[has].mean()),
                aligned=float(ours.values[name][has].mean()),
                base_spread=spread if spread > NOISE else 0.0,
                difference=score_difference(ours_told, theirs_told, clusters[has].tolist(), rules),
            )
        )
    moved = drift(theirs.thumbnails, ours.thumbnails)
    rows.append(
        PictureStatistic(
            name="drift",
            description=STATISTICS["drift"].description,
            base=None,
            aligned=None,
            base_spread=None,
            difference=score_difference(moved, np.zeros_like(moved), clusters.tolist(), rules),
        )
    )
    return tuple(rows)


def summarise(scores: Array, clusters: Sequence[int]) -> Summary:
    """Mean, its error and median of one side's scores."""
    groups = as_clusters(clusters, len(scores))
    return Summary(
        mean=float(scores.mean()),
        median=float(np.median(scores)),
        standard_error=clustered_standard_error(scores, groups),
    )


def score_difference(ours: Array, theirs: Array, clusters: Sequence[int], rules: Rules) -> Difference:
    """Mean of ours − theirs over rows, with its interval."""
    return paired_difference(ours, theirs, clusters, num_resamples=rules.num_resamples, confidence=rules.confidence)
