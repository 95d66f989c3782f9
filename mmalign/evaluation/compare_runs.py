"""Several evaluations against each other, once it is checked that their numbers may be compared at all.

Shapes: N rows (prompt and seed), the same for every run.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np

from mmalign.evaluation.drawing import prompt_numbers
from mmalign.evaluation.holm import Corrected, corrected
from mmalign.evaluation.intervals import Array
from mmalign.evaluation.result import EvaluationResult, Row, ScorerResult
from mmalign.evaluation.win_rate import Difference, WinRate, win_rate, win_rate_difference

ALLOWED = ("base",)  # what two runs may differ in, if asked: each is then compared with a base of its own
_SETTINGS = (
    "seed",
    "num_inference_steps",
    "guidance_scale",
    "true_cfg_scale",
    "height",
    "width",
    "scheduler",
    "scheduler_fingerprint",
    "tie_margin",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class RunDifference:
    """Win rate of run `first` minus that of run `second`, prompts resampled for both together.

    p_corrected: among the differences of all pairs of runs by held-out scorers, and by all scorers.
    """

    first: str
    second: str
    difference: Difference
    p_corrected: Corrected


@dataclass(frozen=True, slots=True, kw_only=True)
class ScorerComparison:
    """What one scorer says of every run, in the runs' order, and of every pair of them. `seen_by`: runs that trained on it."""

    name: str
    fingerprint: str
    seen_by: tuple[str, ...]
    win_rates: tuple[WinRate, ...]
    differences: tuple[RunDifference, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """Several runs compared by the scorers that all of them were judged by, held-out ones first.

    judges: those that tell the verdicts: of every run the first of them in its own order, so that no run's order goes before
    another's.
    """

    runs: tuple[str, ...]
    aligned_fingerprints: tuple[str, ...]
    base_fingerprints: tuple[str, ...]
    scorers: tuple[ScorerComparison, ...]
    judges: tuple[str, ...]
    left_out: tuple[str, ...]  # scorers that did not judge every run
    settings: Mapping[str, Any]


def compare_results(
    results: Mapping[str, EvaluationResult],
    *,
    allow_different: Collection[str] = (),
    num_resamples: int = 2000,
    confidence: float = 0.95,
) -> Comparison:
    """Compare evaluations by name; ValueError names the field in which two of them differ and may not.

    allow_different: "base" compares runs from different bases, each with its own.
    """
    unknown = sorted(set(allow_different) - set(ALLOWED))
    if unknown:
        raise ValueError(f"runs may differ in {', '.join(ALLOWED)} only, not in {', '.join(unknown)}")
    if len(results) < 2:
        raise ValueError("give at least two runs to compare")
    names = list(results)
    first = results[names[0]]
    for name in names[1:]:
        _check_comparable(names[0], first, name, results[name], allow_different)
    seen = {
        scorer.name: tuple(name for name in names if scorer.name in results[name].settings["trained_on"])
        for scorer in first.scorers
    }
    shared = sorted(
        (scorer for scorer in first.scorers if all(_scorer(scorer.name, result) for result in results.values())),
        key=lambda scorer: bool(seen[scorer.name]),
    )
    if not shared:
        judged = "; ".join(f"{name}: {', '.join(s.name for s in result.scorers)}" for name, result in results.items())
        raise ValueError(f"no scorer judged every run ({judged}), so there is nothing to compare")
    options = {"tie_margin": first.settings["tie_margin"], "num_resamples": num_resamples, "confidence": confidence}
    rows = {name: _ordered(result) for name, result in results.items()}
    clusters = prompt_numbers([row.prompt for row in rows[names[0]]])
    pairs = list(combinations(names, 2))

    def scores(name: str, scorer: str) -> tuple[Array, Array]:
        aligned = np.array([row.aligned_scores[scorer] for row in rows[name]])
        return aligned, np.array([row.base_scores[scorer] for row in rows[name]])

    differences = [
        [_difference(scores(a, scorer.name), scores(b, scorer.name), clusters, options) for a, b in pairs]
        for scorer in shared
    ]
    p_values = iter(
        corrected(
            [difference.p_value for row in differences for difference in row],
            [bool(seen[scorer.name]) for scorer in shared for _ in pairs],
        )
    )
    return Comparison(
        runs=tuple(names),
        aligned_fingerprints=tuple(result.aligned_fingerprint for result in results.values()),
        base_fingerprints=tuple(result.base_fingerprint for result in results.values()),
        scorers=tuple(
            ScorerComparison(
                name=scorer.name,
                fingerprint=scorer.fingerprint,
                seen_by=seen[scorer.name],
                win_rates=tuple(win_rate(*scores(name, scorer.name), clusters, **options) for name in names),
                differences=tuple(
                    RunDifference(first=a, second=b, difference=difference, p_corrected=next(p_values))
                    for (a, b), difference in zip(pairs, row, strict=True)
                ),
            )
            for scorer, row in zip(shared, differences, strict=True)
        ),
        judges=tuple(sorted({_judge(result, shared, seen) for result in results.values()})),
        left_out=tuple(
            dict.fromkeys(
                s.name for result in results.values() for s in result.scorers if s.name not in {t.name for t in shared}
            )
        ),
        settings={
            "num_prompts": len(set(clusters)),
            "num_pictures_per_side": len(clusters),
            **{name: first.settings[name] for name in _SETTINGS if name in first.settings},
            "num_resamples": num_resamples,
            "confidence": confidence,
            "allow_different": sorted(allow_different),
        },
    )


def _difference(
    first: tuple[Array, Array], second: tuple[Array, Array], clusters: Sequence[int], options: Mapping[str, Any]
) -> Difference:
    (x, base_x), (y, base_y) = first, second
    return win_rate_difference(x, y, base_x, clusters, scores_base_y=base_y, **options)


def _check_comparable(
    name: str, first: EvaluationResult, other_name: str, other: EvaluationResult, allow_different: Collection[str]
) -> None:
    def refuse(field: str, why: str) -> None:
        raise ValueError(f"{other_name} cannot be compared with {name}: they differ in {field} ({why})")

    prompts, others = ({row.prompt for row in result.rows} for result in (first, other))
    if prompts != others:
        example = sorted(prompts ^ others)[0]
        refuse("prompts", f"{len(prompts ^ others)} are in one of them only, such as {example!r:.80}")
    if [(row.prompt, row.seed) for row in _ordered(first)] != [(row.prompt, row.seed) for row in _ordered(other)]:
        refuse("seeds", "the same prompts were drawn from other seeds, or other numbers of them")
    for key in _SETTINGS:
        # Not every report has a true guidance to tell.
        mine, theirs = first.settings.get(key), other.settings.get(key)
        if mine != theirs:
            refuse(key, f"{mine} and {theirs}")
    for scorer in first.scorers:
        twin = _scorer(scorer.name, other)
        if twin is not None and twin.fingerprint != scorer.fingerprint:
            refuse(f"the fingerprint of scorer {scorer.name}", f"{scorer.fingerprint[:16]} and {twin.fingerprint[:16]}")
    if first.base_fingerprint != other.base_fingerprint and "base" not in allow_different:
        shown = f"{first.base_fingerprint[:16]} and {other.base_fingerprint[:16]}"
        refuse("the base's fingerprint", f"{shown}; --allow-different base compares each with its own")


def _judge(result: EvaluationResult, shared: Collection[ScorerResult], seen: Mapping[str, Collection[str]]) -> str:
    names = {scorer.name for scorer in shared}
    return min((s.name for s in result.scorers if s.name in names), key=lambda name: bool(seen[name]))


def _scorer(name: str, result: EvaluationResult) -> ScorerResult | None:
    return next((scorer for scorer in result.scorers if scorer.name == name), None)


def _ordered(result: EvaluationResult) -> list[Row]:
    """The rows in an order that does not depend on how the prompts were listed."""
    return sorted(result.rows, key=lambda row: (row.prompt, row.seed))
