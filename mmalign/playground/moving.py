"""The third world: clips of one or two garments that move, one after the other, in eight frames of 32×32 pixels.

Whatever a question can be about is known when a clip is drawn: garment, colour, way, which came first, and the background.
Rows are keyed: row i of a stream is the same whichever rows are asked for with it.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from mmalign.data.answer_records import VideoClip
from mmalign.playground import world
from mmalign.playground.photographs import Photographs

NUM_FRAMES = 8
FRAMES_PER_SECOND = 4.0
WAYS = ("left", "right", "up", "down")
TWO_SHARE = 0.6
HALF_WAY = 5.5
# What `world.Scenes.shift` must grow by for a garment to go that way.
_SHIFTS = ((1.0, 0.0), (-1.0, 0.0), (0.0, 1.0), (0.0, -1.0))


@dataclass(frozen=True)
class Thing:
    """A garment on its way.

    garment, colour, way: indices into GARMENTS, COLOURS, WAYS. scale: its size, and aside: how far it is off the middle across its
    way, in pixels. tint: offset of the hue (turns), saturation, value.
    """

    photograph: int
    garment: int
    colour: int
    way: int
    scale: float
    aside: float
    tint: tuple[float, float, float]


@dataclass(frozen=True)
class Clip:
    """One or two things in the order in which they appear. starts: the frame in which each does; it stays until the next one."""

    things: tuple[Thing, ...]
    starts: tuple[int, ...]
    background: int
    tint: tuple[float, float, float]


def draw_clips(labels: np.ndarray, rows: Iterable[int], *, seed: int) -> list[Clip]:
    """The clips of `rows` of the endless stream `seed`; row i shows photograph 2·i modulo their number, and one close behind it."""
    return [_draw(labels, int(row), np.random.default_rng([seed, int(row)])) for row in rows]


def _draw(labels: np.ndarray, row: int, rng: np.random.Generator) -> Clip:
    """Two things differ in garment and in colour, and neither has the background's."""
    number = 1 + int(rng.random() < TWO_SHARE)
    first = 2 * row % len(labels)
    second = next(
        at % len(labels) for at in range(first + 1, first + len(labels)) if labels[at % len(labels)] != labels[first]
    )
    background, *colours = rng.permutation(len(world.COLOURS))[: 1 + number].tolist()

    def tint() -> tuple[float, float, float]:
        jitter, saturation, value = rng.random(3).tolist()
        return (jitter - 0.5) * 10 / 360, 0.55 + 0.45 * saturation, 0.65 + 0.35 * value

    things = tuple(
        Thing(
            photograph=photograph,
            garment=int(labels[photograph]),
            colour=colour,
            way=int(rng.integers(len(WAYS))),
            scale=float(rng.uniform(22, 26)),
            aside=float(rng.uniform(-3, 3)),
            tint=tint(),
        )
        for photograph, colour in zip((first, second), colours, strict=False)
    )
    starts = (0, int(rng.integers(3, 6)))[:number]
    return Clip(things, starts, background, tint())


def compose(photographs: Photographs, clips: Sequence[Clip]) -> Float[Tensor, "B 8 3 32 32"]:
    """The frames of `clips`; values in [0, 1]."""
    frames = compose_frames(photographs, [(clip, frame) for clip in clips for frame in range(NUM_FRAMES)])
    return frames.unflatten(0, (len(clips), NUM_FRAMES))


def compose_frames(photographs: Photographs, frames: Sequence[tuple[Clip, int]]) -> Float[Tensor, "N 3 32 32"]:
    """Single frames, by clip and number."""
    behind = [clip for clip, _ in frames]
    things, shifts = zip(*(shown_in(clip, frame) for clip, frame in frames), strict=True)
    tints = torch.tensor([[thing.tint, clip.tint] for thing, clip in zip(things, behind, strict=True)])
    scenes = world.Scenes(
        garment=torch.tensor([thing.garment for thing in things]),
        colour=torch.tensor([thing.colour for thing in things]),
        background=torch.tensor([clip.background for clip in behind]),
        template=torch.zeros(len(things), dtype=torch.long),
        hue_jitter=tints[..., 0],
        saturation=tints[..., 1],
        value=tints[..., 2],
        scale=torch.tensor([thing.scale for thing in things]),
        shift=torch.tensor(shifts),
    )
    rows = torch.tensor([thing.photograph for thing in things])
    return world.compose(photographs, rows, scenes)


def shown_in(clip: Clip, frame: int) -> tuple[Thing, tuple[float, float]]:
    """What is there in a frame, and how far it is shifted, as `world.Scenes` says it: leftwards and upwards."""
    at = max(number for number, start in enumerate(clip.starts) if start <= frame)
    start, stop = (*clip.starts, NUM_FRAMES)[at : at + 2]
    along = HALF_WAY * (2 * (frame - start) / (stop - 1 - start) - 1)
    thing = clip.things[at]
    x, y = _SHIFTS[thing.way]
    return thing, (along * x + thing.aside * abs(y), along * y + thing.aside * abs(x))


def to_video(frames: Float[Tensor, "8 3 32 32"]) -> VideoClip:
    """A composed clip as data sets hold one: frames of 8 bits."""
    pictures = (frames.movedim(1, -1) * 255).round().byte().numpy()
    return VideoClip(
        tuple(Image.fromarray(picture) for picture in pictures),
        tuple(range(len(pictures))),
        FRAMES_PER_SECOND,
        len(pictures),
    )
