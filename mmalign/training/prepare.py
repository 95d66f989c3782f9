"""From whatever the user calls a data set to rows that a trainer reads: encode once, compare, count what was left out."""

import hashlib
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmalign.data import (
    EncodedPairs,
    Normalizer,
    PreferenceDataset,
    compare,
    default_cache_dir,
    encode_pairs,
    load_pairs,
    score_pairs,
)
from mmalign.data.records import summarise
from mmalign.denoisers import Denoiser
from mmalign.rewards import scorer
from mmalign.training.config import DenoiserConfig

logger = logging.getLogger("mmalign")


@dataclass(frozen=True)
class Prepared:
    """Encoded pairs, the rows that are trained on, and the normaliser that the smoothing was fitted with."""

    encoded: EncodedPairs
    dataset: PreferenceDataset
    normalizer: Normalizer | None
    fingerprint: str


def prepare(data: Any, denoiser: Denoiser, args: DenoiserConfig, *, like: Prepared | None = None) -> Prepared:
    """Encodes `data` (or finds it in the cache) and compares its pairs as `args.comparison` says.

    `like`: for evaluation data, the training data, whose normaliser must serve both.
    """
    source = load_pairs(data, split=args.train_split if like is None else args.eval_split)
    cache_dir = Path(args.cache_dir) if args.cache_dir else default_cache_dir()
    progress = not args.disable_tqdm
    resolution = args.resolution or native_size(denoiser)
    encoded = encode_pairs(source, denoiser, resolution=resolution, cache_dir=cache_dir, progress=progress)
    scores, normalizer, fitted = None, None, {}
    if args.comparison != "human":
        reward = scorer(args.scorer or "")
        scores = score_pairs(source, reward, cache_dir=cache_dir, progress=progress)[encoded.rows]
        if args.comparison == "smoothed":
            normalizer = like.normalizer if like else _normalizer(args, scores, reward)
            fitted = {"normalizer": normalizer}
        if args.comparison == "bradley_terry":
            fitted = {"logit_scale": reward.logit_scale}
    compared = compare(encoded.labels, scores, args.comparison_config(**fitted))
    if encoded.bad_rows:
        logger.warning(summarise(encoded.bad_rows, len(source)))
    if encoded.num_truncated_prompts:
        logger.warning("%d prompts are longer than the text encoder reads and were cut", encoded.num_truncated_prompts)
    logger.info("%s: %s", source.name, compared)
    if not len(compared):
        raise ValueError(f"no usable pair in {data!r}: {len(encoded.bad_rows)} bad rows; {compared}")
    digest = hashlib.sha256(encoded.key.encode())
    for column in (compared.kept, compared.first, compared.strength):
        digest.update(column.contiguous().numpy().tobytes())
    return Prepared(encoded, PreferenceDataset(encoded, compared), normalizer, digest.hexdigest())


def native_size(denoiser: Denoiser) -> tuple[int, int]:
    """(height, width) in pixels that the network was trained at, by its config."""
    size, factor = denoiser.module.config.sample_size, denoiser.pipe.vae_scale_factor  # type: ignore[union-attr]
    height, width = (size, size) if isinstance(size, int) else size
    return height * factor, width * factor


def _normalizer(args: DenoiserConfig, scores: Any, scorer: Any) -> Normalizer:
    if args.smoothing_normalizer == "official":
        return Normalizer.official(scores)
    return Normalizer.fit(
        scores, args.smoothing_normalizer, scorer_name=scorer.name, scorer_fingerprint=scorer.fingerprint
    )
