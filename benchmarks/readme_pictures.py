"""The pictures of the README: what the benchmarks' models draw for held-out prompts, evenly spaced; the same seeds in every column.

python benchmarks/readme_pictures.py self-npo ppd longalign rrpo
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import answers
import long_prompts
import negative_guidance
import personal
from PIL import Image

from mmalign.data.answer_records import VideoClip
from mmalign.evaluation import side_by_side
from mmalign.evaluation.generate import generate_batches
from mmalign.playground import answer_questions, measure, pairs, scene_prompts, settings

PICTURES = Path(__file__).parent.parent / "docs" / "pictures"


def self_npo() -> Image.Image:
    """Plain guidance, and guidance away from both kinds of negative side, on the base at its own guidance scale."""
    prompts = every(pairs.prompts().test, 8)
    columns = [
        draw(negative_guidance.sides("base", negative, 0, negative_guidance.WORK), prompts)
        for negative in ("plain", *negative_guidance.NEGATIVES)
    ]
    return sheet(columns, prompts, ["plain guidance", "Self-NPO", "Diffusion-NPO"], rows_per_line=2)


def ppd() -> Image.Image:
    """For new users, told by four pairs each: those at the two ends of two tastes."""
    prompts, (name, scale) = every(pairs.prompts().test, 6), personal.CHOSEN
    pipe = personal.trained("ppd", personal.CANDIDATES[name], seed=0)
    new = personal.people(len(pairs.prompts().test), personal.NEW_TASTES, "test")
    pipe.users = personal.tokens_of(new)
    columns, titles = [draw(pipe, prompts)], ["nobody"]
    for taste, ends in {"saturation": ("muted", "saturated"), "brightness": ("dark", "bright")}.items():
        order = sorted(new.tastes, key=lambda user: getattr(new.tastes[user], taste))
        for user, end in zip((order[0], order[-1]), ends, strict=True):
            columns.append(draw(pipe, prompts, user=user, user_scale=scale))
            titles.append(f"likes {end}")
    return sheet(columns, prompts, titles, rows_per_line=1)


def longalign() -> Image.Image:
    """Captions of four sentences, of which 77 tokens hold two: cut there, and read in segments by what stage "supervised" made."""
    prompts, titles = (
        every(scene_prompts.prompts().test, 4),
        {"base, cut": "cut at 77 tokens", "supervised, segments": "LongAlign"},
    )
    columns = [draw(long_prompts.pipeline(long_prompts.ROWS[row], 0)[0], prompts, world="scene-base") for row in titles]
    return sheet(columns, prompts, list(titles.values()), rows_per_line=2)


def rrpo() -> Image.Image:
    """Held-out questions that the base and RRPO answer differently, and the clips that they are about."""
    world, rows = "video", answers.ROWS
    ours, theirs = (
        answers.answers_of(answers.aligned(world, spec, 0), world, rows)
        for spec in (answers.rows_of(world)["rrpo"], None)
    )
    source = answer_questions.load(world, rows=rows)
    shown = every([row for row in range(len(source)) if ours[row] != theirs[row]], 6)
    clips = [next(part for part in source.prompt(row)[-1].parts if isinstance(part, VideoClip)) for row in shown]
    captions = [
        f"{source[row].text} It is: {source[row].right[0]}. Base: {theirs[row]}. RRPO: {ours[row]}." for row in shown
    ]
    titles = [f"{frame / clips[0].frames_per_second:g} s" for frame in clips[0].indices]
    return side_by_side([list(clip.frames) for clip in clips], captions, titles, cell_size=64, rows_per_line=2)


def every(ones: list[Any], number: int) -> list[Any]:
    """So many of them, evenly spaced."""
    return ones[:: len(ones) // number][:number]


def draw(pipe: Any, prompts: list[str], *, world: Any = "base", **call: Any) -> list[Image.Image]:
    """One picture a prompt, at the guidance scale of the world's base. call: what else the pipeline's call is told."""
    batches = generate_batches(
        pipe,
        prompts,
        list(range(len(prompts))),
        num_inference_steps=settings.NUM_INFERENCE_STEPS,
        guidance_scale=measure.chosen_guidance(world),
        batch_size=len(prompts),
        call=call,
    )
    return [image for batch in batches for image in batch]


def sheet(
    columns: list[list[Image.Image]], prompts: list[str], titles: list[str], *, rows_per_line: int
) -> Image.Image:
    """A row of pictures a prompt."""
    return side_by_side(
        list(zip(*columns, strict=True)), prompts, titles, rows_per_line=rows_per_line, max_caption_lines=12
    )


DRAWN: dict[str, Callable[[], Image.Image]] = {"self-npo": self_npo, "ppd": ppd, "longalign": longalign, "rrpo": rrpo}


def main() -> None:
    """Draws the named pictures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pictures", nargs="+", choices=DRAWN)
    for name in parser.parse_args().pictures:
        PICTURES.mkdir(exist_ok=True)
        DRAWN[name]().save(PICTURES / f"{name}.png", optimize=True)


if __name__ == "__main__":
    main()
