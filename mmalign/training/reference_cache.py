"""Errors of the frozen reference, kept across runs: they depend on (pair, timestep, noise), never on what is trained.

A row's timestep and noise are drawn from (seed, epoch, row), so a second run over the same pairs (another β, learning rate or loss)
meets the same points and needs no reference. Kept in `cache_dir/reference-<key>.safetensors`, one table (S sides, R rows) an epoch, NaN
where nothing is known; the key is the sha256 of everything the errors depend on.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from mmalign.data.shards import read_noted, write_shard


class ReferenceErrors:
    """A table of errors in memory and on disk. `parts`: everything they depend on, as JSON values; rows are 0 … num_rows − 1.

    Raises ValueError for a file that was changed after it was written.
    """

    def __init__(self, cache_dir: Path, parts: dict[str, Any], *, num_rows: int, sides: int) -> None:
        self._parts: dict[str, Any] = json.loads(json.dumps(parts))
        key = hashlib.sha256(json.dumps(self._parts, sort_keys=True).encode()).hexdigest()
        self.path = cache_dir / f"reference-{key}.safetensors"
        self._shape = (sides, num_rows)
        self._epochs: dict[int, Tensor] = self._read()
        self._new = False
        self.found = self.asked = 0

    def find(self, epoch: int, rows: list[int]) -> Float[Tensor, " S*B"] | None:
        """The errors of these rows, laid out [chosen…, rejected…]; None unless all of them are known."""
        self.asked += len(rows)
        table = self._epochs.get(epoch)
        if table is None or table[:, rows].isnan().any():
            return None
        self.found += len(rows)
        return table[:, rows].flatten()

    def keep(self, epoch: int, rows: list[int], errors: Float[Tensor, " S*B"]) -> None:
        """Remembers what was computed; `write` brings it to disk."""
        table = self._epochs.setdefault(epoch, torch.full(self._shape, float("nan"), dtype=errors.dtype))
        table[:, rows] = errors.detach().cpu().unflatten(0, (self._shape[0], len(rows)))
        self._new = True

    def write(self, world_size: int = 1, rank: int = 0) -> None:
        """Brings what is new to disk, joined with what other processes and runs have found. Every process must call it."""
        from filelock import FileLock

        tables = [self._epochs]
        if world_size > 1:
            tables = [{}] * world_size
            torch.distributed.all_gather_object(tables, self._epochs)
        elif not self._new:
            return
        if rank == 0:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(self.path.with_suffix(".lock")):
                joined = _join([*tables, self._read()])
                digest = _digest(joined)
                named = {str(epoch): table for epoch, table in joined.items()}
                write_shard(self.path, named, {"parts": self._parts, "sha256": digest})
        self._new = False

    def _read(self) -> dict[int, Tensor]:
        if not self.path.is_file():
            return {}
        notes, tensors = read_noted(self.path)
        tables = {int(name): table for name, table in tensors.items()}
        whole = notes["parts"] == self._parts and notes["sha256"] == _digest(tables)
        if not whole or any(table.shape != self._shape for table in tables.values()):
            raise ValueError(f"{self.path} was changed after it was written: delete it, and the run will make it anew")
        return tables


def _join(parts: list[dict[int, Tensor]]) -> dict[int, Tensor]:
    """One table an epoch; where several know a number, the first one's."""
    joined: dict[int, Tensor] = {}
    for part in parts:
        for epoch, table in part.items():
            known = joined.get(epoch)
            joined[epoch] = table.clone() if known is None else torch.where(known.isnan(), table, known)
    return joined


def _digest(tables: dict[int, Tensor]) -> str:
    digest = hashlib.sha256()
    for epoch in sorted(tables):
        digest.update(str(epoch).encode())
        digest.update(tables[epoch].contiguous().numpy().tobytes())
    return digest.hexdigest()
