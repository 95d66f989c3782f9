"""Random draws keyed by (seed, epoch, row, purpose): never by rank, worker, batch size or position in the batch.

A row gets the same numbers alone, in any batch and on any number of processes, so that a resumed or re-sharded run
sees what the first one saw. Generators live on the CPU, whose stream is the same everywhere.
"""

import hashlib
from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor


def row_generators(seed: int, epoch: int, rows: Sequence[int] | Tensor, purpose: str) -> list[torch.Generator]:
    """One CPU generator a row, seeded with the first 63 bits of sha256(seed, epoch, row, purpose).

    Purposes ("noise", "timestep", "inversion", …) give independent streams, so adding a draw to one moves no other.
    """
    generators = []
    for row in rows.tolist() if isinstance(rows, Tensor) else rows:
        digest = hashlib.sha256(f"{seed}/{epoch}/{row}/{purpose}".encode()).digest()
        generators.append(torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1))
    return generators


def randn(
    generators: Sequence[torch.Generator],
    shape: Sequence[int],
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Float[Tensor, "B ..."]:
    """Standard normal (B, *shape). Drawn in float32 and cast, so that the dtype does not change the draw."""
    return torch.stack([torch.randn(tuple(shape), generator=g) for g in generators]).to(device, dtype)


def rand(generators: Sequence[torch.Generator]) -> Float[Tensor, " B"]:
    """Uniform in [0, 1), (B,)."""
    return torch.cat([torch.rand(1, generator=g) for g in generators])


def randint(generators: Sequence[torch.Generator], low: int, high: int) -> Int[Tensor, " B"]:
    """Uniform integers in low … high − 1, (B,)."""
    return torch.cat([torch.randint(low, high, (1,), generator=g) for g in generators])
