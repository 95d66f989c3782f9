"""validate_pairs: what a source holds, and what is wrong with the rows that training will leave out."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from tqdm.auto import tqdm

from mmalign.data.ahead import in_order
from mmalign.data.clips import frames_of
from mmalign.data.images import BadImage, covering_size
from mmalign.data.pairs import PairSource
from mmalign.data.records import BadRow, InvalidRow

# What differs from one row to the next with the same trouble: quoted values, and numbers.
_PARTICULAR = re.compile(r"'(?:[^'\\]|\\.)*'|\"(?:[^\"\\]|\\.)*\"|[-+]?\d[\d.,…]*(?:e[-+]?\d+)?")


@dataclass(frozen=True)
class Problem:
    """One kind of trouble. example: the first row that has it; rows: the numbers of all of them, ascending."""

    example: BadRow
    rows: list[int]


@dataclass(frozen=True)
class DataReport:
    """What validate_pairs saw. usable: row numbers; ties, users and prompts are counted among the usable rows."""

    num_rows: int
    usable: list[int]
    num_ties: int
    num_prompts: int
    num_users: int
    bad_rows: list[BadRow]

    @property
    def problems(self) -> list[Problem]:
        """The bad rows by kind, the most frequent first."""
        return group_by_kind(self.bad_rows)


@dataclass(frozen=True, slots=True)
class _Seen:
    prompt: str
    tie: bool
    user_id: str | None


def validate_pairs(
    source: PairSource, *, resolution: int | tuple[int, int] = 512, workers: int = 4, progress: bool = True
) -> DataReport:
    """Read and check every row as training at this resolution (side, or (height, width)) does; nothing is encoded."""
    height, width = (resolution, resolution) if isinstance(resolution, int) else resolution
    if height < 1 or width < 1 or workers < 1:
        raise ValueError(f"resolution and workers must be at least 1, got {resolution} and {workers}")

    def check(row: int) -> _Seen | BadRow:
        try:
            record = source[row]
        except InvalidRow as error:
            return error.bad_row
        for field, image in zip(source.image_fields, (record.image_0, record.image_1), strict=True):
            try:
                covering_size(frames_of(image)[0], height, width)
            except BadImage as error:
                return BadRow(row, field, str(error))
        return _Seen(record.prompt, record.label == 0.5, record.user_id)

    found = in_order(check, range(len(source)), workers)
    with tqdm(found, total=len(source), desc="Checking pairs", unit="pair", disable=not progress) as bar:
        seen = list(bar)
    good = [item for item in seen if isinstance(item, _Seen)]
    return DataReport(
        num_rows=len(seen),
        usable=[row for row, item in enumerate(seen) if isinstance(item, _Seen)],
        num_ties=sum(item.tie for item in good),
        num_prompts=len({item.prompt for item in good}),
        num_users=len({item.user_id for item in good if item.user_id is not None}),
        bad_rows=[item for item in seen if isinstance(item, BadRow)],
    )


def group_by_kind(bad_rows: Sequence[BadRow]) -> list[Problem]:
    """Bad rows whose field and reason agree but for quoted values and numbers, together; the most frequent kind first."""
    kinds: dict[str, list[BadRow]] = {}
    for bad in bad_rows:
        kinds.setdefault(_PARTICULAR.sub("…", f"{bad.field}: {bad.reason}"), []).append(bad)
    ordered = sorted(kinds.values(), key=len, reverse=True)
    return [Problem(found[0], [bad.row for bad in found]) for found in ordered]
