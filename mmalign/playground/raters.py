"""The people who compare pictures in the playground.

A rater likes first that the picture shows what was asked, then that it is clean and sharp, then their own taste. They look through
judge A, are unsure like people are (logistic noise), and call it a tie when they see little difference. Tastes are hidden from every
method: a data set carries user ids, never weights.
"""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from mmalign.playground.judges import Match, Reading, score
from mmalign.playground.world import COLOURS

NUM_USERS = 12
NOISE = 0.35
TIE_WIDTH = 0.2
_TASTE_SEED = 77


@dataclass(frozen=True)
class Taste:
    """One user's liking: of saturation, brightness and large garments (per standard deviation), and of one colour."""

    saturation: float
    brightness: float
    size: float
    favourite: int
    favourite_weight: float


def users(number: int = NUM_USERS, seed: int = _TASTE_SEED) -> list[Taste]:
    """The users of the world, drawn once from `seed`."""
    rng = np.random.default_rng(seed)
    tastes = []
    for _ in range(number):
        saturation, brightness, size = rng.normal(0, 0.35, 3)
        tastes.append(
            Taste(saturation, brightness, size, int(rng.integers(len(COLOURS))), float(rng.uniform(0.2, 0.6)))
        )
    return tastes


def utility(taste: Taste, reading: Reading, matched: Match) -> Float[Tensor, " B"]:
    """How much a user likes each picture: what everybody likes (`judges.score`) plus their taste."""
    seen = reading.measured
    liking = (
        taste.saturation * (seen.saturation - 0.75) / 0.12
        + taste.brightness * (seen.brightness - 0.46) / 0.12
        + taste.size * (seen.garment_share - 0.3) / 0.1
        + taste.favourite_weight * (-(seen.colour_distance[:, taste.favourite] / 0.06).square()).exp()
    )
    return score(reading, matched) + liking


def compare(first: Float[Tensor, " B"], second: Float[Tensor, " B"], rng: np.random.Generator) -> Float[Tensor, " B"]:
    """Labels of `first` against `second`: 1 preferred, 0 not, 0.5 where the rater sees little difference."""
    felt = (first - second) + torch.from_numpy(rng.logistic(0, NOISE, len(first))).float()
    label = (felt > 0).float()
    label[felt.abs() < TIE_WIDTH] = 0.5
    return label
