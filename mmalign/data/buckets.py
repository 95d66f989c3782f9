"""Aspect-ratio buckets: pictures of about one area, each pair in the shape that is nearest to its own.

Sides are multiples of a quarter of the resolution, at most 64 pixels, rounded to what the network reads; shapes go from 1:2 to
2:1. A pair's shape is the one nearest (in log) to the geometric mean of its two pictures' aspect ratios: both share it, as they share
their noise, and neither is squeezed. What sticks out is cropped at the centre, of no picture more than half.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from mmalign.data.clips import PictureOrClip, frames_of
from mmalign.data.images import BadImage
from mmalign.data.raw import bad
from mmalign.data.records import PairRecord
from mmalign.denoisers import Denoiser

_STEP, _WIDEST = 64, 2.0
MOST_CROPPED = 0.5
RULE = "geometric mean of both aspects"


@dataclass(frozen=True)
class Bucket:
    """A shape in pixels, and (C, h, w) of its latents, of clips (C, F, h, w)."""

    height: int
    width: int
    latent: tuple[int, ...]

    @property
    def elements(self) -> int:
        """Numbers in one channel of a latent."""
        return math.prod(self.latent[1:])


def one_shape(denoiser: Denoiser, height: int, width: int, frames: int | None = None) -> Bucket:
    """That shape itself; ValueError where the network cannot read it."""
    return Bucket(height, width, denoiser.latent_shape(height, width, frames))


def buckets_of(denoiser: Denoiser, height: int, width: int, frames: int | None = None) -> list[Bucket]:
    """The buckets of `sizes_of` for what the network reads."""
    multiple = denoiser.pixels_per_latent * denoiser.patch
    return [one_shape(denoiser, *size, frames) for size in sizes_of(height, width, multiple)]


def sizes_of(height: int, width: int, multiple: int) -> list[tuple[int, int]]:
    """(height, width) of about height × width pixels, these among them, from the tallest to the widest."""
    step = max(multiple, min(_STEP, min(height, width) // 4) // multiple * multiple)
    area, shapes = height * width, {(height, width)}
    for side in range(step, math.isqrt(area) + 1, step):
        other = round(area / side / step) * step
        if other / side <= _WIDEST:
            shapes |= {(side, other), (other, side)}
    return sorted(shapes, key=lambda shape: shape[1] / shape[0])


def most_elements(buckets: Sequence[Bucket]) -> int:
    """Numbers in one channel of the largest latent."""
    return max(bucket.elements for bucket in buckets)


def bucket_of(record: PairRecord, buckets: Sequence[Bucket]) -> Bucket:
    """The pair's bucket, the only one or the nearest; InvalidRow where a picture of it would lose more than half."""
    if len(buckets) == 1:
        return buckets[0]
    try:
        return nearest(buckets, record.sides)
    except BadImage as error:
        raise bad(record.row, " and ".join(record.fields), str(error)) from error


def nearest(buckets: Sequence[Bucket], sides: Sequence[PictureOrClip]) -> Bucket:
    """The pair's bucket; BadImage where a picture of it would lose more than half."""
    images = [frames_of(side)[0] for side in sides]
    aspect = math.fsum(math.log(image.width / image.height) for image in images) / len(images)
    found = min(buckets, key=lambda bucket: abs(math.log(bucket.width / bucket.height) - aspect))
    for image in images:
        ratio = (image.width / image.height) / (found.width / found.height)
        lost = 1 - min(ratio, 1 / ratio)
        if lost > MOST_CROPPED:
            raise BadImage(
                f"{image.width}×{image.height} would lose {lost:.0%} in the pair's shape {found.width}×{found.height}: "
                "the two pictures differ too much, or are too long and thin"
            )
    return found
