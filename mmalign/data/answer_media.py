"""Pictures and clips of a conversation, opened; and decoded frames of videos, kept on disk so that they are decoded once.

A clip is what clips.py reads, or frames with what is known of their video:
{"frames": a list or a folder of pictures, "fps": of the video, "indices": of the frames in it, "total_frames": in all}.
Only "frames" is needed; frames without indices are all there are.

cache/frames-<key>.safetensors    frames (F, H, W, 3) uint8; which they are, in its notes
    key = sha256 of the file's content and of all that decides which of its frames are read, and in which size
"""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mmalign.data.answer_records import VideoClip
from mmalign.data.clips import Limits, Pick, Sampled, evenly, sample_clip, video_kind
from mmalign.data.fingerprints import files_fingerprint
from mmalign.data.images import BadImage, content, inside
from mmalign.data.raw import given, what
from mmalign.data.shards import read_notes, read_shard, write_shard

# Of a video, whether all of them are used or not: 18 minutes at 30 frames a second.
MAX_VIDEO_FRAMES = 2**15
# What processors of transformers take where they are told nothing.
_ASSUMED_RATE = 24.0
# Frames a second that nobody films; larger integers are no floats any more.
_FASTEST = 1e9
_KEYS = ("frames", "fps", "indices", "total_frames")
_FORMAT = 1
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ClipReading:
    """Which frames of a clip are read: num_frames evenly, or fps a second; all of them where only frames come, and neither is given.

    source_fps: frames a second of clips that do not tell it; 24 unless given, and a warning says so. cache: a folder for the decoded
    frames of videos.
    """

    num_frames: int | None = None
    fps: float | None = None
    source_fps: float | None = None
    limits: Limits = field(default_factory=lambda: Limits(max_frames=MAX_VIDEO_FRAMES))
    cache: Path | None = None

    def __post_init__(self) -> None:
        if self.num_frames is not None and self.fps is not None:
            raise ValueError(f"num_frames={self.num_frames} and fps={self.fps:g}: give one of the two")
        if self.num_frames is not None and self.num_frames < 1:
            raise ValueError(f"num_frames must be at least 1, got {self.num_frames}")
        for name in ("fps", "source_fps"):
            rate = getattr(self, name)
            if rate is not None and not 0 < rate < math.inf:
                raise ValueError(f"{name} must be above 0 and finite, got {rate}")
        if self.limits.longest_side is not None and self.limits.longest_side < 1:
            raise ValueError(f"longest_side must be at least 1, got {self.limits.longest_side}")


@dataclass(frozen=True, slots=True)
class _Known:
    """What comes with frames that were taken out of a video before."""

    frames_per_second: float | None = None
    indices: tuple[int, ...] | None = None
    total: int | None = None


def open_clip(value: Any, reading: ClipReading, *, roots: Sequence[Path] = (), absolute: bool = False) -> VideoClip:
    """A clip of any sort as its sampled frames. Raises BadImage; ValueError where it is not said which frames of a video are read."""
    value, known = _with_knowledge(value) if _are_frames(value) else (content(value), _Known())
    kept = None if reading.cache is None else _cache_file(value, known, reading, reading.cache, roots, absolute)
    if kept is None:
        return _decoded(value, known, reading, roots, absolute)
    if not kept.is_file():
        from filelock import FileLock

        kept.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(kept.with_suffix(".lock")):
            if not kept.is_file():
                _keep(kept, _decoded(value, known, reading, roots, absolute))
    return _load(kept)


def _decoded(value: Any, known: _Known, reading: ClipReading, roots: Sequence[Path], absolute: bool) -> VideoClip:
    # Processors want the rate of animations too.
    sampled = sample_clip(
        value, _pick(reading, known), roots=roots, absolute=absolute, limits=reading.limits, timed=True
    )
    return _clip(sampled, reading, known)


def _pick(reading: ClipReading, known: _Known) -> Pick:
    def pick(total: int, rate: float | None) -> Sequence[int]:
        if known.indices is not None and len(known.indices) != total:
            raise BadImage(f"{total} frames, but {len(known.indices)} indices")
        if known.indices is None and known.total not in (None, total):
            raise BadImage(f"{total} frames of total_frames {known.total}: pass the indices of those that there are")
        if reading.num_frames is not None:
            return evenly(reading.num_frames)(total, rate)
        if reading.fps is not None:
            source = _rate(rate, reading, known)
            return _at_rate(known.indices or range(total), source, reading.fps)
        if rate is not None:
            raise ValueError("which frames of a video are read is not said: pass num_frames=… or fps=…")
        return range(total)

    return pick


def _at_rate(indices: Sequence[int], source: float, fps: float) -> list[int]:
    """The frames nearest to 0, 1/fps, 2/fps … seconds after the first."""
    if not indices:
        return []
    numbers = np.asarray(indices, dtype=float) - indices[0]
    step = source / fps
    times = np.arange(math.floor(numbers[-1] / step + 1e-9) + 1) * step
    after = np.searchsorted(numbers, times).clip(max=len(numbers) - 1)
    before = (after - 1).clip(min=0)
    found = np.where(times - numbers[before] <= numbers[after] - times, before, after).tolist()
    if len(set(found)) < len(found):
        raise BadImage(f"holds fewer than {fps:g} frames a second (fps): {len(indices)} of a video with {source:g}")
    return found


