"""Clips: a side of a pair that is several frames, sampled evenly to as many as a video model reads.

A list of pictures, a folder of frame files (in the order of their names, numbers counting as numbers), an animated file that Pillow
reads (GIF, APNG, WebP), or a video (.mp4, .mov, .webm; extra `video`). A still picture is a clip of one frame. Frames are counted,
not timed: what is shown longer weighs no more.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
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
# What PyAV counts the time of files in.
_MICROSECONDS = 1_000_000
# Pictures in the container that MP4 has too.
_PICTURE_BRANDS = {b"avif", b"avis", b"heic", b"mif1", b"msf1"}


@dataclass(frozen=True, slots=True)
class Limits:
    """max_pixels: of a frame. max_frames: of a source, whether all of them are used or not. longest_side: of a frame; larger ones are
    shrunk to it.
    """

    max_pixels: int = MAX_PIXELS
    max_frames: int = MAX_FRAMES
    longest_side: int | None = None


@dataclass(frozen=True, slots=True)
class Sampled:
    """Frames taken out of a clip, their numbers in it, how many it has, and how many a second; None where the source does not tell."""

    frames: Clip
    indices: tuple[int, ...]
    total: int
    frames_per_second: float | None


# (frames there are, frames a second if known) → the numbers of those that are used, ascending.
Pick: TypeAlias = Callable[[int, "float | None"], Sequence[int]]


def read_clip(
    value: Any,
    num_frames: int,
    *,
    roots: Sequence[Path] = (),
    absolute: bool = False,
    max_pixels: int = MAX_PIXELS,
) -> Clip:
    """`num_frames` frames of a clip, evenly spaced from its first to its last, as `to_rgb` reads pictures. Raises BadImage."""
    limits = Limits(max_pixels, MAX_FRAMES)
    return sample_clip(value, evenly(num_frames), roots=roots, absolute=absolute, limits=limits).frames


def sample_clip(
    value: Any,
    pick: Pick,
    *,
    roots: Sequence[Path] = (),
    absolute: bool = False,
    limits: Limits | None = None,
    timed: bool = False,
) -> Sampled:
    """The frames of a clip that `pick` names, all of one size. timed: ask an animation how long it lasts, which reads all of it."""
    from PIL import Image

    limits = limits or Limits()
    value = content(value)
    place = inside(value, roots, absolute, folders=True) if isinstance(value, str | Path) else None
    if place is not None and place.is_dir():
        value = [f"{value}/{file.name}" for file in frame_files(place)]
    if isinstance(value, Image.Image):
        if getattr(value, "n_frames", 1) > 1:
            raise BadImage("an opened animation: pass its path, its bytes, or a list of its frames")
        value = [value]
    if isinstance(value, list | tuple):
        sampled = _of_list(value, pick, roots, absolute, limits)
    elif (kind := video_kind(value if place is None else place)) is not None:
        sampled = _of_video(value if place is None else place, kind, pick, limits)
    else:
        sampled = _of_animation(value, pick, roots, absolute, limits, timed)
    sizes = {frame.size for frame in sampled.frames}
    if len(sizes) > 1:
        raise BadImage(f"frames of different sizes: {', '.join(f'{w}×{h}' for w, h in sorted(sizes)[:3])}")
    return sampled


def evenly(wanted: int) -> Pick:
    """The first frame, the last, and others evenly between: so many of them."""

    def pick(total: int, frames_per_second: float | None) -> list[int]:
        if total < wanted:
            raise BadImage(f"holds {total} frame(s), and {wanted} are asked for (num_frames)")
        return [int(at) for at in np.linspace(0, total - 1, wanted).round()]

    return pick


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
    shown = [side[at] for at in glimpses(side)]
    width, height = side[0].size
    strip = Image.new("RGB", (width * len(shown), height))
    for at, frame in enumerate(shown):
        strip.paste(frame, (at * width, 0))
    return strip


def glimpses(clip: Clip) -> list[int]:
    """The numbers of its first, its middle and its last frame."""
    return list(dict.fromkeys((0, len(clip) // 2, len(clip) - 1)))


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


def _picked(pick: Pick, total: int, frames_per_second: float | None, limits: Limits) -> Sequence[int]:
    if total > limits.max_frames:
        raise BadImage(f"more than {limits.max_frames} frames: cut the clip")
    wanted = pick(total, frames_per_second)
    if not wanted:
        raise BadImage("holds no frames")
    return wanted


def _of_list(items: Sequence[Any], pick: Pick, roots: Sequence[Path], absolute: bool, limits: Limits) -> Sampled:
    frames: list[Image.Image] = []
    wanted = _picked(pick, len(items), None, limits)
    for at in wanted:
        try:
            frame = to_rgb(items[at], roots=roots, absolute=absolute, max_pixels=limits.max_pixels)
        except BadImage as error:
            raise BadImage(f"frame {at}: {error}") from error
        frames.append(_shrunk(frame, limits))
        _check_room(frames[0].size, len(wanted), limits)
    return Sampled(tuple(frames), tuple(wanted), len(items), None)


def _of_animation(
    value: Any, pick: Pick, roots: Sequence[Path], absolute: bool, limits: Limits, timed: bool
) -> Sampled:
    frames = []
    with opened(value, roots, absolute) as image, damage_told():
        total = getattr(image, "n_frames", 1)
        _check_room(image.size, 1, limits)
        rate = _rate_of_animation(image, min(total, limits.max_frames)) if timed else None
        wanted = _picked(pick, total, rate, limits)
        _check_room(_shown(image.size, limits), len(wanted), limits)
        for at in wanted:
            image.seek(at)
            frames.append(_shrunk(loaded(image, limits.max_pixels), limits))
    return Sampled(tuple(frames), tuple(wanted), total, rate)


def _rate_of_animation(image: Image.Image, total: int) -> float | None:
    """Frames a second, on average; None where the file does not say how long they are shown."""
    milliseconds = 0.0
    for at in range(total):
        image.seek(at)
        # WebP tells only then.
        image.load()
        milliseconds += image.info.get("duration") or 0
    return 1000 * total / milliseconds if milliseconds > 0 else None


def _of_video(source: Any, kind: str, pick: Pick, limits: Limits) -> Sampled:
    """Decoded twice, for what a file says of its number of frames is not always so."""
    try:
        import av
    except ImportError as error:
        raise ImportError('reading .mp4, .mov and .webm files needs PyAV: pip install "mmalign[video]"') from error

    @contextmanager
    def container() -> Iterator[Any]:
        # An open file and a named format: FFmpeg opens nothing else, whatever the file refers to.
        with (
            io.BytesIO(source) if isinstance(source, bytes | bytearray | memoryview) else source.open("rb") as file,
            # Titles in old encodings are nobody's business.
            av.open(file, "r", format=kind, metadata_errors="ignore") as opened_video,
        ):
            yield opened_video

    try:
        with container() as video:
            rate = video.streams.video[0].average_rate
            frames = _roomy(_to_its_end(video), 1, limits)
            total = sum(1 for _ in islice(frames, limits.max_frames + 1))
        rate = float(rate) if rate else None
        wanted = _picked(pick, total, rate, limits)
        with container() as video:
            frames = _roomy(islice(video.decode(video=0), max(wanted) + 1), len(wanted), limits)
            chosen = set(wanted)
            used = [_shrunk(_upright(frame), limits) for at, frame in enumerate(frames) if at in chosen]
    except (av.FFmpegError, IndexError) as error:
        raise BadImage(f"damaged or truncated video, or none in the file ({type(error).__name__})") from error
    return Sampled(tuple(used), tuple(wanted), total, rate)


def _to_its_end(video: Any) -> Iterator[Any]:
    """Every frame; BadImage behind the last one of a file that breaks off, which FFmpeg reads as a shorter video."""
    stream, end = video.streams.video[0], 0.0
    # Sound may go on where the pictures stop.
    for packet in video.demux():
        if packet.is_corrupt:
            raise BadImage("damaged or truncated video: the file breaks off")
        if packet.pts is not None:
            end = max(end, float((packet.pts + (packet.duration or 0)) * packet.time_base))
        if packet.stream.index == stream.index:
            yield from packet.decode()
    if video.duration is None or not stream.average_rate:
        return
    told, read = video.duration / _MICROSECONDS, end - (video.start_time or 0) / _MICROSECONDS
    # The last frame may not say how long it is shown.
    if told - read > 0.1 * told + 2 / float(stream.average_rate):
        raise BadImage(f"damaged or truncated video: the file breaks off after {read:.2g} of {told:.2g} seconds")


def _roomy(frames: Iterator[Any], num_frames: int, limits: Limits) -> Iterator[Any]:
    for frame in frames:
        size = (frame.width, frame.height)
        _check_room(size, 1, limits)
        _check_room(_shown(size, limits), num_frames, limits)
        yield frame


def _upright(frame: Any) -> Image.Image:
    image: Image.Image = frame.to_image()
    return image.rotate(frame.rotation, expand=True) if frame.rotation else image


def video_kind(source: Any) -> str | None:
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


def _check_room(size: tuple[int, int], num_frames: int, limits: Limits) -> None:
    width, height = size
    room = min(limits.max_pixels, MAX_CLIP_PIXELS // max(1, num_frames))
    if width * height > room:
        raise BadImage(
            f"{num_frames} frames of {width}×{height}, and {room} pixels a frame are the limit: shrink the clip"
        )


def _shown(size: tuple[int, int], limits: Limits) -> tuple[int, int]:
    """The size in which a frame is kept."""
    if limits.longest_side is None or max(size) <= limits.longest_side:
        return size
    scale = limits.longest_side / max(size)
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))


def _shrunk(frame: Image.Image, limits: Limits) -> Image.Image:
    from PIL import Image

    size = _shown(frame.size, limits)
    return frame if size == frame.size else frame.resize(size, Image.Resampling.BICUBIC)
