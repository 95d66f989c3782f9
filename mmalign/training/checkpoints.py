"""What makes a checkpoint trustworthy: a manifest of its files with their hashes, and the facts of the run it continues."""

import hashlib
import json
from pathlib import Path
from typing import Any

from mmalign.files import write_json

MANIFEST = "manifest.json"
STAGING = ".unfinished-checkpoint"


def write_manifest(folder: Path, facts: dict[str, Any]) -> None:
    """Lists every file of `folder` with its size and sha256, beside `facts` about the run."""
    files = {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": file_hash(path)}
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != MANIFEST
    }
    write_json(folder / MANIFEST, {"format": 1, "facts": facts, "files": files})


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


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "…"
