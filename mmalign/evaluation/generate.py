"""Draw pictures so that each depends on its prompt and its seed only, never on the batch it was drawn in."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
from PIL import Image
from tqdm.auto import tqdm

from mmalign.denoisers.parts import bar_hidden, evaluating, networks

# A diffusers text-to-image pipeline; the common base class declares neither its call nor its components.
Pipeline: TypeAlias = Any


def generate(
    pipe: Pipeline,
    prompts: Sequence[str],
    seeds: Sequence[int],
    *,
    num_inference_steps: int,
    guidance_scale: float,
    batch_size: int = 8,
    height: int | None = None,
    width: int | None = None,
    progress: bool = True,
) -> list[Image.Image]:
    """One picture for each (prompt, seed), in order; `height` and `width` left out take the pipeline's own size."""
    pictures: list[Image.Image] = []
    for batch in generate_batches(
        pipe,
        prompts,
        seeds,
        num_inference_steps=num_inference_steps,
        guidance_scale=guidance_scale,
        batch_size=batch_size,
        height=height,
        width=width,
        progress=progress,
    ):
        pictures.extend(batch)
    return pictures


def generate_batches(
    pipe: Pipeline,
    prompts: Sequence[str],
    seeds: Sequence[int],
    *,
    num_inference_steps: int,
    guidance_scale: float,
    batch_size: int = 8,
    height: int | None = None,
    width: int | None = None,
    progress: bool = True,
    description: str = "Drawing",
) -> Generator[list[Image.Image]]:
    """The pictures of `generate`, batch by batch, so that a caller can store them as they come."""
    if len(prompts) != len(seeds):
        raise ValueError(f"Every prompt needs a seed, but there are {len(prompts)} prompts and {len(seeds)} seeds.")
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}.")
    size = {name: value for name, value in (("height", height), ("width", width)) if value is not None}
    with (
        bar_hidden(pipe),
        evaluating(networks(pipe).values()),
        tqdm(total=len(prompts), desc=description, unit="picture", disable=not progress) as bar,
    ):
        for start in range(0, len(prompts), batch_size):
            rows = slice(start, start + batch_size)
            generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds[rows]]
            output = pipe(
                list(prompts[rows]),
                generator=generators,
                num_inference_steps=num_inference_steps,
                guidance_scale=guidance_scale,
                output_type="np",
                **size,
            )
            yield _pictures(np.asarray(output.images), prompts[rows], seeds[rows])
            bar.update(len(generators))


def _pictures(pixels: np.ndarray, prompts: Sequence[str], seeds: Sequence[int]) -> list[Image.Image]:
    """(B, H, W, 3) in [0, 1] → B pictures; a picture that is not finite is an error that says how to draw it again."""
    if len(pixels) != len(prompts):
        raise ValueError(f"The pipeline returned {len(pixels)} pictures for {len(prompts)} prompts.")
    for image, prompt, seed in zip(pixels, prompts, seeds, strict=True):
        if not np.isfinite(image).all():
            raise ValueError(
                f"The picture of {prompt!r} with seed {seed} has NaN or infinite pixels. "
                "Load the pipeline in float32 or bfloat16, or check whether training diverged."
            )
    return [Image.fromarray(image) for image in (pixels * 255).round().astype(np.uint8)]
