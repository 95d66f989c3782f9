"""Where caches lie, how large they are, and how to clear them."""

from __future__ import annotations

import logging
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

_log = logging.getLogger(__name__)
_OURS = re.compile(r"(scores-|reference-|paths-|frames-)?[0-9a-f]{64}(\.partial|\.lock|\.safetensors)?")
# What a user can do about a full disk besides freeing some.
REMEDY = (
    "point cache_dir or $MMALIGN_CACHE at a larger disk, or call mmalign.data.clear_cache(); what was finished is kept"
)


def default_cache_dir() -> Path:
    """$MMALIGN_CACHE if it is set, else ~/.cache/mmalign."""
    return Path(os.environ.get("MMALIGN_CACHE") or Path("~/.cache/mmalign")).expanduser()


def cache_size(cache_dir: str | Path | None = None) -> int:
    """Bytes that our caches take up in a cache folder."""
    return sum(_size(entry) for entry in _entries(cache_dir))


def clear_cache(cache_dir: str | Path | None = None) -> int:
    """Delete our caches from a cache folder and nothing else in it; the bytes that were freed.

    Unfinished ones go too, but not those that a process is building now.
    """
    from filelock import FileLock, Timeout

    freed = 0
    for entry in _entries(cache_dir):
        lock = entry.with_name(entry.name.split(".")[0] + ".lock")
        try:
            with FileLock(lock, timeout=0):
                freed += _size(entry)
                if entry.is_dir():
                    shutil.rmtree(entry)
                elif entry != lock:
                    entry.unlink()
            lock.unlink(missing_ok=True)
        except Timeout:
            _log.warning("%s is being built and stays", entry)
    return freed


def _entries(cache_dir: str | Path | None) -> Iterator[Path]:
    folder = default_cache_dir() if cache_dir is None else Path(cache_dir).expanduser()
    if folder.is_dir():
        yield from sorted(entry for entry in folder.iterdir() if _OURS.fullmatch(entry.name))


def _size(entry: Path) -> int:
    files = entry.rglob("*") if entry.is_dir() else [entry]
    return sum(file.stat().st_size for file in files if file.is_file())
