"""The scene world's tokenizer and text encoder, which learns by itself to tell what each sentence has said so far."""

from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from mmalign.playground import photographs, scenes, tokenizer, world
from mmalign.playground.fit import FitConfig, fit

FIT = FitConfig(steps=1_200, batch_size=32, learning_rate=2e-3, warmup=100, weight_decay=1e-2, seed=21, curve_every=50)
STEPS = 750  # of the schedule's 1,200: by then it told all attributes of 200 held-out captions.
MAX_LENGTH = 77
VOCAB_SIZE = 340
STREAM = 212
TWO_SENTENCES = 0.75
ATTRIBUTES = (len(scenes.PLACES), len(photographs.GARMENTS), len(world.COLOURS), len(world.COLOURS))


@cache
def build_tokenizer() -> CLIPTokenizer:
    """A tokenizer with so few merges that most garments are spelled, and that 77 tokens hold about half of a long caption."""
    rows = torch.arange(1_000)
    cells = scenes.draw_scenes(photographs.load("train").labels, rows, seed=STREAM)
    captions = [scenes.caption(cells, row, np.random.default_rng([STREAM, row])) for row in rows.tolist()]
    return tokenizer.learn(captions, vocab_size=VOCAB_SIZE, max_length=MAX_LENGTH)


def build_text_encoder(seed: int = 0) -> CLIPTextModel:
    """An untrained text encoder of 0.3 M parameters.

    Its positions begin as sinusoids: what "the token before" is need not be learned 77 times.
    """
    torch.manual_seed(seed)
    vocabulary = build_tokenizer()
    width = 96
    encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(vocabulary),
            hidden_size=width,
            intermediate_size=2 * width,
            num_hidden_layers=3,
            num_attention_heads=4,
            max_position_embeddings=MAX_LENGTH,
            projection_dim=width,
            bos_token_id=vocabulary.bos_token_id,
            eos_token_id=vocabulary.eos_token_id,
            pad_token_id=vocabulary.pad_token_id,
        )
    )
    angle = torch.arange(MAX_LENGTH)[:, None] * 10_000 ** (-torch.arange(width // 2) / (width // 2))
    embeddings = encoder.text_model.embeddings if hasattr(encoder, "text_model") else encoder.embeddings
    spread = embeddings.token_embedding.weight.std()
    embeddings.position_embedding.weight.data = torch.cat([angle.sin(), angle.cos()], 1) * spread * 2**0.5
    return encoder


def tokens_of(captions: list[str]) -> Tensor:
    """(B, 77) token ids, padded."""
    return build_tokenizer()(captions, padding="max_length", max_length=MAX_LENGTH, return_tensors="pt").input_ids


def fits(caption: str) -> bool:
    """Whether a caption is at most 77 tokens long, begin and end counted."""
    return len(build_tokenizer()(caption, verbose=False).input_ids) <= MAX_LENGTH


def sentence_numbers(tokens: Tensor) -> Tensor:
    """(B, 77): the number of the sentence in which each token stands, its full stop included; −1 for begin, end and padding."""
    vocabulary = build_tokenizer()
    full_stop = tokens == vocabulary(".").input_ids[1]
    number = full_stop.cumsum(1) - full_stop.long()
    inside = (number < full_stop.sum(1, keepdim=True)) & (tokens != vocabulary.bos_token_id)
    return torch.where(inside, number, -1)


def draw_captions(cells: world.Scenes, rows: Tensor, *, seed: int) -> list[str]:
    """One sentence or, three times as often, two about each scene; those of row i are drawn from (seed, i)."""
    captions = []
    for scene, row in enumerate(rows.tolist()):
        rng = np.random.default_rng([seed, row])
        number = 1 + int(rng.random() < TWO_SENTENCES)
        captions.append(scenes.short_caption(cells, scene, number, rng, fits))
    return captions


def train(checkpoint: Path | None = None, *, stop_after: int = STEPS) -> tuple[CLIPTextModel, list[dict[str, float]]]:
    """Every token of a sentence learns to tell place, garment and colours of that sentence, as far as they were said."""
    encoder = build_text_encoder()
    heads = nn.Linear(encoder.config.hidden_size, sum(ATTRIBUTES))
    parts = nn.ModuleDict({"encoder": encoder, "heads": heads})
    labels = photographs.load("train").labels

    def loss_of(step: int, generator: torch.Generator) -> Tensor:
        rows = torch.arange(step * FIT.batch_size, (step + 1) * FIT.batch_size)
        captions = draw_captions(scenes.draw_scenes(labels, rows, seed=STREAM), rows, seed=STREAM)
        tokens = tokens_of(captions)
        asked = [[(a.place, a.garment, a.colour, a.background) for a in scenes.read_caption(c)] for c in captions]
        said = torch.tensor([one + one[-1:] * (2 - len(one)) for one in asked])
        number = sentence_numbers(tokens)
        inside = number >= 0
        target = said.gather(1, number.clamp(min=0)[..., None].expand(-1, -1, len(ATTRIBUTES)))[inside]
        guesses = heads(encoder(tokens).last_hidden_state[inside]).split(ATTRIBUTES, 1)
        return torch.stack([F.cross_entropy(guess, target[:, i]) for i, guess in enumerate(guesses)]).sum()

    curve = fit(parts, loss_of, FIT, checkpoint=checkpoint, stop_after=stop_after, name="scene text")
    return encoder, curve
