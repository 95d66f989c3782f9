"""Rankings of several pictures of one prompt, as pairs.

n ranked pictures give n(n − 1)/2 pairs, in the order (0, 1), (0, 2) … (n − 2, n − 1). The smaller rank is preferred. Equal
ranks give a pair with label 0.5, a tie, which `compare` drops or keeps like every other. A ranking that cannot be read
is one bad row; one picture that cannot be opened costs the pairs it stands in and no others.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

from mmalign.data.columns import Form, read_scores
from mmalign.data.judgements import label_of_ranks
from mmalign.data.raw import RawPair, bad, read_number, read_text, read_user, what
from mmalign.data.records import InvalidRow
from mmalign.data.rows import Rows

# Where a ranking stands in one row: the columns of its pictures and of their ranks.
_LISTS: dict[Form, tuple[str, str]] = {
    "hpdv2 rankings": ("image_path", "rank"),
    "imagereward rankings": ("generations", "ranking"),
}
RANKED: tuple[Form, ...] = (*_LISTS, "imagereward")


@dataclass(frozen=True, slots=True)
class _Place:
    """A picture: the row it stands in, and its place in that row's list (None where it has the row for itself)."""

    row: int
    at: int | None


@dataclass(frozen=True, slots=True)
class _Match:
    """Two pictures of one ranking."""

    prompt: str | None
    sides: tuple[_Place, _Place]
    label: float


@dataclass(frozen=True, slots=True)
class _Fault:
    """What is left out: a ranking, or one row of it."""

    row: int
    field: str
    reason: str


class Rankings:
    """The pairs of a table of rankings: `len`, and `[i]` a RawPair, or InvalidRow is raised."""

    def __init__(self, rows: Rows, form: Form, scores: Mapping[str, tuple[str, str]]) -> None:
        self._rows, self._form, self._scores = rows, form, scores
        self._found: Sequence[_Match | _Fault] = list(_by_row(rows, form) if form in _LISTS else _by_prompt_id(rows))
        self._column = "image" if form == "imagereward" else _LISTS[form][0]

    def __len__(self) -> int:
        return len(self._found)

    def __getitem__(self, number: int) -> RawPair:
        found = self._found[number]
        if isinstance(found, _Fault):
            try:
                self._rows[found.row]
            except InvalidRow as error:
                # The line could not be read at all, which says more than the columns that it lacks.
                raise bad(number, f"{error.bad_row.field} of row {found.row}", error.bad_row.reason) from error
            raise bad(number, f"{found.field} of row {found.row}", found.reason)
        first, second = found.sides
        raws = (self._rows[first.row], self._rows[second.row])
        column = self._column
        pictures = [
            raw.get(column) if side.at is None else raw[column][side.at]
            for raw, side in zip(raws, found.sides, strict=True)
        ]
        return RawPair(
            prompt=read_text({"prompt": found.prompt}, "prompt", number),
            label=found.label,
            fields=(_named(column, first), _named(column, second)),
            pictures=(pictures[0], pictures[1]),
            scores=read_scores(raws, number, self._scores),
            user_id=read_user(raws[0], number),
        )

    def row_of(self, number: int) -> int:
        """The row of the table that a pair comes from, the first of two."""
        found = self._found[number]
        return found.row if isinstance(found, _Fault) else found.sides[0].row

    def prompts(self) -> list[str | None]:
        """The prompt of every pair; None where there is none to read."""
        return [None if isinstance(found, _Fault) else found.prompt for found in self._found]


def _by_row(rows: Rows, form: Form) -> Iterable[_Match | _Fault]:
    """A ranking a row: a list of pictures and a list of ranks."""
    pictures, ranks = _LISTS[form]
    for row, raw in enumerate(rows.light(("prompt", ranks, pictures))):
        try:
            prompt = read_text(raw, "prompt", row)
            numbers = _ranks(raw, pictures, ranks, row)
        except InvalidRow as error:
            yield _Fault(row, error.bad_row.field, error.bad_row.reason)
            continue
        for i, j in combinations(range(len(numbers)), 2):
            yield _Match(prompt, (_Place(row, i), _Place(row, j)), label_of_ranks(numbers[i], numbers[j]))


def _ranks(raw: Mapping[str, Any], pictures: str, ranks: str, row: int) -> list[float]:
    for name in (pictures, ranks):
        if not isinstance(raw.get(name), list | tuple):
            raise bad(row, name, f"expected a list, got {what(raw.get(name))}")
    if len(raw[pictures]) != len(raw[ranks]):
        raise bad(row, ranks, f"{len(raw[ranks])} ranks for {len(raw[pictures])} pictures")
    if len(raw[ranks]) < 2:
        raise bad(row, pictures, f"{len(raw[pictures])} pictures: a comparison needs two")
    return [read_number(value, f"{ranks}[{at}]", row) for at, value in enumerate(raw[ranks])]


def _by_prompt_id(rows: Rows) -> Iterable[_Match | _Fault]:
    """A picture a row, as in ImageRewardDB: those of one prompt_id are ranked against each other."""
    groups: dict[str, list[tuple[int, float, str]]] = {}
    for row, raw in enumerate(rows.light(("prompt", "prompt_id", "rank"))):
        try:
            prompt = read_text(raw, "prompt", row)
            rank = read_number(raw.get("rank"), "rank", row)
            key = raw.get("prompt_id")
            if not isinstance(key, str | int):
                raise bad(row, "prompt_id", f"expected text or a whole number, got {what(key)}")
        except InvalidRow as error:
            yield _Fault(row, error.bad_row.field, error.bad_row.reason)
            continue
        groups.setdefault(str(key), []).append((row, rank, prompt))
    for key, members in groups.items():
        yield from _of_group(key, members)


def _of_group(key: str, members: list[tuple[int, float, str]]) -> Iterable[_Match | _Fault]:
    row, _, prompt = members[0]
    if len(members) == 1:
        yield _Fault(row, "prompt_id", f"the only usable picture of prompt_id {key!r}: a comparison needs two")
        return
    other = next((at for at, _, text in members if text != prompt), None)
    if other is not None:
        yield _Fault(other, "prompt", f"differs from that of row {row}, which has the same prompt_id {key!r}")
        return
    for (i, rank, _), (j, other_rank, _) in combinations(members, 2):
        yield _Match(prompt, (_Place(i, None), _Place(j, None)), label_of_ranks(rank, other_rank))


def _named(column: str, place: _Place) -> str:
    return f"{column} of row {place.row}" if place.at is None else f"{column}[{place.at}] of row {place.row}"
