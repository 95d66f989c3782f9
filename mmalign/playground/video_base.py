"""A tiny LLaVA-OneVision that answers questions about clips of moving garments, in transformers' own classes.

Of the families with video it is the nearest to LLaVA-Video, for which RRPO was made, and the plainest: a tower that sees frame by
frame, four tokens a frame, one-dimensional positions and a language model that does all the telling of time.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import (
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionImageProcessor,
    LlavaOnevisionProcessor,
    LlavaOnevisionVideoProcessor,
    PreTrainedTokenizerFast,
)

from mmalign.playground import answer_base, chat, moving, moving_questions, photographs, world
from mmalign.playground.fit import FitConfig

EYE = FitConfig(
    steps=3_000, batch_size=64, learning_rate=2e-3, warmup=100, weight_decay=1e-2, ema=0.99, constant=True, seed=51
)
ANSWERS = FitConfig(
    steps=1_600,
    batch_size=12,
    learning_rate=2e-3,
    warmup=100,
    weight_decay=1e-2,
    ema=0.99,
    constant=True,
    seed=52,
    save_every=50,
)
EYE_STREAM, STREAM = 711, 712
PATCH, SIDE, WIDTH = 8, 4, 96
TOKENS_PER_FRAME = 4
PLACES = 4
_MEDIA = chat.VIDEO * (moving.NUM_FRAMES * TOKENS_PER_FRAME + 1)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Every word of the questions and answers about clips is one token."""
    rng = np.random.default_rng(STREAM)
    clips = moving.draw_clips(np.arange(8), range(600), seed=STREAM)
    asked = [
        moving_questions.ask(clip, kind, rng, true=true)
        for clip in clips
        for kind in moving_questions.kinds_of(clip)
        for true in (True, False)
    ]
    return chat.build_tokenizer(text for question in asked for text in (question.text, question.answer))


def build_processor() -> LlavaOnevisionProcessor:
    """Frames of 32×32 pixels become four tokens each; a line break ends a clip. A picture becomes sixteen and a line break twice."""
    as_trained: dict[str, Any] = {
        "size": {"height": world.SIZE, "width": world.SIZE},
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
    }
    return LlavaOnevisionProcessor(
        LlavaOnevisionImageProcessor(image_grid_pinpoints=[[world.SIZE, world.SIZE]], **as_trained),
        build_tokenizer(),
        LlavaOnevisionVideoProcessor(**as_trained),
        num_image_tokens=SIDE**2,
        vision_feature_select_strategy="full",
        chat_template=chat.TEMPLATE,
    )


def build(tokenizer: PreTrainedTokenizerFast, seed: int = 0) -> LlavaOnevisionForConditionalGeneration:
    """An untrained model: 16 patches of 8×8 pixels a frame, a language model of four layers."""
    torch.manual_seed(seed)
    vision = {
        "model_type": "siglip_vision_model",
        "hidden_size": WIDTH,
        "intermediate_size": 128,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "image_size": world.SIZE,
        "patch_size": PATCH,
        "vision_use_head": False,
    }
    special = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("pad", "bos", "eos")}
    text = {
        "model_type": "qwen2",
        "vocab_size": len(tokenizer),
        "hidden_size": WIDTH,
        "intermediate_size": 176,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 1024,
        "initializer_range": 0.05,
        "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0},
    }
    config = LlavaOnevisionConfig(
        vision_config=vision,
        text_config=text | special,
        image_token_index=tokenizer.image_token_id,
        video_token_index=tokenizer.video_token_id,
        image_grid_pinpoints=[[world.SIZE, world.SIZE]],
        tie_word_embeddings=True,
        **special,
    )
    return LlavaOnevisionForConditionalGeneration(config)


def seeing(model: LlavaOnevisionForConditionalGeneration) -> answer_base.Seeing:
    """The model for training: it looks at clips with values in [0, 1], the line break included."""

    def look(clips: Tensor) -> Tensor:
        return model.model.get_video_features(clips * 2 - 1).pooler_output

    return answer_base.Seeing(model, model.model.vision_tower, look, model.config.video_token_id)


def training_world() -> answer_base.World:
    """Clips of the training photographs. Glimpses are single frames: what is there, before what, and where."""
    data = photographs.load("train")

    def draw(rows: Sequence[int]) -> tuple[Tensor, list[Any]]:
        clips = moving.draw_clips(data.labels, rows, seed=STREAM)
        return moving.compose(data, clips), clips

    def glimpse(rows: Sequence[int]) -> tuple[Tensor, Tensor]:
        clips = moving.draw_clips(data.labels, rows, seed=EYE_STREAM)
        frames = [(clip, row % moving.NUM_FRAMES) for clip, row in zip(clips, rows, strict=True)]
        facts = []
        for clip, frame in frames:
            thing, shift = moving.shown_in(clip, frame)
            facts.append([thing.garment, thing.colour, clip.background, *map(_place, shift)])
        return moving.compose_frames(data, frames)[:, None], torch.tensor(facts)

    sizes = (len(photographs.GARMENTS), len(world.COLOURS), len(world.COLOURS), PLACES, PLACES)
    return answer_base.World(moving_questions, draw, glimpse, sizes)


def dialogues(tokenizer: PreTrainedTokenizerFast) -> chat.Chat:
    """Dialogues about a clip of eight frames."""
    return chat.Chat(tokenizer, _MEDIA)


def _place(shift: float) -> int:
    """Which quarter of the way a garment is at."""
    return min(int((shift / (2 * moving.HALF_WAY) + 0.5) * PLACES), PLACES - 1)


def train(
    work_dir: Path,
) -> tuple[LlavaOnevisionForConditionalGeneration, LlavaOnevisionProcessor, list[dict[str, float]]]:
    """Trains eye and answers; the model, its processor and both curves."""
    processor = build_processor()
    model = build(processor.tokenizer)
    parts = seeing(model), training_world(), dialogues(processor.tokenizer)
    return model, processor, answer_base.train(*parts, (EYE, ANSWERS), work_dir, "video")
