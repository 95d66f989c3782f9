"""Prompts from a file: plain text, JSON, a table, or the parquet files of a data set."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mmalign.data.splits import files_of_split

COLUMNS = ("prompt", "caption", "text")
ENDINGS = (".txt", ".json", ".jsonl", ".csv", ".tsv", ".parquet")


def read_prompts(path: str | Path, *, split: str | None = None) -> list[str]:
    """Every prompt of a file once, in order of first appearance; ValueError names the row that cannot be used.

    .txt has one a line. The others have a column prompt, caption or text, however capitalised, or are a JSON list of strings:
    Parti's .tsv, HPDv2's benchmark and test .json, ImageReward's rankings, Pick-a-Pic's parquet. A folder gives its parquet
    files, or else its JSON files; `split` picks those named after a split, such as "validation_unique".
    """
    path = Path(path)
    found: dict[str, None] = {}
    for file in _files(path, split):
        for number, row in enumerate(_rows(file), 1):
            prompt = _prompt(row, f"{file}, row {number}")
            if prompt:
                found.setdefault(prompt)
    if not found:
        raise ValueError(f"{path} holds no prompts")
    return list(found)


def _files(path: Path, split: str | None) -> list[Path]:
    if not path.exists():
        raise ValueError(f"{path}: no such prompt file")
    if path.is_file():
        if split is not None:
            raise ValueError(f"{path} is one file, so it has no split {split!r}; name the folder that holds the splits")
        return [path]
    found = sorted(path.rglob("*.parquet")) or sorted(path.glob("*.json")) or sorted(path.glob("*.jsonl"))
    if not found:
        raise ValueError(f"{path} holds no .parquet, .json or .jsonl file; name a prompt file in it")
    return found if split is None else files_of_split(found, split, path)


def _rows(file: Path) -> Iterator[Any]:
    """Strings or mappings, one a row."""
    ending = file.suffix.lower()
    if ending not in ENDINGS:
        raise ValueError(f"{file}: prompts are read from {', '.join(ENDINGS)}")
    if ending == ".parquet":
        yield from _parquet(file)
        return
    try:
        content = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8 text (byte {error.start}): save it as UTF-8") from None
    if ending == ".txt":
        # Not splitlines(): a prompt may hold other separators.
        yield from content.split("\n")
    elif ending == ".tsv":
        # A quotation mark in a .tsv is a character as any other: Parti has prompts that begin with a quoted word.
        yield from _table(file, content, delimiter="\t", quoting=csv.QUOTE_NONE)
    elif ending == ".csv":
        yield from _table(file, content)
    elif ending == ".jsonl":
        # Not splitlines(): JSON may hold other line separators inside its strings.
        for number, line in enumerate(content.split("\n"), 1):
            if line.strip():
                yield _json(line, f"{file}, line {number}")
    else:
        rows = _json(content, str(file))
        if not isinstance(rows, list):
            raise ValueError(f"{file} must hold a list of prompts, or of objects with a key prompt or caption")
        yield from rows


def _table(file: Path, content: str, **dialect: Any) -> Iterator[Any]:
    try:
        yield from csv.DictReader(io.StringIO(content), **dialect)
    except csv.Error as error:
        raise ValueError(f"{file} is no table that can be read: {error}") from None


def _json(content: str, where: str) -> Any:
    try:
        return json.loads(content)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where} is not valid JSON: {error}") from None


def _parquet(file: Path) -> Iterator[Any]:
    """The prompt column alone: the pictures beside it are never read."""
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.ParquetFile(file)
    except pyarrow.ArrowInvalid as error:
        raise ValueError(f"{file} is no parquet file: {error}") from None
    names = table.schema_arrow.names
    column = _column(dict.fromkeys(names), str(file))
    for batch in table.iter_batches(columns=[column]):
        yield from batch.to_pylist()


def _prompt(row: Any, where: str) -> str:
    """The prompt of a row, "" where it is blank."""
    if isinstance(row, Mapping):
        row = row[_column(row, where)]
    if row is None:
        return ""
    if not isinstance(row, str):
        raise ValueError(f"{where}: the prompt must be text, got {row!r:.60}")
    return row.strip()


def _column(row: Mapping[Any, Any], where: str) -> str:
    """What the prompt's column is called in this row."""
    names = {str(key).lower(): key for key in row}
    for name in COLUMNS:
        if name in names:
            return str(names[name])
    raise ValueError(f"{where} has no column prompt, caption or text; it has {', '.join(names) or 'nothing'}")
