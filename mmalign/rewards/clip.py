"""CLIP-like scorers: the cosine between a picture's and its prompt's embedding. PickScore is one of them."""

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from mmalign.rewards.fingerprints import module_hash, text_hash, tokenizer_hash

if TYPE_CHECKING:
    from PIL import Image

# The processor reads its crop and colours with Pillow, as the published scorers did: the tensor version of
# transformers 5 differs from it by up to 0.03 a pixel.
_FORMAT = 1


class ClipScorer:
    """The raw cosine of image and text features of a CLIPModel.

    logit_scale: what the model multiplies the cosine by to get logits (about 100 for PickScore).
    num_truncated_prompts: how many of the prompts scored so far were longer than the text encoder reads.
    """

    def __init__(self, model: Any, tokenizer: Any, image_processor: Any, *, name: str, batch_size: int = 32) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        self.model = model.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.image_processor = image_processor
        self.name = name
        self.batch_size = batch_size
        self.num_truncated_prompts = 0
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
    ) -> "ClipScorer":
        """From a folder or Hub id with safetensors weights; `processor` where tokenizer and preprocessing lie elsewhere."""
        from transformers import AutoTokenizer, CLIPImageProcessorPil, CLIPModel

        if processor is None and processor_revision is not None:
            raise ValueError("processor_revision has no effect without processor; leave it out")
        at = (revision if processor is None else processor_revision) or "main"
        source = model if processor is None else processor
        loaded: Any = CLIPModel.from_pretrained(model, revision=revision or "main", dtype=dtype, use_safetensors=True)
        tokenizer = AutoTokenizer.from_pretrained(source, revision=at)
        images = CLIPImageProcessorPil.from_pretrained(source, revision=at)
        label = name or f"clip:{model}" + (f" with {processor}" if processor else "")
        return cls(loaded.to(device), tokenizer, images, name=label, batch_size=batch_size)

    @property
    def logit_scale(self) -> float:
        return float(self.model.logit_scale.detach().float().exp())

    @cached_property
    def fingerprint(self) -> str:
        """sha256 over weights (with their dtype), tokenizer and preprocessing."""
        settings = self.image_processor.to_dict()
        return text_hash([_FORMAT, module_hash(self.model, self.name), tokenizer_hash(self.tokenizer), settings])

    def count_truncated(self, prompts: Sequence[str]) -> int:
        """How many of the prompts are longer than the text encoder reads."""
        ids = self.tokenizer(list(prompts), truncation=False, padding=False, verbose=False).input_ids
        return sum(len(row) > self._max_length for row in ids)

    def score(
        self, images: "Sequence[Image.Image]", prompts: Sequence[str], *, scaled: bool = False
    ) -> Float[Tensor, " N"]:
        """Cosine of picture i and prompt i, in float32 on the CPU; scaled: times logit_scale."""
        if len(images) != len(prompts):
            raise ValueError(f"{len(images)} images and {len(prompts)} prompts: give one prompt an image")
        if not images:
            return torch.zeros(0)
        parts = []
        for start in range(0, len(images), self.batch_size):
            rows = slice(start, start + self.batch_size)
            parts.append(self._cosine(list(images[rows]), list(prompts[rows])))
        scores = torch.cat(parts)
        if not torch.isfinite(scores).all():
            raise ValueError(f"{self.name} gave NaN or infinite scores in {self.model.dtype}: load it in float32")
        self.num_truncated_prompts += self.count_truncated(prompts)
        return scores * self.logit_scale if scaled else scores

    @torch.no_grad()
    def _cosine(self, images: "list[Image.Image]", prompts: list[str]) -> Float[Tensor, " B"]:
        device, dtype = self.model.device, self.model.dtype
        pixels = self.image_processor(images=images, return_tensors="pt").pixel_values
        # Padded to one length, so that a row's numbers do not hang on its neighbours'. Equal prompts are read once.
        distinct = list(dict.fromkeys(prompts))
        tokens = self.tokenizer(
            distinct, padding="max_length", truncation=True, max_length=self._max_length, return_tensors="pt"
        ).to(device)
        seen = self.model.get_image_features(pixel_values=pixels.to(device, dtype)).pooler_output.float()
        read = self.model.get_text_features(
            input_ids=tokens.input_ids, attention_mask=tokens.attention_mask
        ).pooler_output.float()
        place = {prompt: index for index, prompt in enumerate(distinct)}
        read = read[torch.tensor([place[prompt] for prompt in prompts], device=device)]
        return torch.nn.functional.cosine_similarity(seen, read, dim=1).cpu()
