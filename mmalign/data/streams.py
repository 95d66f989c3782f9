"""A stream as rows: read forward once, a few rows held, nothing stored.

A row that lies behind what is held starts the stream again, so that an interrupted encoding goes on where it was, at the price of
passing over what it has. What keys a cache of latents has to be known before the stream is read: the data set's name and commit
on the Hub; of an IterableDataset of the user's own its features and its first 64 rows; where rows name files below `root`, that
folder's place and the files that the first 64 rows name. A change further on is not seen.
"""

from __future__ import annotations

import hashlib
import itertools
import logging
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mmalign.data.fingerprints import MEDIA
from mmalign.data.records import EndOfSource
from mmalign.data.rows import ListRows, undecoded

_log = logging.getLogger(__name__)
_HELD = 64
_HASHED = 64


class StreamRows:
    """The first `length` rows of a datasets.IterableDataset, or all if they are fewer, which shows where it ends.

    key: what names the content beforehand; None takes the first rows.
    """

    absolute = True

    def __init__(self, dataset: Any, length: int, roots: Sequence[Path] = (), *, key: str | None = None) -> None:
        dataset = dataset.with_format(None)
        for name, feature in (dataset.features or {}).items():
            if (plain := undecoded(feature)) != feature:
                dataset = dataset.cast_column(name, plain)
        self._data, self._length, self._key, self.roots = dataset, length, key, tuple(roots)
        first = next(iter(dataset), None)
        self.columns = list(dataset.column_names or first or ())
        self._lock = threading.Lock()
        self._rows: Iterator[Any] | None = None
        self._held: dict[int, Any] = {}
        self._next = 0
        self._end: int | None = None if first else 0

    def __len__(self) -> int:
        return self._length if self._end is None else min(self._length, self._end)

    def select_columns(self, columns: Sequence[str]) -> None:
        """Read only these from now on, where the stream says what it has."""
        if self._data.features is not None:
            self._data = self._data.select_columns(list(columns))

    def __getitem__(self, row: int) -> Mapping[str, Any]:
        with self._lock:
            if row not in self._held:
                self._read_to(row)
            if row not in self._held:
                raise EndOfSource(f"row {row} of {self._end}")
            return dict(self._held[row])

    def light(self, columns: Sequence[str]) -> Iterator[Mapping[str, Any]]:
        """Every row in order, these columns only; passes over the stream once more."""
        data = self._data
        if data.features is not None:
            data = data.select_columns([name for name in columns if name in self.columns])
        number = 0
        for row in itertools.islice(data, self._length):
            yield row
            number += 1
        if number < self._length:
            self._ended(number)

    def fingerprint(self, *, folders: bool = False, media: Sequence[str] = MEDIA) -> str:
        key = self._key or str(self._data.features)
        if self._key is None or self.roots:
            # The files that the first rows name stand for all; where the folder is, for those named further on.
            first = list(itertools.islice(self._data, min(self._length, _HASHED)))
            roots = [str(root.resolve()) for root in self.roots]
            key += f"/{roots}/{ListRows(first, *self.roots[:1]).fingerprint(folders=folders, media=media)}"
        return hashlib.sha256(f"stream/{key}/{self._length}".encode()).hexdigest()

    def _read_to(self, row: int) -> None:
        if self._end is not None and row >= self._end:
            return
        if self._rows is None or row < self._next:
            self._held.clear()
            # A little before, as of threads that read ahead any one may come first.
            self._next = max(0, row - _HELD // 2)
            self._rows = iter(self._data.skip(self._next))
        try:
            while self._next <= row:
                self._held[self._next] = next(self._rows)
                self._next += 1
                self._held.pop(self._next - 1 - _HELD, None)
        except StopIteration:
            self._rows = None
            # Nothing came after a jump: it went behind the end.
            self._ended(self._next if self._held else sum(1 for _ in self._data))
        except BaseException:
            # A broken iterator would look like the end of the stream when it is asked again.
            self._rows = None
            raise

    def _ended(self, number: int) -> None:
        if self._end is None and number < self._length:
            _log.warning("the stream ended after %d rows, before the %d that were asked for", number, self._length)
        self._end = number


def known_length(dataset: Any) -> int | None:
    """How many rows the data set's own card says that this split has."""
    splits = dataset.info.splits or {}
    split = splits.get(str(dataset.split)) if dataset.split is not None else None
    return getattr(split, "num_examples", None) or None
