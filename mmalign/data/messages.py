"""TRL's conversational preference rows, where the two answers are pictures.

prompt    [{"role": "user", "content": text or [{"type": "text", "text": …}]}]
chosen    [{"role": "assistant", "content": [{"type": "image", "image": …}]}]     rejected alike
A part without a picture of its own takes the next one of the row's `images` (a list) or `image` (one).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mmalign.data.raw import bad, what

_SIDES = ("chosen", "rejected")


def plain_row(raw: Mapping[str, Any], row: int) -> Mapping[str, Any]:
    """The row with its prompt as text and its answers as pictures; a row without messages comes back as it is."""
    told = [name for name in _SIDES if isinstance(raw.get(name), list | tuple) and not _is_clip(raw[name])]
    if not told and not isinstance(raw.get("prompt"), list | tuple):
        return raw
    plain = dict(raw)
    if isinstance(raw.get("prompt"), list | tuple):
        plain["prompt"] = plain_prompt(raw["prompt"], row)
    parts = {name: _picture_part(raw[name], name, row) for name in told}
    own = {name: _own_picture(part) for name, part in parts.items()}
    waiting = [name for name in parts if own[name] is None]
    given = _images(raw)
    if len(waiting) != len(given):
        raise bad(row, "images", f"{len(waiting)} image placeholders but {len(given)} images: one is needed for each")
    return plain | own | dict(zip(waiting, given, strict=True))


def plain_prompt(messages: Any, row: int) -> str:
    """The text of the one user message that a text-to-image prompt is."""
    message = _only_message(messages, "prompt", "user", row)
    content = message.get("content")
    if isinstance(content, str):
        return content
    texts = []
    for part in _parts(content, "prompt", row):
        if part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise bad(
                row, "prompt", f"holds a part of type {what(part.get('type'))}; only text prompts can be trained on"
            )
        texts.append(part["text"])
    return "".join(texts)


def _picture_part(messages: Any, field: str, row: int) -> Mapping[str, Any]:
    content = _only_message(messages, field, "assistant", row).get("content")
    parts = _parts(content, field, row)
    if len(parts) != 1 or parts[0].get("type") != "image":
        kinds = ", ".join(what(part.get("type")) for part in parts[:4])
        raise bad(row, field, f"expected one part of type 'image', got {len(parts)} ({kinds})")
    return parts[0]


def _is_clip(items: Any) -> bool:
    """Whether a list holds frames, which are pictures, and no messages, which have a role."""
    return bool(items) and not any(isinstance(item, Mapping) and "role" in item for item in items)


def _only_message(messages: Any, field: str, role: str, row: int) -> Mapping[str, Any]:
    found = [message.get("role") if isinstance(message, Mapping) else message for message in messages]
    if len(messages) != 1 or found[0] != role:
        roles = ", ".join(what(item) for item in found[:4]) or "none"
        raise bad(row, field, f"expected one message of role {role!r}, got {len(messages)} ({roles})")
    return dict(messages[0])


def _parts(content: Any, field: str, row: int) -> list[Mapping[str, Any]]:
    if not isinstance(content, list | tuple) or not all(isinstance(part, Mapping) for part in content):
        raise bad(row, field, f"the message's content is {what(content)}, expected a list of typed parts")
    return list(content)


def _own_picture(part: Mapping[str, Any]) -> Any:
    value = part.get("image")
    # Arrow fills the fields that other parts have with None.
    empty = isinstance(value, Mapping) and all(item is None for item in value.values())
    return None if empty else value


def _images(raw: Mapping[str, Any]) -> list[Any]:
    if raw.get("images") is not None:
        images = raw["images"]
        return list(images) if isinstance(images, list | tuple) else [images]
    return [] if raw.get("image") is None else [raw["image"]]
