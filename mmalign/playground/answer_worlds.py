"""The two worlds that questions are asked about, as data sets hold them: pictures ("vision") and clips ("video")."""

from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Literal

import torch
from PIL import Image

from mmalign.data.answer_records import Picture, VideoClip
from mmalign.data.perturb import perturb
from mmalign.playground import moving, moving_questions, photographs, picture_questions, world
from mmalign.playground.photographs import Photographs, Split

WorldName = Literal["vision", "video"]
# As many photographs as ship with the package, so that a row shows the same with and without the full set.
_SHIPPED = {"train": 4_000, "test": 2_000}


@dataclass(frozen=True)
class Seen:
    """A picture or a clip, and what it shows, as the world's questions take it."""

    medium: Picture | VideoClip
    shown: Any


def questions_of(name: WorldName) -> ModuleType:
    """The module that asks about a world."""
    return {"vision": picture_questions, "video": moving_questions}[name]


def see(name: WorldName, split: Split, rows: Sequence[int], *, seed: int) -> list[Seen]:
    """Rows of the stream `seed`; those of `test` show photographs that no model has seen."""
    full = photographs.load(split)
    data = Photographs(full.images[: _SHIPPED[split]], full.labels[: _SHIPPED[split]])
    if name == "video":
        clips = moving.draw_clips(data.labels, rows, seed=seed)
        return [
            Seen(moving.to_video(frames), clip) for frames, clip in zip(moving.compose(data, clips), clips, strict=True)
        ]
    scenes = world.draw_scenes(data.labels, torch.tensor(rows), seed=seed)
    pixels = (world.compose(data, torch.tensor(rows), scenes).movedim(1, -1) * 255).round().byte().numpy()
    return [
        Seen(Picture(Image.fromarray(one)), shown)
        for one, shown in zip(pixels, picture_questions.shown(scenes), strict=True)
    ]


def perturbed(medium: Picture | VideoClip, generator: torch.Generator) -> Picture | VideoClip:
    """A picture behind a block; a clip behind one, its frames shuffled locally or, every other time, globally."""
    if isinstance(medium, Picture):
        return Picture(perturb([medium.image], shuffle="none", generator=generator)[0])
    far = bool(torch.rand((), generator=generator) < 0.5)
    frames = perturb(medium.frames, shuffle="global" if far else "local", generator=generator)
    return VideoClip(frames, medium.indices, medium.frames_per_second, medium.total_frames)


def column_of(medium: Picture | VideoClip) -> dict[str, Any]:
    """The medium in a column of its own, as `load_answers` and `load_questions` read it."""
    if isinstance(medium, Picture):
        return {"image": medium.image}
    clip = {
        "frames": list(medium.frames),
        "fps": medium.frames_per_second,
        "indices": list(medium.indices),
        "total_frames": medium.total_frames,
    }
    return {"video": clip}
