"""Where raw rows come from: a list, a folder with metadata.jsonl, parquet files, or a datasets.Dataset.

Each offers `columns`, `len`, `[i] → dict` and `fingerprint()`, a hash of the content: of every byte up to 4 GiB; above
that of sizes, times of change and samples, so that it costs seconds, notices every ordinary edit, and says so here.
"""

from __future__ import annotations

import hashlib
import json
import threading
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from mmalign.data.images import BadImage, inside
from mmalign.data.records import BadRow, InvalidRow

READ_WHOLE = 4 * 2**30
_SAMPLE = 2**16
# The columns that may hold a path where a picture is meant.
_MEDIA = ("jpg_0", "jpg_1", "chosen", "rejected")
_METADATA = "metadata.jsonl"


class Rows(Protocol):
    """A table of raw rows. `roots`: folders that paths in it may point into; `absolute`: whether they may be absolute."""

    @property
    def columns(self) -> Sequence[str]: ...
    @property
    def roots(self) -> Sequence[Path]: ...
    @property
    def absolute(self) -> bool: ...
    def __len__(self) -> int: ...
    def __getitem__(self, row: int) -> Mapping[str, Any]: ...
    def fingerprint(self) -> str: ...


class ListRows:
    """A list of dicts in memory; images are PIL, bytes, or paths under `root`."""

    absolute = True

    def __init__(self, items: Sequence[Mapping[str, Any]], root: Path | None = None) -> None:
        for row, item in enumerate(items):
            if not isinstance(item, Mapping):
                raise ValueError(f"row {row}: expected a dict, got {type(item).__name__}")
        self._items = list(items)
        self.columns = _union(self._items)
        self.roots = () if root is None else (root,)

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, row: int) -> Mapping[str, Any]:
        return self._items[row]

    def fingerprint(self) -> str:
        sha = hashlib.sha256()
        texts: list[str] = []
        for item in self._items:
            for key in sorted(item):
                sha.update(f"|{key}:".encode())
                _add_value(sha, item[key], texts)
        sha.update(_referenced(texts, self).encode())
        return sha.hexdigest()


class FolderRows(ListRows):
    """A folder with metadata.jsonl, one JSON object a line, paths relative to the folder and inside it."""

    absolute = False

    def __init__(self, folder: Path) -> None:
        items: list[Mapping[str, Any]] = []
        self._invalid: dict[int, str] = {}
        try:
            # Not splitlines(): JSON strings may hold U+2028, which it takes for the end of a line.
            lines = (folder / _METADATA).read_text(encoding="utf-8-sig").split("\n")
        except UnicodeDecodeError as error:
            raise ValueError(f"{folder / _METADATA} is not UTF-8 ({error.reason} at byte {error.start})") from error
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                item = json.loads(line)
            except json.JSONDecodeError as error:
                item = error.msg
            if not isinstance(item, dict):
                self._invalid[len(items)] = f"line {number} is not a JSON object"
            items.append(item if isinstance(item, dict) else {})
        super().__init__(items, folder)

    def __getitem__(self, row: int) -> Mapping[str, Any]:
        if row in self._invalid:
            raise InvalidRow(BadRow(row, _METADATA, self._invalid[row]))
        return super().__getitem__(row)


class ParquetRows:
    """Parquet files read in place, a row group at a time: no second copy on disk. Paths are relative to `root`."""

    absolute = False

    def __init__(self, files: Sequence[Path], root: Path, columns: Sequence[str] | None = None) -> None:
        import pyarrow.parquet as pq

        self._files = [pq.ParquetFile(file, memory_map=True) for file in files]
        self._paths, self.roots, self._wanted = list(files), (root,), columns
        self.columns = list(self._files[0].schema_arrow.names)
        self._groups: list[tuple[int, int]] = []
        self._starts, total = [], 0
        for index, file in enumerate(self._files):
            if missing := set(self.columns) ^ set(file.schema_arrow.names):
                raise ValueError(
                    f"{files[index]}: columns differ from those of {files[0]}: {', '.join(sorted(missing))}"
                )
            for group in range(file.num_row_groups):
                self._groups.append((index, group))
                self._starts.append(total)
                total += file.metadata.row_group(group).num_rows
        self._length = total
        self._lock = threading.Lock()
        self._held: dict[int, Any] = {}

    def __len__(self) -> int:
        return self._length

    def select_columns(self, columns: Sequence[str]) -> None:
        """Read only these from now on."""
        self._wanted = list(columns)

    def __getitem__(self, row: int) -> Mapping[str, Any]:
        place = bisect_right(self._starts, row) - 1
        with self._lock:
            if place not in self._held:
                # Two groups: readers that run a little ahead straddle the border.
                while len(self._held) > 1:
                    self._held.pop(next(iter(self._held)))
                index, group = self._groups[place]
                self._held[place] = self._files[index].read_row_group(group, columns=self._wanted)
            table = self._held[place]
        return dict(table.slice(row - self._starts[place], 1).to_pylist()[0])

    def fingerprint(self) -> str:
        texts: list[str] = []
        for file in self._files:
            names = [field.name for field in file.schema_arrow if field.name in _MEDIA and str(field.type) == "string"]
            texts += [text for column in file.read(columns=names).columns for text in column.to_pylist() if text]
        return files_fingerprint((path.name, path) for path in self._paths) + _referenced(texts, self)


