"""WebDataset shards: tar files whose members belong together by key, read in place and never extracted.

A member is <key>.<field>; the key ends at the first dot of the file's name. Fields that are read:

    0001.chosen.jpg    0001.rejected.mp4                   pictures or videos, any format; the ending may be left out
    0001.jpg_0.jpg     0001.jpg_1.jpg     0001.0.jpg …     as in Pick-a-Pic; 0 is jpg_0, 1 is jpg_1
    0001.jpg                                               the one picture of a row of ImageRewardDB
    0001.txt           0001.prompt.txt    0001.caption.txt the prompt, UTF-8
    0001.json                                              one object with the other columns: label_0, prompt, confidence, user_id …

Pictures 0 and 1 need `label_0` (1 where picture 0 is preferred): a plain `label` would not say of which. Every key is a row, in the
order of shards and of first members; members of a key may lie anywhere in its shard. Other fields, pictures that the columns do not
need, folders and hidden files, and names without a dot, are passed over; among the rest a link, a device, a name that occurs twice or
a text that cannot be read makes its key a bad row.
"""

from __future__ import annotations

import itertools
import json
import re
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mmalign.data.clips import VIDEO_ENDINGS
from mmalign.data.fingerprints import MEDIA, files_fingerprint
from mmalign.data.images import ENDINGS
from mmalign.data.records import BadRow, InvalidRow

TAR_ENDINGS = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")
PICTURE_BYTES, TEXT_BYTES = 2**28, 2**22
_PICTURES = {"chosen": "chosen", "rejected": "rejected", "jpg_0": "jpg_0", "jpg_1": "jpg_1", "image": "image"}
_PICTURES |= {"0": "jpg_0", "1": "jpg_1", "": "image"}
_NAME = re.compile(r"(?P<key>(?:.*/)?[^./][^./]*)\.(?P<field>[^/]+)", re.DOTALL)
_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")


@dataclass(slots=True)
class _Sample:
    """The members of one key: where its pictures lie, by column, the other columns, and the faults that were met."""

    key: str
    shard: int
    pictures: dict[str, tuple[str, int, int]] = field(default_factory=dict)
    columns: dict[str, Any] = field(default_factory=dict)
    prompt: str | None = None
    faults: list[tuple[str, str]] = field(default_factory=list)
    seen: set[str] = field(default_factory=set)


class TarRows:
    """The samples of several shards as rows; a picture is read when its row is."""

    roots: Sequence[Path] = ()
    absolute = False

    def __init__(self, files: Sequence[Path]) -> None:
        self._files = list(files)
        self._samples = [sample for shard, file in enumerate(self._files) for sample in _samples(file, shard)]
        pictures = dict.fromkeys(column for sample in self._samples for column in sample.pictures)
        self._wanted = self._pictures = list(pictures)
        self.columns = [*pictures, *dict.fromkeys(name for sample in self._samples for name in sample.columns)]

    def __len__(self) -> int:
        return len(self._samples)

    def select_columns(self, columns: Sequence[str]) -> None:
        """Read only these pictures from now on, every one of which a row must have."""
        self._wanted = [name for name in self._pictures if name in columns]

    def __getitem__(self, row: int) -> Mapping[str, Any]:
        sample = self._samples[row]
        if (fault := self._fault(sample)) is not None:
            raise InvalidRow(BadRow(row, *fault))
        return sample.columns | {name: self._read(sample, name, row) for name in self._wanted}

    def light(self, columns: Sequence[str]) -> Iterator[Mapping[str, Any]]:
        """Every row in order, without its pictures."""
        return ({} if self._fault(sample) is not None else sample.columns for sample in self._samples)

    def _fault(self, sample: _Sample) -> tuple[str, str] | None:
        """The first that concerns what is read."""
        unread = set(_PICTURES.values()) - set(self._wanted)
        return next((fault for fault in sample.faults if fault[0] not in unread), None)

    def fingerprint(self, *, folders: bool = False, media: Sequence[str] = MEDIA) -> str:
        return files_fingerprint((f"{place}/{file.name}", file) for place, file in enumerate(self._files))

    def _read(self, sample: _Sample, column: str, row: int) -> dict[str, Any]:
        file = self._files[sample.shard]
        if column not in sample.pictures:
            raise InvalidRow(BadRow(row, column, f"{sample.key!r} has no such member in {file.name}"))
        name, offset, size = sample.pictures[column]
        with file.open("rb") as opened:
            opened.seek(offset)
            content = opened.read(size)
        if len(content) != size:
            raise InvalidRow(BadRow(row, column, f"{file.name} was shortened since it was opened"))
        return {"bytes": content, "path": name}


