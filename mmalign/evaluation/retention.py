"""Does the aligned model still do what its base did, on prompts that the preferences did not ask about?"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from mmalign.evaluation.measure import MeasuredSide, Rules, score_difference, summarise
from mmalign.evaluation.result import Retention
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
    if not 0 < plan.tolerance < float("inf"):
        raise ValueError(f"the retention tolerance must be a number above zero, got {plan.tolerance}")
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
    ours, theirs, clusters = aligned.scores[scorer.name], base.scores[scorer.name], aligned.clusters
    return Retention(
        scorer=scorer.name,
        fingerprint=scorer.fingerprint,
        base=summarise(theirs, clusters),
        aligned=summarise(ours, clusters),
        difference=score_difference(ours, theirs, clusters, rules),
        tolerance=tolerance,
    )
