"""The one canonical record that every preference data set for models that answer becomes: a conversation and one or two answers."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, TypeAlias

if TYPE_CHECKING:
    from PIL import Image

Span: TypeAlias = tuple[int, int]
Role = Literal["system", "user", "assistant"]


@dataclass(frozen=True, slots=True)
class Picture:
    """A picture in a turn: RGB, upright (EXIF), 8 bits a channel."""

    image: Image.Image


@dataclass(frozen=True, slots=True)
class VideoClip:
    """A clip in a turn: its sampled frames, RGB, all of one size, and where they stood in the video.

    indices: the number of each frame in the video. frames_per_second, total_frames: of the video; processors write timestamps
    and positions from them.
    """

    frames: tuple[Image.Image, ...]
    indices: tuple[int, ...]
    frames_per_second: float
    total_frames: int


Part: TypeAlias = "str | Picture | VideoClip"


@dataclass(frozen=True, slots=True)
class Turn:
    """What one side said: text and media in order."""

    role: Role
    parts: tuple[Part, ...]

    @property
    def media(self) -> tuple[Picture | VideoClip, ...]:
        """Its pictures and clips."""
        return tuple(part for part in self.parts if not isinstance(part, str))


@dataclass(frozen=True, slots=True)
class AnswerPair:
    """A conversation that ends with the user's turn, and two answers to it; rejected is None where there is one, liked or not.

    chosen, rejected: the text of the assistant's next turn. label: how strongly `chosen` is preferred, in [0.5, 1]; of a single answer
    whether it is liked (1) or not (0). chosen_marks, rejected_marks: characters [start, stop) of the phrases that matter, in order,
    without overlap; None where nothing is marked. fields: where the answers stand in the source. scores: a column's name →
    (score of chosen, of rejected).
    """

    row: int
    prompt: tuple[Turn, ...]
    chosen: str
    rejected: str | None
    label: float = 1.0
    chosen_marks: tuple[Span, ...] | None = None
    rejected_marks: tuple[Span, ...] | None = None
    fields: tuple[str, ...] = ("chosen", "rejected")
    scores: dict[str, tuple[float, float]] = field(default_factory=dict)
    user_id: str | None = None

    @property
    def media(self) -> tuple[Picture | VideoClip, ...]:
        """The prompt's pictures and clips, in order."""
        return tuple(medium for turn in self.prompt for medium in turn.media)