def tar_files(pattern: str) -> list[Path] | None:
    """The shards that {000..011} in a path stands for; None for a path without. All of them must be there."""
    ranges = _RANGE.findall(pattern)
    if not ranges:
        return None
    numbers = [[f"{number:0{len(first)}}" for number in range(int(first), int(last) + 1)] for first, last in ranges]
    texts = _RANGE.sub("\0", pattern).split("\0")
    files = [
        Path(texts[0] + "".join(map(str.__add__, chosen, texts[1:]))).expanduser()
        for chosen in itertools.product(*numbers)
    ]
    missing = [file for file in files if not file.is_file()]
    if missing or not files:
        first = f", the first is {missing[0]}" if missing else ""
        raise ValueError(f"{pattern}: {len(missing)} of {len(files)} shards are missing{first}")
    return files


def _samples(file: Path, shard: int) -> list[_Sample]:
    found: dict[str, _Sample] = {}
    try:
        with tarfile.open(file, "r:") as tar:
            for member in tar:
                if member.size < 0:
                    # tarfile would go back by as much and never end.
                    raise tarfile.ReadError(f"{member.name!r:.80} has a negative size")
                match = _NAME.fullmatch(member.name.removeprefix("./"))
                if match is None or member.isdir():
                    continue
                sample = found.setdefault(match["key"], _Sample(match["key"], shard))
                if (fault := _add(sample, tar, member, match["field"].lower())) is not None:
                    sample.faults.append(fault)
            _check_end(tar, file)
    except (tarfile.TarError, EOFError) as error:
        raise ValueError(
            f"{file} is damaged, cut off, or no uncompressed tar file ({error}): fetch it again, or gunzip it, as a "
            "compressed one cannot be read in place"
        ) from error
    for sample in found.values():
        if (fault := _name_prompt(sample)) is not None:
            sample.faults.append(fault)
    return list(found.values())


def _check_end(tar: tarfile.TarFile, file: Path) -> None:
    """tarfile takes a damaged header for the end of the archive; the rest must be zeros, and some of them must be there."""
    opened: Any = tar.fileobj
    opened.seek(tar.offset)
    rest = 0
    while chunk := opened.read(2**20):
        if chunk.strip(b"\0"):
            raise tarfile.ReadError(f"a damaged header or a second archive follows byte {tar.offset}")
        rest += len(chunk)
    if rest < tarfile.BLOCKSIZE:
        raise tarfile.ReadError(f"no end of archive after byte {tar.offset}")


def _add(sample: _Sample, tar: tarfile.TarFile, member: tarfile.TarInfo, name: str) -> tuple[str, str] | None:
    """Takes a member in; what is wrong with it, if it is one that is read."""
    base, dot, ending = name.rpartition(".")
    stem = (base if dot else "") if ending in ENDINGS | VIDEO_ENDINGS else name
    is_text = name in ("json", "txt", "prompt.txt", "caption.txt")
    if stem not in _PICTURES and not is_text:
        return None
    column = name if is_text else _PICTURES[stem]
    shown = repr(member.name)[:80]
    if not member.isreg() or member.issparse():
        return column, f"{shown} is a link, a device or a sparse file, which are not followed"
    if column in sample.seen:
        return column, f"{shown}: {sample.key!r} has more than one such member"
    sample.seen.add(column)
    limit = TEXT_BYTES if is_text else PICTURE_BYTES
    if member.size > limit:
        return column, f"{shown} has {member.size} bytes, more than {limit}"
    if not is_text:
        sample.pictures[column] = (member.name, member.offset_data, member.size)
        return None
    content = tar.extractfile(member)
    assert content is not None
    return _add_text(sample, column, content.read(), shown)


def _add_text(sample: _Sample, column: str, content: bytes, shown: str) -> tuple[str, str] | None:
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        return column, f"{shown} is not UTF-8 ({error.reason})"
    if column != "json":
        if sample.prompt is not None:
            return column, f"{shown}: {sample.key!r} has more than one prompt"
        sample.prompt = text.strip()
        return None
    try:
        values = json.loads(text)
    except (ValueError, RecursionError):
        values = None
    if not isinstance(values, dict):
        return column, f"{shown} is not a JSON object"
    if taken := sorted(set(values) & set(_PICTURES)):
        return column, f"{shown} holds {taken[0]!r}: a picture is a member of its own"
    sample.columns |= values
    return None


def _name_prompt(sample: _Sample) -> tuple[str, str] | None:
    """The prompt's column is called as the form of the pictures wants it, whether it came as text or in the object."""
    ours, other = ("caption", "prompt") if {"jpg_0", "jpg_1"} & set(sample.pictures) else ("prompt", "caption")
    given = [sample.columns.pop(name) for name in (ours, other) if name in sample.columns]
    given = [value.strip() if isinstance(value, str) else value for value in given]
    if sample.prompt is not None:
        given.append(sample.prompt)
    if given:
        sample.columns[ours] = given[0]
    if any(value != given[0] for value in given):
        return ours, f"{sample.key!r} has prompts that differ"
    return None
