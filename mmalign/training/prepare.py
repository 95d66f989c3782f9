"""From whatever the user calls a data set to rows that a trainer reads: encode once, compare, count what was left out."""

import hashlib
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mmalign.data import (
    EncodedPairs,
    Normalizer,
    PairSource,
    PreferenceDataset,
    PreferenceItem,
    collate,
    compare,
    default_cache_dir,
    encode_pairs,
    load_pairs,
    score_pairs,
)
from mmalign.data.columns import TAKE_CAPTIONED
from mmalign.data.reward_columns import PREFIX, RewardColumn
from mmalign.denoisers import Denoiser
from mmalign.rewards import Scorer, scorer
from mmalign.training.config import DenoiserConfig

logger = logging.getLogger("mmalign")


@dataclass(frozen=True)
class Prepared:
    """Encoded pairs, the rows that are trained on, and the normaliser that the smoothing was fitted with.

    fingerprint: sha256 of all that a run depends on; points: of the pictures, prompts and sides alone, whatever a pair is worth.
    """

    name: str
    encoded: EncodedPairs
    dataset: PreferenceDataset
    normalizer: Normalizer | None
    fingerprint: str
    points: str


def prepare(data: Any, denoiser: Denoiser, args: DenoiserConfig, *, like: Prepared | None = None) -> Prepared:
    """Encodes `data` (or finds it in the cache) and compares its pairs as `args.comparison` says; prepared data stay as they are.

    `like`: for evaluation data, the training data, whose normaliser must serve both. The parts of the denoiser's pipeline should stand
    on the training device.
    """
    return data if isinstance(data, Prepared) else prepare_source(opened(data, args, like), denoiser, args, like=like)


def opened(data: Any, args: DenoiserConfig, like: Prepared | None) -> PairSource:
    """The pairs that the user calls `data`, of the split that is meant; single pictures too, where nothing is compared."""
    split = args.train_split if like is None else args.eval_split
    source = load_pairs(data, split=split, captioned=not args.needs_pairs)
    if source.sides == 1 and args.needs_pairs:
        raise ValueError(f"{source.name} holds single pictures: {TAKE_CAPTIONED}")
    if source.sides == 1 and args.comparison != "human":
        raise ValueError(
            f"comparison={args.comparison!r} compares two pictures, and {source.name} has one a row: leave it out"
        )
    return source


def prepare_source(
    source: PairSource, denoiser: Denoiser, args: DenoiserConfig, *, like: Prepared | None = None
) -> Prepared:
    """`prepare` of pairs that are open."""
    cache_dir = Path(args.cache_dir) if args.cache_dir else default_cache_dir()
    progress = not args.disable_tqdm
    num_frames = args.num_frames or source.num_frames or denoiser.native_frames
    if num_frames is not None:
        source = source.as_clips(num_frames)
    resolution = args.resolution or denoiser.native_size
    encoded = encode_pairs(
        source,
        denoiser,
        resolution=resolution,
        cache_dir=cache_dir,
        progress=progress,
        aspect_buckets=args.aspect_buckets,
    )
    scores, normalizer = None, None
    fitted: dict[str, Any] = {}
    if args.comparison != "human":
        name = args.scorer or ""
        reward: Scorer | RewardColumn
        if name.startswith(PREFIX):
            reward = RewardColumn(name)
            scores = reward.scores(encoded, human_ties=args.keep_human_ties)
        else:
            reward = scorer(name, device=args.device)
            scores = score_pairs(source, reward, cache_dir=cache_dir, progress=progress)[encoded.rows]
        if args.comparison == "smoothed":
            normalizer = like.normalizer if like else _normalizer(args, scores, reward)
            fitted = {"normalizer": normalizer}
        if args.comparison == "bradley_terry":
            fitted = {"logit_scale": reward.logit_scale}
    compared = compare(encoded.labels, scores, args.comparison_config(**fitted))
    if encoded.num_truncated_prompts:
        logger.warning("%d prompts are longer than the text encoder reads and were cut", encoded.num_truncated_prompts)
    logger.info("%s: %s", source.name, compared if source.sides == 2 else f"{len(compared)} pictures")
    if not len(compared):
        raise ValueError(f"no usable {source.unit} in {source.name}: {len(encoded.bad_rows)} bad rows; {compared}")
    digest = hashlib.sha256(encoded.key.encode())
    for column in (compared.kept, compared.first):
        digest.update(column.contiguous().numpy().tobytes())
    points = digest.hexdigest()
    digest.update(compared.strength.contiguous().numpy().tobytes())
    return Prepared(source.name, encoded, PreferenceDataset(encoded, compared), normalizer, digest.hexdigest(), points)


def check_held_out(train: Prepared, evaluated: Prepared) -> None:
    """ValueError if the evaluation data are the training data; a warning if they share prompts."""
    if evaluated.encoded.key == train.encoded.key:
        raise ValueError("eval_dataset is the training data: name another one, or another eval_split")
    shared = set(train.encoded.prompts) & set(evaluated.encoded.prompts)
    if shared:
        logger.warning(
            "%d of %d evaluation prompts also occur in training: accuracy on them may be memory, not preference",
            len(shared),
            len(evaluated.encoded.prompts),
        )


def batch_of(items: list[PreferenceItem]) -> dict[str, Any]:
    """`collate`, with what is looked up on the CPU as plain numbers, which no loader sends to a device and back."""
    batch = collate(items)
    return {**batch, "row": batch["row"].tolist(), "prompt_index": batch["prompt_index"].tolist()}


def _normalizer(args: DenoiserConfig, scores: torch.Tensor, reward: Scorer | RewardColumn) -> Normalizer:
    if args.smoothing_normalizer == "official":
        normalizer = Normalizer.official()
        normalizer.check_scorer(reward.name, reward.fingerprint)
        return normalizer
    return Normalizer.fit(
        scores, args.smoothing_normalizer, scorer_name=reward.name, scorer_fingerprint=reward.fingerprint
    )
