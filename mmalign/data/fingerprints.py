"""What names the content of a source: hashes of values, of files, and of the files that values lead to."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mmalign.data.clips import frame_files
from mmalign.data.images import BadImage, inside, to_rgb

READ_WHOLE = 4 * 2**30
_SAMPLE = 2**16
# The columns that may hold a path where a picture is meant.
MEDIA = (
    *("jpg_0", "jpg_1", "chosen", "rejected", "images", "image"),
    *("file_path", "image_path", "generations", "path1", "path2"),
)


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


def referenced(texts: Iterable[str], roots: Sequence[Path], absolute: bool, folders: bool) -> str:
    """files_fingerprint of the files that these texts lead to; of the others, that they lead to none.

    folders: of the frames in the folders that they lead to as well.
    """
    found: dict[str, Path] = {}
    for text in dict.fromkeys(texts if roots else ()):
        try:
            place = inside(text, roots, absolute, folders=folders)
        except BadImage:
            continue
        found |= {f"{text}/{file.name}": file for file in frame_files(place)} if place.is_dir() else {text: place}
    return files_fingerprint(found.items())


def add_value(sha: Any, value: Any, texts: list[str]) -> None:
    """Hash a raw value, marked off from what follows: pictures by what is read from them, bytes as they are, the rest by its
    text; texts may turn out paths.
    """
    from PIL import Image

    # A stack of our own: JSON may be nested more deeply than Python calls may be.
    waiting = [value]
    while waiting:
        value = waiting.pop()
        if isinstance(value, Image.Image):
            sha.update(_of_picture(value))
        elif isinstance(value, bytes | bytearray | memoryview):
            sha.update(b"|bytes" + hashlib.sha256(value).digest())
        elif isinstance(value, Mapping):
            keys = sorted(value, key=str)
            sha.update(f"|{keys}:".encode(errors="backslashreplace"))
            waiting += [value[key] for key in reversed(keys)]
        elif isinstance(value, list | tuple):
            sha.update(f"|{len(value)}:".encode())
            waiting += reversed(value)
        else:
            # hex: Python refuses to write integers of more than 4300 digits in decimal.
            sha.update(f"|{hex(value) if type(value) is int else repr(value)}".encode(errors="backslashreplace"))
            if isinstance(value, str | Path):
                texts.append(str(value))


def digest_of(value: Any) -> str:
    """sha256 of a raw value; paths in it by their text."""
    sha = hashlib.sha256()
    add_value(sha, value, [])
    return sha.hexdigest()


def processor_fingerprint(processor: Any) -> str:
    """sha256 of the files that a model's processor is saved as."""
    with tempfile.TemporaryDirectory() as folder:
        processor.save_pretrained(folder)
        found = (path for path in Path(folder).rglob("*") if path.is_file())
        return files_fingerprint((path.relative_to(folder).as_posix(), path) for path in found)


def paths_in(table: Any, media: Sequence[str] = MEDIA) -> list[str]:
    """The paths, in these columns of an arrow table or batch, of pictures that do not lie in it themselves."""
    return [text for name in sorted(set(media) & set(table.schema.names)) for text in _texts_of(table.column(name))]


def _of_picture(image: Any) -> bytes:
    try:
        seen = to_rgb(image, max_pixels=image.width * image.height)
    except BadImage as error:
        return f"|no picture: {error}".encode()
    return f"|picture{seen.size}".encode() + hashlib.sha256(seen.tobytes()).digest()


def _texts_of(column: Any) -> list[str]:
    """All texts of an arrow column, in lists and structs too, but not the path beside a picture's bytes, which are not read."""
    import pyarrow.compute as pc
    from pyarrow import types

    kind = column.type
    if types.is_dictionary(kind):
        column, kind = column.cast(kind.value_type), kind.value_type
    if types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind):
        return [text for text in column.to_pylist() if text is not None]
    if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        return _texts_of(pc.list_flatten(column))
    if not types.is_struct(kind):
        return []
    names = [part.name for part in kind]
    if "bytes" in names:
        column = column.filter(pc.is_null(pc.struct_field(column, "bytes")))
    return [text for name in names for text in _texts_of(pc.struct_field(column, name))]
