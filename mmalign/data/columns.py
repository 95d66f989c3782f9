"""The two forms of preference data that are understood, and a row of either as a PairRecord."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from mmalign.data.images import BadImage, to_rgb
from mmalign.data.records import BadRow, InvalidRow, PairRecord

Form = Literal["pickapic", "canonical"]
REQUIRED: dict[Form, tuple[str, ...]] = {
    "pickapic": ("caption", "jpg_0", "jpg_1", "label_0"),
    "canonical": ("prompt", "chosen", "rejected"),
}
_OPTIONAL: dict[Form, tuple[str, ...]] = {
    "pickapic": ("label_1", "has_label", "user_id"),
    "canonical": ("chosen_score", "rejected_score", "user_id"),
}
_SCORE = re.compile(r"(?=.*score)(.+)_[01]")


def recognise(columns: Collection[str]) -> Form:
    """Which form a table with these columns has."""
    found = [form for form, names in REQUIRED.items() if set(names) <= set(columns)]
    if len(found) == 1:
        return found[0]
    trouble = "both forms at once, drop the columns of one" if found else "not preference data of images"
    raise ValueError(
        f"columns {', '.join(sorted(map(str, columns))) or '(none)'}: {trouble}. Expected Pick-a-Pic's "
        f"({', '.join(REQUIRED['pickapic'])}, and optionally label_1, user_id, *_score_0, *_score_1) or "
        f"({', '.join(REQUIRED['canonical'])}, and optionally chosen_score, rejected_score, user_id)"
    )


def used_columns(form: Form, columns: Collection[str]) -> list[str]:
    """The columns that `read_row` looks at, in a fixed order; the rest need not be read."""
    names = [*REQUIRED[form], *(name for name in _OPTIONAL[form] if name in columns)]
    return names + [name for pair in score_columns(form, columns).values() for name in pair if name not in names]


def score_columns(form: Form, columns: Collection[str]) -> dict[str, tuple[str, str]]:
    """Reward columns by name: `ps_score_0`, `ps_score_1` are "ps_score"; `chosen_score`, `rejected_score` are "score"."""
    if form == "canonical":
        pair = ("chosen_score", "rejected_score")
        return {"score": pair} if set(pair) <= set(columns) else {}
    stems = sorted({match[1] for name in columns if (match := _SCORE.fullmatch(name))})
    return {stem: (f"{stem}_0", f"{stem}_1") for stem in stems if {f"{stem}_0", f"{stem}_1"} <= set(columns)}


def read_row(
    form: Form,
    raw: Mapping[str, Any],
    row: int,
    *,
    scores: Mapping[str, tuple[str, str]],
    roots: Sequence[Path],
    absolute: bool,
    max_pixels: int,
) -> PairRecord:
    """One row of the source, checked field by field; InvalidRow names the first field at fault."""
    prompt_field, field_0, field_1 = REQUIRED[form][:3]
    prompt = raw.get(prompt_field)
    if not isinstance(prompt, str):
        raise _bad(row, prompt_field, f"expected text, got {_what(prompt)} (an empty prompt is '')")
    if any("\ud800" <= letter <= "\udfff" for letter in prompt):
        raise _bad(row, prompt_field, "the text holds half of a surrogate pair, which is no valid Unicode")
    label = _label(raw, row) if form == "pickapic" else 1.0
    images = []
    for name in (field_0, field_1):
        try:
            images.append(to_rgb(raw.get(name), roots=roots, absolute=absolute, max_pixels=max_pixels))
        except BadImage as error:
            raise _bad(row, name, str(error)) from error
    user_id = raw.get("user_id")
    return PairRecord(
        row=row,
        prompt=prompt,
        image_0=images[0],
        image_1=images[1],
        label=label,
        scores=_scores(raw, row, scores),
        user_id=None if user_id is None else str(user_id),
    )


def _label(raw: Mapping[str, Any], row: int) -> float:
    if raw.get("has_label") is not None and not raw["has_label"]:
        raise _bad(row, "has_label", "the row was never labelled")
    label = _number(raw, "label_0", row)
    if not 0 <= label <= 1:
        raise _bad(row, "label_0", f"{label:g} lies outside [0, 1] (1 image 0 preferred, 0 image 1, 0.5 a tie)")
    if "label_1" in raw:
        other = _number(raw, "label_1", row)
        if abs(label + other - 1) > 1e-6:
            raise _bad(row, "label_1", f"label_0 + label_1 is {label:g} + {other:g}, expected 1")
    return label


def _scores(raw: Mapping[str, Any], row: int, columns: Mapping[str, tuple[str, str]]) -> dict[str, tuple[float, float]]:
    """The scores that the row has; a column left empty on both sides is no score, on one side an error."""
    found = {}
    for name, pair in columns.items():
        if all(raw.get(column) is None for column in pair):
            continue
        found[name] = (_number(raw, pair[0], row), _number(raw, pair[1], row))
    return found


def _number(raw: Mapping[str, Any], name: str, row: int) -> float:
    value = raw.get(name)
    if isinstance(value, list | tuple) and len(value) == 1:
        value = value[0]
    try:
        number = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if isinstance(value, str) or not math.isfinite(number):
        raise _bad(row, name, f"expected a finite number, got {_what(value)}")
    return number


def _what(value: Any) -> str:
    return repr(value)[:60] if value is None or isinstance(value, int | float | str) else type(value).__name__


def _bad(row: int, field: str, reason: str) -> InvalidRow:
    return InvalidRow(BadRow(row, field, reason))
