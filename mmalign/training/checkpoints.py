"""Files that are whole or absent: written aside, listed in a manifest with their hashes, renamed, and checked when read."""

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

MANIFEST = "manifest.json"
STAGING = ".unfinished-checkpoint"
# Windows knows no quotas.
_DISK_FULL = (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC))


def write_manifest(folder: Path, facts: dict[str, Any]) -> None:
    """Lists every file of `folder` with its size and sha256, beside `facts` about the run."""
    files = {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": file_hash(path)}
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != MANIFEST
    }
    write_text(folder / MANIFEST, json.dumps({"format": 1, "facts": facts, "files": files}, indent=1))


def read_manifest(folder: Path) -> dict[str, Any]:
    """The facts of a checkpoint; ValueError when a file is missing, changed, or there is no manifest."""
    path = folder / MANIFEST
    if not path.is_file():
        raise ValueError(
            f"{folder} is not a finished mmalign checkpoint: it has no {MANIFEST}. Resume from a checkpoint-* folder that has one"
        )
    manifest = json.loads(path.read_text(encoding="utf-8"))
    for name, expected in manifest["files"].items():
        file = folder / name
        if not file.is_file():
            raise ValueError(
                f"{folder} lacks {name}: the run would not continue as it was. Resume from another checkpoint"
            )
        if file.stat().st_size != expected["bytes"] or file_hash(file) != expected["sha256"]:
            raise ValueError(f"{file} was changed after it was saved (sha256 differs). Resume from another checkpoint")
    return manifest["facts"]


def check_facts(saved: dict[str, Any], now: dict[str, Any], folder: Path) -> None:
    """ValueError naming the first fact in which the checkpoint's run and this one differ."""
    for name, value in now.items():
        if saved.get(name) != value:
            raise ValueError(
                f"{folder} was trained with another {name} ({_shown(saved.get(name))}; now {_shown(value)}), so it would not continue "
                "that run. Restore it, or start anew in another output_dir"
            )


def file_hash(path: Path) -> str:
    """sha256 of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_text(path: Path, text: str) -> None:
    """The whole file or none: written under another name, then renamed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        part.write_text(text, encoding="utf-8")
        os.replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


@contextmanager
def staged(folder: Path) -> Iterator[Path]:
    """A folder to write into; its entries move to `folder` once the block ends, and none of it stays if the block raises."""
    existed = folder.exists()
    part = folder / f".unfinished-{os.getpid()}"
    try:
        with full_disk_explained(part):
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
def full_disk_explained(folder: Path) -> Iterator[None]:
    """Turns 'no space left' while writing below `folder` into one line with the remedy, and removes what was begun there."""
    try:
        yield
    except Exception as error:
        code = _disk_full(error)
        if code is None:
            raise
        shutil.rmtree(folder, ignore_errors=True)
        raise OSError(
            code,
            f"no space left on the disk that holds {folder.parent}: free some, or choose another folder; nothing half-written remains",
        ) from error


def _disk_full(error: Exception) -> int | None:
    """The error number if a disk or quota is full. safetensors and torch.save raise errors of their own, without one."""
    if isinstance(error, OSError):
        return error.errno if error.errno in _DISK_FULL else None
    told = "No space left on device" in str(error) or "Disk quota exceeded" in str(error)
    # What torch's zip writer says when a write comes back short.
    cut_short = isinstance(error, RuntimeError) and "inline_container" in str(error)
    return errno.ENOSPC if told or cut_short else None


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "…"
