"""LAION's aesthetic predictor: how a picture would be rated from 1 to 10, whatever its prompt."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mmalign.files import absence_explained
from mmalign.rewards.base import NetworkScorer
from mmalign.rewards.checkpoints import linear_head, read_checkpoint
from mmalign.rewards.fingerprints import module_hash, text_hash
from mmalign.rewards.pixels import crop_images, crop_pixels, normalise

if TYPE_CHECKING:
    from PIL import Image

# The Hub's copy of the repository's sac+logos+ava1-l14-linearMSE.pth.
REPO, FILE = "trl-lib/ddpo-aesthetic-predictor", "aesthetic-model.pth"
CLIP = "openai/clip-vit-large-patch14"
_FORMAT = 1


class AestheticScorer(NetworkScorer):
    """Five linear layers on the normalised image embedding of CLIP ViT-L/14; prompts are not read.

    By C. Schuhmann, who published it as a repository, github.com/christophschuhmann/improved-aesthetic-predictor.
    """

    def __init__(self, vision: Any, projection: nn.Linear, head: nn.Module, *, name: str, batch_size: int = 32) -> None:
        parts = nn.ModuleDict({"vision": vision, "projection": projection, "head": head})
        super().__init__(parts, name=name, batch_size=batch_size)
        self.vision, self.projection, self.head = vision, projection, head

    @classmethod
    def from_file(
        cls,
        path: str | Path,
        *,
        name: str = "aesthetic",
        clip: str | Path = CLIP,
        revision: str | None = None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        batch_size: int = 32,
    ) -> AestheticScorer:
        """The head from its published file, the CLIP from a folder or Hub id with safetensors weights.

        dtype: of the CLIP; the head is read in float32.
        """
        from transformers import CLIPModel

        head = linear_head(read_checkpoint(path), "the aesthetic predictor")
        with absence_explained(f"download {CLIP} from the Hub and pass AestheticScorer.from_file(…, clip=<folder>)"):
            both: Any = CLIPModel.from_pretrained(clip, revision=revision or "main", dtype=dtype, use_safetensors=True)
        vision, projection = both.vision_model, both.visual_projection
        width, given = head[0].in_features, projection.out_features
        if width != given:
            raise ValueError(f"the head reads {width} numbers and {clip} gives {given}: pass clip={CLIP!r}")
        return cls(vision.to(device), projection.to(device), head.to(device), name=name, batch_size=batch_size)

    @property
    def logit_scale(self) -> float:
        raise ValueError(
            f"{self.name} was trained on ratings, not on comparisons: use its scores unscaled, or fit a Normalizer"
        )

    @cached_property
    def fingerprint(self) -> str:
        parts = [module_hash(part, self.name) for part in (self.vision, self.projection, self.head)]
        return text_hash([_FORMAT, parts])

    def count_truncated(self, prompts: Sequence[str]) -> int:
        return 0

    def preprocess(self, images: Sequence[Image.Image]) -> Float[Tensor, "B 3 h w"]:
        return normalise(crop_images(images, self.vision.config.image_size))

    def preprocess_pixels(self, pixels: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B 3 h w"]:
        return normalise(crop_pixels(pixels, self.vision.config.image_size))

    def reward(self, inputs: Float[Tensor, "B 3 h w"], prompts: Sequence[str]) -> Float[Tensor, " B"]:
        pooled = self.vision(pixel_values=inputs.to(self.projection.weight.dtype)).pooler_output
        return self.head(nn.functional.normalize(self.projection(pooled).float(), dim=1))[:, 0]
