"""validate_pairs: what a source holds, and what is wrong with the rows that training will leave out."""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from tqdm.auto import tqdm

from mmalign.data.ahead import in_order
from mmalign.data.buckets import Bucket, bucket_of, sizes_of
from mmalign.data.clips import frames_of
from mmalign.data.images import BadImage, covering_size
from mmalign.data.pairs import PairSource
from mmalign.data.raw import RawPair
from mmalign.data.records import BadRow, InvalidRow

# What differs from one row to the next with the same trouble: quoted values, and numbers.
_PARTICULAR = re.compile(r"'(?:[^'\\]|\\.)*'|\"(?:[^\"\\]|\\.)*\"|[-+]?\d[\d.,…]*(?:e[-+]?\d+)?")
_MULTIPLE = 8
_Row = TypeVar("_Row")


@dataclass(frozen=True)
class Problem:
    """One kind of trouble. example: the first row that has it; rows: the numbers of all of them, ascending."""

    example: BadRow
    rows: list[int]


@dataclass(frozen=True)
class Counts:
    """Pairs, how many of them are ties, and how many prompts and users they have."""

    pairs: int
    ties: int
    prompts: int
    users: int


@dataclass(frozen=True)
class Told:
    """What a row is counted by; `prompt` is anything that tells prompts apart."""

    prompt: Hashable
    label: float
    user_id: str | None


@dataclass(frozen=True)
class DataReport:
    """What validate_pairs saw. usable: row numbers; ties, users and prompts are counted among the usable rows.

    told: the same counts of all rows whose text and numbers can be read, whatever their pictures are.
    """

    num_rows: int
    usable: list[int]
    num_ties: int
    num_prompts: int
    num_users: int
    bad_rows: list[BadRow]
    told: Counts

    @property
    def problems(self) -> list[Problem]:
        """The bad rows by kind, the most frequent first."""
        return group_by_kind(self.bad_rows)


def validate_pairs(
    source: PairSource,
    *,
    resolution: int | tuple[int, int] = 512,
    aspect_buckets: bool = False,
    workers: int = 4,
    progress: bool = True,
) -> DataReport:
    """Read and check every row as training at this resolution (side, or (height, width)) does; nothing is encoded.

    aspect_buckets: each pair in the shape nearest to its own, whose sides are multiples of 8 (of 64 where the resolution is at least
    256, which every image model reads).
    """
    height, width = (resolution, resolution) if isinstance(resolution, int) else resolution
    if height < 1 or width < 1 or workers < 1:
        raise ValueError(f"resolution and workers must be at least 1, got {resolution} and {workers}")
    sizes = sizes_of(height, width, _MULTIPLE) if aspect_buckets else [(height, width)]
    shapes = [Bucket(*size, ()) for size in sizes]

    def check(row: int) -> tuple[RawPair | None, BadRow | None]:
        told = None
        try:
            raw = source.raw(row)
            told = replace(raw, pictures=())
            record = source.opened(raw, row)
            shape = bucket_of(record, shapes)
        except InvalidRow as error:
            return told, error.bad_row
        for field, image in zip(record.fields, record.sides, strict=True):
            try:
                covering_size(frames_of(image)[0], shape.height, shape.width)
            except BadImage as error:
                return told, BadRow(row, field, str(error))
        return told, None

    seen = checked_rows(check, len(source), source.unit, workers, progress)
    return DataReport(**findings([(None if told is None else _told(told), bad) for told, bad in seen]))


def checked_rows(
    check: Callable[[int], tuple[_Row | None, BadRow | None]], rows: int, unit: str, workers: int, progress: bool
) -> list[tuple[_Row | None, BadRow | None]]:
    """What `check` says of every row, in order, in threads, with a bar."""
    found = in_order(check, range(rows), workers)
    with tqdm(found, total=rows, desc=f"Checking {unit}s", unit=unit, disable=not progress) as bar:
        return list(bar)


def findings(seen: Sequence[tuple[Told | None, BadRow | None]]) -> dict[str, Any]:
    """The fields of a DataReport, of (what is told, what is wrong) of every row."""
    good = _counts([told for told, bad in seen if told is not None and bad is None])
    return {
        "num_rows": len(seen),
        "usable": [row for row, (_, bad) in enumerate(seen) if bad is None],
        "num_ties": good.ties,
        "num_prompts": good.prompts,
        "num_users": good.users,
        "bad_rows": [bad for _, bad in seen if bad is not None],
        "told": _counts([told for told, _ in seen if told is not None]),
    }


def _told(pair: RawPair) -> Told:
    return Told(pair.prompt, pair.label, pair.user_id)


def _counts(rows: Sequence[Told]) -> Counts:
    return Counts(
        pairs=len(rows),
        ties=sum(row.label == 0.5 for row in rows),
        prompts=len({row.prompt for row in rows}),
        users=len({row.user_id for row in rows if row.user_id is not None}),
    )


def group_by_kind(bad_rows: Sequence[BadRow]) -> list[Problem]:
    """Bad rows whose field and reason agree but for quoted values and numbers, together; the most frequent kind first."""
    kinds: dict[str, list[BadRow]] = {}
    for bad in bad_rows:
        kinds.setdefault(_PARTICULAR.sub("…", f"{bad.field}: {bad.reason}"), []).append(bad)
    ordered = sorted(kinds.values(), key=len, reverse=True)
    return [Problem(found[0], [bad.row for bad in found]) for found in ordered]
