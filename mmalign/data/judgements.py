"""What people said of two pictures, as one label in [0, 1]: how strongly the first is preferred."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mmalign.data.raw import bad, given, read_number, what


def label_of_pickapic(raw: Mapping[str, Any], row: int) -> float:
    """`label_0`; `label_1`, where there is one, must complete it to 1, and `has_label` must not deny it."""
    denied = raw.get("has_label")
    if isinstance(denied, str):
        raise bad(row, "has_label", f"expected true or false, got {what(denied)}")
    if given(denied) and not denied:
        raise bad(row, "has_label", "the row was never labelled")
    label = read_number(raw.get("label_0"), "label_0", row)
    if not 0 <= label <= 1:
        raise bad(row, "label_0", f"{label:g} lies outside [0, 1] (1 image 0 preferred, 0 image 1, 0.5 a tie)")
    if given(raw.get("label_1")):
        other = read_number(raw["label_1"], "label_1", row)
        if abs(label + other - 1) > 1e-6:
            raise bad(row, "label_1", f"label_0 + label_1 is {label:g} + {other:g}, expected 1")
    return label


def label_of_chosen(raw: Mapping[str, Any], row: int) -> float:
    """1 where the source only says which picture was chosen; its confidence or its share of the votes where it says more.

    A half is a tie. Less than a half would say that the other picture was chosen, and is an error.
    """
    confidence = raw.get("confidence")
    votes = [name for name in ("chosen_votes", "rejected_votes") if given(raw.get(name))]
    if votes and given(confidence):
        raise bad(row, "confidence", "the row has votes as well: keep one of the two")
    if votes:
        return _preferred(_share(raw, row), "rejected_votes", row)
    if not given(confidence):
        return 1.0
    return _preferred(read_number(confidence, "confidence", row), "confidence", row)


def label_of_votes(value: Any, field: str, row: int) -> float:
    """(votes for the first, votes for the second) → the first's share; [1, 0] is 1, [3, 3] a tie."""
    if not isinstance(value, list | tuple) or len(value) != 2:
        raise bad(row, field, f"expected one number for each of two pictures, got {_count(value)}")
    counts = [read_number(item, f"{field}[{side}]", row) for side, item in enumerate(value)]
    return _fraction(counts[0], counts[1], field, row)


def label_of_ranks(first: float, second: float) -> float:
    """Rank 1 is the best: the smaller rank is preferred, equal ranks are a tie."""
    return 0.5 if first == second else float(first < second)


def _share(raw: Mapping[str, Any], row: int) -> float:
    chosen, rejected = (read_number(raw.get(name), name, row) for name in ("chosen_votes", "rejected_votes"))
    return _fraction(chosen, rejected, "chosen_votes", row)


def _fraction(first: float, second: float, field: str, row: int) -> float:
    if first < 0 or second < 0 or not 0 < first + second < float("inf"):
        raise bad(row, field, f"votes {first:g} and {second:g}: expected counts from 0 up, and at least one vote")
    return first / (first + second)


def _preferred(label: float, field: str, row: int) -> float:
    if not 0.5 <= label <= 1:
        raise bad(row, field, f"the preferred side has a confidence or share of votes of {label:g}, expected 0.5 … 1")
    return label


def _count(value: Any) -> str:
    return f"{len(value)} of them" if isinstance(value, list | tuple) else what(value)