class DatasetRows:
    """A datasets.Dataset, from memory, from save_to_disk or from the Hub."""

    absolute = True

    def __init__(self, dataset: Any, roots: Sequence[Path] = ()) -> None:
        if dataset.format["type"] == "custom":
            raise ValueError(
                "the Dataset has a set_transform that would be ignored: use .map, or .reset_format() first"
            )
        from datasets import Image

        for name, feature in dataset.features.items():
            if isinstance(feature, Image) and feature.decode:
                # We decode ourselves: a damaged picture must name its row, not end the pass.
                dataset = dataset.cast_column(name, Image(decode=False))
        self._data = dataset.with_format(None)
        self.columns, self.roots = list(dataset.column_names), tuple(roots)

    def __len__(self) -> int:
        return len(self._data)

    def select_columns(self, columns: Sequence[str]) -> None:
        """Read only these from now on."""
        self._data = self._data.select_columns(list(columns))

    def __getitem__(self, row: int) -> Mapping[str, Any]:
        return dict(self._data[row])

    def fingerprint(self) -> str:
        if self._data.data.nbytes > READ_WHOLE:
            # datasets' own name for (builder, revision, files, transforms): all there is without reading everything.
            return hashlib.sha256(f"{self._data._fingerprint}/{len(self._data)}".encode()).hexdigest()
        sha = hashlib.sha256(str(self._data.features).encode())
        texts: list[str] = []
        for table in self._data.with_format("arrow").iter(batch_size=1000):
            for batch in table.combine_chunks().to_batches():
                sha.update(batch.serialize())
            texts += _paths_in(table)
        return sha.hexdigest() + _referenced(texts, self)


def files_fingerprint(files: Iterable[tuple[str, Path]]) -> str:
    """sha256 over names and contents; above 4 GiB in all over names, sizes, times of change and up to 64 samples."""
    listed = sorted(files)
    whole = sum(path.stat().st_size for _, path in listed) <= READ_WHOLE
    sha = hashlib.sha256()
    for name, path in listed:
        stat = path.stat()
        sha.update(f"|{name}:{stat.st_size}:{'' if whole else stat.st_mtime_ns}:".encode())
        with path.open("rb") as file:
            if whole:
                sha.update(hashlib.file_digest(file, "sha256").digest())
                continue
            parts = min(64, 1 + stat.st_size // 2**24)
            for part in range(parts):
                file.seek(part * max(0, stat.st_size - _SAMPLE) // max(1, parts - 1))
                sha.update(file.read(_SAMPLE))
    return sha.hexdigest()


def _union(items: Sequence[Mapping[str, Any]]) -> list[str]:
    return list(dict.fromkeys(str(key) for item in items for key in item))


def _add_value(sha: Any, value: Any, texts: list[str]) -> None:
    """Hash a raw value: pictures by their pixels, bytes as they are, the rest by its text; texts may turn out paths."""
    from PIL import Image

    if isinstance(value, Image.Image):
        sha.update(f"{value.mode}{value.size}".encode())
        try:
            sha.update(value.tobytes())
        except (OSError, SyntaxError, ValueError):
            sha.update(b"damaged")
    elif isinstance(value, bytes | bytearray | memoryview):
        sha.update(hashlib.sha256(value).digest())
    elif isinstance(value, Mapping):
        for key in sorted(value):
            sha.update(f"|{key}:".encode())
            _add_value(sha, value[key], texts)
    else:
        sha.update(repr(value).encode())
        if isinstance(value, str | Path):
            texts.append(str(value))


def _paths_in(table: Any) -> list[str]:
    """The paths, in an arrow table, of pictures that do not lie in the table itself."""
    import pyarrow.compute as pc

    found: list[str | None] = []
    for name in set(_MEDIA) & set(table.column_names):
        column = table[name]
        if str(column.type) == "string":
            found += column.to_pylist()
        elif str(column.type).startswith("struct<bytes"):
            elsewhere = column.filter(pc.is_null(pc.struct_field(column, "bytes")))
            found += pc.struct_field(elsewhere, "path").to_pylist()
    return [text for text in found if text]


def _referenced(texts: Iterable[str], rows: Rows) -> str:
    """files_fingerprint of the files that these texts lead to; of the others, that they lead to none."""
    found: dict[str, Path] = {}
    for text in dict.fromkeys(texts if rows.roots else ()):
        try:
            found[text] = inside(text, rows.roots, rows.absolute)
        except BadImage:
            continue
    return files_fingerprint(found.items())
