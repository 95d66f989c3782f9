"""In which order an epoch visits the pairs: all of them shuffled, or a share of them drawn by how much they weigh."""

import hashlib
from collections.abc import Callable, Iterator

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils.data import Sampler


class Shuffled(Sampler[int]):
    """All rows in an order drawn from (seed, epoch), whatever became of the process's own random state.

    The epoch is asked for when it begins: accelerate hands `set_epoch` on to its own sampler only, once a sharded loader is resumed.
    """

    def __init__(self, length: int, seed: int, epoch: Callable[[], int]) -> None:
        self.length, self.seed, self.epoch = length, seed, epoch

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[int]:
        yield from torch.randperm(self.length, generator=self._generator()).tolist()

    def _generator(self) -> torch.Generator:
        digest = hashlib.sha256(f"{self.seed}/{self.epoch()}/row order".encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


class ShuffledByProbability(Shuffled):
    """A systematic sample of the rows without replacement, row i with probability π_i, as many as Σπ, shuffled."""

    def __init__(self, probabilities: Float[Tensor, " R"], seed: int, epoch: Callable[[], int]) -> None:
        super().__init__(round(float(probabilities.sum())), seed, epoch)
        self.probabilities = probabilities

    def __iter__(self) -> Iterator[int]:
        generator = self._generator()
        order = torch.randperm(len(self.probabilities), generator=generator)
        start = torch.rand(1, generator=generator, dtype=torch.float64)
        yield from order[_systematic(self.probabilities[order], start)].tolist()


def inclusion_probabilities(strength: Float[Tensor, " R"], share: float) -> Float[Tensor, " R"]:
    """π_i = min(1, c·|strength_i|) with Σπ = round(share · R), at least 1; fewer if fewer rows have any strength.

    A loss divided by π_i keeps its expectation, and since a pair's gradient grows with its |strength|, none gets out of proportion.
    """
    size = strength.abs().double()
    number = min(max(1, round(share * len(size))), int((size > 0).sum()))
    certain = torch.zeros_like(size, dtype=torch.bool)
    while True:
        # Whoever would be drawn more than once is drawn for certain, and the rest share what is left.
        left = size.masked_fill(certain, 0)
        drawn = left * ((number - int(certain.sum())) / left.sum().clamp(min=torch.finfo(torch.float64).tiny))
        over = (drawn >= 1) & ~certain
        if not over.any():
            return torch.where(certain, torch.ones_like(size), drawn)
        certain |= over


def _systematic(probabilities: Tensor, start: Tensor) -> Int[Tensor, " n"]:
    """Where the running sum of π passes start, start + 1, …: a row is hit with its probability, and none twice."""
    after = (probabilities.cumsum(0) - start).ceil()
    after[-1] = (probabilities.sum().round() - start).ceil()
    before = torch.cat([(-start).ceil(), after[:-1]])
    return (after > before).nonzero()[:, 0]
