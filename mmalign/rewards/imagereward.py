"""ImageReward: a BLIP that reads the prompt while it looks at the picture."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mmalign.files import absence_explained
from mmalign.rewards.base import NetworkScorer
from mmalign.rewards.checkpoints import fitted, linear_head, part_of, read_checkpoint, shape_of
from mmalign.rewards.fingerprints import module_hash, text_hash, tokenizer_hash
from mmalign.rewards.pixels import crop_images, crop_pixels, normalise

if TYPE_CHECKING:
    from PIL import Image

REPO, FILE = "THUDM/ImageReward", "ImageReward.pt"
TOKENIZER = "google-bert/bert-base-uncased"
# By which the authors put raw rewards on a scale of about mean 0 and standard deviation 1.
_MEAN, _STD = 0.16717362830052426, 1.0333394966054072
_MAX_LENGTH = 35
# Attention heads are this wide in both halves of every published BLIP.
_HEAD_WIDTH = 64
_FORMAT = 1

# BLIP's own names of the picture half, and those of transformers; the text half has one set of names.
_RENAMED = (
    (r"^cls_token$", "embeddings.class_embedding"),
    (r"^pos_embed$", "embeddings.position_embedding"),
    (r"^patch_embed\.proj\.", "embeddings.patch_embedding."),
    (r"^norm\.", "post_layernorm."),
    (r"^blocks\.", "encoder.layers."),
    (r"\.attn\.qkv\.", ".self_attn.qkv."),
    (r"\.attn\.proj\.", ".self_attn.projection."),
    (r"\.norm([12])\.", r".layer_norm\1."),
)


class ImageRewardScorer(NetworkScorer):
    """(r − mean) / std, r from five linear layers on the first token of BLIP's text encoder (arXiv:2304.05977).

    Only the first 35 tokens of a prompt are read. The model was trained on r, so logit_scale is std.
    """

    def __init__(
        self, vision: Any, text: Any, head: nn.Module, tokenizer: Any, *, name: str, batch_size: int = 32
    ) -> None:
        super().__init__(
            nn.ModuleDict({"vision": vision, "text": text, "head": head}), name=name, batch_size=batch_size
        )
        self.vision, self.text, self.head, self.tokenizer = vision, text, head, tokenizer

    @classmethod
    def from_file(
        cls,
        path: str | Path,
        *,
        name: str = "imagereward",
        tokenizer: str | Path = TOKENIZER,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        batch_size: int = 32,
    ) -> ImageRewardScorer:
        """From the published file, or its state dict as safetensors; sizes are read from the weights.

        dtype: of the BLIP; the head is read in float32.
        """
        from transformers import BertTokenizer

        state = read_checkpoint(path)
        vision = _vision(part_of(state, "blip.visual_encoder.", "ImageReward")).to(device, dtype)
        text = _text(part_of(state, "blip.text_encoder.", "ImageReward")).to(device, dtype)
        head = linear_head(part_of(state, "mlp.", "ImageReward"), "ImageReward's head").to(device)
        with absence_explained(f"download {TOKENIZER} from the Hub and pass from_file(…, tokenizer=<folder>)"):
            words = BertTokenizer.from_pretrained(tokenizer)
        return cls(vision, text, head, words, name=name, batch_size=batch_size)

    @property
    def logit_scale(self) -> float:
        return _STD

    @cached_property
    def fingerprint(self) -> str:
        parts = [module_hash(part, self.name) for part in (self.vision, self.text, self.head)]
        return text_hash([_FORMAT, parts, tokenizer_hash(self.tokenizer)])

    def count_truncated(self, prompts: Sequence[str]) -> int:
        ids = self.tokenizer(list(prompts), truncation=False, padding=False, verbose=False).input_ids
        return sum(len(row) > _MAX_LENGTH for row in ids)

    def preprocess(self, images: Sequence[Image.Image]) -> Float[Tensor, "B 3 h w"]:
        return normalise(crop_images(images, self.vision.config.image_size))

    def preprocess_pixels(self, pixels: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B 3 h w"]:
        return normalise(crop_pixels(pixels, self.vision.config.image_size))

    def reward(self, inputs: Float[Tensor, "B 3 h w"], prompts: Sequence[str]) -> Float[Tensor, " B"]:
        tokens = self.tokenizer(
            list(prompts), padding="max_length", truncation=True, max_length=_MAX_LENGTH, return_tensors="pt"
        ).to(self.device)
        seen = self.vision(pixel_values=inputs.to(self.vision.dtype)).last_hidden_state
        read = self.text(
            input_ids=tokens.input_ids, attention_mask=tokens.attention_mask, encoder_hidden_states=seen
        ).last_hidden_state
        return (self.head(read[:, 0].float())[:, 0] - _MEAN) / _STD


def _vision(state: dict[str, Tensor]) -> Any:
    from transformers import BlipVisionConfig, BlipVisionModel

    for pattern, name in _RENAMED:
        state = {re.sub(pattern, name, key): value for key, value in state.items()}
    what = "ImageReward's picture encoder"
    width, _, patch, _ = shape_of(state, "embeddings.patch_embedding.weight", what)
    side = int((shape_of(state, "embeddings.position_embedding", what)[1] - 1) ** 0.5)
    config = BlipVisionConfig(
        hidden_size=width,
        intermediate_size=shape_of(state, "encoder.layers.0.mlp.fc1.weight", what)[0],
        num_hidden_layers=_depth(state, "encoder.layers."),
        num_attention_heads=width // _HEAD_WIDTH,
        image_size=side * patch,
        patch_size=patch,
        # BLIP's; transformers' default is ten times as much.
        layer_norm_eps=1e-6,
    )
    return fitted(lambda: BlipVisionModel(config), state, what)


def _text(state: dict[str, Tensor]) -> Any:
    from transformers import BlipTextConfig, BlipTextModel

    # Counts from 0 up, which transformers makes itself.
    state = {key: value for key, value in state.items() if key != "embeddings.position_ids"}
    what = "ImageReward's text encoder"
    words, width = shape_of(state, "embeddings.word_embeddings.weight", what)
    config = BlipTextConfig(
        vocab_size=words,
        hidden_size=width,
        encoder_hidden_size=shape_of(state, "encoder.layer.0.crossattention.self.key.weight", what)[1],
        intermediate_size=shape_of(state, "encoder.layer.0.intermediate.dense.weight", what)[0],
        num_hidden_layers=_depth(state, "encoder.layer."),
        num_attention_heads=width // _HEAD_WIDTH,
        max_position_embeddings=shape_of(state, "embeddings.position_embeddings.weight", what)[0],
    )
    return fitted(lambda: BlipTextModel(config, add_pooling_layer=False), state, what)


def _depth(state: dict[str, Tensor], prefix: str) -> int:
    return len({key.removeprefix(prefix).split(".")[0] for key in state if key.startswith(prefix)})
