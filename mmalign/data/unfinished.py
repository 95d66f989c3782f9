"""What a long pass has made so far, in files beside its result: an interrupted one goes on from there."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from mmalign.data.shards import read_notes, read_shard, write_shard

_SECONDS = 30.0


class Unfinished:
    """Rows of a pass by place: tokens of one shape, and a JSON value each.

    folder: where they are kept, a file every 30 seconds, each whole or absent. key: what the pass depends on; files of another key
    are removed.
    """

    def __init__(self, folder: Path, key: str, seconds: float = _SECONDS) -> None:
        self._folder, self._key, self._seconds = folder, key, seconds
        self._rows: dict[int, tuple[Tensor, Any]] = {}
        self._waiting: list[int] = []
        for path in sorted(folder.glob("*.safetensors")):
            notes = read_notes(path)
            if notes["key"] != key:
                path.unlink()
                continue
            tokens = read_shard(path)["tokens"].clone()
            for place, row, told in zip(notes["places"], tokens, notes["told"], strict=True):
                self._rows[place] = row, told
        self._saved = time.monotonic()

    def __len__(self) -> int:
        return len(self._rows)

    def get(self, place: int) -> tuple[Tensor, Any] | None:
        """A row that is done."""
        return self._rows.get(place)

    def add(self, place: int, tokens: Float[Tensor, "L D"], told: Any) -> None:
        """Keeps a row, and writes those that wait once it is time."""
        self._rows[place] = tokens, told
        self._waiting.append(place)
        if time.monotonic() - self._saved >= self._seconds:
            rows = [self._rows[waiting] for waiting in self._waiting]
            notes = {"key": self._key, "places": self._waiting, "told": [told for _, told in rows]}
            path = self._folder / f"{self._waiting[0]:08d}.safetensors"
            write_shard(path, {"tokens": torch.stack([tokens for tokens, _ in rows])}, notes)
            self._waiting, self._saved = [], time.monotonic()

    def remove(self) -> None:
        """Once the result is written."""
        shutil.rmtree(self._folder, ignore_errors=True)
