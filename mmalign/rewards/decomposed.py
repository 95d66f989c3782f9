"""A CLIP-like reward taken apart: what it says of the text, and what it says of any picture whatever was asked (LongAlign).

Prompt embeddings of preference-tuned CLIPs lie in a narrow cone around one direction V. With C_P = C_P^⊥ + η·V, η = C_P·V, the score
is C_X·C_P^⊥ + η·C_X·V, the second part being style. Re-weighted by ω ≤ 1: R_ω = C_X·C_P^⊥ + ω·η·C_X·V (arXiv:2410.11817).
Shapes: B pictures with their prompts, D dimensions of the embedding.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import normalize

from mmalign.files import written_aside
from mmalign.rewards.base import NetworkScorer
from mmalign.rewards.embedding import EmbeddingScorer
from mmalign.rewards.fingerprints import text_hash

if TYPE_CHECKING:
    from PIL import Image

# Of fewer captions the mean is their own content rather than what all captions share; of one it is all of it.
FEWEST_CAPTIONS = 100
_KEY = "direction"


@dataclass(frozen=True, eq=False)
class CommonDirection:
    """V (D,), a unit vector, with what it was made of: the scorer, and how many captions."""

    vector: Float[Tensor, " D"]
    scorer_name: str
    scorer_fingerprint: str
    num_captions: int
    captions_sha256: str

    @classmethod
    @torch.no_grad()
    def estimate(cls, scorer: Any, captions: Sequence[str], *, batch_size: int = 64) -> CommonDirection:
        """V = the mean prompt embedding over the distinct captions, normalised; ValueError for fewer than FEWEST_CAPTIONS."""
        reward, different = embedding_of(scorer), list(dict.fromkeys(captions))
        if len(different) < FEWEST_CAPTIONS:
            raise ValueError(
                f"the common direction of {len(different)} captions would be their own content: give at least {FEWEST_CAPTIONS} "
                "different ones (the more the better; thousands are usual)"
            )
        total: Tensor | float = 0.0
        for start in range(0, len(different), batch_size):
            total = total + reward.prompt_embeddings(different[start : start + batch_size]).double().sum(0)
        assert isinstance(total, Tensor)
        vector = normalize(total, dim=0).float().cpu()
        told = hashlib.sha256(json.dumps(different).encode()).hexdigest()
        return cls(vector, reward.name, reward.fingerprint, len(different), told)

    def save(self, path: str | Path) -> Path:
        """Writes one .safetensors file, what it was made of in its metadata, and returns its path."""
        from safetensors.torch import save_file

        told = {
            "scorer_name": self.scorer_name,
            "scorer_fingerprint": self.scorer_fingerprint,
            "num_captions": str(self.num_captions),
            "captions_sha256": self.captions_sha256,
        }
        path = Path(path).expanduser()
        with written_aside(path) as part:
            save_file({_KEY: self.vector.contiguous()}, part, metadata=told)
        return path

    @classmethod
    def load(cls, path: str | Path) -> CommonDirection:
        """Reads what `save` wrote; ValueError for any other file."""
        from safetensors import SafetensorError, safe_open

        path = Path(path).expanduser()
        try:
            with safe_open(path, framework="pt") as file:
                told, vector = dict(file.metadata() or {}), file.get_tensor(_KEY)
            number = int(told.pop("num_captions"))
            return cls(vector, num_captions=number, **told)
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"{path} holds no common direction: make one with CommonDirection.estimate(…).save(path)"
            ) from error

    def check(self, scorer: EmbeddingScorer) -> None:
        """ValueError unless it was made of this very scorer."""
        if self.scorer_fingerprint != scorer.fingerprint:
            raise ValueError(
                f"the common direction was made of {self.scorer_name}, and the scorer is {scorer.name} or other weights of it: "
                "estimate it again"
            )


class ReweightedScorer(NetworkScorer):
    """R_ω of a CLIP-like scorer: 1 is the plain score, 0 the text-relevant part alone; LongAlign trains at 0.3. A scorer itself."""

    def __init__(self, scorer: Any, direction: CommonDirection, *, omega: float = 0.3) -> None:
        if not 0 <= omega <= 1:
            raise ValueError(f"omega must lie in 0 … 1, got {omega}")
        self.base = embedding_of(scorer)
        direction.check(self.base)
        super().__init__(self.base.model, name=f"{self.base.name} at omega {omega:g}", batch_size=self.base.batch_size)
        self.direction, self.omega = direction, omega

    @property
    def fingerprint(self) -> str:
        return text_hash([self.base.fingerprint, self.direction.vector.tolist(), self.omega])

    @property
    def logit_scale(self) -> float:
        if self.omega == 1:
            return self.base.logit_scale
        raise ValueError(
            f"{self.name}: the model learnt to compare by the whole score; use omega=1, or scores unscaled"
        )

    def count_truncated(self, prompts: Sequence[str]) -> int:
        return self.base.count_truncated(prompts)

    def preprocess(self, images: Sequence[Image.Image]) -> Any:
        return self.base.preprocess(images)

    def preprocess_pixels(self, pixels: Float[Tensor, "B 3 H W"]) -> Any:
        return self.base.preprocess_pixels(pixels)

    def reward(self, inputs: Any, prompts: Sequence[str]) -> Float[Tensor, " B"]:
        relevant, style = self.parts(inputs, prompts)
        return relevant + self.omega * style

    def parts(self, inputs: Any, prompts: Sequence[str]) -> tuple[Float[Tensor, " B"], Float[Tensor, " B"]]:
        """(text-relevant C_X·C_P^⊥, text-irrelevant η·C_X·V) of preprocessed pictures, which add up to the plain score."""
        seen, vector = self.base.picture_embeddings(inputs), self.direction.vector.to(self.device)
        with torch.no_grad():
            whole = self.base.prompt_embeddings(prompts)
            common = whole @ vector
        return (seen * (whole - common[:, None] * vector)).sum(1), common * (seen @ vector)

    @torch.no_grad()
    def commonness(self, prompts: Sequence[str]) -> Float[Tensor, " N"]:
        """η, how much of each prompt's embedding lies along V."""
        return self.base.prompt_embeddings(prompts) @ self.direction.vector.to(self.device)


def embedding_of(scorer: Any) -> EmbeddingScorer:
    """The scorer, if it is a cosine of two embeddings; ValueError with the reason if not."""
    if isinstance(scorer, EmbeddingScorer):
        return scorer
    reason = _NO_SPLIT.get(type(scorer).__name__, "it is no cosine of a picture's and a prompt's embedding")
    raise ValueError(
        f"{scorer.name} cannot be taken apart: {reason}; use a CLIP-like scorer (pickscore, hpsv2, clip:…, denscore)"
    )


_NO_SPLIT = {
    "HPSv3Scorer": "a vision language model reads picture and prompt together",
    "ImageRewardScorer": "its text encoder attends to the picture while it reads the prompt",
    "AestheticScorer": "it reads no prompt",
    "Ensemble": "its members have directions of their own; re-weight each of them before",
}
