"""Row-wise tensors in numbered safetensors files, read through memory maps a row at a time."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmalign.data.storage import REMEDY
from mmalign.files import write_file

_OPEN_FILES = 64
SHARD_BYTES = 128 * 2**20


def rows_per_shard(bytes_per_row: int) -> int:
    """How many rows fill about 128 MiB, between 1 and 4096."""
    return max(1, min(4096, SHARD_BYTES // max(1, bytes_per_row)))


def write_shard(path: Path, tensors: Mapping[str, Tensor], notes: Any = None) -> Path:
    """One file, whole or not at all; `notes` is any JSON value."""
    from safetensors.torch import save

    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    return write_file(path, save(contiguous, {"notes": json.dumps(notes)}), remedy=REMEDY)


def read_notes(path: Path) -> Any:
    """The JSON value that was written with a shard."""
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        return json.loads(file.metadata()["notes"])


def read_shard(path: Path, *, without: str = "") -> dict[str, Tensor]:
    """The tensors of one file, all but one if asked."""
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys() if name != without}  # noqa: SIM118


def read_noted(path: Path) -> tuple[Any, dict[str, Tensor]]:
    """What `write_shard` wrote, its notes and its tensors; ValueError for a damaged file.

    Copies: a file that is mapped into memory cannot be replaced on Windows.
    """
    from safetensors import SafetensorError

    try:
        return read_notes(path), {name: tensor.clone() for name, tensor in read_shard(path).items()}
    except (SafetensorError, TypeError, KeyError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is damaged: delete it, and the run will make it anew") from error


class ShardedRows:
    """Tensors whose first axis runs over rows that lie in several files, in order."""

    def __init__(self, files: list[Path], lengths: list[int]) -> None:
        self._files = files
        self._starts = torch.tensor([0, *lengths]).cumsum(0)
        self._open: dict[int, Any] = {}

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getstate__(self) -> dict[str, Any]:
        # Memory maps do not travel to another process; it opens its own.
        return self.__dict__ | {"_open": {}}

    def rows(self, name: str, index: Tensor) -> Tensor:
        """Tensor `name` at rows `index` (n,), in that order: (n, …)."""
        index = index.detach().cpu().long()
        if index.ndim != 1 or (index.numel() and (index.min() < 0 or index.max() >= len(self))):
            raise IndexError(f"rows {index.tolist()[:8]} of {len(self)}")
        shard = torch.searchsorted(self._starts, index, right=True) - 1
        offset = index - self._starts[shard]
        pieces = [
            self._slice(int(number), name)[int(at) : int(at) + 1] for number, at in zip(shard, offset, strict=True)
        ]
        if pieces:
            return torch.cat(pieces)
        return self._slice(0, name)[0:0]

    def _slice(self, number: int, name: str) -> Any:
        from safetensors import safe_open

        if number not in self._open:
            while len(self._open) >= _OPEN_FILES:
                self._open.pop(next(iter(self._open)))
            self._open[number] = safe_open(self._files[number], framework="pt")
        return self._open[number].get_slice(name)
