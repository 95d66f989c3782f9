"""Files and folders that are whole or absent: written under another name, then renamed; a full disk or a lack says so in one line."""

import errno
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# Windows knows no quotas.
_DISK_FULL = (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC))


def slug(text: str) -> str:
    """A prompt or a label as a part of a file name."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:40].rstrip("-") or "prompt"


@contextmanager
def written_aside(path: Path, *, remedy: str = "choose another folder") -> Iterator[Path]:
    """A name beside `path` to write to. Once the block ends, the file is flushed to disk and renamed; where it raises, removed.

    `remedy`: what else than freeing space the user can do about a full disk.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with full_disk_explained(path.parent, remedy):
            yield part
            with part.open("rb+") as file:
                os.fsync(file.fileno())
            os.replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def write_file(path: Path, data: bytes | str, *, remedy: str = "choose another folder") -> Path:
    """Writes the whole file (text as UTF-8) or none; returns `path`."""
    with written_aside(path, remedy=remedy) as part:
        part.write_bytes(data.encode() if isinstance(data, str) else data)
    return path


def write_json(path: Path, value: Any) -> Path:
    """Writes `value` as indented JSON, the whole file or none; returns `path`."""
    return write_file(path, json.dumps(value, indent=1) + "\n")


@contextmanager
def staged(folder: Path) -> Iterator[Path]:
    """A folder to write into; its entries move to `folder` once the block ends, and none of it stays if the block raises."""
    existed = folder.exists()
    part = folder / f".unfinished-{os.getpid()}"
    try:
        with full_disk_explained(folder):
            shutil.rmtree(part, ignore_errors=True)
            part.mkdir(parents=True)
            yield part
    except BaseException:
        shutil.rmtree(part if existed else folder, ignore_errors=True)
        raise
    for entry in sorted(part.iterdir()):
        target = folder / entry.name
        if target.is_dir() and not target.is_symlink():
            shutil.rmtree(target)
        os.replace(entry, target)
    part.rmdir()


@contextmanager
def full_disk_explained(folder: Path, remedy: str = "choose another folder") -> Iterator[None]:
    """Turns 'no space left' from any library that writes into `folder` into one OSError that names the remedy."""
    try:
        yield
    except Exception as error:
        code = _disk_full(error)
        if code is None:
            raise
        raise OSError(
            code, f"no space left on the disk that holds {folder}: free some, or {remedy}; nothing half-written remains"
        ) from error


@contextmanager
def absence_explained(remedy: str) -> Iterator[None]:
    """Weights that are neither on this machine nor to be had from the network: a one-line ValueError with the remedy."""
    try:
        yield
    except OSError as error:
        # A fault of this machine, such as a full disk, has a number and speaks for itself.
        if error.errno is not None:
            raise
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        raise ValueError(f"{reason}: {remedy}") from error


def _disk_full(error: Exception) -> int | None:
    """The error number if a disk or quota is full. safetensors and torch.save raise errors of their own, without one."""
    if isinstance(error, OSError):
        return error.errno if error.errno in _DISK_FULL else None
    told = "No space left on device" in str(error) or "Disk quota exceeded" in str(error)
    # What torch's zip writer says when a write comes back short.
    cut_short = isinstance(error, RuntimeError) and "inline_container" in str(error)
    return errno.ENOSPC if told or cut_short else None
