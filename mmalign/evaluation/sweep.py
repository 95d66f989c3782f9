"""The aligned side at several scales of its LoRA: how much of it buys how much, and what it costs."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Generator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from mmalign.evaluation.drawing import Side
from mmalign.evaluation.generate import Pipeline
from mmalign.evaluation.measure import MeasuredSide, Rules, compare_scores, compare_statistics
from mmalign.evaluation.result import ScalePoint
from mmalign.rewards.scorer import Scorer


def sweep_scales(
    pipe: Pipeline,
    scales: Sequence[float],
    base: MeasuredSide,
    *,
    draw: Callable[[float], Side],
    measure: Callable[[Side], MeasuredSide],
    scorers: Sequence[Scorer],
    trained_on: Collection[str],
    rules: Rules,
) -> tuple[ScalePoint, ...]:
    """The comparison with `base` at each scale, in increasing order; `draw` is called with `pipe` at that scale."""
    points = []
    for scale in sorted(set(scales)):
        with at_lora_scale(pipe, scale):
            aligned = measure(draw(scale))
        points.append(
            ScalePoint(
                scale=scale,
                scorers=compare_scores(aligned, base, scorers, trained_on, rules),
                statistics=compare_statistics(aligned, base, rules),
            )
        )
    return tuple(points)


def check_scales(pipe: Pipeline, scales: Sequence[float]) -> None:
    """Refuse scales that are no numbers, and a pipeline without one LoRA that can be scaled."""
    for scale in scales:
        if not math.isfinite(scale):
            raise ValueError(f"a LoRA scale must be a finite number, got {scale}")
    if scales:
        _lora_layers(pipe)


@contextmanager
def at_lora_scale(pipe: Pipeline, scale: float) -> Generator[None]:
    """The pipeline with its LoRA acting `scale` times as strongly as it was trained; left as it was found.

    At 0 the adapter is switched off, which is the base to the bit for every kind of adapter (a DoRA scaled to 0 is not).
    """
    layers = _lora_layers(pipe)
    before = [(dict(layer.scaling), layer.disable_adapters) for layer in layers]
    # Switching layers on and off trains or freezes their weights.
    trained = {weight: weight.requires_grad for layer in layers for weight in layer.parameters()}
    try:
        for layer in layers:
            if layer.disable_adapters != (scale == 0):
                layer.enable_adapters(scale != 0)
            layer.set_scale(layer.active_adapters[0], scale)
        yield
    finally:
        for layer, (scaling, disabled) in zip(layers, before, strict=True):
            layer.scaling.update(scaling)
            if layer.disable_adapters != disabled:
                layer.enable_adapters(not disabled)
        for weight, wanted in trained.items():
            weight.requires_grad_(wanted)


def _lora_layers(pipe: Pipeline) -> list[Any]:
    """The layers of the pipeline's one LoRA."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    networks = [part for part in pipe.components.values() if isinstance(part, torch.nn.Module)]
    layers: list[Any] = [
        m for network in networks for m in network.modules() if isinstance(m, BaseTunerLayer) and m.active_adapters
    ]
    names = {name for layer in layers for name in layer.active_adapters}
    if len(names) != 1:
        found = "none" if not names else ", ".join(sorted(names))
        raise ValueError(f"LoRA scales need a pipeline with one LoRA, loaded and not merged; active here: {found}")
    if any(layer.merged for layer in layers):
        raise ValueError("LoRA scales need a LoRA that is not merged into the weights: call unfuse_lora() first")
    return layers
