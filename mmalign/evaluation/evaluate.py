"""Compare an aligned model with its base: same prompts, same seeds, every scorer, intervals over prompts."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import numpy as np

from mmalign.evaluation.drawing import Side, draw_side, prompt_numbers
from mmalign.evaluation.generate import Pipeline
from mmalign.evaluation.image_statistics import DESCRIPTIONS, drift, side_statistics
from mmalign.evaluation.intervals import Array, as_clusters, check_options, clustered_standard_error
from mmalign.evaluation.result import (
    EvaluationResult,
    PictureStatistic,
    Row,
    ScorerResult,
    Summary,
    library_versions,
)
from mmalign.evaluation.scorers import Scorer, check_scorers, score_files
from mmalign.evaluation.win_rate import Difference, paired_difference, win_rate


def evaluate(
    aligned: Pipeline,
    base: Pipeline,
    prompts: Sequence[str],
    *,
    scorers: Sequence[Scorer],
    output_dir: str | Path,
    num_inference_steps: int,
    guidance_scale: float,
    trained_on: Collection[str] = frozenset(),
    num_images_per_prompt: int = 1,
    seed: int = 0,
    batch_size: int = 8,
    height: int | None = None,
    width: int | None = None,
    aligned_label: str = "aligned",
    base_label: str = "base",
    aligned_fingerprint: str | None = None,
    base_fingerprint: str | None = None,
    tie_margin: float = 0.0,
    num_resamples: int = 2000,
    confidence: float = 0.95,
    progress: bool = True,
) -> EvaluationResult:
    """Draw both sides into `output_dir`, score them, and compare. Called again, it draws only what is missing.

    trained_on: names of the scorers that gave labels or rewards to the training; they are marked so everywhere, and the
    headline comes from the first scorer that is not among them.
    aligned_fingerprint, base_fingerprint: name the weights; left out, they are computed from them.
    """
    check_scorers(scorers, trained_on)
    check_options(num_resamples, confidence)
    if aligned_label == base_label:
        raise ValueError(f"Both sides are labelled {base_label!r}; give them different labels.")

    def draw(pipe: Pipeline, label: str, fingerprint: str | None) -> Side:
        return draw_side(
            pipe,
            prompts,
            label=label,
            output_dir=output_dir,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            num_images_per_prompt=num_images_per_prompt,
            seed=seed,
            batch_size=batch_size,
            height=height,
            width=width,
            fingerprint=fingerprint,
            progress=progress,
        )

    return compare_sides(
        draw(aligned, aligned_label, aligned_fingerprint),
        draw(base, base_label, base_fingerprint),
        scorers=scorers,
        trained_on=trained_on,
        tie_margin=tie_margin,
        num_resamples=num_resamples,
        confidence=confidence,
        batch_size=batch_size,
        progress=progress,
    )


def compare_sides(
    aligned: Side,
    base: Side,
    *,
    scorers: Sequence[Scorer],
    trained_on: Collection[str] = frozenset(),
    tie_margin: float = 0.0,
    num_resamples: int = 2000,
    confidence: float = 0.95,
    batch_size: int = 8,
    progress: bool = True,
) -> EvaluationResult:
    """Score two sides that were drawn from the same prompts, seeds and sampler, and compare them pair by pair."""
    check_scorers(scorers, trained_on)
    check_options(num_resamples, confidence)
    _check_paired(aligned, base)
    prompts, clusters = aligned.prompts, prompt_numbers(aligned.prompts)

    def score(side: Side) -> dict[str, Array]:
        return score_files(
            scorers,
            side.pictures,
            prompts,
            batch_size=batch_size,
            description=f"Scoring {side.label}",
            progress=progress,
        )

    aligned_scores, base_scores = score(aligned), score(base)
    rate = partial(win_rate, tie_margin=tie_margin, num_resamples=num_resamples, confidence=confidence)
    difference = partial(paired_difference, num_resamples=num_resamples, confidence=confidence)
    results = tuple(
        ScorerResult(
            name=scorer.name,
            fingerprint=scorer.fingerprint,
            seen_in_training=scorer.name in trained_on,
            win_rate=rate(aligned_scores[scorer.name], base_scores[scorer.name], clusters),
            aligned=_summarise(aligned_scores[scorer.name], clusters),
            base=_summarise(base_scores[scorer.name], clusters),
            difference=difference(aligned_scores[scorer.name], base_scores[scorer.name], clusters),
        )
        for scorer in scorers
    )
    return EvaluationResult(
        aligned_label=aligned.label,
        base_label=base.label,
        aligned_fingerprint=aligned.model_fingerprint,
        base_fingerprint=base.model_fingerprint,
        scorers=results,
        statistics=_statistics(aligned, base, clusters, difference),
        rows=_rows(aligned, base, aligned_scores, base_scores),
        settings={
            "num_prompts": len(set(prompts)),
            "num_pictures_per_side": len(prompts),
            "seed": aligned.seed,
            **asdict(aligned.settings),
            "tie_margin": tie_margin,
            "num_resamples": num_resamples,
            "confidence": confidence,
            "trained_on": sorted(trained_on),
        },
        versions=library_versions(),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
    )


def _check_paired(aligned: Side, base: Side) -> None:
    if aligned.prompts != base.prompts or aligned.seeds != base.seeds:
        raise ValueError("The two sides were not drawn from the same prompts and seeds, so they cannot be compared.")
    if aligned.settings != base.settings:
        ours, theirs = asdict(aligned.settings), asdict(base.settings)
        differing = [f"{key}: {ours[key]} and {theirs[key]}" for key in ours if ours[key] != theirs[key]]
        raise ValueError(f"The two sides were drawn with different settings ({'; '.join(differing)}).")


def _summarise(scores: Array, clusters: Sequence[int]) -> Summary:
    groups = as_clusters(clusters, len(scores))
    return Summary(
        mean=float(scores.mean()),
        median=float(np.median(scores)),
        standard_error=clustered_standard_error(scores, groups),
    )


def _statistics(
    aligned: Side, base: Side, clusters: Sequence[int], difference: Callable[..., Difference]
) -> tuple[PictureStatistic, ...]:
    ours, our_thumbnails = side_statistics(aligned.pictures, aligned.prompts)
    theirs, their_thumbnails = side_statistics(base.pictures, base.prompts)
    rows = [
        PictureStatistic(
            name=name,
            description=description,
            base=float(theirs[name].mean()),
            aligned=float(ours[name].mean()),
            difference=difference(ours[name], theirs[name], clusters),
        )
        for name, description in DESCRIPTIONS.items()
    ]
    moved = drift(their_thumbnails, our_thumbnails)
    rows.append(
        PictureStatistic(
            name="drift",
            description="root mean square distance of 16-pixel thumbnails, base to aligned, same seed",
            base=None,
            aligned=None,
            difference=difference(moved, np.zeros_like(moved), clusters),
        )
    )
    return tuple(rows)


def _rows(
    aligned: Side, base: Side, aligned_scores: dict[str, Array], base_scores: dict[str, Array]
) -> tuple[Row, ...]:
    return tuple(
        Row(
            prompt=prompt,
            seed=aligned.seeds[row],
            base_picture=base.pictures[row],
            aligned_picture=aligned.pictures[row],
            base_scores={name: float(values[row]) for name, values in base_scores.items()},
            aligned_scores={name: float(values[row]) for name, values in aligned_scores.items()},
        )
        for row, prompt in enumerate(aligned.prompts)
    )
