"""Trains the scene world's Stable Diffusion, a stand-in of SD1.5: it knows sentences and places, and no text beyond 77 tokens.

First the text encoder alone, which learns to tell what a sentence has said so far; then encoder and UNet together, on pictures with
captions of one or two sentences that fit into 77 tokens. The UNet begins as the first world's.
"""

from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from mmalign.playground import base, photographs, scenes, tokenizer, world
from mmalign.playground.fit import FitConfig, fit

TEXT_FIT = FitConfig(
    steps=1_200, batch_size=32, learning_rate=2e-3, warmup=100, weight_decay=1e-2, seed=21, curve_every=50
)
FIT = FitConfig(
    steps=2_000,
    batch_size=32,
    learning_rate=5e-4,
    warmup=100,
    weight_decay=1e-3,
    ema=0.998,
    constant=True,
    seed=22,
    save_every=100,
)
TEXT_STEPS = 750  # of the schedule's 1,200: by then it tells everything that was said.
MAX_LENGTH = 77
VOCAB_SIZE = 340
STREAM = 211
TEXT_STREAM = 212
NUM_ROWS = 12_000
TWO_SENTENCES = 0.75
_BLOCK = 500
_ATTRIBUTES = (len(scenes.PLACES), len(photographs.GARMENTS), len(world.COLOURS), len(world.COLOURS))


@cache
def build_tokenizer() -> CLIPTokenizer:
    """A tokenizer with so few merges that most garments are spelled, and that 77 tokens hold about half of a long caption."""
    rows = torch.arange(1_000)
    cells = scenes.draw_scenes(photographs.load("train").labels, rows, seed=TEXT_STREAM)
    captions = [scenes.caption(cells, row, np.random.default_rng([TEXT_STREAM, row])) for row in rows.tolist()]
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


def train_text_encoder(
    checkpoint: Path | None = None, *, stop_after: int = TEXT_STEPS
) -> tuple[CLIPTextModel, list[dict[str, float]]]:
    """Every token of a sentence learns to tell place, garment and colours of that sentence, as far as they were said."""
    vocabulary, encoder = build_tokenizer(), build_text_encoder()
    heads = nn.Linear(encoder.config.hidden_size, sum(_ATTRIBUTES))
    parts = nn.ModuleDict({"encoder": encoder, "heads": heads})
    stop = vocabulary(".").input_ids[1]
    labels = photographs.load("train").labels

    def loss_of(step: int, generator: torch.Generator) -> Tensor:
        rows = torch.arange(step * TEXT_FIT.batch_size, (step + 1) * TEXT_FIT.batch_size)
        captions = draw_captions(scenes.draw_scenes(labels, rows, seed=TEXT_STREAM), rows, seed=TEXT_STREAM)
        tokens = tokens_of(captions)
        asked = [[(a.place, a.garment, a.colour, a.background) for a in scenes.read_caption(c)] for c in captions]
        said = torch.tensor([one + one[-1:] * (2 - len(one)) for one in asked])
        full_stop = tokens == stop
        number = full_stop.cumsum(1) - full_stop.long()
        inside = (number < full_stop.sum(1, keepdim=True)) & (tokens != vocabulary.bos_token_id)
        target = said.gather(1, number.clamp(max=1)[..., None].expand(-1, -1, len(_ATTRIBUTES)))[inside]
        guesses = heads(encoder(tokens).last_hidden_state[inside]).split(_ATTRIBUTES, 1)
        return sum(F.cross_entropy(guess, target[:, i]) for i, guess in enumerate(guesses))

    curve = fit(parts, loss_of, TEXT_FIT, checkpoint=checkpoint, stop_after=stop_after, name="scene text")
    return encoder, curve


def draw_captions(cells: world.Scenes, rows: Tensor, *, seed: int) -> list[str]:
    """One sentence or, three times as often, two about each scene; those of row i are drawn from (seed, i)."""
    captions = []
    for scene, row in enumerate(rows.tolist()):
        rng = np.random.default_rng([seed, row])
        number = 1 + int(rng.random() < TWO_SENTENCES)
        captions.append(scenes.short_caption(cells, scene, number, rng, fits))
    return captions


class TrainingScenes:
    """Latents and cells of the training stream's scenes, encoded in blocks when first asked for and kept."""

    def __init__(self, vae: AutoencoderKL) -> None:
        self.vae, self.data = vae, photographs.load("train")
        self._blocks: dict[int, Tensor] = {}

    @torch.no_grad()
    def _block(self, index: int) -> Tensor:
        if index not in self._blocks:
            rows = torch.arange(index * _BLOCK, (index + 1) * _BLOCK)
            cells = scenes.draw_scenes(self.data.labels, rows, seed=STREAM)
            pixels = world.compose(self.data, scenes.cell_rows(rows), cells) * 2 - 1
            latents = torch.cat([self.vae.encode(part).latent_dist.mean for part in pixels.split(250)])
            self._blocks[index] = scenes.join(latents * self.vae.config.scaling_factor)
        return self._blocks[index]

    def __call__(self, step: int, batch_size: int) -> tuple[Tensor, list[str]]:
        """(B, 4, 16, 16) latents and B captions of a step; scenes come again after `NUM_ROWS`, with other captions."""
        draws = torch.arange(step * batch_size, (step + 1) * batch_size)
        rows = draws % NUM_ROWS
        latents = torch.stack([self._block(row // _BLOCK)[row % _BLOCK] for row in rows.tolist()])
        cells = scenes.draw_scenes(self.data.labels, rows, seed=STREAM)
        return latents, draw_captions(cells, draws, seed=STREAM)


def train(
    vae: AutoencoderKL,
    unet: UNet2DConditionModel,
    text_encoder: CLIPTextModel,
    checkpoint: Path | None = None,
    *,
    stop_after: int | None = None,
    steps: int | None = None,
) -> tuple[StableDiffusionPipeline, list[dict[str, float]]]:
    """Trains the first world's `unet` and a text encoder that was taught alone, by noise prediction; the pipeline and the loss curve.

    Timesteps are drawn with a density that grows with t: what is asked for is decided in the noise, and cleaning up is known already.
    """
    unet.register_to_config(sample_size=scenes.SIZE // 4)
    parts = nn.ModuleDict({"unet": unet.to(memory_format=torch.channels_last), "text_encoder": text_encoder})
    scheduler = base.noise_scheduler()
    signal, noise_level = scheduler.alphas_cumprod.sqrt(), (1 - scheduler.alphas_cumprod).sqrt()
    batches = TrainingScenes(vae)
    config = replace(FIT, steps=steps) if steps else FIT

    def loss_of(step: int, generator: torch.Generator) -> Tensor:
        latents, captions = batches(step, config.batch_size)
        dropped = torch.rand(len(captions), generator=generator) < base.PROMPT_DROPOUT
        tokens = tokens_of(["" if d else c for c, d in zip(captions, dropped, strict=True)])
        noise = torch.randn(latents.shape, generator=generator)
        timestep = (torch.rand(len(latents), generator=generator).sqrt() * len(signal)).long()
        noised = signal[timestep][:, None, None, None] * latents + noise_level[timestep][:, None, None, None] * noise
        prediction = unet(noised, timestep, text_encoder(tokens).last_hidden_state).sample
        return (prediction - noise).square().mean()

    curve = fit(parts, loss_of, config, checkpoint=checkpoint, stop_after=stop_after, name="scene base")
    pipe = StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=build_tokenizer(),
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    return pipe, curve
