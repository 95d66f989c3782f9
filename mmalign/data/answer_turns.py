"""Conversations as rows tell them → turns of text and media, in order; and which picture or clip of the row each place stands for.

A place is a part {"type": "image"} or {"type": "video"} of a message, with its own `image` or `video` (or `path`) or the row's next
one, or a mark <image> or <video> in a plain text; a line break beside a mark belongs to it. Media of a kind that no place
asks for stand before the first user's text.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias

from mmalign.data.answer_records import Role
from mmalign.data.raw import bad, empty, given, read_text, what

Kind = Literal["image", "video"]
# The columns that hold a row's media: one, or a list of them.
COLUMNS: dict[Kind, tuple[str, ...]] = {"image": ("image", "images"), "video": ("video", "videos", "media_path")}
_MARK = re.compile(r"(?:\r?\n)?<(image|video)>(?:\r?\n)?")
# What a message may hold beside its content, and what a template would write of it.
_UNREAD = ("tool_calls", "reasoning_content", "thinking")
_ROLES: dict[Any, Role] = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
}


@dataclass(frozen=True, slots=True)
class Medium:
    """A picture or clip that is not opened yet, or the place of one, whose value is None. field: where it stands in the source."""

    kind: Kind
    value: Any
    field: str = dataclasses.field(compare=False)
    marked: bool = dataclasses.field(default=False, compare=False)

    @property
    def shown(self) -> Any:
        """What tells it from others: of {"bytes", "path"} the bytes, whatever they are called."""
        held = self.value.get("bytes") if isinstance(self.value, Mapping) else None
        return self.value if held is None else held


RawPart: TypeAlias = "str | Medium"


@dataclass(frozen=True, slots=True)
class RawTurn:
    """A turn whose media are not opened yet."""

    role: Role
    parts: tuple[RawPart, ...]

    @property
    def media(self) -> tuple[Medium, ...]:
        """Its pictures and clips, or their places."""
        return tuple(part for part in self.parts if isinstance(part, Medium))

    @property
    def text(self) -> str:
        """What it says."""
        return "".join(part for part in self.parts if isinstance(part, str))


def user_turn(text: Any, field: str, row: int) -> RawTurn:
    """A plain text as the user's turn."""
    return RawTurn("user", _parts(text, field, row))


def read_turns(messages: Any, field: str, row: int) -> tuple[RawTurn, ...]:
    """Messages (role and content, or from and value) as turns; only the user's may hold media."""
    if not isinstance(messages, list | tuple) or not messages:
        raise bad(row, field, f"expected a list of messages, got {what(messages)}")
    return tuple(_turn(message, field, row) for message in messages)


def answer_of(value: Any, field: str, row: int) -> tuple[tuple[RawTurn, ...], str]:
    """The turns before an answer, if they come with it, and its text. value: text, a message, or messages that end with the answer."""
    if isinstance(value, Mapping):
        value = [value]
    if not isinstance(value, list | tuple):
        turns: tuple[RawTurn, ...] = (RawTurn("assistant", _parts(value, field, row)),)
    else:
        turns = read_turns(value, field, row)
    *before, last = turns
    if last.role != "assistant":
        raise bad(row, field, f"ends with the turn of {last.role!r}, expected the assistant's")
    if last.media:
        raise bad(row, field, f"the answer holds {_called(last.media[0])}; answers are text")
    return tuple(before), last.text


def with_media(
    turns: Sequence[RawTurn], raw: Mapping[str, Any], row: int, *, llava: bool = False
) -> tuple[RawTurn, ...]:
    """The turns with the row's pictures and clips in their places. llava: where a row has clips only, <image> marks them too.

    Raises InvalidRow where a kind has another number of places than the row has media.
    """
    media = {kind: _media_of(kind, raw, row) for kind in COLUMNS}
    if llava and media["video"] and not media["image"]:
        turns = [replace(turn, parts=tuple(map(_as_clip, turn.parts))) for turn in turns]
    first = next(at for at, turn in enumerate(turns) if turn.role == "user")
    for kind in ("video", "image"):
        places = [place for turn in turns for place in turn.media if place.kind == kind]
        if not places and media[kind]:
            turns = [
                RawTurn(turn.role, (*media[kind], *turn.parts)) if at == first else turn
                for at, turn in enumerate(turns)
            ]
            media[kind] = []
        waiting = [place for place in places if place.value is None]
        if len(waiting) != len(media[kind]) and places:
            field = media[kind][0].field.split("[")[0] if media[kind] else places[0].field
            raise bad(
                row,
                field,
                f"{len(waiting)} {kind} placeholder(s) in {places[0].field} but {len(media[kind])} {kind}(s) in the row: "
                "one is needed for each",
            )
    waiting_media = {kind: iter(found) for kind, found in media.items()}
    filled = tuple(RawTurn(turn.role, tuple(_filled(part, waiting_media) for part in turn.parts)) for turn in turns)
    return filled


