"""What all scorers that are one network share: batches, checks, cut prompts, and the way through them with gradient."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

if TYPE_CHECKING:
    from PIL import Image

_log = logging.getLogger(__name__)


class NetworkScorer(ABC):
    """A picture is preprocessed as its authors did it, then read with its prompt; the weights stay frozen.

    num_truncated_prompts: how many of the prompts scored so far were longer than the text encoder reads; the first
    time there are any, the log says so.
    """

    def __init__(self, model: Any, *, name: str, batch_size: int) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        self.model = model.eval().requires_grad_(False)
        self.name = name
        self.batch_size = batch_size
        self.num_truncated_prompts = 0

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """sha256 over all that a score depends on: weights with their dtype, tokenizer, preprocessing."""

    @property
    @abstractmethod
    def logit_scale(self) -> float:
        """k of the model's own P(a is better than b) = σ(k (s_a − s_b)); ValueError if it was not trained to compare."""

    @abstractmethod
    def count_truncated(self, prompts: Sequence[str]) -> int:
        """How many of the prompts are longer than the text encoder reads."""

    @abstractmethod
    def preprocess(self, images: Sequence[Image.Image]) -> Any:
        """What the network reads of pictures, to the bit as its authors had it: (B, 3, h, w), or what else has a `to(device)`."""

    @abstractmethod
    def preprocess_pixels(self, pixels: Float[Tensor, "B 3 H W"]) -> Any:
        """The same of pixels in [0, 1], with gradient."""

    @abstractmethod
    def reward(self, inputs: Any, prompts: Sequence[str]) -> Float[Tensor, " B"]:
        """Score of preprocessed picture i and prompt i, in float32 on the model's device, with gradient to the inputs."""

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def score(
        self, images: Sequence[Image.Image], prompts: Sequence[str], *, scaled: bool = False
    ) -> Float[Tensor, " N"]:
        """Score of picture i and prompt i, in float32 on the CPU; scaled: times logit_scale."""
        if len(images) != len(prompts):
            raise ValueError(f"{len(images)} images and {len(prompts)} prompts: give one prompt an image")
        if not images:
            return torch.zeros(0)
        parts = []
        for start in range(0, len(images), self.batch_size):
            rows = slice(start, start + self.batch_size)
            with torch.no_grad():
                parts.append(self.reward(self.preprocess(images[rows]).to(self.device), prompts[rows]).cpu())
        scores = torch.cat(parts)
        if not torch.isfinite(scores).all():
            raise ValueError(f"{self.name} gave NaN or infinite scores: load it in float32")
        self._count_cut(prompts)
        return scores * self.logit_scale if scaled else scores

    def score_pixels(
        self, pixels: Float[Tensor, "N 3 H W"], prompts: Sequence[str], *, scaled: bool = False
    ) -> Float[Tensor, " N"]:
        """The same for pixels in [0, 1], in one batch, on their device and with gradient to them.

        Equal to `score` for pictures of the size that the network reads, and for HPSv2 of any size. Elsewhere Pillow
        rounds while it resizes, which no gradient passes: without it pixels differ by up to 1.1 of 255 levels.
        """
        if pixels.ndim != 4 or pixels.shape[1] != 3 or len(pixels) != len(prompts):
            raise ValueError(
                f"pixels must be ({len(prompts)}, 3, H, W) for {len(prompts)} prompts, got {tuple(pixels.shape)}"
            )
        if not prompts:
            return torch.zeros(0, device=pixels.device)
        if pixels.min() < 0 or pixels.max() > 1:
            raise ValueError("pixels must lie in [0, 1]: of a VAE's output x, pass (x / 2 + 0.5).clamp(0, 1)")
        inputs = self.preprocess_pixels(pixels.to(self.device, torch.float32))
        scores = self.reward(inputs, prompts).to(pixels.device)
        self._count_cut(prompts)
        return scores * self.logit_scale if scaled else scores

    def _count_cut(self, prompts: Sequence[str]) -> None:
        count = self.count_truncated(prompts)
        if count and not self.num_truncated_prompts:
            _log.warning(
                "%s reads the beginning of long prompts only: %d of %d were cut (said once; num_truncated_prompts counts on)",
                self.name,
                count,
                len(prompts),
            )
        self.num_truncated_prompts += count


def distinct(prompts: Sequence[str]) -> tuple[list[str], Int[Tensor, " N"]]:
    """The different prompts, and which of them each one is: equal prompts are read once."""
    place = {prompt: index for index, prompt in enumerate(dict.fromkeys(prompts))}
    return list(place), torch.tensor([place[prompt] for prompt in prompts])
