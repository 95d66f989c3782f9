"""The pictures of the README: what the benchmarks' models draw for held-out prompts, evenly spaced; the same seeds in every column.

python benchmarks/readme_pictures.py self-npo ppd
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import negative_guidance
import personal
from PIL import Image

from mmalign.evaluation import side_by_side
from mmalign.evaluation.generate import generate_batches
from mmalign.playground import measure, pairs, settings

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


def every(prompts: list[str], number: int) -> list[str]:
    """So many of the prompts, evenly spaced."""
    return prompts[:: len(prompts) // number][:number]


def draw(pipe: Any, prompts: list[str], **call: Any) -> list[Image.Image]:
    """One picture a prompt, as the benchmarks draw."""
    batches = generate_batches(
        pipe,
        prompts,
        list(range(len(prompts))),
        num_inference_steps=settings.NUM_INFERENCE_STEPS,
        guidance_scale=measure.chosen_guidance(),
        batch_size=len(prompts),
        call=call,
    )
    return [image for batch in batches for image in batch]


def sheet(
    columns: list[list[Image.Image]], prompts: list[str], titles: list[str], *, rows_per_line: int
) -> Image.Image:
    """A row of pictures a prompt."""
    return side_by_side(list(zip(*columns, strict=True)), prompts, titles, rows_per_line=rows_per_line)


DRAWN: dict[str, Callable[[], Image.Image]] = {"self-npo": self_npo, "ppd": ppd}


def main() -> None:
    """Draws the named pictures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pictures", nargs="+", choices=DRAWN)
    for name in parser.parse_args().pictures:
        PICTURES.mkdir(exist_ok=True)
        DRAWN[name]().save(PICTURES / f"{name}.png", optimize=True)


if __name__ == "__main__":
    main()
