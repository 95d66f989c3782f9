"""Batches of one shape, where aspect-ratio buckets give pairs several."""

import hashlib
from collections.abc import Iterable, Iterator, Sequence

import torch
from jaxtyping import Int
from torch import Tensor
from torch.utils.data import Sampler


class InBuckets(Sampler[int]):
    """The rows of another sampler, in an order in which every `batch` rows in turn are of one bucket.

    What fills no batch of its bucket is left out of the epoch; which rows these are changes with the sampler's order. Being rows in
    an order, they are cut into batches, shared between processes and skipped on resuming as any others.
    """

    def __init__(self, rows: Sampler[int], buckets: Int[Tensor, " N"], batch: int) -> None:
        self.rows, self.buckets, self.batch = rows, buckets, batch

    def __len__(self) -> int:
        return rows_in_batches(self.buckets, self.batch)

    def __iter__(self) -> Iterator[int]:
        batches = bucket_batches(self.buckets, self.rows, self.batch, drop_last=True)
        # As they fill up, those of a rare shape would come last.
        digest = hashlib.sha256(str(batches).encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
        for place in torch.randperm(len(batches), generator=generator).tolist():
            yield from batches[place]


def rows_in_batches(buckets: Int[Tensor, " N"], size: int) -> int:
    """How many rows fill batches of one bucket."""
    return int((buckets.bincount() // size).sum()) * size


def bucket_batches(buckets: Int[Tensor, " N"], rows: Iterable[int], size: int, *, drop_last: bool) -> list[list[int]]:
    """Rows in batches of one bucket each, as they fill up when the rows come in this order; then, unless dropped, the short ones."""
    waiting: dict[int, list[int]] = {}
    batches = []
    for row in rows:
        bucket = int(buckets[row])
        batch = waiting.setdefault(bucket, [])
        batch.append(row)
        if len(batch) == size:
            batches.append(waiting.pop(bucket))
    return batches if drop_last else [*batches, *waiting.values()]


def told_buckets(shapes: Sequence[tuple[int, ...]], buckets: Int[Tensor, " N"], batch: int) -> str:
    """How many pairs each shape (C, h, w) has, and how many of them fill no batch, in one line."""
    counts = buckets.bincount(minlength=len(shapes)).tolist()
    found = [f"{width}×{height}: {count}" for (*_, height, width), count in zip(shapes, counts, strict=True) if count]
    rest, never = sum(count % batch for count in counts), sum(count for count in counts if count < batch)
    told = f"pairs by shape of their latents: {', '.join(found)}; {rest} of {sum(counts)} fill no batch of {batch} in an epoch"
    return told + (f", {never} of them in none ever: a smaller batch would reach them" if never else "")
