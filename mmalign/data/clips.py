"""Clips: a side of a pair that is several frames, sampled evenly to as many as a video model reads.

A list of pictures, a folder of frame files (in the order of their names, numbers counting as numbers), an animated file that Pillow
reads (GIF, APNG, WebP), or a video (.mp4, .mov, .webm; extra `video`). A still picture is a clip of one frame. Frames are counted,
not timed: what is shown longer weighs no more.
"""

from __future__ import annotations

import io
import re
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from mmalign.data.images import (
    ENDINGS,
    MAX_PIXELS,
    BadImage,
    content,
    damage_told,
    fit,
    inside,
    loaded,
    opened,
    to_pixels,
    to_rgb,
)

if TYPE_CHECKING:
    from PIL import Image

Clip: TypeAlias = "tuple[Image.Image, ...]"
PictureOrClip: TypeAlias = "Image.Image | Clip"

VIDEO_ENDINGS = frozenset("mp4 mov webm".split())
# Of a source, whether all of them are used or not.
MAX_FRAMES = 4096
# Of all frames that are used: 81 of full HD, and some.
MAX_CLIP_PIXELS = 2**28
# Pictures in the container that MP4 has too.
_PICTURE_BRANDS = {b"avif", b"avis", b"heic", b"mif1", b"msf1"}


def read_clip(
    value: Any,
    num_frames: int,
    *,
    roots: Sequence[Path] = (),
    absolute: bool = False,
    max_pixels: int = MAX_PIXELS,
) -> Clip:
    """`num_frames` frames of a clip, evenly spaced from its first to its last, as `to_rgb` reads pictures. Raises BadImage."""
    from PIL import Image

    value = content(value)
    place = inside(value, roots, absolute, folders=True) if isinstance(value, str | Path) else None
    if place is not None and place.is_dir():
        value = [f"{value}/{file.name}" for file in frame_files(place)]
    if isinstance(value, Image.Image):
        if getattr(value, "n_frames", 1) > 1:
            raise BadImage("an opened animation: pass its path, its bytes, or a list of its frames")
        value = [value]
    if isinstance(value, list | tuple):
        frames = _of_list(value, num_frames, roots, absolute, max_pixels)
    elif (kind := _container(value if place is None else place)) is not None:
        frames = _of_video(value if place is None else place, kind, num_frames, max_pixels)
    else:
        frames = _of_animation(value, num_frames, roots, absolute, max_pixels)
    sizes = {frame.size for frame in frames}
    if len(sizes) > 1:
        raise BadImage(f"frames of different sizes: {', '.join(f'{w}×{h}' for w, h in sorted(sizes)[:3])}")
    return tuple(frames)


def fitted(
    side: PictureOrClip, height: int, width: int
) -> tuple[Float[Tensor, "3 *F H W"], tuple[int, int, int, int, int, int]]:
    """Pixels in [−1, 1] of a picture (3, H, W) or a clip (3, F, H, W), resized and cropped by `fit`, and the numbers of `fit`."""
    fits = [fit(frame, height, width) for frame in frames_of(side)]
    pixels = [to_pixels(frame) for frame, _ in fits]
    return torch.stack(pixels, dim=1) if isinstance(side, tuple) else pixels[0], fits[0][1]


def frames_of(side: PictureOrClip) -> Clip:
    """The frames of a clip; a picture is the only one of its own."""
    return side if isinstance(side, tuple) else (side,)


