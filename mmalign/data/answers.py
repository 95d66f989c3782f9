"""load_answers: any supported source of preferences between answers as an AnswerSource, read and checked row by row."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from mmalign.data.answer_forms import (
    MEDIA_COLUMNS,
    REQUIRED,
    SCORES,
    RawAnswers,
    read_answers,
    recognise,
    used_columns,
)
from mmalign.data.answer_media import MAX_VIDEO_FRAMES, ClipReading, open_clip
from mmalign.data.answer_records import AnswerPair, Part, Picture, Turn
from mmalign.data.answer_turns import Medium, RawTurn
from mmalign.data.clips import Limits
from mmalign.data.fingerprints import digest_of
from mmalign.data.images import MAX_PIXELS, to_rgb
from mmalign.data.raw import bad, opening, told_as
from mmalign.data.records import EndOfSource, InvalidRow
from mmalign.data.rows import DatasetRows, ListRows, ParquetRows, Rows, check_rows
from mmalign.data.sources import open_rows, refuse

_TIE = 0.5


class AnswerSource:
    """Preferences between answers in their own order. `source[i]` reads and checks row i: an AnswerPair, or InvalidRow is raised."""

    def __init__(self, rows: Rows, name: str, reading: ClipReading, *, max_rows: int | None = None) -> None:
        if not isinstance(rows, ListRows | ParquetRows | DatasetRows):
            raise ValueError(f"{name}: answers are read from lists, JSON, parquet and datasets, not from streams")
        check_rows(rows, name, max_rows)
        self.name = name
        self.form = recognise(rows.columns)
        self.reading = reading
        self.score_names = tuple(name for name, pair in SCORES.items() if set(pair) <= set(rows.columns))
        if isinstance(rows, ParquetRows | DatasetRows):
            rows.select_columns(used_columns(self.form, rows.columns))
        self._rows: Rows = rows
        self._index: Sequence[int] = range(len(rows) if max_rows is None else min(max_rows, len(rows)))

    def __len__(self) -> int:
        return len(self._index)

    def __repr__(self) -> str:
        return f"AnswerSource({self.name!r}, {len(self)} rows, {self.form} columns)"

    @property
    def sides(self) -> int:
        """Answers in a row: 2, or 1 where each is liked or not."""
        return 1 if self.form == "unpaired" else 2

    @property
    def unit(self) -> str:
        """What a row is called."""
        return "answer" if self.form == "unpaired" else "pair"

    @property
    def num_table_rows(self) -> int:
        """Rows of the table that the rows were chosen from."""
        return len(self._rows)

    def table_row(self, row: int) -> int:
        """The row of that table which `row` is."""
        return self._index[row]

    def fingerprint(self) -> str:
        """sha256 of the content and of what decides which rows are good and what is read of them (see rows.py for its limits)."""
        media = (*MEDIA_COLUMNS, *REQUIRED[self.form])
        chosen = len(self._index) if isinstance(self._index, range) else tuple(self._index)
        told = (self._rows.fingerprint(folders=True, media=media), self.form, chosen, replace(self.reading, cache=None))
        return hashlib.sha256(repr(told).encode()).hexdigest()

    def prompts(self) -> list[str | None]:
        """What tells the prompt of every row from others, as in `identity_of`; None where it cannot be read."""
        return [self._prompt(row) for row in range(len(self))]

    def select(self, rows: Sequence[int], name: str) -> AnswerSource:
        """These rows of the source, in this order, as a source of its own that counts them from 0."""
        part = copy.copy(self)
        part.name, part._index = name, [self._index[row] for row in rows]
        return part

    def __getitem__(self, row: int) -> AnswerPair:
        return self.opened(self.raw(row), row)

    def raw(self, row: int) -> RawAnswers:
        """What row i tells before its media are opened; InvalidRow where that cannot be read."""
        if not 0 <= row < len(self):
            raise EndOfSource(f"row {row} of {len(self)}")
        with told_as(row):
            return read_answers(self.form, self._rows[self._index[row]], row)

    def opened(self, raw: RawAnswers, row: int) -> AnswerPair:
        """The same with its pictures and clips; InvalidRow where they cannot be used."""
        return AnswerPair(
            row=row,
            prompt=open_turns(raw.prompt, row, self._rows, self.reading),
            chosen=raw.chosen,
            rejected=raw.rejected,
            label=raw.label,
            chosen_marks=raw.chosen_marks,
            rejected_marks=raw.rejected_marks,
            fields=raw.fields,
            scores=raw.scores,
            user_id=raw.user_id,
        )

    def _prompt(self, row: int) -> str | None:
        try:
            return identity_of(self.raw(row).prompt)
        except InvalidRow:
            return None


def untied(pair: AnswerPair) -> AnswerPair:
    """The same pair; InvalidRow for a tie, from which nothing is learnt."""
    if pair.rejected is not None and pair.label == _TIE:
        raise bad(pair.row, "label", "a tie: neither answer is preferred")
    return pair


def open_turns(turns: Sequence[RawTurn], row: int, rows: Rows, reading: ClipReading) -> tuple[Turn, ...]:
    """A conversation with its pictures and clips; InvalidRow where one cannot be used."""
    return tuple(Turn(turn.role, tuple(_opened(part, row, rows, reading) for part in turn.parts)) for turn in turns)


def identity_of(prompt: Sequence[RawTurn]) -> str:
    """What tells a prompt from others: its media (files by their names), or its text where it has none. Nothing is decoded."""
    media = [medium.shown for turn in prompt for medium in turn.media]
    return digest_of(media) if media else "\n".join(f"{turn.role}: {turn.text}" for turn in prompt)


def _opened(part: str | Medium, row: int, rows: Rows, reading: ClipReading) -> Part:
    if isinstance(part, str):
        return part
    place: dict[str, Any] = {"roots": rows.roots, "absolute": rows.absolute}
    with opening(part.value, part.field, row):
        if part.kind == "video":
            return open_clip(part.value, reading, **place)
        return Picture(to_rgb(part.value, max_pixels=reading.limits.max_pixels, **place))


def load_answers(
    source: Any,
    *,
    split: str | None = None,
    revision: str | None = None,
    root: str | Path | None = None,
    max_rows: int | None = None,
    max_pixels: int = MAX_PIXELS,
    num_frames: int | None = None,
    fps: float | None = None,
    source_fps: float | None = None,
    longest_side: int | None = None,
    frame_cache: str | Path | None = None,
) -> AnswerSource:
    """Open a source of preferences between answers; nothing is decoded yet.

    source: a Hub data set id, a parquet, .json or .jsonl file, a folder of parquet files or with metadata.jsonl, a `save_to_disk`
    folder, a datasets.Dataset, or a list of dicts; columns as in TRL, RLAIF-V, ms-swift, ShareGPT, RRPO or VideoChat2 (see
    answer_forms.py and docs/answer-data.md). split, revision, root, max_rows, max_pixels: as in load_pairs. num_frames: so many of
    each clip, evenly; fps: or so many a second. source_fps: frames a second of clips that do not tell theirs. longest_side: of a
    frame; larger ones are shrunk. frame_cache: a folder in which the frames of videos are kept, so that each is decoded once.
    """
    reading = ClipReading(
        num_frames=num_frames,
        fps=fps,
        source_fps=source_fps,
        limits=Limits(max_pixels=max_pixels, max_frames=MAX_VIDEO_FRAMES, longest_side=longest_side),
        cache=None if frame_cache is None else Path(frame_cache).expanduser(),
    )
    if isinstance(source, AnswerSource):
        given: dict[str, Any] = {
            "split": split,
            "revision": revision,
            "root": root,
            "max_rows": max_rows,
            "max_pixels": None if max_pixels == MAX_PIXELS else max_pixels,
            "num_frames": num_frames,
        }
        given |= {"fps": fps, "source_fps": source_fps, "longest_side": longest_side, "frame_cache": frame_cache}
        refuse("an AnswerSource", **given)
        return source
    rows, name = open_rows(source, split=split, revision=revision, root=root, max_rows=max_rows, pictures=False)
    return AnswerSource(rows, name, reading, max_rows=max_rows)
