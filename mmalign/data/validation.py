"""validate_pairs: what a source holds, and what is wrong with the rows that training will leave out."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

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

    found = in_order(check, range(len(source)), workers)
    with tqdm(found, total=len(source), desc=f"Checking {source.unit}s", unit=source.unit, disable=not progress) as bar:
        seen = list(bar)
    good = _counts([told for told, bad in seen if told is not None and bad is None])
    return DataReport(
        num_rows=len(seen),
        usable=[row for row, (_, bad) in enumerate(seen) if bad is None],
        num_ties=good.ties,
        num_prompts=good.prompts,
        num_users=good.users,
        bad_rows=[bad for _, bad in seen if bad is not None],
        told=_counts([told for told, _ in seen if told is not None]),
    )


def _counts(pairs: Sequence[RawPair]) -> Counts:
    return Counts(
        pairs=len(pairs),
        ties=sum(pair.label == 0.5 for pair in pairs),
        prompts=len({pair.prompt for pair in pairs}),
        users=len({pair.user_id for pair in pairs if pair.user_id is not None}),
    )


def group_by_kind(bad_rows: Sequence[BadRow]) -> list[Problem]:
    """Bad rows whose field and reason agree but for quoted values and numbers, together; the most frequent kind first."""
    kinds: dict[str, list[BadRow]] = {}
    for bad in bad_rows:
        kinds.setdefault(_PARTICULAR.sub("…", f"{bad.field}: {bad.reason}"), []).append(bad)
    ordered = sorted(kinds.values(), key=len, reverse=True)
    return [Problem(found[0], [bad.row for bad in found]) for found in ordered]
