"""A tiny LFM2-VL that answers questions about the first world's pictures, in transformers' own classes."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import (
    Lfm2VlConfig,
    Lfm2VlForConditionalGeneration,
    Lfm2VlImageProcessor,
    Lfm2VlProcessor,
    PreTrainedTokenizerFast,
)

from mmalign.playground import answer_base, chat, photographs, picture_questions, world
from mmalign.playground.fit import FitConfig

EYE = FitConfig(
    steps=2_000, batch_size=64, learning_rate=2e-3, warmup=100, weight_decay=1e-2, ema=0.99, constant=True, seed=41
)
ANSWERS = FitConfig(
    steps=450,
    batch_size=16,
    learning_rate=2e-3,
    warmup=100,
    weight_decay=1e-2,
    ema=0.99,
    constant=True,
    seed=42,
    save_every=50,
)
EYE_STREAM, STREAM = 701, 702
PATCH, SIDE, WIDTH = 8, 4, 96
_MEDIA = f"{chat.IMAGE_START}{chat.IMAGE * 4}{chat.IMAGE_END}"


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Every word of the questions and answers about pictures is one token."""
    rng = np.random.default_rng(STREAM)
    pictures = [tuple(picture) for picture in rng.integers(len(world.COLOURS), size=(600, 3)).tolist()]
    asked = [
        picture_questions.ask(picture, kind, rng, true=true)
        for picture in pictures
        for kind in picture_questions.KINDS
        for true in (True, False)
    ]
    return chat.build_tokenizer(text for question in asked for text in (question.text, question.answer))


def build_processor() -> Lfm2VlProcessor:
    """Pictures of 32×32 pixels become four tokens; larger ones up to sixteen. Nothing is split into tiles."""
    pictures = Lfm2VlImageProcessor(
        encoder_patch_size=PATCH,
        tile_size=PATCH * SIDE,
        min_image_tokens=4,
        max_image_tokens=16,
        max_tiles=4,
        do_image_splitting=False,
    )
    return Lfm2VlProcessor(pictures, build_tokenizer(), chat_template=chat.TEMPLATE)


def build(tokenizer: PreTrainedTokenizerFast, seed: int = 0) -> Lfm2VlForConditionalGeneration:
    """An untrained model: 16 patches of 8×8 pixels, a language model of two short convolutions and three attentions."""
    torch.manual_seed(seed)
    vision = {
        "model_type": "siglip2_vision_model",
        "hidden_size": WIDTH,
        "intermediate_size": 128,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_patches": SIDE**2,
        "patch_size": PATCH,
        "vision_use_head": False,
    }
    text = {
        "model_type": "lfm2",
        "vocab_size": len(tokenizer),
        "hidden_size": WIDTH,
        "intermediate_size": WIDTH,
        "block_auto_adjust_ff_dim": False,
        "num_hidden_layers": 5,
        "layer_types": ["conv", "full_attention", "conv", "full_attention", "full_attention"],
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 1024,
        "initializer_range": 0.05,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0},
    }
    special = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("pad", "bos", "eos")}
    config = Lfm2VlConfig(
        vision_config=vision,
        text_config=text | special,
        image_token_id=tokenizer.image_token_id,
        projector_hidden_size=WIDTH,
        **special,
    )
    return Lfm2VlForConditionalGeneration(config)


def seeing(model: Lfm2VlForConditionalGeneration) -> answer_base.Seeing:
    """The model for training: it looks at a whole batch of pictures in [0, 1] at once."""
    tower, projector = model.model.vision_tower, model.model.multi_modal_projector

    def look(pixels: Tensor) -> Tensor:
        patches = (pixels * 2 - 1).unflatten(3, (SIDE, PATCH)).unflatten(2, (SIDE, PATCH))
        batch = len(pixels)
        seen = tower(
            pixel_values=patches.permute(0, 2, 4, 3, 5, 1).reshape(batch, SIDE**2, -1),
            pixel_attention_mask=torch.ones(batch, SIDE**2, dtype=torch.int32),
            spatial_shapes=torch.full((batch, 2), SIDE),
        )
        return projector(seen.last_hidden_state.view(batch, SIDE, SIDE, -1)).flatten(1, 2)

    return answer_base.Seeing(model, tower, look, model.config.image_token_id)


def training_world() -> answer_base.World:
    """Pictures of the training photographs."""
    data = photographs.load("train")

    def draw(rows: Sequence[int], stream: int = STREAM) -> tuple[Tensor, list[Any]]:
        scenes = world.draw_scenes(data.labels, torch.tensor(rows), seed=stream)
        return world.compose(data, torch.tensor(rows), scenes), picture_questions.shown(scenes)

    def glimpse(rows: Sequence[int]) -> tuple[Tensor, Tensor]:
        pixels, shown = draw(rows, EYE_STREAM)
        return pixels, torch.tensor(shown)

    return answer_base.World(picture_questions, draw, glimpse, picture_questions.FACT_SIZES)


def dialogues(tokenizer: PreTrainedTokenizerFast) -> chat.Chat:
    """Dialogues about a picture of 32×32 pixels."""
    return chat.Chat(tokenizer, _MEDIA)


def train(work_dir: Path) -> tuple[Lfm2VlForConditionalGeneration, Lfm2VlProcessor, list[dict[str, float]]]:
    """Trains eye and answers; the model, its processor and both curves."""
    processor = build_processor()
    model = build(processor.tokenizer)
    parts = seeing(model), training_world(), dialogues(processor.tokenizer)
    return model, processor, answer_base.train(*parts, (EYE, ANSWERS), work_dir, "vision")
