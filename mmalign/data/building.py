"""How a cache is filled: shard after shard, each written whole, none made twice."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Sequence, Sized
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional
from tqdm.auto import tqdm

from mmalign.data.ahead import in_order
from mmalign.data.buckets import Bucket, bucket_of, most_elements
from mmalign.data.clips import fitted
from mmalign.data.encoded import EMPTY, INDEX, MANIFEST, Column, Manifest
from mmalign.data.images import BadImage
from mmalign.data.pairs import PairSource
from mmalign.data.records import BadRow, InvalidRow, summarise
from mmalign.data.shards import read_notes, read_shard, rows_per_shard, write_shard
from mmalign.data.storage import REMEDY
from mmalign.data.texts import text_tensors
from mmalign.denoisers import Denoiser
from mmalign.files import write_file

LatentMode = Literal["sample", "mean"]


@dataclass(frozen=True, kw_only=True)
class Job:
    """What to encode, with what, and into which folder."""

    source: PairSource
    denoiser: Denoiser
    # One shape, or those among which each pair finds its own.
    shapes: list[Bucket]
    folder: Path
    batch_size: int
    dtype: torch.dtype
    mode: LatentMode
    seed: int
    shard_rows: int
    workers: int
    progress: bool


@dataclass(frozen=True)
class _Prepared:
    """A good row of S sides: pixels in [−1, 1], the six numbers of each picture's size and crop, and what belongs to the row."""

    row: int
    prompt: str
    label: float
    scores: dict[str, tuple[float, float]]
    user_id: str | None
    shape: Bucket
    pixels: Float[Tensor, "S 3 *F H W"]
    sizes: Int[Tensor, "S 6"]


def build(job: Job, key: str, parts: dict[str, Any]) -> None:
    """Fill job.folder, starting from the shards that an earlier attempt finished; it is complete once this returns."""
    job.folder.mkdir(parents=True, exist_ok=True)
    for leftover in job.folder.glob(".*.tmp"):
        leftover.unlink()
    try:
        _fill(job, key, parts)
    except BaseException:
        if not any(job.folder.iterdir()):
            shutil.rmtree(job.folder, ignore_errors=True)
        raise


def _fill(job: Job, key: str, parts: dict[str, Any]) -> None:
    latents = _latent_shards(job)
    notes = [read_notes(path) for path in latents]
    bad_rows = [bad for note in notes for bad in note["bad_rows"]]
    texts = [prompt for note in notes for prompt in note["prompts"]]
    if not texts:
        for path in latents:
            path.unlink()
        summary = summarise([BadRow(*bad) for bad in bad_rows], len(job.source))
        raise ValueError(f"{job.source.name} has no usable {job.source.unit}; {summary}")
    distinct = list(dict.fromkeys(texts))
    _write_index(job, latents, texts, distinct)
    prompts = _prompt_shards(job, distinct)
    lengths = [note["stop"] - note["start"] for note in map(read_notes, prompts)]
    written = [*latents, *prompts, job.folder / INDEX, job.folder / EMPTY]
    manifest = Manifest(
        key=key,
        parts=parts,
        latents=Column([path.name for path in latents], [len(note["prompts"]) for note in notes]),
        prompts=Column([path.name for path in prompts], lengths),
        prompt_texts=distinct,
        user_ids=[user for note in notes for user in note["user_ids"]],
        score_names=list(job.source.score_names),
        bad_rows=bad_rows,
        num_truncated_prompts=job.denoiser.count_truncated(distinct),
        files={path.name: [path.stat().st_size, _sha256(path)] for path in written},
    )
    write_file(job.folder / MANIFEST, json.dumps(asdict(manifest)), remedy=REMEDY)


def _latent_shards(job: Job) -> list[Path]:
    with tqdm(
        total=len(job.source), desc=f"Encoding {job.source.unit}s", unit=job.source.unit, disable=not job.progress
    ) as bar:

        def write(path: Path, start: int, stop: int) -> None:
            write_shard(path, *_encode_rows(job, start, stop, bar))

        return _shards(job.folder, "latents", job.source, job.shard_rows, write, bar)


def _prompt_shards(job: Job, distinct: list[str]) -> list[Path]:
    empty = text_tensors(job.denoiser, [""], job.dtype)
    write_shard(job.folder / EMPTY, empty)
    rows = rows_per_shard(sum(tensor.numel() * tensor.element_size() for tensor in empty.values()))
    with tqdm(total=len(distinct), desc="Encoding prompts", unit="prompt", disable=not job.progress) as bar:

        def write(path: Path, start: int, stop: int) -> None:
            batches = []
            for at in range(start, stop, job.batch_size):
                batch = distinct[at : min(stop, at + job.batch_size)]
                batches.append(text_tensors(job.denoiser, batch, job.dtype))
                bar.update(len(batch))
            tensors = {name: torch.cat([part[name] for part in batches]) for name in empty}
            write_shard(path, tensors, {"start": start, "stop": stop})

        return _shards(job.folder, "prompts", distinct, min(rows, job.shard_rows), write, bar)


