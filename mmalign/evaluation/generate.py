"""Draw pictures or clips so that each depends on its prompt and its seed only, never on the batch it was drawn in."""

from __future__ import annotations

import inspect
from collections.abc import Generator, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
from PIL import Image
from tqdm.auto import tqdm

from mmalign.denoisers.cascade_decoder import check_draws
from mmalign.denoisers.parts import bar_hidden, draws_clips, evaluating, networks

# A diffusers text-to-image or text-to-video pipeline; the common base class declares neither its call nor its components.
Pipeline: TypeAlias = Any


def generate(
    pipe: Pipeline,
    prompts: Sequence[str],
    seeds: Sequence[int],
    *,
    num_inference_steps: int,
    guidance_scale: float,
    true_cfg_scale: float | None = None,
    batch_size: int = 8,
    height: int | None = None,
    width: int | None = None,
    num_frames: int | None = None,
    progress: bool = True,
) -> list[Any]:
    """One picture for each (prompt, seed), in order, or of a video pipeline one clip, a tuple of frames.

    `height`, `width` and `num_frames` left out take the pipeline's own; only a video pipeline takes `num_frames`. `true_cfg_scale`: for
    models that were distilled to be told a guidance_scale (FLUX), guidance by a second, negative branch, of the empty prompt.
    """
    pictures: list[Any] = []
    for batch in generate_batches(
        pipe,
        prompts,
        seeds,
        num_inference_steps=num_inference_steps,
        guidance_scale=guidance_scale,
        true_cfg_scale=true_cfg_scale,
        batch_size=batch_size,
        height=height,
        width=width,
        num_frames=num_frames,
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
    true_cfg_scale: float | None = None,
    batch_size: int = 8,
    height: int | None = None,
    width: int | None = None,
    num_frames: int | None = None,
    progress: bool = True,
    description: str = "Drawing",
    call: Mapping[str, Any] | None = None,
) -> Generator[list[Any]]:
    """The pictures of `generate`, batch by batch, so that a caller can store them as they come.

    `call`: what else the pipeline's call is told.
    """
    if len(prompts) != len(seeds):
        raise ValueError(f"Every prompt needs a seed, but there are {len(prompts)} prompts and {len(seeds)} seeds.")
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}.")
    check_draws(pipe)
    clips = draws_clips(pipe)
    if num_frames is not None and not clips:
        raise ValueError(f"num_frames={num_frames} has no effect: {type(pipe).__name__} draws pictures; leave it out")
    check_true_guidance(pipe, true_cfg_scale)
    asked = (("height", height), ("width", width), ("num_frames", num_frames))
    size = {name: value for name, value in asked if value is not None}
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
                **({} if true_cfg_scale is None else _true_guidance(true_cfg_scale, len(generators))),
                **(call or {}),
            )
            _check_shown(output, prompts[rows], seeds[rows])
            drawn = np.asarray(output.frames if clips else output.images)
            yield _pictures(drawn, prompts[rows], seeds[rows])
            bar.update(len(generators))


def check_true_guidance(pipe: Pipeline, scale: float | None) -> None:
    """ValueError for a scale that would not act."""
    if scale is None:
        return
    if "true_cfg_scale" not in inspect.signature(type(pipe).__call__).parameters:
        raise ValueError(
            f"true_cfg_scale={scale:g} has no effect: {type(pipe).__name__} guides by guidance_scale; leave it out"
        )
    if not scale > 1:
        raise ValueError(f"true_cfg_scale must be above 1, got {scale:g}: leave it out to draw without that branch")


def _true_guidance(scale: float, rows: int) -> dict[str, Any]:
    return {"true_cfg_scale": scale, "negative_prompt": [""] * rows}


def _check_shown(output: Any, prompts: Sequence[str], seeds: Sequence[int]) -> None:
    """Refuse pictures that a safety checker blacked out; only pipelines that may have one tell so, None where it is off."""
    flags = getattr(output, "nsfw_content_detected", None) or []
    for flagged, prompt, seed in zip(flags, prompts, seeds, strict=False):
        if flagged:
            raise ValueError(
                f"The safety checker blacked out the picture of {prompt!r} with seed {seed}, which would be scored as it is. "
                "Load the pipeline with safety_checker=None (--no-safety-checker), or leave the prompt out."
            )


def _pictures(pixels: np.ndarray, prompts: Sequence[str], seeds: Sequence[int]) -> list[Any]:
    """(B, H, W, 3) in [0, 1] → B pictures, (B, F, H, W, 3) → B clips; what is not finite is an error that says how to draw it again."""
    if len(pixels) != len(prompts):
        raise ValueError(f"The pipeline returned {len(pixels)} pictures for {len(prompts)} prompts.")
    for image, prompt, seed in zip(pixels, prompts, seeds, strict=True):
        if not np.isfinite(image).all():
            raise ValueError(
                f"The picture of {prompt!r} with seed {seed} has NaN or infinite pixels. "
                "Load the pipeline in float32 or bfloat16, or check whether training diverged."
            )
    whole = (pixels * 255).round().astype(np.uint8)
    if whole.ndim == 4:
        return [Image.fromarray(image) for image in whole]
    return [tuple(Image.fromarray(frame) for frame in clip) for clip in whole]
