"""encode_prompts: prompts without pictures, encoded once, into a cache that knows what it was made from.

cache_dir/<key>/    key = sha256 of the prompts, the text encoders and tokenizers, precision and format
    manifest.json    prompts-00000.safetensors …    empty.safetensors
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn
from torch.utils.data import Dataset
from tqdm.auto import tqdm

from mmalign.data.encoded import key_of
from mmalign.data.pairs import load_pairs
from mmalign.data.prompts import ENDINGS, read_prompts
from mmalign.data.shards import ShardedRows, read_shard, rows_per_shard, write_shard
from mmalign.data.storage import REMEDY, default_cache_dir
from mmalign.denoisers import Conditioning, Denoiser
from mmalign.files import write_file
from mmalign.rewards.fingerprints import module_hash, reading_parts, tokenizer_hash

_FORMAT = 1
_MANIFEST, _EMPTY = "manifest.json", "empty.safetensors"


@dataclass(frozen=True)
class PromptSource:
    """Distinct prompts in order of first appearance, and what they are called."""

    name: str
    prompts: list[str]


def load_prompts(source: Any, *, split: str | None = None) -> PromptSource:
    """Prompts from a list of texts, a prompt file (see prompts.py), or the rows of whatever `load_pairs` reads, "playground" too."""
    if isinstance(source, Sequence) and not isinstance(source, str) and all(isinstance(item, str) for item in source):
        name, texts = "prompts", list(source)
    elif isinstance(source, str | Path) and str(source).lower().endswith(ENDINGS):
        name, texts = str(source), read_prompts(Path(source).expanduser(), split=split)
    else:
        pairs = load_pairs(source, split=split, captioned=True)
        name, texts = pairs.name, [text for text in pairs.prompts() if text]
    distinct = list(dict.fromkeys(text.strip() for text in texts if text.strip()))
    if not distinct:
        raise ValueError(f"{name} holds no prompts")
    return PromptSource(name, distinct)


class EncodedPrompts(Dataset[dict[str, int]]):
    """N prompts and what the text encoders make of them; the tensors stay on disk until asked for. An item is a row's number.

    num_truncated: how many of them are longer than the text encoder reads.
    """

    buckets = None

    def __init__(self, name: str, folder: Path) -> None:
        self.name, self._folder = name, folder
        manifest = json.loads((folder / _MANIFEST).read_text(encoding="utf-8"))
        self.fingerprint: str = manifest["key"]
        self.prompts: list[str] = manifest["prompts"]
        self.num_truncated: int = manifest["num_truncated"]
        self._text = ShardedRows([folder / file for file in manifest["files"]], manifest["lengths"])

    @property
    def dataset(self) -> EncodedPrompts:
        """Itself: the rows to train on."""
        return self

    def __len__(self) -> int:
        return len(self.prompts)

    def __getitem__(self, item: int) -> dict[str, int]:
        return {"row": range(len(self))[item]}

    def conditioning(self, rows: Int[Tensor, " n"]) -> Conditioning:
        """The text of these rows; for SDXL without sizes."""
        pooled = self._text.rows("pooled", rows) if self.empty.pooled is not None else None
        return Conditioning(self._text.rows("prompt_embeds", rows), pooled)

    @cached_property
    def empty(self) -> Conditioning:
        """The empty prompt, one row."""
        tensors = read_shard(self._folder / _EMPTY)
        return Conditioning(tensors["prompt_embeds"], tensors.get("pooled"))


def encode_prompts(
    source: PromptSource,
    denoiser: Denoiser,
    *,
    cache_dir: str | Path | None = None,
    batch_size: int = 8,
    progress: bool = True,
    dtype: torch.dtype = torch.float32,
) -> EncodedPrompts:
    """Open the cache of these prompts for this model, after building it if need be. Several processes may call it at once."""
    from filelock import FileLock

    empty = text_tensors(denoiser, [""], dtype)
    key = key_of(_parts(source, denoiser, empty))
    root = default_cache_dir() if cache_dir is None else Path(cache_dir).expanduser()
    root.mkdir(parents=True, exist_ok=True)
    final, partial = root / key, root / f"{key}.partial"
    with FileLock(root / f"{key}.lock"):
        if not final.is_dir():
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
            _build(source, denoiser, partial, key, empty, batch_size, progress)
            os.replace(partial, final)
    return EncodedPrompts(source.name, final)


def _build(
    source: PromptSource,
    denoiser: Denoiser,
    folder: Path,
    key: str,
    empty: dict[str, Tensor],
    batch_size: int,
    progress: bool,
) -> None:
    write_shard(folder / _EMPTY, empty)
    dtype = empty["prompt_embeds"].dtype
    shard = rows_per_shard(sum(tensor.numel() * tensor.element_size() for tensor in empty.values()))
    files: list[str] = []
    lengths: list[int] = []
    with tqdm(total=len(source.prompts), desc="Encoding prompts", unit="prompt", disable=not progress) as bar:
        for start in range(0, len(source.prompts), shard):
            texts = source.prompts[start : start + shard]
            batches = []
            for at in range(0, len(texts), batch_size):
                batches.append(text_tensors(denoiser, texts[at : at + batch_size], dtype))
                bar.update(len(texts[at : at + batch_size]))
            path = folder / f"prompts-{len(files):05d}.safetensors"
            write_shard(path, {name: torch.cat([batch[name] for batch in batches]) for name in empty})
            files.append(path.name)
            lengths.append(len(texts))
    manifest = {
        "key": key,
        "prompts": source.prompts,
        "num_truncated": denoiser.count_truncated(source.prompts),
        "files": files,
        "lengths": lengths,
    }
    write_file(folder / _MANIFEST, json.dumps(manifest), remedy=REMEDY)


def text_tensors(denoiser: Denoiser, prompts: Sequence[str], dtype: torch.dtype) -> dict[str, Tensor]:
    """What the text encoders make of prompts, on the CPU; ValueError where it is not finite."""
    encoded = denoiser.encode_prompt(prompts)
    tensors = {"prompt_embeds": encoded.prompt_embeds}
    if encoded.pooled is not None:
        tensors["pooled"] = encoded.pooled
    for tensor in tensors.values():
        if not torch.isfinite(tensor).all():
            raise ValueError(
                f"the text encoder returned NaN or infinite values in {tensor.dtype} for one of {list(prompts)[:3]}: "
                "load the pipeline in float32 or bfloat16"
            )
    return {name: tensor.to("cpu", dtype) for name, tensor in tensors.items()}


def _parts(source: PromptSource, denoiser: Denoiser, empty: dict[str, Tensor]) -> dict[str, Any]:
    """Everything that the bytes of the cache depend on; the empty prompt shows how long texts are read."""
    parts: dict[str, Any] = {
        "format": _FORMAT,
        "kind": "prompts",
        "prompts": hashlib.sha256(json.dumps(source.prompts).encode()).hexdigest(),
        "family": denoiser.family,
        "empty_prompt": getattr(denoiser, "empty_prompt", "encode"),
        "empty": {name: [str(tensor.dtype), list(tensor.shape)] for name, tensor in empty.items()},
    }
    parts |= reading_parts(denoiser.pipe)
    for name, component in sorted(denoiser.pipe.components.items()):
        if name.startswith("text_encoder") and isinstance(component, nn.Module):
            parts[name] = module_hash(component, name)
        elif name.startswith("tokenizer") and component is not None:
            parts[name] = tokenizer_hash(component)
    return parts
