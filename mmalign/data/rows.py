"""Where raw rows come from: a list, a JSON file, parquet files, or a datasets.Dataset.

Each offers `columns`, `len`, `[i] → dict`, `light(columns)`, which passes over all rows without their pictures, and
`fingerprint()`, a hash of the content (with folders=True also of the frames in folders that it names): of every byte up
to 4 GiB; above that of sizes, times of change and samples, so that it costs seconds, notices every ordinary edit, and
says so here.
"""

from __future__ import annotations

import hashlib
import json
import threading
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from mmalign.data.clips import frame_files
from mmalign.data.images import BadImage, inside
from mmalign.data.records import BadRow, InvalidRow

READ_WHOLE = 4 * 2**30
_SAMPLE = 2**16
# The columns that may hold a path where a picture is meant.
_MEDIA = (
    *("jpg_0", "jpg_1", "chosen", "rejected", "images", "image"),
    *("file_path", "image_path", "generations", "path1", "path2"),
)


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
    def light(self, columns: Sequence[str]) -> Iterator[Mapping[str, Any]]: ...
    def fingerprint(self, *, folders: bool = False) -> str: ...


class ListRows:
    """A list of dicts in memory; images are PIL, bytes, or paths under `root`.

    unreadable: rows that hold nothing, and (field, reason) why. absolute: whether paths may be absolute.
    """

    def __init__(
        self,
        items: Sequence[Mapping[str, Any]],
        root: Path | None = None,
        *,
        unreadable: Mapping[int, tuple[str, str]] | None = None,
        absolute: bool = True,
    ) -> None:
        for row, item in enumerate(items):
            if not isinstance(item, Mapping):
                raise ValueError(f"row {row}: expected a dict, got {type(item).__name__}")
        self._items, self._unreadable, self.absolute = list(items), dict(unreadable or {}), absolute
        self.columns = _union(self._items)
        self.roots = () if root is None else (root,)

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, row: int) -> Mapping[str, Any]:
        if row in self._unreadable:
            raise InvalidRow(BadRow(row, *self._unreadable[row]))
        return self._items[row]

    def light(self, columns: Sequence[str]) -> Iterator[Mapping[str, Any]]:
        """Every row in order, its other columns left out or not."""
        return iter(self._items)

    def fingerprint(self, *, folders: bool = False) -> str:
        sha = hashlib.sha256()
        texts: list[str] = []
        for item in self._items:
            for key in sorted(item, key=str):
                sha.update(f"|{key}:".encode(errors="backslashreplace"))
                _add_value(sha, item[key], texts)
        sha.update(_referenced(texts, self, folders).encode())
        return sha.hexdigest()


def json_rows(file: Path, root: Path) -> ListRows:
    """A .jsonl file, one JSON object a line, or a .json file with a list of objects; paths are relative to `root`, inside it."""
    try:
        text = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8 ({error.reason} at byte {error.start})") from error
    items: list[Mapping[str, Any]] = []
    unreadable: dict[int, tuple[str, str]] = {}
    for place, item in _json_items(file, text):
        if not isinstance(item, dict):
            unreadable[len(items)] = (file.name, f"{place} is not a JSON object")
        items.append(item if isinstance(item, dict) else {})
    return ListRows(items, root, unreadable=unreadable, absolute=False)


def _json_items(file: Path, text: str) -> Iterator[tuple[str, Any]]:
    if file.suffix == ".json":
        found = _parsed(text)
        if not isinstance(found, list):
            raise ValueError(f"{file} is no JSON list of objects; one object a line belongs into a .jsonl file")
        yield from ((f"item {number}", item) for number, item in enumerate(found))
        return
    # Not splitlines(): JSON strings may hold U+2028, which it takes for the end of a line.
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield f"line {number}", _parsed(line)