def check_said(turns: Sequence[RawTurn], field: str, row: int) -> None:
    """InvalidRow for a turn without a word, a picture or a clip."""
    for turn in turns:
        if not turn.media and not turn.text.strip():
            raise bad(row, field, f"a turn of {turn.role!r} is empty")


def _filled(part: RawPart, media: Mapping[Kind, Any]) -> RawPart:
    return next(media[part.kind]) if isinstance(part, Medium) and part.value is None else part


def _as_clip(part: RawPart) -> RawPart:
    return replace(part, kind="video") if isinstance(part, Medium) and part.marked else part


def _turn(message: Any, field: str, row: int) -> RawTurn:
    if not isinstance(message, Mapping):
        raise bad(row, field, f"expected messages with role and content, got {what(message)}")
    if unread := next((name for name in _UNREAD if not empty(message.get(name))), None):
        raise bad(row, field, f"a message with {unread}, which is not read")
    said, content = (message.get("role"), message.get("content"))
    if said is None and content is None:
        said, content = (message.get("from"), message.get("value"))
    role = _ROLES.get(said) if isinstance(said, str) else None
    if role is None:
        raise bad(row, field, f"a message of role {what(said)}, expected system, user or assistant")
    turn = RawTurn(role, _parts(content, field, row))
    if turn.media and role != "user":
        raise bad(row, field, f"{_called(turn.media[0])} in a turn of {role!r}; media stand in the user's turns")
    return turn


def _parts(content: Any, field: str, row: int) -> tuple[RawPart, ...]:
    """Text with marks, or typed parts; texts beside each other as one, empty ones left out."""
    if isinstance(content, list | tuple):
        found = [_part(part, field, row) for part in content]
    else:
        # Text and the names of marks take turns.
        pieces = _MARK.split(read_text({field: content}, field, row))
        found = [
            Medium("video" if piece == "video" else "image", None, field, marked=True) if at % 2 else piece
            for at, piece in enumerate(pieces)
        ]
    joined: list[RawPart] = []
    for part in found:
        if isinstance(part, str) and joined and isinstance(joined[-1], str):
            joined[-1] += part
        elif part != "":
            joined.append(part)
    return tuple(joined)


def _part(part: Any, field: str, row: int) -> RawPart:
    kind = part.get("type") if isinstance(part, Mapping) else part
    if not isinstance(part, Mapping) or kind not in ("text", "image", "video"):
        raise bad(row, field, f"a part of type {what(kind)}, expected text, image or video")
    if kind == "text":
        return read_text({field: part.get("text")}, field, row)
    own = [part[name] for name in (kind, "path", "url") if not _nothing(part.get(name))]
    return Medium(kind, own[0] if own else None, field)


def _media_of(kind: Kind, raw: Mapping[str, Any], row: int) -> list[Medium]:
    """The row's pictures or clips, from the one column of that kind that holds any."""
    columns = [name for name in COLUMNS[kind] if not _nothing(raw.get(name)) and not _no_list(raw[name])]
    if len(columns) > 1:
        raise bad(row, columns[1], f"the row has {columns[0]} as well: keep one of the two")
    if not columns:
        return []
    name = columns[0]
    value = raw[name]
    # A list under `video` is one clip's frames.
    if isinstance(value, list | tuple) and name not in ("video", "media_path"):
        return [_checked(Medium(kind, item, f"{name}[{at}]"), row) for at, item in enumerate(value)]
    return [Medium(kind, value, name)]


def _checked(medium: Medium, row: int) -> Medium:
    if _nothing(medium.value):
        raise bad(row, medium.field, f"no {medium.kind} (None)")
    return medium


def _nothing(value: Any) -> bool:
    """No value; Arrow fills the fields that other rows' structs have with None."""
    empty = isinstance(value, Mapping) and all(item is None for item in value.values())
    return empty or not given(value)


def _no_list(value: Any) -> bool:
    return isinstance(value, list | tuple) and not value


def _called(medium: Medium) -> str:
    return f"a mark <{medium.kind}>" if medium.marked else f"a part of type {medium.kind!r}"
