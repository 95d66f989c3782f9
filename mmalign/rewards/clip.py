"""CLIP-like scorers: the cosine between a picture's and its prompt's embedding. PickScore is one of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from mmalign.files import absence_explained
from mmalign.rewards.embedding import EmbeddingScorer
from mmalign.rewards.fingerprints import module_hash, text_hash, tokenizer_hash
from mmalign.rewards.pixels import crop_pixels, normalise, resize_pixels

if TYPE_CHECKING:
    from PIL import Image

# The processor reads its crop and colours with Pillow, as the published scorers did: the tensor version of
# transformers 5 differs from it by up to 0.03 a pixel.
_FORMAT = 1


class ClipScorer(EmbeddingScorer):
    """The raw cosine of image and text features of a CLIPModel (arXiv:2103.00020; PickScore: arXiv:2305.01569).

    logit_scale: what the model multiplies the cosine by to get logits (about 100 for PickScore).
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        image_processor: Any,
        *,
        name: str,
        batch_size: int = 32,
        segmented: bool = False,
        compat_segments: bool = False,
    ) -> None:
        super().__init__(model, name=name, batch_size=batch_size, segmented=segmented, compat_segments=compat_segments)
        self.tokenizer = tokenizer
        self.image_processor = image_processor
        # A tokenizer without a stated length claims 10³⁰ tokens.
        self._max_length = min(tokenizer.model_max_length, model.config.text_config.max_position_embeddings)

    @classmethod
    def from_pretrained(
        cls,
        model: str | Path,
        processor: str | Path | None = None,
        *,
        name: str | None = None,
        revision: str | None = None,
        processor_revision: str | None = None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        batch_size: int = 32,
        **reading: bool,
    ) -> ClipScorer:
        """From a folder or Hub id with safetensors weights; `processor` where tokenizer and preprocessing lie elsewhere.

        reading: `segmented` and `compat_segments`, how prompts are read (`EmbeddingScorer`).
        """
        from transformers import AutoTokenizer, CLIPImageProcessorPil, CLIPModel

        if processor is None and processor_revision is not None:
            raise ValueError("processor_revision has no effect without processor; leave it out")
        at = (revision if processor is None else processor_revision) or "main"
        source = model if processor is None else processor
        with absence_explained(f"download {model} from the Hub, weights as safetensors, and pass its folder"):
            loaded: Any = CLIPModel.from_pretrained(
                model, revision=revision or "main", dtype=dtype, use_safetensors=True
            )
        with absence_explained(f"download tokenizer and preprocessing of {source} and pass processor=<folder>"):
            tokenizer = AutoTokenizer.from_pretrained(source, revision=at)
            images = CLIPImageProcessorPil.from_pretrained(source, revision=at)
        label = name or f"clip:{model}" + (f" with {processor}" if processor else "")
        return cls(loaded.to(device), tokenizer, images, name=label, batch_size=batch_size, **reading)

    @property
    def logit_scale(self) -> float:
        return float(self.model.logit_scale.detach().float().exp())

    @cached_property
    def fingerprint(self) -> str:
        """sha256 over weights (with their dtype), tokenizer and preprocessing."""
        settings = self.image_processor.to_dict()
        weights = module_hash(self.model, self.name)
        return text_hash([_FORMAT, weights, tokenizer_hash(self.tokenizer), settings, *self._reading()])

    @property
    def max_length(self) -> int:
        return self._max_length

    def num_tokens(self, text: str) -> int:
        return len(self.tokenizer(text, truncation=False, padding=False, verbose=False).input_ids)

    def preprocess(self, images: Sequence[Image.Image]) -> Float[Tensor, "B 3 h w"]:
        return self.image_processor(images=list(images), return_tensors="pt").pixel_values

    def preprocess_pixels(self, pixels: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B 3 h w"]:
        from PIL import Image

        given = self.image_processor
        size, crop = dict(given.size), dict(given.crop_size)
        short, fixed = size.get("shortest_edge"), {"height", "width"} <= size.keys()
        bicubic = given.do_resize and given.resample == Image.Resampling.BICUBIC
        square = short is not None and given.do_center_crop and crop["height"] == crop["width"] <= short
        whole = fixed and not given.do_center_crop
        if not (bicubic and given.do_rescale and given.do_normalize and (square or whole)):
            raise ValueError(
                f"{self.name}: gradients pass only through CLIP's own preprocessing (bicubic to the shorter side, then a "
                "square crop; or bicubic to one size); use score(…) instead"
            )
        if whole:
            read = resize_pixels(pixels, size["height"], size["width"])
        else:
            read = crop_pixels(pixels, crop["height"], short=short, rounding=math.floor)
        return normalise(read, given.image_mean, given.image_std)

    def picture_features(self, inputs: Float[Tensor, "B 3 h w"]) -> Float[Tensor, "B D"]:
        return self.model.get_image_features(pixel_values=inputs.to(self.model.dtype)).pooler_output.float()

    def text_features(self, texts: Sequence[str]) -> Float[Tensor, "B D"]:
        tokens = self.tokenizer(
            list(texts), padding="max_length", truncation=True, max_length=self._max_length, return_tensors="pt"
        ).to(self.device)
        return self.model.get_text_features(
            input_ids=tokens.input_ids, attention_mask=tokens.attention_mask
        ).pooler_output.float()
