"""Several scorers as one: a weighted mean of their scores, each on a scale of its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from mmalign.rewards.fingerprints import text_hash
from mmalign.rewards.scorer import PixelScorer, Scorer

if TYPE_CHECKING:
    from PIL import Image


@dataclass(frozen=True)
class Member:
    """A scorer with its share. mean, std: what is taken off its raw scores and what they are divided by."""

    scorer: Scorer
    weight: float = 1.0
    mean: float = 0.0
    std: float = 1.0

    def __post_init__(self) -> None:
        if not self.weight > 0 or not self.std > 0:
            raise ValueError(
                f"{self.scorer.name}: weight and std must be positive, got {self.weight} and {self.std}; leave a "
                "scorer without weight out"
            )


class Ensemble:
    """Σ w_i (s_i − mean_i) / std_i / Σ w_i. A scorer itself; a picture's score stays its own.

    Scales differ: HPSv2 moves by hundredths, ImageReward by ones. `standardised` finds mean and std on pictures of yours.
    """

    def __init__(self, members: Sequence[Member], *, name: str | None = None) -> None:
        if not members:
            raise ValueError("an ensemble needs at least one member")
        self.members = tuple(members)
        self.name = name or "+".join(member.scorer.name for member in members)

    @property
    def fingerprint(self) -> str:
        return text_hash([[m.scorer.fingerprint, m.weight, m.mean, m.std] for m in self.members])

    def score(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> Float[Tensor, " N"]:
        """In float32 on the CPU."""
        return self._mean([member.scorer.score(images, prompts) for member in self.members])

    def score_pixels(self, pixels: Float[Tensor, "N 3 H W"], prompts: Sequence[str]) -> Float[Tensor, " N"]:
        """The same for pixels in [0, 1], on their device and with gradient to them; see NetworkScorer.score_pixels."""
        scores = []
        for member in self.members:
            if not isinstance(member.scorer, PixelScorer):
                raise ValueError(f"{member.scorer.name} passes no gradient: leave it out, or use score(…)")
            scores.append(member.scorer.score_pixels(pixels, prompts))
        return self._mean(scores)

    def _mean(self, scores: list[Tensor]) -> Tensor:
        total = sum(member.weight for member in self.members)
        shares = [m.weight / total * (row - m.mean) / m.std for m, row in zip(self.members, scores, strict=True)]
        return torch.stack(shares).sum(0)


def standardised(
    scorer: Scorer, images: Sequence[Image.Image], prompts: Sequence[str], *, weight: float = 1.0
) -> Member:
    """The scorer on a scale where these pictures have mean 0 and standard deviation 1 (population)."""
    scores = scorer.score(images, prompts).double()
    if len(scores) < 2 or not scores.std(correction=0) > 0:
        raise ValueError(f"{scorer.name} gave {len(scores)} pictures no different scores: standardise on more pictures")
    return Member(scorer, weight, float(scores.mean()), float(scores.std(correction=0)))
