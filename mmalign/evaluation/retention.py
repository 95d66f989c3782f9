"""Does the aligned model still do what its base did, on prompts that the preferences did not ask about?"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from mmalign.evaluation.intervals import Array
from mmalign.evaluation.measure import MeasuredSide, Rules, score_difference, summarise
from mmalign.evaluation.result import Retention
from mmalign.evaluation.win_rate import Difference
from mmalign.rewards.scorer import Scorer


@dataclass(frozen=True, slots=True, kw_only=True)
class RetentionPlan:
    """What is asked, fixed before anything is drawn.

    tolerance: how much of the mean score may be lost, in the scorer's own unit. scorer: its name among those of the evaluation;
    None is the first held-out one.
    """

    prompts: Sequence[str]
    tolerance: float
    scorer: str | None = None


def retention_scorer(plan: RetentionPlan, scorers: Sequence[Scorer], trained_on: Collection[str]) -> Scorer:
    """The scorer that tells retention; ValueError where it was trained on, is not there, or the tolerance is none."""
    check_tolerance(plan.tolerance)
    names = [scorer.name for scorer in scorers]
    held_out = [scorer for scorer in scorers if scorer.name not in trained_on]
    if plan.scorer is not None and plan.scorer not in names:
        raise ValueError(f"retention is to be told by {plan.scorer!r}, but the scorers are {names}. Add it to them.")
    chosen = next((scorer for scorer in held_out if plan.scorer in (None, scorer.name)), None)
    if chosen is None:
        raise ValueError("retention must be told by a scorer that was not trained on: add one, such as clip:<Hub id>")
    return chosen


def retention(aligned: MeasuredSide, base: MeasuredSide, scorer: Scorer, tolerance: float, rules: Rules) -> Retention:
    """Two sides on the retention prompts, compared by the mean of one scorer.

    Non-inferiority by interval: only a loss counts, so a model that got better has kept what the base could.
    """
    ours, theirs = aligned.scores[scorer.name], base.scores[scorer.name]
    difference = score_difference(ours, theirs, aligned.clusters, rules)
    return retained(ours, theirs, aligned.clusters, scorer.name, scorer.fingerprint, tolerance, difference)


def retained(
    ours: Array,
    theirs: Array,
    clusters: Sequence[Any],
    scorer: str,
    fingerprint: str,
    tolerance: float,
    difference: Difference,
) -> Retention:
    """The same of scores that are at hand, row by row, and their difference; scorer and fingerprint say whose."""
    return Retention(
        scorer=scorer,
        fingerprint=fingerprint,
        base=summarise(theirs, clusters),
        aligned=summarise(ours, clusters),
        difference=difference,
        tolerance=tolerance,
    )


def check_tolerance(tolerance: float) -> None:
    """ValueError for a tolerance that is none."""
    if not 0 < tolerance < float("inf"):
        raise ValueError(f"the retention tolerance must be a number above zero, got {tolerance}")
