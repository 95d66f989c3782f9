"""Draw one side of a comparison into a folder, resuming where an earlier run stopped."""

from __future__ import annotations

import hashlib
import io
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from PIL import Image

from mmalign.denoisers.parts import draws_clips
from mmalign.evaluation.fingerprint import model_fingerprint, scheduler_fingerprint
from mmalign.evaluation.generate import Pipeline, generate_batches
from mmalign.files import slug, write_file
from mmalign.rewards.fingerprints import text_hash


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplerSettings:
    """Everything besides model, prompt and seed that a picture depends on; of a side that was drawn, with its pictures' size."""

    num_inference_steps: int
    guidance_scale: float
    height: int | None
    width: int | None
    scheduler: str
    scheduler_fingerprint: str
    true_cfg_scale: float | None = None

    def told(self) -> dict[str, Any]:
        """By name; a true guidance only where there is one, so that what lies in a folder without it is found again."""
        return {name: value for name, value in asdict(self).items() if name != "true_cfg_scale" or value is not None}


@dataclass(frozen=True, slots=True, kw_only=True)
class Side:
    """The N pictures of one model, with what they were drawn from."""

    label: str
    model_fingerprint: str
    settings: SamplerSettings
    seed: int  # the number that, with the prompt, every picture's own seed comes from
    prompts: tuple[str, ...]  # (N,) the prompt of each picture; a prompt has several rows if it has several pictures
    seeds: tuple[int, ...]  # (N,)
    pictures: tuple[Path, ...]  # (N,)


def check_prompts(prompts: Sequence[str]) -> None:
    if isinstance(prompts, str) or not prompts:
        raise ValueError("prompts must be a list with at least one prompt.")


def paired_rows(prompts: Sequence[str], num_images_per_prompt: int, seed: int) -> tuple[list[str], list[int]]:
    """The N = prompts × pictures rows and their seeds, the same for every model.

    A row's seed depends on `seed`, the prompt's text and the picture's number only: adding or shuffling prompts changes
    no picture. A prompt that is listed twice simply has twice the pictures.
    """
    check_prompts(prompts)
    if num_images_per_prompt < 1:
        raise ValueError(f"num_images_per_prompt must be at least 1, got {num_images_per_prompt}.")
    drawn: Counter[str] = Counter()
    rows, seeds = [], []
    for prompt in prompts:
        for _ in range(num_images_per_prompt):
            text = f"{seed}:{drawn[prompt]}:{prompt}".encode("utf-8", "backslashreplace")
            rows.append(prompt)
            seeds.append(int.from_bytes(hashlib.sha256(text).digest()[:4], "big"))
            drawn[prompt] += 1
    return rows, seeds


def draw_side(
    pipe: Pipeline,
    prompts: Sequence[str],
    *,
    label: str,
    output_dir: str | Path,
    num_inference_steps: int,
    guidance_scale: float,
    true_cfg_scale: float | None = None,
    num_images_per_prompt: int = 1,
    seed: int = 0,
    batch_size: int = 8,
    height: int | None = None,
    width: int | None = None,
    fingerprint: str | None = None,
    call: Mapping[str, Any] | None = None,
    progress: bool = True,
) -> Side:
    """Draw every prompt with one model. Pictures of the same model, settings, prompt and seed are reused.

    fingerprint: names the model's weights; left out, it is computed from them. Draw the base with the adapter off and
    the aligned side with it on, one after the other, and hand both to `compare_sides`: one model in memory is enough.
    call: what else the pipeline's call is told, as JSON values.
    """
    if draws_clips(pipe):
        raise ValueError(
            f"{type(pipe).__name__} draws clips, and neither scorers nor the report read them yet: draw both models with "
            "`mmalign generate` and compare by eye"
        )
    settings = SamplerSettings(
        num_inference_steps=num_inference_steps,
        guidance_scale=guidance_scale,
        height=height,
        width=width,
        scheduler=type(pipe.scheduler).__name__,
        scheduler_fingerprint=scheduler_fingerprint(pipe.scheduler),
        true_cfg_scale=true_cfg_scale,
    )
    model = fingerprint or model_fingerprint(pipe)
    rows, seeds = paired_rows(prompts, num_images_per_prompt, seed)
    origin = {"model": model, "settings": settings.told()} | ({"call": dict(call)} if call else {})
    folder = Path(output_dir) / "pictures" / f"{slug(label)}-{text_hash(origin)[:12]}"
    folder.mkdir(parents=True, exist_ok=True)
    write_file(folder / "drawn_from.json", json.dumps(origin, indent=2))

    files = [folder / _file_name(prompt, number) for prompt, number in zip(rows, seeds, strict=True)]
    missing = [row for row, file in enumerate(files) if not _is_picture(file)]
    batches = generate_batches(
        pipe,
        [rows[row] for row in missing],
        [seeds[row] for row in missing],
        num_inference_steps=num_inference_steps,
        guidance_scale=guidance_scale,
        true_cfg_scale=true_cfg_scale,
        batch_size=batch_size,
        height=height,
        width=width,
        progress=progress and bool(missing),
        description=f"Drawing {label}",
        call=call,
    )
    remaining = iter(missing)
    with closing(batches):
        for batch in batches:
            for picture in batch:
                _store(picture, files[next(remaining)])
    with Image.open(files[0]) as first:
        width, height = first.size
    return Side(
        label=label,
        model_fingerprint=model,
        settings=replace(settings, height=height, width=width),
        seed=seed,
        prompts=tuple(rows),
        seeds=tuple(seeds),
        pictures=tuple(files),
    )


def prompt_numbers(prompts: Sequence[str]) -> list[int]:
    """(N,) the number of each row's prompt, in order of first appearance."""
    number: dict[str, int] = {}
    return [number.setdefault(prompt, len(number)) for prompt in prompts]


def _file_name(prompt: str, seed: int) -> str:
    return f"{slug(prompt)}-{text_hash(prompt)[:10]}-{seed}.png"


def _is_picture(file: Path) -> bool:
    """Whether a stored picture is there and whole; a damaged one is drawn again."""
    try:
        with Image.open(file) as image:
            image.load()
    except OSError:
        return False
    return True


def _store(picture: Image.Image, file: Path) -> None:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    write_file(file, buffer.getvalue())
