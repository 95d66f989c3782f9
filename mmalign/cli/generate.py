"""`mmalign generate`: pictures or clips from prompts and seeds, one file each, and all of them on one sheet."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mmalign.cli.models import (
    ALIASES,
    check_negative,
    device_option,
    load_pipeline,
    long_prompt_option,
    model_options,
    negative_options,
    prompt_options,
    read_prompts,
    sampling_of,
    sampling_options,
)
from mmalign.cli.options import Command, Given, Option, UsageError, number, switch, whole
from mmalign.cli.users import class_for, user_of, user_options, users_of
from mmalign.files import slug

_MODEL, _WHAT = "the model", "what is drawn"
_FOR = "for whom (models that PPD trained)"
_SHEET_ROWS = 32
# CogVideoX 1.0's own.
_FRAMES_PER_SECOND = 8.0
VERB = Command(
    prog="mmalign generate",
    description=(
        "Draws one picture for each prompt and seed (a video model: one clip, as animated WebP). It depends on its prompt and seed "
        "alone, not on its batch."
    ),
    example='mmalign generate --model playground --prompt "a red bag on a blue background" --seeds 0 1 2 3',
    options=[
        *model_options(group=_MODEL, lora=True),
        *negative_options(group=_MODEL),
        long_prompt_option(group=_MODEL),
        device_option(_MODEL),
        *prompt_options(_WHAT),
        Option(
            name="seeds",
            help="draw every prompt with each of these",
            convert=whole,
            metavar="N",
            many=True,
            group=_WHAT,
            nullable=True,
        ),
        Option(name="output_dir", help="where the pictures go", metavar="DIR", default="pictures", group=_WHAT),
        Option(
            name="grid",
            help="also write grid.png, prompts down and seeds across; of a clip three frames",
            convert=switch,
            default=True,
            group=_WHAT,
        ),
        *sampling_options(seed="of the first picture; the next ones count up"),
        *user_options(group=_FOR),
        Option(
            name="num_frames",
            help="frames of a clip; none is the video model's own",
            convert=whole,
            metavar="N",
            group=_WHAT,
            nullable=True,
        ),
        Option(
            name="frames_per_second",
            help="speed of a clip; none is 8",
            convert=number,
            metavar="X",
            group=_WHAT,
            nullable=True,
        ),
    ],
    aliases=ALIASES,
)


def run(argv: Sequence[str]) -> int:
    """Draws, and says where the pictures are."""
    given = VERB.read(argv)
    if given is None:
        return 0
    check_negative(given)
    prompts = read_prompts(given)
    if given["seeds"] and given["seed"] != 0:
        raise UsageError("--seed and --seeds both say which pictures; give one of them")
    # Without --seeds every prompt has a seed of its own, as evaluation does it.
    seeds = given["seeds"] or None
    pairs = (
        [(prompt, seed) for prompt in prompts for seed in seeds]
        if seeds
        else list(zip(prompts, _counted(given, prompts), strict=True))
    )
    files = draw(given, pairs, columns=len(seeds) if seeds else 1)
    print(
        f"{len(pairs)} {'clips' if files[0].suffix == '.webp' else 'pictures'} in {given['output_dir']}/"
        + (f"; all on one sheet: {files[-1]}" if given["grid"] else "")
    )
    return 0


def _counted(given: Given, prompts: list[str]) -> range:
    return range(given["seed"], given["seed"] + len(prompts))


def draw(given: Given, pairs: list[tuple[str, int]], columns: int) -> list[Path]:
    """The files that were written, batch by batch: a picture each, then what they show (`metadata.jsonl`), then the sheet."""
    from mmalign.data.clips import glance, write_clip
    from mmalign.denoisers.parts import draws_clips
    from mmalign.evaluation import side_by_side
    from mmalign.evaluation.generate import generate_batches
    from mmalign.files import write_file, written_aside

    call, users = user_of(given), users_of(given)
    pipe = load_pipeline(given, class_for(users), lora=given["lora"], negative=given["negative"])
    if users is not None:
        pipe.users = users
    clips, speed = draws_clips(pipe), given["frames_per_second"]
    if speed is not None and (speed <= 0 or not clips):
        raise UsageError("--frames-per-second must be positive, and is for video models")
    folder, ending = Path(given["output_dir"]), "webp" if clips else "png"
    names = [f"{number:04d}-seed{seed}-{slug(prompt)}.{ending}" for number, (prompt, seed) in enumerate(pairs)]
    files = [folder / name for name in names]
    images: list[Any] = []
    for batch in generate_batches(
        pipe,
        [prompt for prompt, _ in pairs],
        [seed for _, seed in pairs],
        **sampling_of(given),
        num_frames=given["num_frames"],
        call=call,
    ):
        for image in batch:
            with written_aside(files[len(images)]) as part:
                if clips:
                    write_clip(image, part, speed or _FRAMES_PER_SECOND)
                else:
                    image.save(part, "PNG")
            images.append(glance(image))
    shown = [
        {"file_name": name, "prompt": prompt, "seed": seed} for name, (prompt, seed) in zip(names, pairs, strict=True)
    ]
    write_file(folder / "metadata.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in shown))
    if given["grid"]:
        rows = [images[start : start + columns] for start in range(0, len(images), columns)][:_SHEET_ROWS]
        captions = [pairs[start][0] for start in range(0, len(pairs), columns)][:_SHEET_ROWS]
        titles = [f"seed {seed}" for _, seed in pairs[:columns]] if columns > 1 else ["each its own seed"]
        files.append(folder / "grid.png")
        side_by_side(rows, captions, titles, rows_per_line=1 if columns > 2 else 4).save(files[-1])
        if len(pairs) > _SHEET_ROWS * columns:
            print(f"the sheet shows the first {_SHEET_ROWS} of {len(pairs) // columns} prompts")
    return files
