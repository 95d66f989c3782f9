"""`mmalign cache`: where caches lie, how large they are, and how to clear ours."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from mmalign.cli.options import Command, Option, switch
from mmalign.cli.terminal import size

VERB = Command(
    prog="mmalign cache",
    description="Shows where encoded data sets and scores (ours) and downloads (the Hub's) are kept. $MMALIGN_CACHE moves ours.",
    example="mmalign cache --clear",
    options=[
        Option(name="cache_dir", help="the folder that a run was given as --cache-dir", metavar="DIR", nullable=True),
        Option(name="clear", help="delete our entries there, and nothing else", convert=switch, default=False),
        Option(
            name="verify",
            help="read every encoded data set there and compare it with the hashes taken when it was written",
            convert=switch,
            default=False,
        ),
        Option(name="json", help="print JSON", convert=switch, default=False),
    ],
)


@dataclass(frozen=True)
class Place:
    """One cache: what it holds, where, how many bytes, and what clears it."""

    holds: str
    folder: str
    bytes: int
    clear: str


def run(argv: Sequence[str]) -> int:
    """Shows the places, or clears or verifies ours."""
    given = VERB.read(argv)
    if given is None:
        return 0
    from mmalign.data import clear_cache, default_cache_dir

    folder = Path(given["cache_dir"]).expanduser() if given["cache_dir"] else default_cache_dir()
    if given["verify"]:
        return verify(folder)
    freed = clear_cache(folder) if given["clear"] else None
    found = places(folder)
    if given["json"]:
        print(json.dumps({"places": [asdict(place) for place in found], "freed_bytes": freed}, indent=1))
        return 0
    if freed is not None:
        print(f"freed {size(freed)} in {folder}")
    for place in found:
        print(f"{size(place.bytes):>11}  {place.folder}\n{'':13}{place.holds}; clear with: {place.clear}")
    return 0


def verify(ours: Path) -> int:
    """Prints a line for every encoded data set; 1 if one of them is damaged."""
    from mmalign.data import EncodedPairs

    damaged = 0
    for folder in sorted(ours.iterdir()) if ours.is_dir() else ():
        if not folder.is_dir() or not re.fullmatch(r"[0-9a-f]{64}", folder.name):
            continue
        try:
            encoded = EncodedPairs.open(folder)
            encoded.verify()
        except ValueError as error:
            damaged += 1
            print(error)
        else:
            print(f"{folder} is whole: {len(encoded)} pairs of {len(encoded.prompts)} prompts")
    return 1 if damaged else 0


def places(ours: Path) -> list[Place]:
    """Our cache, and the two that downloads go to."""
    from mmalign.data import cache_size

    hub = Path(os.environ.get("HF_HOME") or "~/.cache/huggingface").expanduser()
    models = Path(os.environ.get("HF_HUB_CACHE") or hub / "hub")
    sets = Path(os.environ.get("HF_DATASETS_CACHE") or hub / "datasets")
    clear = "mmalign cache --clear"
    return [
        Place("encoded pairs and scores", str(ours), cache_size(ours), clear),
        Place("models and files from the Hub", str(models), _bytes(models), "hf cache prune, hf cache rm"),
        Place("prepared data sets", str(sets), _bytes(sets), "delete the folder"),
    ]


def _bytes(folder: Path) -> int:
    # Not following links: the Hub's snapshots point to blobs that are counted already.
    return sum(path.lstat().st_size for path in folder.rglob("*") if path.is_file() and not path.is_symlink())
