"""Scorers that are a cosine of two embeddings, a picture's and a prompt's; long prompts may be read in segments (Denscore)."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, Self

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import normalize

from mmalign.denoisers.segments import segments
from mmalign.rewards.base import NetworkScorer, distinct


class EmbeddingScorer(NetworkScorer):
    """The raw cosine of picture and prompt.

    segmented: a prompt's embedding is the mean of its sentences' unit embeddings, not normalised again, so that the score is the
    mean of their cosines (LongAlign's Denscore, arXiv:2410.11817). compat_segments: by its released splitter.
    """

    def __init__(
        self, model: Any, *, name: str, batch_size: int, segmented: bool = False, compat_segments: bool = False
    ) -> None:
        if compat_segments and not segmented:
            raise ValueError("compat_segments has no effect without segmented=True; leave it out")
        super().__init__(model, name=name, batch_size=batch_size)
        self.segmented, self.compat_segments = segmented, compat_segments

    def in_segments(self) -> Self:
        """From now on prompts are read in segments."""
        self.segmented = True
        vars(self).pop("fingerprint", None)
        return self

    @property
    @abstractmethod
    def max_length(self) -> int:
        """Tokens that the text encoder reads, start and end included."""

    @abstractmethod
    def num_tokens(self, text: str) -> int:
        """Tokens of a text, start and end included."""

    @abstractmethod
    def picture_features(self, inputs: Any) -> Float[Tensor, "B D"]:
        """Embeddings of preprocessed pictures, of any length, in float32 and with gradient."""

    @abstractmethod
    def text_features(self, texts: Sequence[str]) -> Float[Tensor, "B D"]:
        """Embeddings of texts as long as the encoder reads, of any length, in float32."""

    def segments(self, prompt: str) -> list[str]:
        """What of the prompt is embedded by itself: all of it, or each of its segments."""
        if not self.segmented:
            return [prompt]
        ends = self.num_tokens("")
        return segments(
            prompt,
            lambda text: self.num_tokens(text) - ends,
            limit=self.max_length - ends,
            compat="longalign" if self.compat_segments else None,
        )

    def prompt_embeddings(self, prompts: Sequence[str]) -> Float[Tensor, "B D"]:
        """Unit vectors, or in segments the mean of unit vectors."""
        different, place = distinct(prompts)
        pieces = [self.segments(prompt) for prompt in different]
        texts, where = distinct([piece for prompt in pieces for piece in prompt])
        # Padded to one length, so that a row's numbers do not hang on its neighbours'.
        each = normalize(self.text_features(texts), dim=1)[where.to(self.device)]
        rows = torch.stack([part.mean(0) for part in each.split([len(prompt) for prompt in pieces])])
        return rows[place.to(self.device)]

    def picture_embeddings(self, inputs: Any) -> Float[Tensor, "B D"]:
        """Unit vectors of preprocessed pictures, with gradient."""
        return normalize(self.picture_features(inputs), dim=1)

    def count_truncated(self, prompts: Sequence[str]) -> int:
        """How many of the prompts are longer than the text encoder reads, or have a segment that is."""
        return sum(
            any(self.num_tokens(piece) > self.max_length for piece in self.segments(prompt)) for prompt in prompts
        )

    def reward(self, inputs: Any, prompts: Sequence[str]) -> Float[Tensor, " B"]:
        return (self.picture_embeddings(inputs) * self.prompt_embeddings(prompts)).sum(1)

    def _reading(self) -> list[Any]:
        """What of the fingerprint depends on how prompts are read; nothing where they are read whole."""
        return [["segments", _RULE, self.compat_segments]] if self.segmented else []


# Changes whenever a prompt's segments do.
_RULE = 1
