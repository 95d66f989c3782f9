"""HPSv2 and HPSv2.1: the cosine of a CLIP that was tuned on human preferences."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from mmalign.rewards.checkpoints import fitted, read_checkpoint
from mmalign.rewards.embedding import EmbeddingScorer
from mmalign.rewards.fingerprints import module_hash, text_hash
from mmalign.rewards.pixels import normalise, pad_pixels, to_pixels

if TYPE_CHECKING:
    from PIL import Image

REPO = "xswu/HPSv2"
FILES = {"hpsv2": "HPS_v2_compressed.pt", "hpsv2.1": "HPS_v2.1_compressed.pt"}
_FORMAT = 1


class HPSv2Scorer(EmbeddingScorer):
    """The raw cosine of image and text features of an open_clip CLIP (arXiv:2306.09341); papers print it times 100.

    Scores of v2 and v2.1 are of different scales and not to be compared. antialias: the authors' code leaves it to
    torchvision, which does it when shrinking since 0.17; False is what older versions did, those of HPSv2's own time.
    """

    def __init__(
        self,
        model: Any,
        *,
        name: str,
        config: dict[str, Any],
        antialias: bool = True,
        batch_size: int = 32,
        segmented: bool = False,
    ) -> None:
        from open_clip import SimpleTokenizer

        super().__init__(model, name=name, batch_size=batch_size, segmented=segmented)
        self.config = config
        self.antialias = antialias
        self.tokenizer = SimpleTokenizer(context_length=model.context_length)

    @classmethod
    def from_file(
        cls,
        path: str | Path,
        *,
        name: str = "hpsv2",
        layout: str = "ViT-H-14",
        antialias: bool = True,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        batch_size: int = 32,
        segmented: bool = False,
    ) -> HPSv2Scorer:
        """From the published file, or its state dict as safetensors. layout: a model that open_clip knows by name."""
        import open_clip

        state = read_checkpoint(path)
        config = open_clip.get_model_config(layout)
        if config is None:
            raise ValueError(f"open_clip knows no layout {layout!r}; HPSv2's is 'ViT-H-14'")
        model = fitted(lambda: open_clip.CLIP(**config), state, f"HPSv2 ({layout})")
        return cls(
            model.to(device, dtype),
            name=name,
            config=config,
            antialias=antialias,
            batch_size=batch_size,
            segmented=segmented,
        )

    @property
    def logit_scale(self) -> float:
        return float(self.model.logit_scale.detach().float().exp())

    @cached_property
    def fingerprint(self) -> str:
        settings = [self.config, self.antialias, self.tokenizer.encoder, self.tokenizer.context_length]
        return text_hash([_FORMAT, module_hash(self.model, self.name), settings, *self._reading()])

    @property
    def max_length(self) -> int:
        return self.tokenizer.context_length

    def num_tokens(self, text: str) -> int:
        return len(self.tokenizer.encode(text)) + 2

    def preprocess(self, images: Sequence[Image.Image]) -> Float[Tensor, "B 3 h w"]:
        # HPSv2 resizes tensors, so that nothing is rounded and both ways are one.
        return torch.cat([self.preprocess_pixels(to_pixels(image)) for image in images])

    def preprocess_pixels(self, pixels: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B 3 h w"]:
        return normalise(pad_pixels(pixels, self.model.visual.image_size[0], antialias=self.antialias))

    def picture_features(self, inputs: Float[Tensor, "B 3 h w"]) -> Float[Tensor, "B D"]:
        return self.model.encode_image(inputs.to(self.model.visual.conv1.weight.dtype)).float()

    def text_features(self, texts: Sequence[str]) -> Float[Tensor, "B D"]:
        return self.model.encode_text(self.tokenizer(list(texts)).to(self.device)).float()