def _parsed(text: str) -> Any:
    """The JSON value, or None. Too deep a nesting and too long a number are no JSON that anybody wrote."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


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

    def light(self, columns: Sequence[str]) -> Iterator[Mapping[str, Any]]:
        """Every row in order, these columns only."""
        for file in self._files:
            for batch in file.iter_batches(batch_size=1000, columns=list(columns)):
                yield from batch.to_pylist()

    def fingerprint(self, *, folders: bool = False) -> str:
        texts: list[str] = []
        for file in self._files:
            # Never those that hold the pictures themselves: they may be terabytes, and are hashed with the file.
            kinds = {field.name: str(field.type) for field in file.schema_arrow if field.name in _MEDIA}
            names = [name for name, kind in kinds.items() if "string" in kind and "binary" not in kind]
            for batch in file.iter_batches(batch_size=1000, columns=names) if names else ():
                texts += _paths_in(batch)
        return files_fingerprint((path.name, path) for path in self._paths) + _referenced(texts, self, folders)


class DatasetRows:
    """A datasets.Dataset, from memory, from save_to_disk or from the Hub."""

    absolute = True

    def __init__(self, dataset: Any, roots: Sequence[Path] = ()) -> None:
        if dataset.format["type"] == "custom":
            raise ValueError(
                "the Dataset has a set_transform that would be ignored: use .map, or .reset_format() first"
            )
        for name, feature in dataset.features.items():
            # We decode ourselves: a damaged picture must name its row, not end the pass.
            if (plain := undecoded(feature)) != feature:
                dataset = dataset.cast_column(name, plain)
        self._data = dataset.with_format(None)
        self.columns, self.roots = list(dataset.column_names), tuple(roots)

    def __len__(self) -> int:
        return len(self._data)

    def select_columns(self, columns: Sequence[str]) -> None:
        """Read only these from now on."""
        self._data = self._data.select_columns(list(columns))

    def __getitem__(self, row: int) -> Mapping[str, Any]:
        return dict(self._data[row])

    def light(self, columns: Sequence[str]) -> Iterator[Mapping[str, Any]]:
        """Every row in order, these columns only."""
        names = [name for name in columns if name in self.columns]
        return iter(self._data.select_columns(names))

    def fingerprint(self, *, folders: bool = False) -> str:
        if self._data.data.nbytes > READ_WHOLE:
            # datasets' own name for (builder, revision, files, transforms): all there is without reading everything.
            return hashlib.sha256(f"{self._data._fingerprint}/{len(self._data)}".encode()).hexdigest()
        sha = hashlib.sha256(str(self._data.features).encode())
        texts: list[str] = []
        for table in self._data.with_format("arrow").iter(batch_size=1000):
            for batch in table.combine_chunks().to_batches():
                sha.update(batch.serialize())
            texts += _paths_in(table)
        return sha.hexdigest() + _referenced(texts, self, folders)


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


def undecoded(feature: Any) -> Any:
    """The feature with every picture and video in it, however deep, as its bytes and path."""
    from datasets import Image, List, Video

    if isinstance(feature, Image | Video):
        return type(feature)(decode=False)
    if isinstance(feature, List):
        return List(undecoded(feature.feature), length=feature.length)
    if isinstance(feature, dict):
        return {name: undecoded(part) for name, part in feature.items()}
    return feature


def _union(items: Sequence[Mapping[str, Any]]) -> list[str]:
    return list(dict.fromkeys(str(key) for item in items for key in item))


def _add_value(sha: Any, value: Any, texts: list[str]) -> None:
    """Hash a raw value: pictures by their pixels, bytes as they are, the rest by its text; texts may turn out paths."""
    from PIL import Image

    # A stack of our own: JSON may be nested more deeply than Python calls may be.
    waiting = [value]
    while waiting:
        value = waiting.pop()
        if isinstance(value, Image.Image):
            sha.update(f"{value.mode}{value.size}".encode())
            try:
                sha.update(value.tobytes())
            except (OSError, SyntaxError, ValueError):
                sha.update(b"damaged")
        elif isinstance(value, bytes | bytearray | memoryview):
            sha.update(hashlib.sha256(value).digest())
        elif isinstance(value, Mapping):
            keys = sorted(value, key=str)
            sha.update(f"|{keys}:".encode(errors="backslashreplace"))
            waiting += [value[key] for key in reversed(keys)]
        elif isinstance(value, list | tuple):
            sha.update(f"|{len(value)}:".encode())
            waiting += reversed(value)
        else:
            # hex: Python refuses to write integers of more than 4300 digits in decimal.
            sha.update((hex(value) if type(value) is int else repr(value)).encode(errors="backslashreplace"))
            if isinstance(value, str | Path):
                texts.append(str(value))


def _paths_in(table: Any) -> list[str]:
    """The paths, in an arrow table or batch, of pictures that do not lie in it themselves."""
    import pyarrow.compute as pc

    found: list[str] = []
    for name in sorted(set(_MEDIA) & set(table.schema.names)):
        column = table.column(name)
        if str(column.type).startswith("struct<bytes"):
            elsewhere = column.filter(pc.is_null(pc.struct_field(column, "bytes")))
            found += filter(None, pc.struct_field(elsewhere, "path").to_pylist())
        elif "string" in str(column.type):
            _add_texts(column.to_pylist(), found)
    return found


def _add_texts(value: Any, found: list[str]) -> None:
    """All texts in nested lists and dicts, but not the path beside a picture's bytes."""
    if isinstance(value, str):
        found.append(value)
    elif isinstance(value, Mapping):
        if value.get("bytes") is None:
            _add_texts(list(value.values()), found)
    elif isinstance(value, list):
        for item in value:
            _add_texts(item, found)


def _referenced(texts: Iterable[str], rows: Rows, folders: bool) -> str:
    """files_fingerprint of the files that these texts lead to; of the others, that they lead to none.

    folders: of the frames in the folders that they lead to as well.
    """
    found: dict[str, Path] = {}
    for text in dict.fromkeys(texts if rows.roots else ()):
        try:
            place = inside(text, rows.roots, rows.absolute, folders=folders)
        except BadImage:
            continue
        found |= {f"{text}/{file.name}": file for file in frame_files(place)} if place.is_dir() else {text: place}
    return files_fingerprint(found.items())
