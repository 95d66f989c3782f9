"""Users by a CLIP-like scorer: every pair a token, by how the features of the preferred picture differ from the rejected one's.

Ours, not the paper's: no language model reads or writes anything, so that it costs two pictures through a small network a pair.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from mmalign.data.users import Profile, Shot
from mmalign.rewards import ClipScorer, scorer


class ClipUserEncoder:
    """Tokens (N, D) of N pairs: what the patches of the preferred picture are half-way through CLIP's vision tower, on average, minus
    those of the rejected one.

    The end of the tower keeps what a caption tells, and a taste is mostly what it does not: the playground's tastes are told better
    half-way (`benchmarks/personal.py probe`).
    """

    def __init__(self, scorer: ClipScorer) -> None:
        self.scorer = scorer

    @property
    def made_by(self) -> dict[str, Any]:
        """The scorer and its weights."""
        return {"encoder": "clip-patch-difference", "scorer": self.scorer.name, "fingerprint": self.scorer.fingerprint}

    def encode(self, shots: Sequence[Shot]) -> Profile:
        """One token a pair, in the pairs' order, which the attention does not see."""
        pictures = [shot.preferred for shot in shots] + [shot.rejected for shot in shots]
        preferred, rejected = self._features(pictures).chunk(2)
        return Profile(preferred - rejected)

    @torch.no_grad()
    def _features(self, pictures: Sequence[Any]) -> Float[Tensor, "B D"]:
        inputs = self.scorer.preprocess(pictures).to(self.scorer.device, self.scorer.model.dtype)
        layers = self.scorer.model.vision_model(pixel_values=inputs, output_hidden_states=True).hidden_states
        # The first place is the class token's.
        return layers[len(layers) // 2][:, 1:].mean(1).float().cpu()


def clip_scorer(name: str, device: torch.device | str = "cpu") -> ClipScorer:
    """A scorer by name whose vision tower can read users; ValueError for one of another kind."""
    found = scorer(name, device=device)
    if not isinstance(found, ClipScorer):
        raise ValueError(f"users are read by a CLIP-like scorer (playground, pickscore, clip:…), and {name} is none")
    return found
