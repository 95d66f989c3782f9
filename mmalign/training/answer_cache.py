"""The frozen reference's log-probability of every token, kept across runs: it depends on the row, never on what is trained.

Kept in `cache_dir/answers-<key>.safetensors`, a number for each supervised token of each answer; the key is the sha256 of everything
that they depend on. Per token, so that a second run may weigh tokens otherwise (mean, ld, another β or loss).
"""

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mmalign.data.shards import read_noted, write_shard

# So many rows of a table that was found are compared with the reference itself.
VERIFIED = 8


class ReferenceTokens:
    """A table in memory and on disk. `parts`: everything the numbers depend on, as JSON values.

    Raises ValueError for a file that was changed after it was written, and where what it holds is not what the reference says now.
    """

    def __init__(self, cache_dir: Path, parts: dict[str, Any], *, tolerance: float = 1e-3) -> None:
        self._parts: dict[str, Any] = json.loads(json.dumps(parts))
        key = hashlib.sha256(json.dumps(self._parts, sort_keys=True).encode()).hexdigest()
        self.path = cache_dir / f"answers-{key}.safetensors"
        self._table = self._read()
        self._to_verify = VERIFIED if self._table else 0
        self._tolerance = tolerance
        self._new = False

    def holds(self, rows: list[int], sides: int) -> bool:
        """Whether all answers of these rows are known."""
        return all(key in self._table for key in _keys(rows, sides * len(rows)))

    def find(self, rows: list[int], supervised: Bool[Tensor, "R T"]) -> Float[Tensor, "R T"] | None:
        """The log-probabilities of these rows' answers, [chosen…, rejected…]; None unless all of them are known."""
        keys = _keys(rows, len(supervised))
        if any(key not in self._table for key in keys):
            return None
        for key, count in zip(keys, supervised.sum(1).tolist(), strict=True):
            if len(self._table[key]) != count:
                raise ValueError(
                    f"{self.path} has {len(self._table[key])} tokens of row {key[0]}, not {count}: delete it"
                )
        values = torch.cat([self._table[key] for key in keys]).to(supervised.device)
        return values.new_zeros(supervised.shape).masked_scatter(supervised, values)

    @property
    def to_verify(self) -> bool:
        """Whether what is found is still to be compared with the reference itself, which is done for the first rows of a file."""
        return self._to_verify > 0

    def verify(self, rows: list[int], known: Float[Tensor, "R T"], live: Float[Tensor, "R T"]) -> None:
        """ValueError where what is kept is not what the reference says."""
        gap = float((known - live).abs().max())
        if not gap <= self._tolerance:
            raise ValueError(
                f"{self.path} does not hold what the reference says now (rows {rows[:5]}, {gap:.2g} apart): delete it, and the run "
                "will make it anew"
            )
        self._to_verify -= len(rows)

    def keep(self, rows: list[int], log_probs: Float[Tensor, "R T"], supervised: Bool[Tensor, "R T"]) -> None:
        """Remembers what was computed; `write` brings it to disk."""
        values, mask = log_probs.detach().float().cpu(), supervised.cpu()
        for key, row, told in zip(_keys(rows, len(mask)), values, mask, strict=True):
            self._table[key] = row[told]
        self._new = True

    def write(self, world_size: int = 1, rank: int = 0) -> None:
        """Brings what is new to disk, joined with what other processes and runs have found. Every process must call it."""
        from filelock import FileLock

        tables = [self._table]
        if world_size > 1:
            tables = [{}] * world_size
            torch.distributed.all_gather_object(tables, self._table)
        elif not self._new:
            return
        if rank == 0:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(self.path.with_suffix(".lock")):
                joined: dict[tuple[int, int], Tensor] = {}
                for table in [self._read(), *tables]:
                    joined |= table
                tensors = _packed(joined)
                write_shard(self.path, tensors, {"parts": self._parts, "sha256": _digest(tensors)})
        self._new = False

    def _read(self) -> dict[tuple[int, int], Tensor]:
        if not self.path.is_file():
            return {}
        notes, tensors = read_noted(self.path)
        if notes["parts"] != self._parts or notes["sha256"] != _digest(tensors):
            raise ValueError(f"{self.path} was changed after it was written: delete it, and the run will make it anew")
        values = tensors["log_probs"].split(tensors["lengths"].tolist())
        return {(row, side): value for (row, side), value in zip(tensors["keys"].tolist(), values, strict=True)}


def _keys(rows: list[int], answers: int) -> list[tuple[int, int]]:
    return [(row, side) for side in range(answers // len(rows)) for row in rows]


def _packed(table: dict[tuple[int, int], Tensor]) -> dict[str, Tensor]:
    keys = sorted(table)
    return {
        "keys": torch.tensor(keys),
        "lengths": torch.tensor([len(table[key]) for key in keys]),
        "log_probs": torch.cat([table[key] for key in keys]),
    }


def _digest(tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(tensors[name].contiguous().numpy().tobytes())
    return digest.hexdigest()
