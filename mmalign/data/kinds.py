"""Whether a source holds preferences between pictures or between answers: its columns tell, and where they agree its first row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any, Literal

from mmalign.data.answer_forms import recognise
from mmalign.data.clips import VIDEO_ENDINGS
from mmalign.data.images import ENDINGS, BadImage, inside
from mmalign.data.records import InvalidRow
from mmalign.data.rows import Rows
from mmalign.data.sources import open_rows

_LOOKED_AT = 20


def kind_of(
    source: Any, *, split: str | None = None, revision: str | None = None, root: str | Path | None = None
) -> Literal["pairs", "answers"]:
    """ "answers" where load_answers reads the source, "pairs" where load_pairs does, or neither. Options as there."""
    rows, _ = open_rows(source, split=split, revision=revision, root=root, captioned=True)
    try:
        form = recognise(rows.columns)
    except ValueError:
        return "pairs"
    # (prompt, chosen, rejected) are columns of both.
    return "answers" if form != "preference" or _holds_texts(rows) else "pairs"


def _holds_texts(rows: Rows) -> bool:
    """Whether what was chosen in the first row that can be read is text."""
    for row in range(min(len(rows), _LOOKED_AT)):
        try:
            value = rows[row].get("chosen")
        except InvalidRow:
            continue
        if value is not None:
            return _is_answer(value, rows)
    return False


def _is_answer(value: Any, rows: Rows) -> bool:
    """A text that names no picture, clip or file; or messages without a picture in the last."""
    if isinstance(value, str):
        return not _names_media(value, rows)
    if isinstance(value, Mapping):
        return bool({"role", "from"} & set(value))
    if (
        not isinstance(value, list | tuple)
        or not value
        or not isinstance(value[-1], Mapping)
        or "role" not in value[-1]
    ):
        return False
    content = value[-1].get("content")
    parts: Sequence[Any] = content if isinstance(content, list | tuple) else []
    return not any(isinstance(part, Mapping) and part.get("type") == "image" for part in parts)


def _names_media(text: str, rows: Rows) -> bool:
    if PurePath(text).suffix.lower()[1:] in ENDINGS | VIDEO_ENDINGS:
        return True
    try:
        inside(text, rows.roots, rows.absolute, folders=True)
    except BadImage:
        return False
    return True
