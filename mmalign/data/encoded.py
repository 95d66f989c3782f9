"""EncodedPairs: a finished cache of latents and text, read in place."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mmalign.data.records import BadRow
from mmalign.data.shards import ShardedRows, read_shard
from mmalign.denoisers import Conditioning

FORMAT = 1
MANIFEST = "manifest.json"
INDEX, EMPTY = "index.safetensors", "empty.safetensors"


@dataclass(frozen=True)
class Column:
    """Shards of one kind: file names, and how many rows each holds."""

    files: list[str]
    lengths: list[int]


@dataclass(frozen=True)
class Manifest:
    """What a cache holds and what it was made from. `parts` are everything that its key is a hash of."""

    key: str
    parts: dict[str, Any]
    latents: Column
    prompts: Column
    prompt_texts: list[str]
    user_ids: list[str | None]
    score_names: list[str]
    bad_rows: list[list[Any]]
    num_truncated_prompts: int
    files: dict[str, list[Any]]


def key_of(parts: Mapping[str, Any]) -> str:
    """sha256 of the parts of a cache key."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


class EncodedPairs:
    """N pairs as scaled latents, with their text, sizes, labels and scores; the tensors stay on disk until asked for.

    Of captioned pictures S = 1 side is there, of pairs 2.

    rows (N,): their numbers in the source. labels (N,): how strongly image_0 is preferred. scores: score column → (N, 2),
    NaN where a row has none. prompts: the distinct prompts, prompt_index (N,) says which one is a pair's.
    num_truncated_prompts: how many of the distinct prompts are longer than the text encoder reads. bucket (N,): which of
    the `shapes` (C, *F, h, w) a pair's latents have; None where all have the same.
    """

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.folder, self.manifest = folder, manifest
        index = read_shard(folder / INDEX)
        self.rows = index["rows"]
        self.labels = index["labels"]
        self.prompt_index = index["prompt_index"]
        self._sizes = index["sizes"]
        self.scores = {name: index[f"score.{name}"] for name in manifest.score_names}
        self.prompts = manifest.prompt_texts
        self.user_ids = manifest.user_ids
        self.bad_rows = [BadRow(*bad) for bad in manifest.bad_rows]
        self.num_truncated_prompts = manifest.num_truncated_prompts
        self._latents = self._column(manifest.latents)
        self._text = self._column(manifest.prompts)
        listed = manifest.parts.get("aspect_buckets", {"shapes": []})["shapes"]
        self.shapes = [tuple(shape[:-2]) for shape in listed]
        # Where pairs differ in shape, the target height and width that SDXL is told say which it is.
        places = {tuple(shape[-2:]): place for place, shape in enumerate(listed)}
        targets = self._sizes[:, 0, 4:].tolist()
        self.bucket = torch.tensor([places[tuple(target)] for target in targets]) if len(listed) > 1 else None

    @classmethod
    def open(cls, folder: str | Path, expected: Mapping[str, Any] | None = None) -> "EncodedPairs":
        """Open a finished cache; refused if it is damaged, or made from other `expected` parts."""
        folder = Path(folder)
        try:
            fields = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
            columns: dict[str, Any] = {name: Column(**fields.pop(name)) for name in ("latents", "prompts")}
            manifest = Manifest(**fields, **columns)
        except (OSError, KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
            raise ValueError(f"{folder} holds no finished cache of this version: delete it and encode again") from error
        if manifest.key != key_of(manifest.parts):
            raise ValueError(f"{folder / MANIFEST} was changed by hand: delete {folder} and encode again")
        if expected is not None and dict(expected) != manifest.parts:
            names = sorted(k for k in {*expected, *manifest.parts} if expected.get(k) != manifest.parts.get(k))
            raise ValueError(f"{folder} was made with other {', '.join(names)}: delete it and encode again")
        for name, (size, _) in manifest.files.items():
            if not (folder / name).is_file() or (folder / name).stat().st_size != size:
                raise ValueError(f"{folder / name} is missing or has another size: delete {folder} and encode again")
        return cls(folder, manifest)

    def verify(self) -> None:
        """Read every file and compare it with the hash taken when it was written."""
        for name, (_, expected) in self.manifest.files.items():
            with (self.folder / name).open("rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != expected:
                    raise ValueError(f"{self.folder / name} is damaged: delete {self.folder} and encode again")

    def __len__(self) -> int:
        return len(self.rows)

    def __repr__(self) -> str:
        return f"EncodedPairs({len(self)} pairs, {len(self.prompts)} prompts, {self.folder})"

    @property
    def key(self) -> str:
        """sha256 of everything the contents depend on."""
        return self.manifest.key

    def latents(self, index: Int[Tensor, " n"]) -> Float[Tensor, "n S C *F h w"]:
        """Scaled latents of (image_0, image_1), or of the one picture, of rows `index`, on the CPU, in the dtype they are stored in.

        With aspect buckets the pairs must be of one bucket.
        """
        stored = self._latents.rows("latents", index)
        if self.bucket is None:
            return stored
        found = self.bucket[index.cpu()].unique().tolist()
        if len(found) > 1:
            shapes = ", ".join(str(self.shapes[place]) for place in found)
            raise ValueError(f"these pairs have latents of several shapes: {shapes}; ask for those of one bucket")
        _, *inner = self.shapes[found[0] if found else 0]
        return stored[..., : prod(inner)].unflatten(-1, inner)

    def conditioning(self, prompt_index: Int[Tensor, " n"]) -> Conditioning:
        """The text of prompts `prompt_index`; for SDXL without sizes, which are an image's: see `sizes`."""
        pooled = self._text.rows("pooled", prompt_index) if self.empty.pooled is not None else None
        return Conditioning(self._text.rows("prompt_embeds", prompt_index), pooled)

    @cached_property
    def empty(self) -> Conditioning:
        """The empty prompt, one row: what a dropped prompt becomes."""
        tensors = read_shard(self.folder / EMPTY)
        return Conditioning(tensors["prompt_embeds"], tensors.get("pooled"))

    def sizes(self, index: Int[Tensor, " n"], side: int | Int[Tensor, " n"]) -> Int[Tensor, "n 6"]:
        """Original height and width, top and left of the crop, target height and width of one side of pairs `index`."""
        index = index.cpu()
        side = torch.as_tensor(side).cpu().expand(index.shape)
        return self._sizes[index, side]

    def _column(self, column: Column) -> ShardedRows:
        return ShardedRows([self.folder / name for name in column.files], column.lengths)
