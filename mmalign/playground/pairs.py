"""Draws the playground's preference set: pairs that its own base drew, compared by its raters, in Pick-a-Pic's columns."""

import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from diffusers import StableDiffusionPipeline
from PIL import Image
from torch import Tensor

from mmalign.evaluation import generate
from mmalign.files import written_aside
from mmalign.playground import judges, raters, world
from mmalign.playground.photographs import GARMENTS
from mmalign.playground.settings import NUM_INFERENCE_STEPS

NUM_TRAIN = 1200
NUM_TEST = 150
JPEG_QUALITY = 92
_SEED = 501


@dataclass(frozen=True)
class Prompts:
    """All 448 things the world can show, split once: `train` for pairs, `test` for evaluation and held-out pairs."""

    train: list[str]
    test: list[str]


def prompts(test_share: float = 0.25, seed: int = _SEED) -> Prompts:
    """Every (garment, colour, background) in all five wordings; what is asked in `test` is never asked in `train`."""
    asked: list[tuple[int, int, int]] = [
        (g, c, b)
        for g in range(len(GARMENTS))
        for c in range(len(world.COLOURS))
        for b in range(len(world.COLOURS))
        if b != c
    ]
    order = np.random.default_rng(seed).permutation(len(asked))
    cut = round(test_share * len(asked))

    def worded(part: np.ndarray) -> list[str]:
        return [world.caption(*asked[int(i)], template) for i in part for template in range(world.NUM_TEMPLATES)]

    return Prompts(train=worded(order[cut:]), test=worded(order[:cut]))


def draw(
    pipe: StableDiffusionPipeline, prompts: list[str], seeds: list[int], guidance_scale: float
) -> list[Image.Image]:
    """One picture a prompt, each from its own seed, as everywhere in the playground."""
    return generate(
        pipe, prompts, seeds, num_inference_steps=NUM_INFERENCE_STEPS, guidance_scale=guidance_scale, batch_size=64
    )


def build(pipe: StableDiffusionPipeline, guidance_scale: float, split: str, number: int) -> Dataset:
    """Draws `number` pairs for prompts of `split` and has them compared, each pair by one user."""
    seed = _SEED + {"train": 1, "test": 2}[split]
    rng = np.random.default_rng(seed)
    pool = getattr(prompts(), split)
    asked = [pool[i] for i in rng.integers(len(pool), size=number)]
    user_ids = rng.integers(raters.NUM_USERS, size=number)
    seeds = rng.integers(2**31, size=2 * number).tolist()
    images = draw(pipe, asked + asked, seeds, guidance_scale)
    packed = [to_jpeg(image) for image in images]
    seen = judges.to_tensor([Image.open(io.BytesIO(data)) for data in packed])
    liking = _utilities(seen, asked + asked, np.concatenate([user_ids, user_ids]))
    labels = raters.compare(liking[:number], liking[number:], rng)
    return Dataset.from_dict(
        {
            "caption": asked,
            "jpg_0": packed[:number],
            "jpg_1": packed[number:],
            "label_0": labels.tolist(),
            "label_1": (1 - labels).tolist(),
            "has_label": [True] * number,
            "are_different": [True] * number,
            "user_id": user_ids.tolist(),
            "ranking_id": list(range(number)),
            "model_0": ["mmalign/playground"] * number,
            "model_1": ["mmalign/playground"] * number,
        }
    )


def save(data: Dataset, path: Path) -> None:
    """Writes one parquet file, to a temporary name first."""
    with written_aside(path) as part:
        data.to_parquet(str(part))


def to_jpeg(image: Image.Image) -> bytes:
    """The bytes of a picture as the data set keeps them."""
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=JPEG_QUALITY, subsampling=0, optimize=True)
    return buffer.getvalue()


def _utilities(seen: Tensor, asked: list[str], user_ids: np.ndarray) -> Tensor:
    reading = judges.load("A").read(seen)
    matched = judges.match(reading, asked)
    by_user = torch.stack([raters.utility(taste, reading, matched) for taste in raters.users()])
    return by_user[torch.from_numpy(user_ids), torch.arange(len(asked))]
