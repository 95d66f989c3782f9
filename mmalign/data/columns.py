"""The forms of data that are understood, of preferences and of captioned pictures, and a row that is no ranking as a RawPair."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from functools import partial
from typing import Any, Literal

from mmalign.data.judgements import label_of_chosen, label_of_pickapic, label_of_votes
from mmalign.data.messages import plain_prompt, plain_row
from mmalign.data.raw import RawPair, bad, given, read_number, read_text, read_user, what
from mmalign.data.records import InvalidRow

Form = Literal[
    "pickapic", "canonical", "hpdv2", "hpdv3", "hpdv2 rankings", "imagereward rankings", "imagereward",
    "captioned", "captioned by text", "captioned by caption",
]  # fmt: skip
REQUIRED: dict[Form, tuple[str, ...]] = {
    "pickapic": ("caption", "jpg_0", "jpg_1", "label_0"),
    "canonical": ("prompt", "chosen", "rejected"),
    "hpdv2": ("prompt", "file_path", "human_preference"),
    "hpdv3": ("prompt", "path1", "path2"),
    "hpdv2 rankings": ("prompt", "image_path", "rank"),
    "imagereward rankings": ("prompt", "generations", "ranking"),
    "imagereward": ("prompt", "prompt_id", "image", "rank"),
    "captioned": ("prompt", "image"),
    "captioned by text": ("text", "image"),
    "captioned by caption": ("caption", "image"),
}
# One picture a row, which nobody compared.
CAPTIONED: tuple[Form, ...] = ("captioned", "captioned by text", "captioned by caption")
RATINGS = ("overall_rating", "image_text_alignment_rating", "fidelity_rating")
_OPTIONAL: dict[Form, tuple[str, ...]] = {
    "pickapic": ("label_1", "has_label", "user_id"),
    "canonical": (
        "chosen_score",
        "rejected_score",
        "confidence",
        "chosen_votes",
        "rejected_votes",
        "user_id",
        "images",
        "image",
    ),
    "hpdv2": ("user_id",),
    "hpdv3": ("confidence", "user_id"),
    "hpdv2 rankings": ("user_id",),
    "imagereward rankings": ("user_id",),
    "imagereward": RATINGS,
    "captioned": (),
    "captioned by text": (),
    "captioned by caption": (),
}
TAKE_CAPTIONED = "sft, self-npo with source='images' and longalign with stage='supervised' learn from them"
_SCORE = re.compile(r"(?=.*score)(.+)_[01]")


def recognise(columns: Collection[str], *, captioned: bool = False) -> Form:
    """Which form a table with these columns has; `captioned`: also single pictures, where they are no preference data."""
    fitting = [form for form, names in REQUIRED.items() if set(names) <= set(columns)]
    found = [form for form in fitting if form not in CAPTIONED]
    if captioned and not found:
        found = fitting
    if len(found) == 1:
        return found[0]
    trouble = "both forms at once, drop the columns of one" if found else "not preference data of images"
    if fitting and not found:
        trouble = f"single pictures with captions, which compare nothing: {TAKE_CAPTIONED}"
    forms = [form for form in REQUIRED if captioned or form not in CAPTIONED]
    known = "; ".join(f"({', '.join(REQUIRED[form])}) as in {form}" for form in forms)
    raise ValueError(f"columns {', '.join(sorted(map(str, columns))) or '(none)'}: {trouble}. Expected one of {known}")


def used_columns(form: Form, columns: Collection[str]) -> list[str]:
    """The columns that are looked at, in a fixed order; the rest need not be read."""
    names = [*REQUIRED[form], *(name for name in _OPTIONAL[form] if name in columns)]
    return names + [name for pair in score_columns(form, columns).values() for name in pair if name not in names]


def score_columns(form: Form, columns: Collection[str]) -> dict[str, tuple[str, str]]:
    """Reward columns by name: `ps_score_0`, `ps_score_1` are "ps_score"; `chosen_score`, `rejected_score` are "score".

    ImageReward's three ratings stand in a column each, which every picture has for itself.
    """
    if form == "canonical":
        pair = ("chosen_score", "rejected_score")
        return {"score": pair} if set(pair) <= set(columns) else {}
    if form == "imagereward":
        return {name: (name, name) for name in RATINGS if name in columns}
    if form != "pickapic":
        return {}
    stems = sorted({match[1] for name in columns if (match := _SCORE.fullmatch(name))})
    return {stem: (f"{stem}_0", f"{stem}_1") for stem in stems if {f"{stem}_0", f"{stem}_1"} <= set(columns)}


def read_pair(form: Form, raw: Mapping[str, Any], row: int, scores: Mapping[str, tuple[str, str]]) -> RawPair:
    """One row of a form whose rows are pairs, checked field by field; InvalidRow names the first field at fault."""
    return _READERS[form](raw, row, scores)


def read_prompt(form: Form, raw: Mapping[str, Any]) -> str | None:
    """The prompt of a row of any form; None where it cannot be read."""
    field = REQUIRED[form][0]
    value = raw.get(field)
    try:
        if form == "canonical" and isinstance(value, list | tuple):
            value = plain_prompt(value, 0)
        return read_text({field: value}, field, 0)
    except InvalidRow:
        return None


def read_scores(
    sides: tuple[Mapping[str, Any], Mapping[str, Any]], row: int, columns: Mapping[str, tuple[str, str]]
) -> dict[str, tuple[float, float]]:
    """The scores of both sides; a column left empty on either is no score of the pair."""
    found = {}
    for name, pair in columns.items():
        values = [side.get(column) for side, column in zip(sides, pair, strict=True)]
        if all(map(given, values)):
            found[name] = (read_number(values[0], pair[0], row), read_number(values[1], pair[1], row))
    return found


def _pickapic(raw: Mapping[str, Any], row: int, scores: Mapping[str, tuple[str, str]]) -> RawPair:
    return _pair(raw, row, scores, "caption", ("jpg_0", "jpg_1"), label_of_pickapic(raw, row))


def _canonical(raw: Mapping[str, Any], row: int, scores: Mapping[str, tuple[str, str]]) -> RawPair:
    raw = plain_row(raw, row)
    return _pair(raw, row, scores, "prompt", ("chosen", "rejected"), label_of_chosen(raw, row))


def _hpdv2(raw: Mapping[str, Any], row: int, scores: Mapping[str, tuple[str, str]]) -> RawPair:
    pictures = raw.get("file_path")
    if not isinstance(pictures, list | tuple) or len(pictures) != 2:
        found = len(pictures) if isinstance(pictures, list | tuple) else what(pictures)
        raise bad(row, "file_path", f"expected a list of two pictures, got {found}")
    fields = ("file_path[0]", "file_path[1]")
    label = label_of_votes(raw.get("human_preference"), "human_preference", row)
    return _pair({**raw, **dict(zip(fields, pictures, strict=True))}, row, scores, "prompt", fields, label)


def _hpdv3(raw: Mapping[str, Any], row: int, scores: Mapping[str, tuple[str, str]]) -> RawPair:
    return _pair(raw, row, scores, "prompt", ("path1", "path2"), label_of_chosen(raw, row))


def _captioned(prompt: str, raw: Mapping[str, Any], row: int, scores: Mapping[str, tuple[str, str]]) -> RawPair:
    return RawPair(read_text(raw, prompt, row), ("image",), (raw.get("image"),), label=1.0, scores={})


def _pair(
    raw: Mapping[str, Any],
    row: int,
    scores: Mapping[str, tuple[str, str]],
    prompt: str,
    fields: tuple[str, str],
    label: float,
) -> RawPair:
    return RawPair(
        prompt=read_text(raw, prompt, row),
        label=label,
        fields=fields,
        pictures=(raw.get(fields[0]), raw.get(fields[1])),
        scores=read_scores((raw, raw), row, scores),
        user_id=read_user(raw, row),
    )


_READERS: dict[Form, Callable[[Mapping[str, Any], int, Mapping[str, tuple[str, str]]], RawPair]] = {
    "pickapic": _pickapic,
    "canonical": _canonical,
    "hpdv2": _hpdv2,
    "hpdv3": _hpdv3,
    **{form: partial(_captioned, REQUIRED[form][0]) for form in CAPTIONED},
}
