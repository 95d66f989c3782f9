"""The one canonical record that every image preference data set becomes, and what is said of a row that cannot."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mmalign.data.clips import PictureOrClip


# Bad rows that are told with their reasons, and by their numbers alone.
_NAMED, _NUMBERED = 5, 50


@dataclass(frozen=True, slots=True)
class PairRecord:
    """Two pictures, or two clips, of one prompt, in the data set's own order; image_1 is None where there is one with its caption.

    label in [0, 1]: how strongly image_0 is preferred (1 image_0, 0 image_1, 0.5 a tie, between: a share of votes).
    Images are RGB, upright (EXIF), 8 bits a channel; of a source that is read as clips, each is a tuple of frames.
    fields: where they stand in the source. scores: a column's name → (score of image_0, of image_1).
    """

    row: int
    prompt: str
    image_0: PictureOrClip
    image_1: PictureOrClip | None
    label: float
    fields: tuple[str, ...]
    scores: dict[str, tuple[float, float]] = field(default_factory=dict)
    user_id: str | None = None

    @property
    def sides(self) -> tuple[PictureOrClip, ...]:
        """The pictures or clips that there are."""
        return (self.image_0,) if self.image_1 is None else (self.image_0, self.image_1)


@dataclass(frozen=True, slots=True)
class BadRow:
    """A row that is left out whole: its number in the source, the column at fault, and what is wrong with it."""

    row: int
    field: str
    reason: str

    def __str__(self) -> str:
        return f"row {self.row}, {self.field}: {self.reason}"


class InvalidRow(ValueError):
    """Raised on reading a row that cannot become a PairRecord; `bad_row` says why."""

    def __init__(self, bad_row: BadRow) -> None:
        super().__init__(str(bad_row))
        self.bad_row = bad_row


class EndOfSource(IndexError):
    """Raised on reading behind a source's last row; where a stream ends may not be known before."""


def summarise(bad_rows: list[BadRow], total: int, *, what: str = "left out") -> str:
    """ "7 of 100 rows left out: row 4, jpg_0: …; …; and 2 more: 71, 80" — one line, the first few with their reasons.

    what: becomes, or became, of them.
    """
    named = "; ".join(str(bad) for bad in bad_rows[:_NAMED])
    rest = [str(bad.row) for bad in bad_rows[_NAMED:]]
    numbers = ", ".join([*rest[:_NUMBERED], *(["…"] if len(rest) > _NUMBERED else [])])
    return f"{len(bad_rows)} of {total} rows {what}: {named}" + (f"; and {len(rest)} more: {numbers}" if rest else "")
