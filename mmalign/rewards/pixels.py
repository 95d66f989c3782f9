"""Pictures as networks read them: resized, cropped or padded, normalised; from Pillow exactly, from tensors with gradient."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

if TYPE_CHECKING:
    from PIL import Image

# Of OpenAI's CLIP, and of nearly all that came after it.
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

# How half a pixel of margin is shared out: `round` in torchvision, `math.floor` in transformers.
Rounding = Callable[[float], int]


def to_pixels(image: Image.Image) -> Float[Tensor, "1 3 H W"]:
    """A picture's colours in [0, 1]."""
    values = torch.from_numpy(np.array(image.convert("RGB")))
    return values.permute(2, 0, 1)[None].float() / 255


def normalise(
    pixels: Float[Tensor, "B 3 H W"], mean: Sequence[float] = CLIP_MEAN, std: Sequence[float] = CLIP_STD
) -> Float[Tensor, "B 3 H W"]:
    """(pixels − mean) / std, a channel each."""
    return (pixels - pixels.new_tensor(mean)[:, None, None]) / pixels.new_tensor(std)[:, None, None]


def resize_pixels(pixels: Float[Tensor, "B 3 H W"], height: int, width: int) -> Float[Tensor, "B 3 height width"]:
    """Pillow's bicubic with gradient; nothing is rounded to 8 bits."""
    # Bicubic overshoots at edges; Pillow resizes rows, then columns, and its 8 bits cut the overshoot off both times.
    for size in ((pixels.shape[2], width), (height, width)):
        if size != tuple(pixels.shape[2:]):
            pixels = _bicubic(pixels, *size, antialias=True).clamp(0, 1)
    return pixels


def crop_images(images: Sequence[Image.Image], size: int) -> Float[Tensor, "B 3 size size"]:
    """Shorter side to `size`, then the middle square: Pillow's bicubic, in 8 bits, as CLIP's and BLIP's authors did it."""
    from PIL import Image

    rows = []
    for image in images:
        height, width = _short_side_size(image.height, image.width, size)
        resized = image.convert("RGB").resize((width, height), Image.Resampling.BICUBIC)
        top, left = round((height - size) / 2), round((width - size) / 2)
        rows.append(to_pixels(resized.crop((left, top, left + size, top + size))))
    return torch.cat(rows)


def crop_pixels(
    pixels: Float[Tensor, "B 3 H W"], size: int, *, short: int | None = None, rounding: Rounding = round
) -> Float[Tensor, "B 3 size size"]:
    """The same with gradient: shorter side to `short` (None: size), then the middle square.

    Nothing is rounded to 8 bits, so that a resized picture differs from Pillow's by up to 1.1 of the 255 levels of colour; one
    that needs no resizing is the same.
    """
    height, width = _short_side_size(pixels.shape[2], pixels.shape[3], short or size)
    pixels = resize_pixels(pixels, height, width)
    top, left = rounding((height - size) / 2), rounding((width - size) / 2)
    return pixels[:, :, top : top + size, left : left + size]


def pad_pixels(
    pixels: Float[Tensor, "B 3 H W"], size: int, *, antialias: bool = True
) -> Float[Tensor, "B 3 size size"]:
    """Longer side to `size`, then black bars to a square, with gradient. Bicubic overshoot stays, as in HPSv2."""
    height, width = pixels.shape[2:]
    scale = size / max(height, width)
    if scale != 1:
        height, width = (max(1, round(side * scale)) for side in (height, width))
        pixels = _bicubic(pixels, height, width, antialias=antialias)
    down, right = size - height, size - width
    return F.pad(pixels, (right // 2, right - right // 2, down // 2, down - down // 2))


def _short_side_size(height: int, width: int, short: int) -> tuple[int, int]:
    if height <= width:
        return short, int(short * width / height)
    return int(short * height / width), short


def _bicubic(pixels: Tensor, height: int, width: int, *, antialias: bool) -> Tensor:
    return F.interpolate(pixels, (height, width), mode="bicubic", align_corners=False, antialias=antialias)
