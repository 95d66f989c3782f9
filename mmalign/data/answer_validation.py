"""validate_answers: what a source of answers holds, and what is wrong with the rows that training will leave out."""

from __future__ import annotations

from dataclasses import dataclass

from mmalign.data.answer_forms import RawAnswers
from mmalign.data.answer_records import AnswerPair, Picture
from mmalign.data.answers import AnswerSource
from mmalign.data.fingerprints import digest_of
from mmalign.data.records import BadRow, InvalidRow
from mmalign.data.validation import DataReport, Told, checked_rows, findings


@dataclass(frozen=True)
class AnswerReport(DataReport):
    """The same of answers, and of the usable rows: pictures and clips in their prompts, and rows with marked phrases."""

    num_pictures: int
    num_clips: int
    num_marked: int


@dataclass(frozen=True)
class _Seen:
    told: Told
    pictures: int = 0
    clips: int = 0
    marked: bool = False


def validate_answers(source: AnswerSource, *, workers: int = 4, progress: bool = True) -> AnswerReport:
    """Read and check every row as training does, its pictures and clips too; nothing is tokenised."""
    if workers < 1:
        raise ValueError(f"workers must be at least 1, got {workers}")

    def check(row: int) -> tuple[_Seen | None, BadRow | None]:
        seen = None
        try:
            raw = source.raw(row)
            seen = _Seen(Told(_asked(raw), raw.label, raw.user_id))
            return _of_pair(seen.told, source.opened(raw, row)), None
        except InvalidRow as error:
            return seen, error.bad_row

    rows = checked_rows(check, len(source), source.unit, workers, progress)
    good = [seen for seen, bad in rows if seen is not None and bad is None]
    return AnswerReport(
        **findings([(None if seen is None else seen.told, bad) for seen, bad in rows]),
        num_pictures=sum(seen.pictures for seen in good),
        num_clips=sum(seen.clips for seen in good),
        num_marked=sum(seen.marked for seen in good),
    )


def _asked(raw: RawAnswers) -> tuple[str, ...]:
    """What tells prompts apart: who says what, and the content of their media."""
    return tuple(
        f"{turn.role}: {turn.text} {digest_of([medium.shown for medium in turn.media])}" for turn in raw.prompt
    )


def _of_pair(told: Told, pair: AnswerPair) -> _Seen:
    pictures = sum(isinstance(medium, Picture) for medium in pair.media)
    marked = pair.chosen_marks is not None or pair.rejected_marks is not None
    return _Seen(told, pictures, len(pair.media) - pictures, marked)
