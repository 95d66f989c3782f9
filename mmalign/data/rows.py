"""Where raw rows come from: a list, a JSON file, parquet files, or a datasets.Dataset.

Each offers `columns`, `len`, `[i] → dict`, `light(columns)`, which passes over all rows without their pictures, and
`fingerprint()`, a hash of the content (with folders=True also of the frames in folders that it names; of typed tables it is the
columns `media` that may name files): of every byte up
to 4 GiB; above that of sizes, times of change and samples, so that it costs seconds, notices every ordinary edit, and
says so here.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import threading
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from mmalign.data import fingerprints
from mmalign.data.fingerprints import MEDIA, add_value, files_fingerprint, paths_in, referenced
from mmalign.data.records import BadRow, InvalidRow


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
    def fingerprint(self, *, folders: bool = False, media: Sequence[str] = MEDIA) -> str: ...


def check_rows(rows: Rows, name: str, max_rows: int | None) -> None:
    """ValueError for a table without rows, and where none of them are asked for."""
    if len(rows) == 0:
        raise ValueError(f"{name} has no rows")
    if max_rows is not None and max_rows < 1:
        raise ValueError(f"max_rows must be at least 1, got {max_rows}")


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

    def fingerprint(self, *, folders: bool = False, media: Sequence[str] = MEDIA) -> str:
        sha = hashlib.sha256()
        texts: list[str] = []
        for item in self._items:
            add_value(sha, item, texts)
        sha.update(repr(sorted(self._unreadable.items())).encode(errors="backslashreplace"))
        sha.update(referenced(texts, self.roots, self.absolute, folders).encode())
        return sha.hexdigest()


def json_rows(file: Path, root: Path) -> ListRows:
    """A .jsonl file, one JSON object a line (blank lines are no rows), or a .json file with a list of them.

    Paths are relative to `root`, inside it; `chosen_file_name` is `chosen` and `file_name` is `image`, as in the Hub's folders of
    pictures.
    """
    try:
        text = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8 ({error.reason} at byte {error.start})") from error
    items: list[Mapping[str, Any]] = []
    unreadable: dict[int, tuple[str, str]] = {}
    for place, item in _json_items(file, text):
        if not isinstance(item, dict):
            unreadable[len(items)] = (file.name, f"{place} is not a JSON object")
        items.append(_without_suffix(item) if isinstance(item, dict) else {})
    return ListRows(items, root, unreadable=unreadable, absolute=False)


def _without_suffix(item: dict[str, Any]) -> dict[str, Any]:
    return {_plain(name): value for name, value in item.items()} | item


def _plain(name: str) -> str:
    return "image" if name == "file_name" else name.removesuffix("_file_name")


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
        self._files = [_parquet(file) for file in files]
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

    def __reduce__(self) -> Any:
        # Open files do not travel to another process; it opens its own.
        return type(self), (self._paths, self.roots[0], self._wanted)

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
                self._held[place] = self._read(place, self._wanted)
            table = self._held[place]
        if isinstance(table, str):
            raise InvalidRow(BadRow(row, self._paths[self._groups[place][0]].name, table))
        return dict(table.slice(row - self._starts[place], 1).to_pylist()[0])

    def light(self, columns: Sequence[str]) -> Iterator[Mapping[str, Any]]:
        """Every row in order, these columns only; of a row that cannot be read, none."""
        for place, (index, group) in enumerate(self._groups):
            table = self._read(place, columns)
            if isinstance(table, str):
                yield from itertools.repeat({}, self._files[index].metadata.row_group(group).num_rows)
                continue
            for batch in table.to_batches(max_chunksize=1000):
                yield from batch.to_pylist()

    def fingerprint(self, *, folders: bool = False, media: Sequence[str] = MEDIA) -> str:
        texts: list[str] = []
        for place in range(len(self._groups)):
            names = self._columns_of_paths(place, media)
            table = self._read(place, names) if names else ""
            if not isinstance(table, str):
                texts += paths_in(table, media)
        # By their place: rows are in the order of the whole paths, which names alone do not tell.
        own = files_fingerprint((f"{place}/{path.name}", path) for place, path in enumerate(self._paths))
        return own + referenced(texts, self.roots, self.absolute, folders)

    def _read(self, place: int, columns: Sequence[str] | None) -> Any:
        """A row group as a table, or why it cannot be read."""
        import pyarrow as pa

        index, group = self._groups[place]
        try:
            return self._files[index].read_row_group(group, columns=columns)
        except (OSError, pa.ArrowException) as error:
            return f"row group {group} of the file is damaged ({_first_line(error)}): fetch it again"

    def _columns_of_paths(self, place: int, media: Sequence[str]) -> list[str]:
        """Those that may name pictures; not where all of them lie in the file, for they may be terabytes."""
        index, group = self._groups[place]
        found, held = set(), set()
        metadata = self._files[index].metadata.row_group(group)
        for number in range(metadata.num_columns):
            leaf = metadata.column(number)
            name, _, rest = leaf.path_in_schema.partition(".")
            known = leaf.statistics is not None and leaf.statistics.has_null_count
            if rest.endswith("bytes") and known and leaf.statistics.null_count == 0:
                held.add(name)
            if self._files[index].schema.column(number).logical_type.type == "STRING":
                found.add(name)
        return sorted((found & set(media)) - held)


def _parquet(file: Path) -> Any:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return pq.ParquetFile(file, memory_map=True)
    except (OSError, pa.ArrowException) as error:
        raise ValueError(f"{file} is damaged, or no parquet file ({_first_line(error)})") from error


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

    def fingerprint(self, *, folders: bool = False, media: Sequence[str] = MEDIA) -> str:
        texts: list[str] = []
        if self._data.data.nbytes > fingerprints.READ_WHOLE:
            # datasets' own name for (builder, revision, files, transforms): all there is without reading everything.
            sha = hashlib.sha256(f"{self._data._fingerprint}/{len(self._data)}".encode())
            for batch in self._data.data.to_batches(max_chunksize=1000):
                texts += paths_in(batch, media)
        else:
            sha = hashlib.sha256(str(self._data.features).encode())
            for table in self._data.with_format("arrow").iter(batch_size=1000):
                for batch in table.combine_chunks().to_batches():
                    sha.update(batch.serialize())
                texts += paths_in(table, media)
        return sha.hexdigest() + referenced(texts, self.roots, self.absolute, folders)


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


def _first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0][:120]
