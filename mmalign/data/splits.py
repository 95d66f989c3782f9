"""Which split a file belongs to, told by its folder or its name; and which of several splits is meant."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_KNOWN = ("train", "validation", "test")


def split_of(file: Path, folder: Path) -> str | None:
    """The nearest folder below `folder` that is named as a split, else what the file's own name begins with.

    Named as the Hub names them: train, train_0, train-00000-of-00003, validation_unique-00000-of-00002.
    """
    *parents, _ = file.relative_to(folder).parts
    for name in (*reversed(parents), file.stem):
        split = re.sub(r"[._]?\d+$", "", name.split("-")[0])
        if split.split("_")[0] in _KNOWN:
            return split
    return None


def files_of_split(found: list[Path], split: str | None, folder: Path) -> list[Path]:
    """The files of a split; all of them where none belongs to one. ValueError where only some do and none was asked for."""
    by_split: dict[str | None, list[Path]] = {}
    for file in found:
        by_split.setdefault(split_of(file, folder), []).append(file)
    others = by_split.pop(None, [])
    if split is None and not by_split:
        return others
    if split is None and others:
        raise ValueError(
            f"{folder}: {others[0].relative_to(folder)} belongs to no split, as other files do "
            f"({', '.join(sorted(map(str, by_split)))}): pass split=…, or move it to a folder named after its split"
        )
    return list(choose_split(by_split, split, folder))


def choose_split(splits: Mapping[Any, Any], split: str | None, where: Any = "the data set") -> Any:
    """What is meant by `split`: where nothing is said, train, or the only one."""
    chosen = split or ("train" if "train" in splits or len(splits) != 1 else next(iter(splits)))
    if chosen not in splits:
        raise ValueError(f"{where} has no split {chosen!r}; it has {', '.join(sorted(splits)) or 'none'}: pass split=…")
    return splits[chosen]
