"""The second world: four pictures of the first in one of 64×64 pixels, told in one sentence a cell.

A batch of B scenes is a `world.Scenes` of 4·B cells: cell 4·i + p stands at PLACES[p] of scene i. So whatever reads the first world
(its measurements, its judges) reads this one cell by cell. A sentence names what it is about (garment, colour, background), and may
name seven properties more, all of them true; a caption holds the sentences of some cells or of all, in any order.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from mmalign.playground import world
from mmalign.playground.photographs import GARMENTS, Photographs

SIZE = 2 * world.SIZE
PLACES = ("top left", "top right", "bottom left", "bottom right")
NUM_PROPERTIES = 7
_WORDINGS = (
    "{place}: {own}{garment}{moved} on a {behind}background.",
    "At the {place} on a {behind}background {own}{garment}{moved}.",
    "The {place} shows {own}{garment} on a {behind}background{moved}.",
    "{place}, a {behind}background with {own}{garment}{moved} on it.",
)
_SENTENCE = re.compile(
    rf"(?P<place>{'|'.join(PLACES)})\b(?=.*\b(?P<colour>{'|'.join(world.COLOURS)}) (?P<garment>{'|'.join(GARMENTS)})\b)"
    rf"(?=.*\b(?P<background>{'|'.join(world.COLOURS)}) background\b)"
)


@dataclass(frozen=True)
class Asked:
    """What one sentence asks for: indices into PLACES, GARMENTS and COLOURS."""

    place: int
    garment: int
    colour: int
    background: int


def draw_scenes(labels: np.ndarray, rows: Int[Tensor, " B"], *, seed: int) -> world.Scenes:
    """The 4·B cells of scenes `rows` of the endless stream `seed`; the cells of scene i show photographs 4·i to 4·i + 3."""
    return world.draw_scenes(labels, cell_rows(rows), seed=seed)


def cell_rows(rows: Int[Tensor, " B"]) -> Int[Tensor, " 4*B"]:
    """The rows of the first world's stream in which the cells of scenes `rows` stand."""
    return (rows[:, None] * len(PLACES) + torch.arange(len(PLACES))).flatten()


def compose(photographs: Photographs, rows: Int[Tensor, " B"], cells: world.Scenes) -> Float[Tensor, "B 3 64 64"]:
    """The pictures of scenes `rows`, whose cells are `cells`; values in [0, 1]."""
    return join(world.compose(photographs, cell_rows(rows), cells))


def join(cells: Float[Tensor, "B4 C H W"]) -> Float[Tensor, "B C 2*H 2*W"]:
    """Four cells after another as one picture (or their latents as one's)."""
    square = cells.unflatten(0, (-1, 2, 2))
    return square.permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)


def split(images: Float[Tensor, "B C H W"]) -> Float[Tensor, "B4 C H/2 W/2"]:
    """The inverse of `join`."""
    square = images.unflatten(3, (2, -1)).unflatten(2, (2, -1))
    return square.permute(0, 2, 4, 1, 3, 5).flatten(0, 2)


def properties(cells: world.Scenes, cell: int) -> tuple[str, ...]:
    """The seven words that are true of a cell: size; vividness and light of the garment, of its background; height; side."""
    saturation, value, shift = cells.saturation[cell], cells.value[cell], cells.shift[cell]

    def word(amount: Tensor, bounds: Sequence[float], words: Sequence[str]) -> str:
        return words[sum(float(amount) > bound for bound in bounds)]

    tints = [
        word(amount[side], [middle], words)
        for side in (0, 1)
        for amount, middle, words in ((saturation, 0.775, ("pale", "vivid")), (value, 0.825, ("dim", "bright")))
    ]
    return (
        word(cells.scale[cell], (24, 27), ("small", "medium", "large")),
        *tints,
        word(shift[1], (-2 / 3, 2 / 3), ("lowered", "level", "raised")),
        word(shift[0], (-2 / 3, 2 / 3), ("rightwards", "centred", "leftwards")),
    )


def sentence(cells: world.Scenes, cell: int, wording: int, told: Sequence[bool] = (True,) * NUM_PROPERTIES) -> str:
    """The sentence of a cell, in one of four wordings, with those of its properties that are `told`."""
    size, vivid, light, vivid_behind, light_behind, height, side = (
        word + " " if tell else "" for word, tell in zip(properties(cells, cell), told, strict=True)
    )
    garment = GARMENTS[int(cells.garment[cell])]
    colour, background = (world.COLOURS[int(c[cell])] for c in (cells.colour, cells.background))
    moved = " ".join((height + side).split())
    text = _WORDINGS[wording].format(
        place=PLACES[cell % len(PLACES)],
        own=f"{'a pair of' if garment == 'trousers' else 'a'} {size}{vivid}{light}{colour} ",
        garment=garment,
        behind=f"{vivid_behind}{light_behind}{background} ",
        moved=f", {moved}," if moved else "",
    )
    text = text.replace(",.", ".").replace("a orange", "an orange")
    return text[0].upper() + text[1:]


def caption(cells: world.Scenes, scene: int, rng: np.random.Generator) -> str:
    """A long caption: all four cells with all that is true of them, in an order and wordings drawn from `rng`."""
    return " ".join(
        sentence(cells, len(PLACES) * scene + int(place), int(rng.integers(len(_WORDINGS))))
        for place in rng.permutation(len(PLACES))
    )


def short_caption(
    cells: world.Scenes, scene: int, number: int, rng: np.random.Generator, fits: Callable[[str], bool]
) -> str:
    """`number` sentences about a scene, with as many drawn properties as `fits` lets through; ValueError if it lets none."""
    places = rng.permutation(len(PLACES))[:number]
    wordings = rng.integers(len(_WORDINGS), size=number)
    order = rng.permutation(number * NUM_PROPERTIES)
    for tell in range(int(rng.integers(len(order) + 1)), -1, -1):
        told = np.isin(np.arange(len(order)), order[:tell]).reshape(number, NUM_PROPERTIES)
        text = " ".join(
            sentence(cells, len(PLACES) * scene + int(place), int(wording), tuple(map(bool, part)))
            for place, wording, part in zip(places, wordings, told, strict=True)
        )
        if fits(text):
            return text
    raise ValueError(f"not even the shortest wording fits: {text!r}")


def read_caption(text: str) -> list[Asked]:
    """What each sentence of a caption asks for, in its order; ValueError for a text that is not of this world."""
    sentences = [part for part in text.split(".") if part.strip()]
    found = [_SENTENCE.search(part.lower()) for part in sentences]
    if not sentences or None in found:
        wrong = sentences[found.index(None)].strip() if sentences else text
        raise ValueError(
            f"no sentence of the playground's scenes: {wrong!r} (say 'Top left: a red sneaker on a blue background.')"
        )
    return [
        Asked(
            PLACES.index(match["place"]),
            GARMENTS.index(match["garment"]),
            world.COLOURS.index(match["colour"]),
            world.COLOURS.index(match["background"]),
        )
        for match in found
        if match
    ]
