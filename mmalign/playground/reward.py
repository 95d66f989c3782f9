"""Trains the playground's reward: a tiny CLIP on captioned photographs, in transformers' `CLIPModel` layout.

It knows whether a picture fits its caption, and nothing of cleanness or of anybody's taste.
"""

from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

from mmalign.playground import photographs, tokenizer, world
from mmalign.playground.fit import FitConfig, fit

FIT = FitConfig(steps=1500, batch_size=128, learning_rate=1e-3, warmup=200, weight_decay=1e-2, ema=0.99, seed=14)
STREAM = 401


def build(vocabulary: CLIPTokenizer, seed: int = 0) -> CLIPModel:
    """An untrained CLIP of 0.6 M parameters: 16 patches of 8×8 pixels, captions of up to 24 tokens."""
    torch.manual_seed(seed)
    special = {
        "bos_token_id": vocabulary.bos_token_id,
        "eos_token_id": vocabulary.eos_token_id,
        "pad_token_id": vocabulary.pad_token_id,
    }
    size = {"hidden_size": 96, "intermediate_size": 192, "num_attention_heads": 4, "projection_dim": 64}
    text = (
        size
        | special
        | {"vocab_size": len(vocabulary), "num_hidden_layers": 2, "max_position_embeddings": tokenizer.MAX_LENGTH}
    )
    vision = size | {"image_size": world.SIZE, "patch_size": 8, "num_hidden_layers": 4}
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=64))


def train(checkpoint: Path | None = None) -> tuple[CLIPModel, CLIPTokenizer, list[dict[str, float]]]:
    """Contrastive training; equal captions in a batch count as each other's right answer."""
    data = photographs.load("train")
    vocabulary = tokenizer.build()
    model = build(vocabulary)

    def loss_of(step: int, generator: torch.Generator) -> Tensor:
        rows = torch.arange(step * FIT.batch_size, (step + 1) * FIT.batch_size)
        scenes = world.draw_scenes(data.labels, rows, seed=STREAM)
        pixels = world.compose(data, rows, scenes) * 2 - 1
        tokens = vocabulary(
            scenes.captions(), padding="max_length", max_length=tokenizer.MAX_LENGTH, return_tensors="pt"
        )
        logits = model(input_ids=tokens.input_ids, pixel_values=pixels).logits_per_image
        shown = torch.stack([scenes.garment, scenes.colour, scenes.background], 1)
        same = (shown[:, None] == shown[None]).all(-1).float()
        target = same / same.sum(1, keepdim=True)
        return 0.5 * (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target))

    curve = fit(model, loss_of, FIT, checkpoint=checkpoint, name="reward")
    return model, vocabulary, curve
