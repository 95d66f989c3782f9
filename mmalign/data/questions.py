"""load_questions: prompts to be answered, and, where it is known, what is right.

Rows have `question` (text, its media marked <image> or <video>) or `prompt` (the same, or messages that end with the user's turn), the
columns of media that preference data have, and as far as there are some

    answer    what is right: a text, or a list of texts of which each one is
    kind      what the question is about
    pair      an id that rows share all of which must be right (VideoHallucer's basic and hallucinated question)
    options   the texts of A, B, …; the question shows them itself

Preference data (see answer_forms.py) are read too: what is right is then the preferred or the liked answer.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from mmalign.data.answer_forms import MEDIA_COLUMNS, REQUIRED, Form, read_answers, recognise, used_columns
from mmalign.data.answer_media import ClipReading
from mmalign.data.answer_records import Turn
from mmalign.data.answer_turns import RawTurn, check_said, read_turns, user_turn, with_media
from mmalign.data.answers import identity_of, open_turns
from mmalign.data.fingerprints import digest_of
from mmalign.data.raw import bad, given, read_text, what
from mmalign.data.records import EndOfSource
from mmalign.data.rows import DatasetRows, ListRows, ParquetRows, Rows, check_rows
from mmalign.data.sources import open_rows, refuse

_ABOUT = ("kind", "pair", "options")
_TIE = 0.5


@dataclass(frozen=True, slots=True)
class Question:
    """What is asked, its media left out. text: of the user's last turn. right: the answers that are right; () where nobody knows.

    cluster: the same for all questions about the same media, or, without media, of the same words. The rest as in the columns.
    """

    row: int
    text: str
    right: tuple[str, ...]
    cluster: str
    kind: str = ""
    pair: str | None = None
    options: tuple[str, ...] = ()


class Questions(Protocol):
    """Questions by row, as `QuestionSource` has them."""

    def __len__(self) -> int: ...
    def __getitem__(self, row: int) -> Question: ...
    def prompt(self, row: int) -> tuple[Turn, ...]: ...
    def fingerprint(self) -> str: ...


class QuestionSource:
    """Questions in their own order. `source[i]` is what question i asks; `prompt(i)` opens its conversation with the media."""

    def __init__(self, rows: Rows, name: str, reading: ClipReading, *, max_rows: int | None = None) -> None:
        if not isinstance(rows, ListRows | ParquetRows | DatasetRows):
            raise ValueError(f"{name}: questions are read from lists, JSON, parquet and datasets, not from streams")
        check_rows(rows, name, max_rows)
        self.name, self.reading, self._rows = name, reading, rows
        self._form, self._asks = _recognised(rows.columns, name)
        self._length = len(rows) if max_rows is None else min(max_rows, len(rows))
        if isinstance(rows, ParquetRows | DatasetRows):
            own = ("question", "prompt", "answer", *MEDIA_COLUMNS)
            wanted = used_columns(self._form, rows.columns) if self._form else own
            rows.select_columns([name for name in dict.fromkeys((*wanted, *_ABOUT)) if name in rows.columns])

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, row: int) -> Question:
        turns, right, raw = self._read(row)
        options = raw.get("options")
        return Question(
            row=row,
            text=turns[-1].text.strip(),
            right=right,
            cluster=digest_of(identity_of(turns)),
            kind=_told(raw, "kind", row) or "",
            pair=_told(raw, "pair", row),
            options=_texts(options, "options", row) if given(options) else (),
        )

    def prompt(self, row: int) -> tuple[Turn, ...]:
        """The conversation with its pictures and clips; InvalidRow where it cannot be read."""
        return open_turns(self._read(row)[0], row, self._rows, self.reading)

    def turns(self, row: int) -> tuple[RawTurn, ...]:
        """The conversation with its media as the source names them."""
        return tuple(self._read(row)[0])

    @property
    def roots(self) -> Sequence[Path]:
        """Folders that paths of media may point into."""
        return self._rows.roots

    def fingerprint(self) -> str:
        """sha256 of the content and of what decides what is read of it."""
        media = (*MEDIA_COLUMNS, *(REQUIRED[self._form] if self._form else ()))
        content = self._rows.fingerprint(folders=True, media=media)
        return digest_of([content, self._form or self._asks, self._length, repr(replace(self.reading, cache=None))])

    def _read(self, row: int) -> tuple[Sequence[RawTurn], tuple[str, ...], Mapping[str, Any]]:
        if not 0 <= row < self._length:
            raise EndOfSource(f"row {row} of {self._length}")
        raw = self._rows[row]
        if self._form is not None:
            pair = read_answers(self._form, raw, row)
            return pair.prompt, (pair.chosen,) if pair.label > _TIE else (), raw
        value = raw.get(self._asks)
        turns = (
            read_turns(value, self._asks, row)
            if isinstance(value, list | tuple)
            else (user_turn(value, self._asks, row),)
        )
        if turns[-1].role != "user":
            raise bad(row, self._asks, f"ends with the turn of {turns[-1].role!r}, expected the user's")
        told = raw.get("answer")
        right = _texts(told, "answer", row) if given(told) else ()
        turns = with_media(turns, raw, row, llava=self._asks == "question")
        check_said(turns, self._asks, row)
        return turns, right, raw


def load_questions(
    source: Any,
    *,
    split: str | None = None,
    revision: str | None = None,
    root: str | Path | None = None,
    max_rows: int | None = None,
    num_frames: int | None = None,
    fps: float | None = None,
    frame_cache: str | Path | None = None,
) -> QuestionSource:
    """Open a source of questions; nothing is decoded yet. source and options: as in `load_answers`."""
    if isinstance(source, QuestionSource):
        options: dict[str, Any] = {"split": split, "revision": revision, "root": root, "max_rows": max_rows}
        refuse("a QuestionSource", **options, num_frames=num_frames, fps=fps, frame_cache=frame_cache)
        return source
    cache = None if frame_cache is None else Path(frame_cache).expanduser()
    reading = ClipReading(num_frames=num_frames, fps=fps, cache=cache)
    rows, name = open_rows(source, split=split, revision=revision, root=root, max_rows=max_rows, pictures=False)
    return QuestionSource(rows, name, reading, max_rows=max_rows)


def _recognised(columns: Collection[str], name: str) -> tuple[Form | None, str]:
    """The form of preference data; or, of questions, the column that asks."""
    if any(set(required) <= set(columns) for required in REQUIRED.values()):
        return recognise(columns), ""
    asks = [column for column in ("question", "prompt") if column in columns]
    if len(asks) != 1:
        found = "both question and prompt" if asks else f"columns {', '.join(sorted(map(str, columns))) or '(none)'}"
        raise ValueError(f"{name} has {found}: questions stand in one column, question or prompt")
    return None, asks[0]


def _told(raw: Mapping[str, Any], field: str, row: int) -> str | None:
    value = raw.get(field)
    if not given(value):
        return None
    return str(value) if isinstance(value, int) else read_text(raw, field, row)


def _texts(value: Any, field: str, row: int) -> tuple[str, ...]:
    found = list(value) if isinstance(value, list | tuple) else [value]
    if not found or not all(isinstance(one, str) and one.strip() for one in found):
        raise bad(row, field, f"expected a text, or several, got {what(value)}")
    return tuple(found)
