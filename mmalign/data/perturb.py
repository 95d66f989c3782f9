"""Clips made harder to see, so that a model tells of them what is not there: RRPO's way to a model's own mistakes.

One light block hides the same part of every frame, and frames are out of order, by a little or altogether.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

if TYPE_CHECKING:
    from PIL import Image

Shuffle = Literal["none", "local", "global"]
LIGHT = (235, 235, 235)


def perturb(
    frames: Sequence[Image.Image],
    *,
    area: tuple[float, float] = (0.25, 0.5),
    shuffle: Shuffle = "local",
    window: int = 2,
    generator: torch.Generator,
) -> tuple[Image.Image, ...]:
    """New frames behind one light block, in another order.

    area: bounds of the share of a frame that the block hides, (0, 0) for no block; it has the frame's proportions. window: how many
    places a frame moves at most in a local shuffle. Frames are of one size; ValueError for bounds that no share keeps.
    """
    low, high = area
    if not 0 <= low <= high <= 1:
        raise ValueError(f"area must be two rising shares in [0, 1], got {area}")
    width, height = frames[0].size
    share = low + (high - low) * float(torch.rand((), generator=generator, dtype=torch.float64))
    rows = round(height * math.sqrt(share))
    columns = min(width, round(share * width * height / rows)) if rows else 0
    top = int(torch.randint(height - rows + 1, (), generator=generator))
    left = int(torch.randint(width - columns + 1, (), generator=generator))
    hidden = [frame.copy() for frame in frames]
    for frame in hidden:
        frame.paste(LIGHT, (left, top, left + columns, top + rows))
    return tuple(hidden[at] for at in shuffled(len(frames), shuffle, window=window, generator=generator).tolist())


def shuffled(number: int, shuffle: Shuffle, *, window: int = 2, generator: torch.Generator) -> Tensor:
    """(number,) which frame comes at each place; in a local shuffle none moves by more than `window` places, from 0 up."""
    if window < 0:
        raise ValueError(f"window must not be negative, got {window}")
    places = torch.arange(number)
    match shuffle:
        case "none":
            return places
        case "global":
            return torch.randperm(number, generator=generator)
        case "local":
            # Place i + [0, window + 1) can be overtaken only by the next `window` places.
            noise = torch.rand(number, generator=generator, dtype=torch.float64)
            return (places + noise * (window + 1)).argsort(stable=True)
        case _:
            raise ValueError(f"shuffle must be none, local or global, got {shuffle!r}")
