"""Sample pictures during training: the same prompts and seeds every time, so that a row of pictures shows what changed."""

import io
import logging
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from mmalign.evaluation.files import write_atomically
from mmalign.evaluation.generate import generate
from mmalign.evaluation.grid import side_by_side
from mmalign.training.config import DenoiserConfig

logger = logging.getLogger("mmalign")


class SamplePictures(TrainerCallback):
    """Draws `validation_prompts` before the first step and every `validation_steps` steps into `samples/step-*.png`."""

    def __init__(self, pipe: Any) -> None:
        self.pipe = pipe
        self._first: list[Any] | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Draws what the model draws before training (or where it is resumed)."""
        if args.validation_steps and state.is_world_process_zero:
            self._draw(args, state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Draws every `validation_steps` steps."""
        if args.validation_steps and state.global_step % args.validation_steps == 0 and state.is_world_process_zero:
            self._draw(args, state.global_step)

    def _draw(self, args: DenoiserConfig, step: int) -> None:
        prompts = args.validation_prompts
        guidance = args.validation_guidance_scale
        images = generate(
            self.pipe,
            prompts,
            [args.validation_seed + i for i in range(len(prompts))],
            num_inference_steps=args.validation_inference_steps,
            guidance_scale=7.5 if guidance is None else guidance,
            progress=False,
        )
        self._first = self._first or images
        rows = [[before, now] for before, now in zip(self._first, images, strict=True)]
        buffer = io.BytesIO()
        side_by_side(rows, prompts, ["start", f"step {step}"]).save(buffer, "PNG")
        folder = Path(args.output_dir or ".") / "samples"
        folder.mkdir(parents=True, exist_ok=True)
        path = write_atomically(folder / f"step-{step:06d}.png", buffer.getvalue())
        logger.info("sample pictures: %s", path)
