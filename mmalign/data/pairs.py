"""load_pairs: any supported source of image preferences, or of captioned pictures, as a PairSource, read and checked row by row."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from mmalign.data.clips import PictureOrClip, frames_of, read_clip
from mmalign.data.columns import (
    CAPTIONED,
    REQUIRED,
    Form,
    read_pair,
    read_prompt,
    recognise,
    score_columns,
    used_columns,
)
from mmalign.data.images import MAX_PIXELS, to_rgb
from mmalign.data.rankings import RANKED, Rankings
from mmalign.data.raw import RawPair, bad, opening, told_as
from mmalign.data.records import EndOfSource, InvalidRow, PairRecord
from mmalign.data.rows import DatasetRows, ParquetRows, Rows, check_rows
from mmalign.data.sources import open_rows, refuse
from mmalign.data.streams import StreamRows
from mmalign.data.tars import TarRows


class _PairRows:
    """A table whose rows are pairs already, as Rankings makes pairs of one whose rows are not."""

    def __init__(self, rows: Rows, form: Form, scores: Mapping[str, tuple[str, str]]) -> None:
        self._rows, self._form, self._scores = rows, form, scores

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, row: int) -> RawPair:
        return read_pair(self._form, self._rows[row], row, self._scores)

    def row_of(self, row: int) -> int:
        return row

    def prompts(self) -> list[str | None]:
        return [read_prompt(self._form, raw) for raw in self._rows.light(REQUIRED[self._form][:1])]


class _Opined:
    """Pairs as other people compared them."""

    def __init__(self, pairs: Any, rows: Sequence[int], opinions: Sequence[tuple[str, float]]) -> None:
        self._pairs, self._places, self._opinions = pairs, rows, opinions

    def __len__(self) -> int:
        return len(self._opinions)

    def __getitem__(self, row: int) -> RawPair:
        user, label = self._opinions[row]
        return replace(self._pairs[self._places[row]], user_id=user, label=label)

    def row_of(self, row: int) -> int:
        return self._pairs.row_of(self._places[row])

    def prompts(self) -> list[str | None]:
        found = self._pairs.prompts()
        return [found[place] for place in self._places]


class PairSource:
    """Preference pairs in their own order. `source[i]` reads and checks row i: a PairRecord, or InvalidRow is raised.

    Where the source holds rankings of several pictures, a row is one pair of a ranking (see rankings.py). With `captioned` it may also
    hold single pictures with captions, which nobody compared: a row is then one picture, and its record has one side.
    """

    def __init__(
        self,
        rows: Rows,
        name: str,
        *,
        max_rows: int | None = None,
        max_pixels: int = MAX_PIXELS,
        num_frames: int | None = None,
        captioned: bool = False,
    ) -> None:
        check_rows(rows, name, max_rows)
        self.name = name
        self.form = recognise(rows.columns, captioned=captioned)
        self.max_pixels, self.num_frames = max_pixels, num_frames
        self._rows = rows
        self._scores = score_columns(self.form, rows.columns)
        if isinstance(rows, StreamRows) and self.form in RANKED:
            raise ValueError(
                f"{name} holds rankings, which must all be known before the first pair: they cannot be streamed"
            )
        if isinstance(rows, ParquetRows | DatasetRows | StreamRows):
            rows.select_columns(used_columns(self.form, rows.columns))
        if isinstance(rows, TarRows):
            rows.select_columns(REQUIRED[self.form])
        self._pairs: Any = (Rankings if self.form in RANKED else _PairRows)(rows, self.form, self._scores)
        # Opinions that are not those of the rows, as the fingerprint tells them.
        self._opined = ""
        total = len(self._pairs)
        self._index: Sequence[int] = range(total if max_rows is None else min(max_rows, total))

    def __len__(self) -> int:
        # A stream may turn out shorter than was asked for.
        return min(len(self._index), len(self._pairs)) if isinstance(self._index, range) else len(self._index)

    def __repr__(self) -> str:
        return f"PairSource({self.name!r}, {len(self)} rows, {self.form} columns)"

    @property
    def sides(self) -> int:
        """Pictures or clips in a row: 2, or 1 where they have captions and are not compared."""
        return 1 if self.form in CAPTIONED else 2

    @property
    def unit(self) -> str:
        """What a row is called."""
        return "picture" if self.form in CAPTIONED else "pair"

    @property
    def score_names(self) -> tuple[str, ...]:
        """Names of the reward columns that the source carries."""
        return tuple(self._scores)

    @property
    def num_table_rows(self) -> int:
        """Rows of the table that the pairs come from: as many, but for rankings."""
        return len(self._rows)

    def table_row(self, row: int) -> int:
        """The row of that table which pair `row` comes from."""
        return self._pairs.row_of(self._index[row])

    @cached_property
    def fingerprint(self) -> str:
        """sha256 of the content and of what decides which rows are good (see rows.py for its cost and its limits)."""
        chosen = len(self._index) if isinstance(self._index, range) else tuple(self._index)
        parts: tuple[Any, ...] = (
            self._rows.fingerprint(folders=self.num_frames is not None),
            self.form,
            chosen,
            self.max_pixels,
        )
        if self.num_frames is not None:
            parts = (*parts, self.num_frames)
        if self._opined:
            parts = (*parts, self._opined)
        return hashlib.sha256(repr(parts).encode()).hexdigest()

    def prompts(self) -> list[str | None]:
        """The prompt of every row, without opening a picture; None where it cannot be read."""
        found = self._pairs.prompts()
        return [found[row] for row in self._index[: len(self)]]

    def opinions(self) -> list[tuple[str | None, float] | None]:
        """Who compared each row and how strongly image_0 was preferred, without decoding a picture; None where it cannot be read."""
        found: list[tuple[str | None, float] | None] = []
        for row in self._index[: len(self)]:
            try:
                pair = self._pairs[row]
            except InvalidRow:
                found.append(None)
                continue
            found.append((pair.user_id, pair.label))
        return found

    def select(self, rows: Sequence[int], name: str) -> PairSource:
        """These rows of the source, in this order, as a source of its own that counts them from 0."""
        part = self._copy()
        part.name, part._index = name, [self._index[row] for row in rows]
        return part

    def judged(self, rows: Sequence[int], opinions: Sequence[tuple[str, float]], name: str) -> PairSource:
        """These rows of the source, in this order, each with another user and label than its own, as a source of its own."""
        part = self._copy()
        part.name, part._index = name, range(len(rows))
        part._pairs = _Opined(self._pairs, [self._index[row] for row in rows], opinions)
        told = repr((self._opined, part._pairs._places, list(opinions)))
        part._opined = hashlib.sha256(told.encode()).hexdigest()
        return part

    def as_clips(self, num_frames: int) -> PairSource:
        """The same rows, every side of them read as a clip of so many frames."""
        part = self._copy()
        part.num_frames = num_frames
        return part

    def _copy(self) -> PairSource:
        part = copy.copy(self)
        part.__dict__.pop("fingerprint", None)
        return part

    def __getitem__(self, row: int) -> PairRecord:
        return self.opened(self.raw(row), row)

    def raw(self, row: int) -> RawPair:
        """What row i tells before its pictures are opened; InvalidRow where that cannot be read."""
        if not 0 <= row < len(self):
            raise EndOfSource(f"row {row} of {len(self)}")
        with told_as(row):
            return self._pairs[self._index[row]]

    def opened(self, pair: RawPair, row: int) -> PairRecord:
        """The same with its pictures; InvalidRow where they cannot be used."""
        first, *others = pair.pictures
        if isinstance(first, str | Path) and first and first in others:
            raise bad(row, pair.fields[1], f"the same file as {pair.fields[0]} ({str(first)[:80]!r})")
        image, *rest = (self._open(value, field, row) for value, field in zip(pair.pictures, pair.fields, strict=True))
        other = rest[0] if rest else None
        if other is not None and _alike(image, other):
            raise bad(row, pair.fields[1], f"the same picture as {pair.fields[0]}")
        return PairRecord(row, pair.prompt, image, other, pair.label, pair.fields, pair.scores, pair.user_id)

    def _open(self, value: Any, field: str, row: int) -> Any:
        read = to_rgb if self.num_frames is None else partial(read_clip, num_frames=self.num_frames)
        with opening(value, field, row):
            return read(value, roots=self._rows.roots, absolute=self._rows.absolute, max_pixels=self.max_pixels)


def _alike(one: PictureOrClip, other: PictureOrClip) -> bool:
    """Whether two sides are the same, pixel by pixel."""
    frames = zip(frames_of(one), frames_of(other), strict=True)
    return all(a.size == b.size and a.tobytes() == b.tobytes() for a, b in frames)


def load_pairs(
    source: Any,
    *,
    split: str | None = None,
    revision: str | None = None,
    root: str | Path | None = None,
    max_rows: int | None = None,
    max_pixels: int = MAX_PIXELS,
    streaming: bool = False,
    num_frames: int | None = None,
    captioned: bool = False,
) -> PairSource:
    """Open a source of preference pairs; nothing is decoded yet.

    source: "playground", a Hub data set id, a parquet file or a folder of them, a `save_to_disk` folder, a folder with
    metadata.jsonl, a .json or .jsonl file, a folder of pictures named in pairs (see named.py), WebDataset shards (a .tar,
    a folder of them, or x-{000..011}.tar; see tars.py), a datasets.Dataset or IterableDataset, or a list of dicts. Columns as in
    Pick-a-Pic, HPDv2, HPDv3, ImageRewardDB, or (prompt, chosen, rejected), also as TRL's messages (see columns.py). split:
    "train" unless given. revision: of a Hub data set. root: the folder that paths in the data are relative to and stay in.
    max_rows: only the first so many. max_pixels: larger pictures make a bad row. streaming: read a Hub data set as it comes,
    without storing it (see streams.py); where its card does not tell its length, max_rows must, as for any IterableDataset.
    num_frames: read every side as a clip of so many frames (see clips.py); a run with a video model asks for it by itself.
    captioned: also single pictures with captions, for what compares nothing: columns (image, prompt), caption or text; metadata.jsonl
    with file_name; a folder of x.png with x.txt; shards of x.png with x.txt. Other callers refuse them.
    """
    if num_frames is not None and num_frames < 1:
        raise ValueError(f"num_frames must be at least 1, got {num_frames}")
    options = {"max_rows": max_rows, "max_pixels": max_pixels, "num_frames": num_frames, "captioned": captioned}
    if isinstance(source, PairSource):
        given = {"split": split, "revision": revision, "root": root, "max_rows": max_rows, "num_frames": num_frames}
        refuse("a PairSource", **given, streaming=streaming or None)
        return source
    rows, name = open_rows(
        source,
        split=split,
        revision=revision,
        root=root,
        max_rows=max_rows,
        streaming=streaming,
        captioned=captioned,
    )
    return PairSource(rows, name, **options)  # type: ignore[arg-type]