def _clip(sampled: Sampled, reading: ClipReading, known: _Known) -> VideoClip:
    indices, total = sampled.indices, sampled.total
    if known.indices is not None:
        indices = tuple(known.indices[at] for at in indices)
        total = known.total or known.indices[-1] + 1
    rate = _rate(sampled.frames_per_second, reading, known)
    return VideoClip(sampled.frames, indices, frames_per_second=rate, total_frames=total)


def _rate(told: float | None, reading: ClipReading, known: _Known) -> float:
    for rate in (known.frames_per_second, told, reading.source_fps):
        if rate is not None:
            return rate
    _say_assumed()
    return _ASSUMED_RATE


@cache
def _say_assumed() -> None:
    _log.warning(
        "some clips do not tell how many frames a second they have: %g are assumed, as processors of transformers do; pass "
        "source_fps=…, or {'frames': …, 'fps': …}",
        _ASSUMED_RATE,
    )


def _are_frames(value: Any) -> bool:
    return isinstance(value, Mapping) and given(value.get("frames"))


def _with_knowledge(value: Mapping[str, Any]) -> tuple[Any, _Known]:
    if unknown := sorted({str(key) for key, item in value.items() if given(item)} - set(_KEYS)):
        raise BadImage(f"a clip with {', '.join(unknown)}: expected {', '.join(_KEYS)}, or bytes and path")
    told: dict[str, Any] = {key: value[key] for key in _KEYS if given(value.get(key))}
    rate, indices, total = (_plain(told.get(key)) for key in ("fps", "indices", "total_frames"))
    if rate is not None and not (_is_number(rate) and 0 < rate < _FASTEST):
        raise BadImage(f"fps is {what(rate)}, expected a number above 0")
    if total is not None and not (type(total) is int and total > 0):
        raise BadImage(f"total_frames is {what(total)}, expected a whole number above 0")
    if indices is not None:
        indices = [_plain(index) for index in indices] if isinstance(indices, list | tuple) else None
        if indices is None or not all(type(index) is int for index in indices):
            raise BadImage("indices are not a list of whole numbers")
        if any(a >= b for a, b in zip([-1, *indices], indices, strict=False)):
            raise BadImage("indices are not in ascending order from 0 up")
        if total is not None and indices and indices[-1] >= total:
            raise BadImage(f"index {indices[-1]} of a video with total_frames {total}")
        indices = tuple(indices)
    return told["frames"], _Known(None if rate is None else float(rate), indices, total)


def _plain(value: Any) -> Any:
    """A number or an array of numpy or torch as Python's own numbers."""
    return value.tolist() if isinstance(value, np.generic | np.ndarray | torch.Tensor) else value


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _cache_file(
    value: Any, known: _Known, reading: ClipReading, folder: Path, roots: Sequence[Path], absolute: bool
) -> Path | None:
    """Where the frames of a video file or its bytes are kept; None for anything else, which is soon read."""
    source = inside(value, roots, absolute, folders=True) if isinstance(value, str | Path) else value
    if (isinstance(source, Path) and source.is_dir()) or video_kind(source) is None:
        return None
    held = files_fingerprint([("", source)]) if isinstance(source, Path) else hashlib.sha256(source).hexdigest()
    asked = (known, replace(reading, cache=None))
    key = hashlib.sha256(repr((_FORMAT, held, asked)).encode()).hexdigest()
    return folder / f"frames-{key}.safetensors"


def _keep(path: Path, clip: VideoClip) -> None:
    frames = torch.from_numpy(np.stack([np.asarray(frame) for frame in clip.frames]))
    known = [list(clip.indices), clip.frames_per_second, clip.total_frames]
    write_shard(path, {"frames": frames}, {"known": known, "sha256": _digest(frames, known)})


def _load(path: Path) -> VideoClip:
    from PIL import Image
    from safetensors import SafetensorError

    try:
        notes, frames = read_notes(path), read_shard(path)["frames"]
        known = notes["known"]
        whole = notes["sha256"] == _digest(frames, known)
    except (SafetensorError, KeyError, ValueError) as error:
        raise ValueError(_damaged(path)) from error
    if not whole:
        raise ValueError(_damaged(path))
    indices, rate, total = known
    return VideoClip(tuple(Image.fromarray(frame) for frame in frames.numpy()), tuple(indices), rate, total)


def _digest(frames: torch.Tensor, known: list[Any]) -> str:
    return hashlib.sha256(repr((tuple(frames.shape), known)).encode() + frames.numpy().tobytes()).hexdigest()


def _damaged(path: Path) -> str:
    return f"{path} was changed after it was written: delete it, and the video will be decoded anew"