def _shards(
    folder: Path, stem: str, items: Sized, rows: int, write: Callable[[Path, int, int], None], bar: tqdm
) -> list[Path]:
    """The files of one kind, in order; those that are there are kept, whatever size they were given."""
    paths: list[Path] = []
    start = 0
    # Asked anew: a stream may turn out shorter.
    while start < len(items):
        path = folder / f"{stem}-{len(paths):05d}.safetensors"
        if path.is_file():
            stop = read_notes(path)["stop"]
            bar.update(stop - start)
        else:
            stop = min(len(items), start + rows)
            write(path, start, stop)
        paths.append(path)
        start = stop
    return paths


def _encode_rows(job: Job, start: int, stop: int, bar: tqdm) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Rows start … stop − 1: tensors of the good ones, and notes with the bad ones and all texts."""
    good: list[_Prepared] = []
    bad: list[BadRow] = []
    waiting: dict[Bucket, list[_Prepared]] = {shape: [] for shape in job.shapes}
    latents: dict[int, Tensor] = {}
    # A clip is as much to hold as its frames, in a batch as among what is read ahead.
    at_once, workers = (max(1, number // (job.source.num_frames or 1)) for number in (job.batch_size, job.workers))
    for item in in_order(lambda row: _prepare(job, row), range(start, stop), workers):
        bar.update(1)
        if isinstance(item, BadRow):
            bad.append(item)
            continue
        good.append(_without_pixels(item))
        batch = waiting[item.shape]
        batch.append(item)
        if len(batch) == at_once:
            latents |= _encode_images(job, batch)
            batch.clear()
    for batch in waiting.values():
        if batch:
            latents |= _encode_images(job, batch)
    tensors = {
        "latents": torch.stack([latents[item.row] for item in good]) if good else _no_latents(job),
        "rows": torch.tensor([item.row for item in good], dtype=torch.long),
        "labels": torch.tensor([item.label for item in good], dtype=torch.float32),
        "sizes": torch.stack([item.sizes for item in good])
        if good
        else torch.zeros(0, job.source.sides, 6, dtype=torch.long),
    }
    nothing = (float("nan"), float("nan"))
    for name in job.source.score_names:
        scores = [item.scores.get(name, nothing) for item in good]
        tensors[f"score.{name}"] = torch.tensor(scores, dtype=torch.float64).reshape(-1, 2)
    notes = {
        "start": start,
        "stop": stop,
        "prompts": [item.prompt for item in good],
        "user_ids": [item.user_id for item in good],
        "bad_rows": [[item.row, item.field, item.reason] for item in bad],
    }
    return tensors, notes


def _prepare(job: Job, row: int) -> _Prepared | BadRow:
    try:
        record = job.source[row]
        shape = bucket_of(record, job.shapes)
    except InvalidRow as error:
        return error.bad_row
    pixels, sizes = [], []
    for field, image in zip(record.fields, record.sides, strict=True):
        try:
            cropped, size = fitted(image, shape.height, shape.width)
        except BadImage as error:
            return BadRow(row, field, str(error))
        pixels.append(cropped)
        sizes.append(size)
    told = (record.prompt, record.label, record.scores, record.user_id)
    return _Prepared(row, *told, shape, torch.stack(pixels), torch.tensor(sizes))


def _without_pixels(item: _Prepared) -> _Prepared:
    return replace(item, pixels=item.pixels.new_zeros(0))


def _no_latents(job: Job) -> Tensor:
    channels, *inner = job.shapes[0].latent
    shape = inner if len(job.shapes) == 1 else [most_elements(job.shapes)]
    return torch.zeros(0, job.source.sides, channels, *shape, dtype=job.dtype)


def _encode_images(job: Job, items: Sequence[_Prepared]) -> dict[int, Float[Tensor, "S C ..."]]:
    """Row → latents, (S, C, *F, h, w); where rows differ in shape, flat and filled up to the largest: (S, C, P)."""
    pixels = torch.stack([item.pixels for item in items]).flatten(0, 1)
    generators = None
    if job.mode == "sample":
        generators = [_generator(job.seed, item.row, side) for item in items for side in range(job.source.sides)]
    latents = job.denoiser.encode_image(pixels, generators).unflatten(0, (-1, job.source.sides)).to("cpu", job.dtype)
    if len(job.shapes) > 1:
        flat = latents.flatten(3)
        latents = functional.pad(flat, (0, most_elements(job.shapes) - flat.shape[-1]))
    return dict(zip((item.row for item in items), latents, strict=True))


def _generator(seed: int, row: int, side: int) -> torch.Generator:
    """The stream of one picture, whichever batch or process it is encoded in."""
    digest = hashlib.sha256(f"latent/{seed}/{row}/{side}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def _write_index(job: Job, latents: list[Path], texts: list[str], distinct: list[str]) -> None:
    small = [read_shard(path, without="latents") for path in latents]
    tensors = {name: torch.cat([part[name] for part in small]) for name in small[0]}
    place = {prompt: index for index, prompt in enumerate(distinct)}
    tensors["prompt_index"] = torch.tensor([place[prompt] for prompt in texts], dtype=torch.long)
    write_shard(job.folder / INDEX, tensors)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
