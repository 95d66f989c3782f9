"""load_pairs: any supported source of image preferences as a PairSource, read and checked row by row."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from functools import cached_property
from importlib.resources import files
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from mmalign.data.ahead import in_order
from mmalign.data.columns import read_row, recognise, score_columns, used_columns
from mmalign.data.images import MAX_PIXELS
from mmalign.data.records import BadRow, InvalidRow, PairRecord
from mmalign.data.rows import DatasetRows, FolderRows, ListRows, ParquetRows, Rows

PLAYGROUND = "playground"
_FORMS = (
    '"playground", a Hub data set id, a parquet file or a folder of them, a datasets save_to_disk folder, a folder '
    "with metadata.jsonl, a datasets.Dataset, or a list of dicts"
)


class PairSource:
    """Preference pairs in their own order. `source[i]` reads and checks row i: a PairRecord, or InvalidRow is raised."""

    def __init__(self, rows: Rows, name: str, *, max_rows: int | None = None, max_pixels: int = MAX_PIXELS) -> None:
        if len(rows) == 0:
            raise ValueError(f"{name} has no rows")
        if max_rows is not None and max_rows < 1:
            raise ValueError(f"max_rows must be at least 1, got {max_rows}")
        self.name = name
        self.form = recognise(rows.columns)
        self.max_pixels = max_pixels
        self._rows = rows
        self._length = len(rows) if max_rows is None else min(max_rows, len(rows))
        self._scores = score_columns(self.form, rows.columns)
        if isinstance(rows, ParquetRows | DatasetRows):
            rows.select_columns(used_columns(self.form, rows.columns))

    def __len__(self) -> int:
        return self._length

    def __repr__(self) -> str:
        return f"PairSource({self.name!r}, {len(self)} rows, {self.form} columns)"

    @property
    def score_names(self) -> tuple[str, ...]:
        """Names of the reward columns that the source carries."""
        return tuple(self._scores)

    @cached_property
    def fingerprint(self) -> str:
        """sha256 of the content and of what decides which rows are good (see rows.py for its cost and its limits)."""
        parts = (self._rows.fingerprint(), self.form, self._length, self.max_pixels)
        return hashlib.sha256(repr(parts).encode()).hexdigest()

    def __getitem__(self, row: int) -> PairRecord:
        if not 0 <= row < self._length:
            raise IndexError(f"row {row} of {self._length}")
        return read_row(
            self.form,
            self._rows[row],
            row,
            scores=self._scores,
            roots=self._rows.roots,
            absolute=self._rows.absolute,
            max_pixels=self.max_pixels,
        )


def load_pairs(
    source: Any,
    *,
    split: str | None = None,
    revision: str | None = None,
    root: str | Path | None = None,
    max_rows: int | None = None,
    max_pixels: int = MAX_PIXELS,
) -> PairSource:
    """Open a source of preference pairs; nothing is decoded yet.

    source: "playground", a Hub data set id, a parquet file or a folder of them, a `save_to_disk` folder, a folder with
    metadata.jsonl, a datasets.Dataset, or a list of dicts. Columns as in Pick-a-Pic (caption, jpg_0, jpg_1, label_0) or
    (prompt, chosen, rejected). split: "train" unless given. revision: of a Hub data set. root: the folder that paths in
    a list or a Dataset may point into. max_rows: only the first so many. max_pixels: larger pictures make a bad row.
    """
    options = {"max_rows": max_rows, "max_pixels": max_pixels}
    folder = None if root is None else Path(root).expanduser()
    if isinstance(source, PairSource):
        _refuse("a PairSource", split=split, revision=revision, root=root, max_rows=max_rows)
        return source
    if not isinstance(source, str | Path):
        _refuse("data in memory", revision=revision)
        return PairSource(_in_memory(source, split, folder), type(source).__name__, **options)  # type: ignore[arg-type]
    name = str(source)
    local = Path(source).expanduser()
    if name == PLAYGROUND:
        _refuse("the playground", revision=revision, root=root)
        rows: Rows = _playground(split or "train")
    elif local.exists():
        _refuse("a local path", revision=revision)
        rows = _local(local, split, folder)
    elif isinstance(source, Path) or name.startswith((".", "/", "~")) or name.endswith((".parquet", ".jsonl")):
        raise ValueError(f"{name}: no such file or folder. A source is {_FORMS}")
    else:
        rows = _from_hub(name, split or "train", revision, folder)
    return PairSource(rows, name if split is None else f"{name}[{split}]", **options)  # type: ignore[arg-type]


def find_bad_rows(source: PairSource, *, workers: int = 4, progress: bool = True) -> list[BadRow]:
    """Read every row once and name those that cannot be used."""

    def check(row: int) -> BadRow | None:
        try:
            source[row]
        except InvalidRow as error:
            return error.bad_row
        return None

    found = in_order(check, range(len(source)), workers)
    with tqdm(found, total=len(source), desc="Checking pairs", unit="pair", disable=not progress) as bar:
        return [bad for bad in bar if bad is not None]


def _in_memory(source: Any, split: str | None, root: Path | None) -> Rows:
    if isinstance(source, Mapping):
        return _in_memory(_choose_split(source, split), None, root)
    if split is not None:
        raise ValueError(f"split={split!r} does not apply to {type(source).__name__}: pass the split itself")
    if isinstance(source, Sequence):
        return ListRows(source, root)
    from datasets import Dataset, IterableDataset

    if isinstance(source, Dataset):
        return DatasetRows(source, () if root is None else (root,))
    if isinstance(source, IterableDataset):
        raise ValueError(
            "a streaming data set cannot be shuffled or cached: take a part of it with "
            "datasets.Dataset.from_list(list(stream.take(n)))"
        )
    raise ValueError(f"cannot read pairs from {type(source).__name__}. A source is {_FORMS}")


def _playground(split: str) -> Rows:
    folder = Path(str(files("mmalign"))) / "assets" / "pairs"
    if split not in ("train", "test"):
        raise ValueError(f"the playground has the splits 'train' and 'test', not {split!r}")
    if not (folder / f"{split}.parquet").is_file():
        raise ValueError(
            f"{folder / split}.parquet is missing: reinstall mmalign, or build it with "
            "`python -m mmalign.playground.build pairs`"
        )
    return ParquetRows([folder / f"{split}.parquet"], folder)


def _local(path: Path, split: str | None, root: Path | None) -> Rows:
    """What lies at a path that exists; only a save_to_disk DatasetDict and split-named parquet files know splits."""
    if path.name == "metadata.jsonl":
        path = path.parent
    if path.is_dir() and (path / "metadata.jsonl").is_file():
        _refuse("a folder with metadata.jsonl", split=split, root=root)
        return FolderRows(path)
    if path.is_dir() and any((path / name).is_file() for name in ("dataset_dict.json", "state.json")):
        from datasets import load_from_disk

        loaded = load_from_disk(str(path))
        return _in_memory(loaded, split, root or path)
    if path.is_file() and path.suffix == ".parquet":
        _refuse("a single parquet file", split=split)
        return ParquetRows([path], root or path.parent)
    found = sorted(path.rglob("*.parquet")) if path.is_dir() else []
    if not found:
        raise ValueError(
            f"{path}: neither parquet, nor metadata.jsonl, nor a save_to_disk folder. A source is {_FORMS}"
        )
    return ParquetRows(_files_of_split(found, split, path), root or path)


def _files_of_split(found: list[Path], split: str | None, folder: Path) -> list[Path]:
    """Files named as the Hub names them, train.parquet or train-00000-of-00003.parquet; all of them if none is."""
    known = ("train", "validation", "test")
    by_split: dict[str, list[Path]] = {}
    for file in found:
        by_split.setdefault(file.stem.split("-")[0], []).append(file)
    if split is None and not set(by_split) & set(known):
        return found
    return list(_choose_split(by_split, split, folder))


def _choose_split(splits: Mapping[str, Any], split: str | None, where: Any = "the data set") -> Any:
    chosen = split or ("train" if "train" in splits or len(splits) != 1 else next(iter(splits)))
    if chosen not in splits:
        raise ValueError(f"{where} has no split {chosen!r}; it has {', '.join(sorted(splits)) or 'none'}: pass split=…")
    return splits[chosen]


def _from_hub(name: str, split: str, revision: str | None, root: Path | None) -> Rows:
    from datasets import config, load_dataset
    from huggingface_hub import constants

    try:
        dataset = load_dataset(name, split=split, revision=revision)
    except (OSError, ValueError, RuntimeError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(f"{name!r} is no local path and could not be loaded from the Hub: {reason}") from error
    caches = (Path(constants.HF_HUB_CACHE), Path(config.HF_DATASETS_CACHE))
    return DatasetRows(dataset, caches if root is None else (root,))


def _refuse(what: str, **options: Any) -> None:
    for option, value in options.items():
        if value is not None:
            raise ValueError(f"{option}={value!r} does not apply to {what}; leave it out")
