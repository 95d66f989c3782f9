"""Checkpoints that are whole or absent: written aside, listed in a manifest with their hashes, renamed, and checked when read."""

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


def write_manifest(folder: Path, facts: dict[str, Any]) -> None:
    """Lists every file of `folder` with its size and sha256, beside `facts` about the run."""
    files = {
        str(path.relative_to(folder)): {"bytes": path.stat().st_size, "sha256": file_hash(path)}
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != MANIFEST
    }
    write_text(folder / MANIFEST, json.dumps({"format": 1, "facts": facts, "files": files}, indent=1))


def read_manifest(folder: Path) -> dict[str, Any]:
    """The facts of a checkpoint; ValueError when a file is missing, changed, or there is no manifest."""
    path = folder / MANIFEST
    if not path.is_file():
        raise ValueError(
            f"{folder} is not a finished mmalign checkpoint: it has no {MANIFEST}. Resume from an older checkpoint-* folder"
        )
    manifest = json.loads(path.read_text())
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
                f"{folder} was trained with another {name} ({saved.get(name)!r}; now {value!r}), so it would not continue that run. "
                "Restore it, or start anew in another output_dir"
            )


def file_hash(path: Path) -> str:
    """sha256 of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_text(path: Path, text: str) -> None:
    """Writes to a temporary name, then renames."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(text)
    os.replace(part, path)


@contextmanager
def full_disk_explained(folder: Path) -> Iterator[None]:
    """Turns 'no space left' while writing below `folder` into one line with the remedy, and removes what was begun there."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        shutil.rmtree(folder, ignore_errors=True)
        raise OSError(
            error.errno,
            f"no space left on the disk that holds {folder}: free some, or choose another output_dir; nothing half-written remains",
        ) from error
