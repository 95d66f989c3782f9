"""Sample pictures during training: the same prompts and seeds every time, so that a row of pictures shows what changed."""

import inspect
import logging
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import TrainerCallback

from mmalign.data.clips import glance
from mmalign.denoisers.parts import bar_hidden, draws_clips, evaluating, networks
from mmalign.evaluation import side_by_side
from mmalign.files import staged
from mmalign.training.devices import on_device
from mmalign.training.run_config import RunConfig

logger = logging.getLogger("mmalign")


class SamplePictures(TrainerCallback):
    """Draws `validation_prompts` before the first step and every `validation_steps` steps into `samples/step-*.png`.

    A sheet has a row a prompt: what the model drew when this run was started, and what it draws now.
    `weights`: puts those in place that are to draw.
    """

    def __init__(self, pipe: Any, weights: Callable[[], AbstractContextManager]) -> None:
        self.pipe, self._weights = pipe, weights
        self._first: tuple[int, list[Image.Image]] | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Draws what the model draws before training (or where it is resumed)."""
        if state.is_world_process_zero:
            self._save(args, state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Draws every `validation_steps` steps."""
        if state.is_world_process_zero and state.global_step % args.validation_steps == 0:
            self._save(args, state.global_step)

    def _save(self, args: RunConfig, step: int) -> None:
        with self._weights():
            images = draw(self.pipe, args)
        self._first = self._first or (step, images)
        before, first = self._first
        titles = [f"step {before}"] if step == before else [f"step {before}", f"step {step}"]
        rows = zip(*[first, images][: len(titles)], strict=True)
        picture = side_by_side(list(rows), args.validation_prompts, titles)
        folder = Path(args.output_dir or ".") / "samples"
        with staged(folder) as part:
            picture.save(part / f"step-{step:06d}.png")
        logger.info("sample pictures: %s", folder / f"step-{step:06d}.png")


def draw(pipe: Any, args: RunConfig) -> list[Image.Image]:
    """One picture a prompt, prompt i from seed `validation_seed` + i, at the pipeline's own guidance unless one is set.

    Of a clip the first, the middle and the last frame, side by side.
    """
    parts = list(networks(pipe).values())
    guidance = args.validation_guidance_scale
    if guidance is None:
        guidance = inspect.signature(type(pipe).__call__).parameters["guidance_scale"].default
    with on_device(parts, args.device), evaluating(parts), bar_hidden(pipe):
        drawn = [
            pipe(
                prompt,
                generator=torch.Generator().manual_seed(args.validation_seed + i),
                num_inference_steps=args.validation_inference_steps,
                guidance_scale=guidance,
                **args.sampling(),
                **({} if args.num_frames is None else {"num_frames": args.num_frames}),
            )
            for i, prompt in enumerate(args.validation_prompts)
        ]
    return [glance(tuple(output.frames[0])) if draws_clips(pipe) else output.images[0] for output in drawn]
