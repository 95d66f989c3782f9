"""Inversion paths kept for later visits of the same pairs: every landing's target, and the reference's error there.

A visit of a known pair then costs the policy alone. Targets are kept in float16: a point is rebuilt from its (rounded) target, so
latent, target and timestep belong together exactly, and policy and reference see the same ones. In a folder, if one is given, in
safetensors files of some hundred MiB under a key of everything the paths depend on; otherwise in memory.
"""

import hashlib
import json
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mmalign.data.shards import SHARD_BYTES, read_notes, write_shard

# Two computations of a path differ by rounding, in other batches and on other devices, and that grows from move to move.
_TOLERANCE = 0.05


@dataclass(frozen=True, eq=False)
class KeptPath:
    """The N landings of one pair's S sides; error: the reference's, None for a run without a reference."""

    target: Float[Tensor, "S N *latent"]
    timestep: Int[Tensor, " N"]
    error: Float[Tensor, "S N"] | None

    def at(self, landing: int) -> "KeptPath":
        """One landing: target (S, …), timestep (), error (S,)."""
        error = None if self.error is None else self.error[:, landing]
        return KeptPath(self.target[:, landing], self.timestep[landing], error)

    @property
    def nbytes(self) -> int:
        """Bytes that it takes up."""
        return sum(part.nbytes for part in self._parts().values())

    def digest(self) -> str:
        """sha256 of all numbers."""
        sha = hashlib.sha256()
        for name, part in sorted(self._parts().items()):
            sha.update(f"{name}{tuple(part.shape)}{part.dtype}".encode())
            sha.update(part.contiguous().numpy().tobytes())
        return sha.hexdigest()

    def _parts(self) -> dict[str, Tensor]:
        parts = {"target": self.target, "timestep": self.timestep, "error": self.error}
        return {name: part for name, part in parts.items() if part is not None}


class KeptPaths:
    """Row → its path. `parts`: everything that paths depend on, as JSON values. Raises ValueError for files that were changed."""

    def __init__(self, cache_dir: Path | None, parts: dict[str, Any]) -> None:
        self._parts: dict[str, Any] = json.loads(json.dumps(parts))
        self._memory: dict[int, KeptPath] = {}
        self._bytes = 0
        self._files: dict[int, Path] = {}
        self._digests: dict[int, str] = {}
        self.folder: Path | None = None
        if cache_dir is not None:
            key = hashlib.sha256(json.dumps(self._parts, sort_keys=True).encode()).hexdigest()
            self.folder = cache_dir / f"paths-{key}"
            self._find_files()
        # What an earlier run has left is believed once a sample of it was computed again.
        self.unchecked = set(self._files)

    def __contains__(self, row: int) -> bool:
        return row in self._memory or row in self._files

    def __getitem__(self, row: int) -> KeptPath:
        return self._memory[row] if row in self._memory else self._read(row)

    def add(self, row: int, path: KeptPath) -> None:
        """Keeps a path; with a folder, what has become a file's worth is written."""
        self._memory[row] = path
        self._bytes += path.nbytes
        if self.folder is not None and self._bytes > SHARD_BYTES:
            self.write()

    def write(self) -> None:
        """Brings what is in memory to the folder, as one more file, and lets go of it; nothing without a folder."""
        if self.folder is None or not self._memory:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        digests = {row: path.digest() for row, path in self._memory.items()}
        tensors = {f"{row}/{name}": part for row, path in self._memory.items() for name, part in path._parts().items()}
        notes = {"parts": self._parts, "sha256": {str(row): digest for row, digest in digests.items()}}
        file = write_shard(self.folder / f"{uuid.uuid4().hex}.safetensors", tensors, notes)
        self._files |= dict.fromkeys(self._memory, file)
        self._digests |= digests
        self._memory, self._bytes = {}, 0

    def check(self, rows: list[int], compute: Callable[[list[int]], dict[int, KeptPath]]) -> None:
        """Once, computes those of `rows` again that an earlier run has left; ValueError if they come out otherwise."""
        left = [row for row in rows if row in self.unchecked]
        if not left:
            return
        self.unchecked = set()
        for row, path in compute(left).items():
            kept = self._read(row)
            same = torch.equal(kept.timestep, path.timestep) and _close(kept.target, path.target)
            if not same or (kept.error is not None and path.error is not None and not _close(kept.error, path.error)):
                raise ValueError(
                    f"the paths kept in {self.folder} are not those that this run computes (row {row}): delete the folder"
                )

    def _find_files(self) -> None:
        assert self.folder is not None
        for file in sorted(self.folder.glob("*.safetensors")):
            notes = read_notes(file)
            if notes["parts"] != self._parts:
                raise self._changed(file)
            for row, digest in notes["sha256"].items():
                self._files[int(row)], self._digests[int(row)] = file, digest

    def _read(self, row: int) -> KeptPath:
        from safetensors import safe_open

        with safe_open(self._files[row], framework="pt") as file:
            names = {name for name in ("target", "timestep", "error") if f"{row}/{name}" in file.keys()}  # noqa: SIM118
            parts = {name: file.get_tensor(f"{row}/{name}") for name in names}
        path = KeptPath(parts["target"], parts["timestep"], parts.get("error"))
        if path.digest() != self._digests[row]:
            raise self._changed(self._files[row])
        return path

    def _changed(self, file: Path) -> ValueError:
        return ValueError(f"{file} was changed after it was written: delete it, and the run will make it anew")


def _close(kept: Tensor, computed: Tensor) -> bool:
    scale = computed.float().square().mean().sqrt()
    return bool((kept.float() - computed.float()).square().mean().sqrt() <= _TOLERANCE * scale)
