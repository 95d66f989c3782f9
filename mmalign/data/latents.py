"""encode_pairs: every picture and prompt encoded once, into a cache that knows what it was made from.

cache_dir/<key>/            key = sha256 of source, VAE, text encoders, tokenizers, resolution, crop, dtype, mode, format
    manifest.json           the parts of the key, sizes and hashes of all files, bad rows, prompts, users
    index.safetensors       rows, labels, prompt_index, sizes, scores
    latents-00000.safetensors …    prompts-00000.safetensors …    empty.safetensors
cache_dir/<key>.partial/    the same while it grows; a shard is there whole or not at all, and is not made twice
"""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mmalign.data.buckets import MOST_CROPPED, RULE, buckets_of, most_elements, one_shape
from mmalign.data.building import Job, LatentMode, build
from mmalign.data.encoded import FORMAT, EncodedPairs, key_of
from mmalign.data.images import RESIZE_FILTER
from mmalign.data.pairs import PairSource
from mmalign.data.records import summarise
from mmalign.data.shards import rows_per_shard
from mmalign.data.storage import default_cache_dir
from mmalign.denoisers import Denoiser
from mmalign.rewards.fingerprints import module_hash, reading_parts, text_hash, tokenizer_hash

_log = logging.getLogger(__name__)
# Components that neither pictures nor prompts pass through on their way into the cache.
_UNUSED = ("scheduler", "safety_checker", "feature_extractor", "image_encoder")


def encode_pairs(
    source: PairSource,
    denoiser: Denoiser,
    *,
    resolution: int | tuple[int, int],
    cache_dir: str | Path | None = None,
    batch_size: int = 8,
    progress: bool = True,
    dtype: torch.dtype = torch.float32,
    latent_mode: LatentMode = "sample",
    seed: int = 0,
    shard_rows: int | None = None,
    workers: int = 4,
    aspect_buckets: bool = False,
) -> EncodedPairs:
    """Open the cache of these pairs for this model, after building it if need be. An interrupted build goes on.

    resolution: side of a square, or (height, width). Both pictures of a pair are resized (Lanczos) until they cover it
    and cropped at the centre. latent_mode: "sample" draws each latent once from the VAE's posterior, keyed by (seed,
    row, side) and so independent of batches (the published code draws anew at every step); "mean" takes the posterior's
    mean and reads no seed. dtype: of what is stored. batch_size: pairs through the VAE, and prompts through the text
    encoders, at once (fewer pairs of clips, by their frames). workers: threads that decode. Several processes may call
    it at once: one builds, the rest wait.
    aspect_buckets: each pair in the shape of about that area which is nearest to its own (see buckets.py).
    """
    from filelock import FileLock

    height, width = (resolution, resolution) if isinstance(resolution, int) else resolution
    frames = source.num_frames
    shapes = (
        buckets_of(denoiser, height, width, frames) if aspect_buckets else [one_shape(denoiser, height, width, frames)]
    )
    _check_options(latent_mode, dtype, batch_size, workers, shard_rows, seed)
    parts = _key_parts(source, denoiser, height, width, dtype, latent_mode, seed)
    if aspect_buckets:
        parts["aspect_buckets"] = {"shapes": [[*shape.latent, shape.height, shape.width] for shape in shapes]}
        parts["aspect_buckets"] |= {"rule": RULE, "most_cropped": MOST_CROPPED}
    key = key_of(parts)
    root = default_cache_dir() if cache_dir is None else Path(cache_dir).expanduser()
    root.mkdir(parents=True, exist_ok=True)
    final, partial = root / key, root / f"{key}.partial"
    with FileLock(root / f"{key}.lock"):
        if not final.is_dir():
            job = Job(
                source=source,
                denoiser=denoiser,
                shapes=shapes,
                folder=partial,
                batch_size=batch_size,
                dtype=dtype,
                mode=latent_mode,
                seed=seed,
                shard_rows=shard_rows
                or rows_per_shard(source.sides * shapes[0].latent[0] * most_elements(shapes) * dtype.itemsize),
                workers=workers,
                progress=progress,
            )
            build(job, key, parts)
            os.replace(partial, final)
    encoded = EncodedPairs.open(final, expected=parts)
    if encoded.bad_rows:
        _log.warning("%s: %s", source.name, summarise(encoded.bad_rows, len(source)))
    return encoded


def _check_options(
    mode: str, dtype: torch.dtype, batch_size: int, workers: int, shard_rows: int | None, seed: int
) -> None:
    if mode not in ("sample", "mean"):
        raise ValueError(f"latent_mode must be 'sample' or 'mean', got {mode!r}")
    if mode == "mean" and seed != 0:
        raise ValueError(f"seed={seed} has no effect with latent_mode='mean'; leave it out")
    if dtype not in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
        raise ValueError(f"dtype must be float32, float16, bfloat16 or float64, got {dtype}")
    for name, value in (("batch_size", batch_size), ("workers", workers), ("shard_rows", shard_rows)):
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")


def _key_parts(
    source: PairSource, denoiser: Denoiser, height: int, width: int, dtype: torch.dtype, mode: LatentMode, seed: int
) -> dict[str, Any]:
    """Everything that the bytes of the cache depend on, readable in the manifest."""
    parts: dict[str, Any] = {
        "format": FORMAT,
        "source": source.fingerprint,
        "family": denoiser.family,
        # Only families that can turn "" into zeros have the attribute.
        "empty_prompt": getattr(denoiser, "empty_prompt", "encode"),
        "resolution": [height, width],
        "crop": "centre",
        "resize": RESIZE_FILTER,
        "dtype": str(dtype).removeprefix("torch."),
        "latent_mode": mode,
        "tiled": _tiles(denoiser.latent_encoder),
        "seed": seed,
    }
    if source.num_frames is not None:
        parts["num_frames"] = source.num_frames
    parts |= reading_parts(denoiser.pipe)
    if all(component is not denoiser.latent_encoder for component in denoiser.pipe.components.values()):
        parts["latent_encoder"] = module_hash(denoiser.latent_encoder, "latent_encoder")
    for name, component in sorted(denoiser.pipe.components.items()):
        if component is None or name in _UNUSED or component is denoiser.module:
            continue
        if isinstance(component, nn.Module):
            parts[name] = module_hash(component, name)
        elif name.startswith("tokenizer"):
            parts[name] = tokenizer_hash(component)
        else:
            parts[name] = text_hash(component)
    return parts


def _tiles(vae: nn.Module) -> Any:
    """How a VAE cuts what it encodes, which the seams follow; False where it does not."""
    if not getattr(vae, "use_tiling", False):
        return False
    return {name: value for name, value in sorted(vars(vae).items()) if name.startswith("tile_")}
