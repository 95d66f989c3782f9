"""A pair as its source tells it, its text and numbers checked, its pictures not opened yet."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmalign.data.images import BadImage
from mmalign.data.records import BadRow, InvalidRow


@dataclass(frozen=True, slots=True)
class RawPair:
    """prompt, label, scores and user_id as in PairRecord; `fields` say where its pictures stand in the source."""

    prompt: str
    fields: tuple[str, ...]
    pictures: tuple[Any, ...]
    label: float
    scores: dict[str, tuple[float, float]]
    user_id: str | None = None


def bad(row: int, field: str, reason: str) -> InvalidRow:
    """The error that leaves a row out whole."""
    return InvalidRow(BadRow(row, field, reason))


@contextmanager
def told_as(row: int) -> Iterator[None]:
    """What is wrong with a row, told of the one that it is `row` of."""
    try:
        yield
    except InvalidRow as error:
        raise bad(row, error.bad_row.field, error.bad_row.reason) from error


@contextmanager
def opening(value: Any, field: str, row: int) -> Iterator[None]:
    """What is wrong with a picture or clip, as what is wrong with its row; with the name of its file."""
    try:
        yield
    except BadImage as error:
        name = value.get("path") if isinstance(value, Mapping) else value
        shown = repr(str(name)[:80]) if isinstance(name, str | Path) else ""
        where = f" in {shown}" if shown and shown not in str(error) else ""
        raise bad(row, field, f"{error}{where}") from error


def read_text(raw: Mapping[str, Any], field: str, row: int) -> str:
    """Text that can be written as UTF-8; '' is allowed, nothing at all is not."""
    value = raw.get(field)
    if not isinstance(value, str):
        raise bad(row, field, f"expected text, got {what(value)} (an empty prompt is '')")
    if any("\ud800" <= letter <= "\udfff" for letter in value):
        raise bad(row, field, "the text holds half of a surrogate pair, which is no valid Unicode")
    return value


def read_number(value: Any, field: str, row: int) -> float:
    """A finite number; a list of one is that one, text is none."""
    if isinstance(value, list | tuple) and len(value) == 1:
        value = value[0]
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if isinstance(value, str | bytes | bytearray) or not math.isfinite(number):
        raise bad(row, field, f"expected a finite number, got {what(value)}")
    return number


def given(value: Any) -> bool:
    """Whether an optional cell holds anything; pandas writes empty ones as NaN."""
    return value is not None and not (isinstance(value, float) and math.isnan(value))


def empty(value: Any) -> bool:
    """Whether an optional cell holds nothing, or a text, list or mapping with nothing in it."""
    return not given(value) or (isinstance(value, str | list | tuple | Mapping) and not value)


def read_user(raw: Mapping[str, Any], row: int) -> str | None:
    """`user_id` as text; an empty cell is nobody."""
    value = raw.get("user_id")
    if not given(value):
        return None
    if isinstance(value, Mapping | list | tuple | bytes):
        raise bad(row, "user_id", f"expected text or a number, got {what(value)}")
    return str(value)


def what(value: Any) -> str:
    """A value in an error message, short."""
    if isinstance(value, int) and abs(value) >= 10**18:
        return "an integer of more than 18 digits"
    return repr(value)[:60] if value is None or isinstance(value, int | float | str) else type(value).__name__
