"""Compare an aligned model with its base: same prompts, same seeds, every scorer, intervals over prompts."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from mmalign.evaluation.drawing import Side, draw_side
from mmalign.evaluation.generate import Pipeline
from mmalign.evaluation.measure import MeasuredSide, Rules, compare_scores, compare_statistics, measure_side
from mmalign.evaluation.result import EvaluationResult, Row, library_versions
from mmalign.evaluation.retention import RetentionPlan, retention, retention_scorer
from mmalign.evaluation.scorers import check_scorers
from mmalign.evaluation.sweep import check_scales, sweep_scales
from mmalign.rewards.scorer import Scorer


def evaluate(
    aligned: Pipeline,
    base: Pipeline,
    prompts: Sequence[str],
    *,
    scorers: Sequence[Scorer],
    output_dir: str | Path,
    num_inference_steps: int,
    guidance_scale: float,
    true_cfg_scale: float | None = None,
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
    lora_scales: Sequence[float] = (),
    retention_plan: RetentionPlan | None = None,
    aligned_call: Mapping[str, Any] | None = None,
    progress: bool = True,
) -> EvaluationResult:
    """Draw both sides into `output_dir`, score them, and compare. Called again, it draws only what is missing.

    trained_on: names of the scorers that gave labels or rewards to the training; they are marked so everywhere, and the
    headline comes from the first scorer that is not among them.
    aligned_fingerprint, base_fingerprint: name the weights; left out, they are computed from them.
    lora_scales: also compare with the aligned side's LoRA at each of these scales; 0 is the adapter switched off.
    retention_plan: other prompts, on which a held-out scorer may not fall by more than a tolerance.
    aligned_call: what else the aligned side's call is told, as JSON values: for whom it draws.
    """
    check_scorers(scorers, trained_on)
    check_scales(aligned, lora_scales)
    keeper = retention_scorer(retention_plan, scorers, trained_on) if retention_plan else None
    rules = Rules(tie_margin=tie_margin, num_resamples=num_resamples, confidence=confidence)
    if aligned_label == base_label:
        raise ValueError(f"Both sides are labelled {base_label!r}; give them different labels.")
    draw = partial(
        draw_side,
        output_dir=output_dir,
        num_inference_steps=num_inference_steps,
        guidance_scale=guidance_scale,
        true_cfg_scale=true_cfg_scale,
        num_images_per_prompt=num_images_per_prompt,
        seed=seed,
        batch_size=batch_size,
        height=height,
        width=width,
        progress=progress,
    )
    draw_aligned = partial(draw, aligned, label=aligned_label, fingerprint=aligned_fingerprint, call=aligned_call)
    draw_base = partial(draw, base, label=base_label, fingerprint=base_fingerprint)
    measure = partial(measure_side, batch_size=batch_size, progress=progress)
    ours, theirs = draw_aligned(prompts), draw_base(prompts)
    _check_paired(ours, theirs)
    measured, reference = measure(ours, scorers=scorers), measure(theirs, scorers=scorers)
    result = _compare(measured, reference, scorers, trained_on, rules)
    if aligned_call:
        result = replace(result, settings={**result.settings, "aligned_call": dict(aligned_call)})
    if lora_scales:

        def draw_scaled(scale: float) -> Side:
            # Weights that the caller named himself are other ones at another scale.
            name = aligned_fingerprint and f"{aligned_fingerprint}, LoRA scale {scale:g}"
            return draw_aligned(prompts, fingerprint=name)

        def measure_scaled(side: Side) -> MeasuredSide:
            return measured if side.pictures == measured.side.pictures else measure(side, scorers=scorers)

        points = sweep_scales(
            aligned,
            lora_scales,
            reference,
            draw=draw_scaled,
            measure=measure_scaled,
            scorers=scorers,
            trained_on=trained_on,
            rules=rules,
        )
        result = replace(result, sweep=points)
    if retention_plan is not None and keeper is not None:
        kept, had = (
            measure(draw_it(retention_plan.prompts), scorers=[keeper]) for draw_it in (draw_aligned, draw_base)
        )
        result = replace(result, retention=retention(kept, had, keeper, retention_plan.tolerance, rules))
    return result


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
    rules = Rules(tie_margin=tie_margin, num_resamples=num_resamples, confidence=confidence)
    _check_paired(aligned, base)
    measure = partial(measure_side, scorers=scorers, batch_size=batch_size, progress=progress)
    return _compare(measure(aligned), measure(base), scorers, trained_on, rules)


def _compare(
    aligned: MeasuredSide, base: MeasuredSide, scorers: Sequence[Scorer], trained_on: Collection[str], rules: Rules
) -> EvaluationResult:
    side = aligned.side
    return EvaluationResult(
        aligned_label=side.label,
        base_label=base.side.label,
        aligned_fingerprint=side.model_fingerprint,
        base_fingerprint=base.side.model_fingerprint,
        scorers=compare_scores(aligned, base, scorers, trained_on, rules),
        statistics=compare_statistics(aligned, base, rules),
        rows=_rows(aligned, base),
        settings={
            "num_prompts": len(set(side.prompts)),
            "num_pictures_per_side": len(side.prompts),
            "seed": side.seed,
            **side.settings.told(),
            **asdict(rules),
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


def _rows(aligned: MeasuredSide, base: MeasuredSide) -> tuple[Row, ...]:
    return tuple(
        Row(
            prompt=prompt,
            seed=aligned.side.seeds[row],
            base_picture=base.side.pictures[row],
            aligned_picture=aligned.side.pictures[row],
            base_scores={name: float(values[row]) for name, values in base.scores.items()},
            aligned_scores={name: float(values[row]) for name, values in aligned.scores.items()},
        )
        for row, prompt in enumerate(aligned.side.prompts)
    )