def glance(side: PictureOrClip) -> Image.Image:
    """One picture to look at: a picture itself; of a clip the first, the middle and the last frame side by side."""
    from PIL import Image

    if not isinstance(side, tuple):
        return side
    shown = [side[at] for at in dict.fromkeys((0, len(side) // 2, len(side) - 1))]
    width, height = side[0].size
    strip = Image.new("RGB", (width * len(shown), height))
    for at, frame in enumerate(shown):
        strip.paste(frame, (at * width, 0))
    return strip


def write_clip(clip: Clip, path: Path, frames_per_second: float) -> None:
    """An animated WebP, lossless, so that it can be read back as data."""
    duration = round(1000 / frames_per_second)
    clip[0].save(path, "WEBP", save_all=True, append_images=clip[1:], duration=duration, loop=0, lossless=True)


def frame_files(folder: Path) -> list[Path]:
    """The pictures in a folder, in the order of their names: frame_2 before frame_10."""

    def order(file: Path) -> list[Any]:
        return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", file.name)]

    files = [file for file in folder.iterdir() if file.suffix.lower()[1:] in ENDINGS and not file.name.startswith(".")]
    return sorted(files, key=order)


def _evenly(total: int, wanted: int) -> list[int]:
    """Which of `total` frames are used: the first, the last, and others evenly between."""
    if total > MAX_FRAMES:
        raise BadImage(f"more than {MAX_FRAMES} frames: cut the clip")
    if total < wanted:
        raise BadImage(f"holds {total} frame(s), and {wanted} are asked for (num_frames)")
    return [int(at) for at in np.linspace(0, total - 1, wanted).round()]


def _of_list(
    items: Sequence[Any], num_frames: int, roots: Sequence[Path], absolute: bool, max_pixels: int
) -> list[Image.Image]:
    frames = []
    for at in _evenly(len(items), num_frames):
        try:
            frames.append(to_rgb(items[at], roots=roots, absolute=absolute, max_pixels=max_pixels))
        except BadImage as error:
            raise BadImage(f"frame {at}: {error}") from error
        _check_room(frames[0].size, num_frames, max_pixels)
    return frames


def _of_animation(
    value: Any, num_frames: int, roots: Sequence[Path], absolute: bool, max_pixels: int
) -> list[Image.Image]:
    frames = []
    with opened(value, roots, absolute) as image, damage_told():
        _check_room(image.size, num_frames, max_pixels)
        for at in _evenly(getattr(image, "n_frames", 1), num_frames):
            image.seek(at)
            frames.append(loaded(image, max_pixels))
    return frames


def _of_video(source: Any, kind: str, num_frames: int, max_pixels: int) -> list[Image.Image]:
    """Decoded twice, for what a file says of its number of frames is not always so."""
    try:
        import av
    except ImportError as error:
        raise ImportError('reading .mp4, .mov and .webm files needs PyAV: pip install "mmalign[video]"') from error

    def decoded() -> Generator[Any]:
        # An open file and a named format: FFmpeg opens nothing else, whatever the file refers to.
        with (
            io.BytesIO(source) if isinstance(source, bytes | bytearray | memoryview) else source.open("rb") as file,
            av.open(file, "r", format=kind) as container,
        ):
            yield from container.decode(video=0)

    try:
        with closing(decoded()) as frames:
            total = sum(1 for _ in islice(_roomy(frames, num_frames, max_pixels), MAX_FRAMES + 1))
        wanted = set(_evenly(total, num_frames))
        with closing(decoded()) as frames:
            return [_upright(frame) for at, frame in enumerate(islice(frames, max(wanted) + 1)) if at in wanted]
    except (av.FFmpegError, IndexError) as error:
        raise BadImage(f"damaged or truncated video, or none in the file ({type(error).__name__})") from error


def _roomy(frames: Iterator[Any], num_frames: int, max_pixels: int) -> Iterator[Any]:
    for frame in frames:
        _check_room((frame.width, frame.height), num_frames, max_pixels)
        yield frame


def _upright(frame: Any) -> Image.Image:
    image: Image.Image = frame.to_image()
    return image.rotate(frame.rotation, expand=True) if frame.rotation else image


def _container(source: Any) -> str | None:
    """FFmpeg's name for the format of a video file or its bytes, by their first bytes; None for anything else."""
    if isinstance(source, Path):
        with source.open("rb") as file:
            start = file.read(12)
    elif isinstance(source, bytes | bytearray | memoryview):
        start = bytes(source[:12])
    else:
        return None
    if start[4:8] == b"ftyp" and start[8:12] not in _PICTURE_BRANDS:
        return "mov"
    return "matroska" if start.startswith(b"\x1aE\xdf\xa3") else None


def _check_room(size: tuple[int, int], num_frames: int, max_pixels: int) -> None:
    width, height = size
    room = min(max_pixels, MAX_CLIP_PIXELS // num_frames)
    if width * height > room:
        raise BadImage(
            f"{num_frames} frames of {width}×{height}, and {room} pixels a frame are the limit: shrink the clip"
        )
