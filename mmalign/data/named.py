"""A folder of pictures, or of clips in a file each, that are paired by their names.

0001_chosen.png, 0001_rejected.png, 0001.txt     or     0001.png, 0001-rejectedlabel.png, 0001.txt
`-` and `_` mean the same, any picture's ending will do, subfolders count, and the text file is the prompt. Every file with
a picture's or a text's ending belongs to some row: what lacks its counterpart is a bad row, not a file passed over.

Where no picture is marked as rejected, 0001.png and 0001.txt are a picture and its caption.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from mmalign.data.clips import VIDEO_ENDINGS
from mmalign.data.images import ENDINGS, BadImage, inside
from mmalign.data.rows import ListRows

_MARK = re.compile(r"(?P<key>.+)[-_](?P<side>chosen|rejected|rejectedlabel)", re.IGNORECASE | re.DOTALL)


def holds_pairs(folder: Path) -> bool:
    """Whether some picture in the folder is marked by its name as rejected."""
    return any(side == "rejected" for _, side, _ in _files(folder))


def holds_pictures(folder: Path) -> bool:
    """Whether there is a picture in the folder."""
    return any(side != "prompt" for _, side, _ in _files(folder))


def named_pairs(folder: Path) -> ListRows:
    """A row for every name, in alphabetical order; its paths are relative to the folder."""
    return _named(folder, _files(folder), ("chosen", "rejected"))


def named_pictures(folder: Path) -> ListRows:
    """The same of pictures with captions."""
    whole = ((path.relative_to(folder).with_suffix("").as_posix(), side, path) for _, side, path in _files(folder))
    return _named(
        folder, ((key, "prompt" if side == "prompt" else "image", path) for key, side, path in whole), ("image",)
    )


def _named(folder: Path, files: Iterable[tuple[str, str, Path]], sides: tuple[str, ...]) -> ListRows:
    groups: dict[str, dict[str, list[Path]]] = {}
    for key, side, path in files:
        groups.setdefault(key, {name: [] for name in (*sides, "prompt")})[side].append(path)
    items: list[Mapping[str, Any]] = []
    unreadable: dict[int, tuple[str, str]] = {}
    for row, (key, found) in enumerate(sorted(groups.items())):
        item: dict[str, Any] = dict.fromkeys(("prompt", *sides))
        for field, paths in found.items():
            if len(paths) != 1:
                there = ", ".join(repr(path.name) for path in paths) or "none"
                unreadable.setdefault(row, (field, f"expected one {field} file for {key!r}, found {there}"))
                continue
            item[field] = paths[0].relative_to(folder).as_posix()
        if item["prompt"] is not None:
            try:
                item["prompt"] = inside(item["prompt"], (folder,), False).read_text(encoding="utf-8-sig").strip()
            except BadImage as error:
                unreadable.setdefault(row, ("prompt", str(error)))
            except UnicodeDecodeError as error:
                unreadable.setdefault(row, ("prompt", f"{item['prompt']!r} is not UTF-8 ({error.reason})"))
        items.append(item)
    return ListRows(items, folder, unreadable=unreadable, absolute=False)


def _files(folder: Path) -> Iterator[tuple[str, str, Path]]:
    """(key, side, path) of every picture and text; hidden files are none of ours."""
    for path in sorted(folder.rglob("*")):
        relative = path.relative_to(folder)
        ending = path.suffix.lower()
        if any(part.startswith(".") for part in relative.parts) or path.is_dir():
            continue
        stem = relative.with_suffix("").as_posix()
        if ending == ".txt":
            yield stem, "prompt", path
        elif ending[1:] in ENDINGS | VIDEO_ENDINGS:
            mark = _MARK.fullmatch(stem)
            side = mark["side"].lower().removesuffix("label") if mark else "chosen"
            yield mark["key"] if mark else stem, side, path
