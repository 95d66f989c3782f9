"""Trains the scene world's Stable Diffusion, a stand-in of SD1.5: it knows sentences and places, and no text beyond 77 tokens.

First the text encoder alone, which learns to tell what a sentence has said so far; then encoder and UNet together, on pictures with
captions of one or two sentences that fit into 77 tokens. The UNet begins as the first world's.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

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
_FIT = FitConfig(
    steps=500,
    batch_size=32,
    learning_rate=5e-4,
    warmup=100,
    weight_decay=1e-3,
    ema=0.998,
    constant=True,
    seed=22,
    save_every=100,
)
STAGES = (
    _FIT,
    replace(_FIT, steps=300, warmup=25, seed=23),
    replace(_FIT, steps=1_500, batch_size=16, warmup=25, seed=24),
)
EXTRA_WEIGHT = 0.03
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


def sentence_numbers(tokens: Tensor) -> Tensor:
    """(B, 77): the number of the sentence in which each token stands, its full stop included; −1 for begin, end and padding."""
    vocabulary = build_tokenizer()
    full_stop = tokens == vocabulary(".").input_ids[1]
    number = full_stop.cumsum(1) - full_stop.long()
    inside = (number < full_stop.sum(1, keepdim=True)) & (tokens != vocabulary.bos_token_id)
    return torch.where(inside, number, -1)


def fits(caption: str) -> bool:
    """Whether a caption is at most 77 tokens long, begin and end counted."""
    return len(build_tokenizer()(caption, verbose=False).input_ids) <= MAX_LENGTH


def train_text_encoder(
    checkpoint: Path | None = None, *, stop_after: int = TEXT_STEPS
) -> tuple[CLIPTextModel, list[dict[str, float]]]:
    """Every token of a sentence learns to tell place, garment and colours of that sentence, as far as they were said."""
    encoder = build_text_encoder()
    heads = nn.Linear(encoder.config.hidden_size, sum(_ATTRIBUTES))
    parts = nn.ModuleDict({"encoder": encoder, "heads": heads})
    labels = photographs.load("train").labels

    def loss_of(step: int, generator: torch.Generator) -> Tensor:
        rows = torch.arange(step * TEXT_FIT.batch_size, (step + 1) * TEXT_FIT.batch_size)
        captions = draw_captions(scenes.draw_scenes(labels, rows, seed=TEXT_STREAM), rows, seed=TEXT_STREAM)
        tokens = tokens_of(captions)
        asked = [[(a.place, a.garment, a.colour, a.background) for a in scenes.read_caption(c)] for c in captions]
        said = torch.tensor([one + one[-1:] * (2 - len(one)) for one in asked])
        number = sentence_numbers(tokens)
        inside = number >= 0
        target = said.gather(1, number.clamp(min=0)[..., None].expand(-1, -1, len(_ATTRIBUTES)))[inside]
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
    work_dir: Path | None = None,
    *,
    stop_after: int | None = None,
    steps: int | None = None,
) -> tuple[StableDiffusionPipeline, list[dict[str, float]]]:
    """Trains the first world's `unet` and a text encoder that was taught alone; the assembled pipeline and the loss curve.

    Stage 1 is noise prediction. It learns what captions speak of, and nothing of where: exchanging the places in a caption changed
    its error by less than 0.1 %. Stage 2 makes all noise levels count alike and asks two things more of the places in a told cell:
    that they look at the sentence about it, and that a linear map reads its garment and colours from their features. Under little noise
    both are learned by what is seen there, under much they are not: a place does not know where it is. Stage 3 also asks it that, at
    every layer that looks at text. `steps` and `stop_after` are stage 3's.
    """
    unet.register_to_config(sample_size=scenes.SIZE // 4)
    parts = nn.ModuleDict({"unet": unet.to(memory_format=torch.channels_last), "text_encoder": text_encoder})
    batches = TrainingScenes(vae)
    scheduler = base.noise_scheduler()
    curve: list[dict[str, float]] = []
    for number, config in enumerate(STAGES, start=1):
        torch.manual_seed(config.seed)
        width = unet.config.block_out_channels[-1]
        if number == 2:
            parts["reader"] = nn.Conv2d(width, sum(_ATTRIBUTES[1:]), 1)
        if number == 3:
            parts["finders"] = nn.ModuleList(nn.Linear(width, len(scenes.PLACES)) for _ in range(3))
            config = replace(config, steps=steps or config.steps)
        checkpoint = None if work_dir is None else work_dir / f"scene-base-{number}.pt"
        entries = fit(
            parts,
            partial(_loss, parts, batches, scheduler.alphas_cumprod, config.batch_size),
            config,
            checkpoint=checkpoint,
            stop_after=stop_after if number == 3 else None,
            name=f"scene base, stage {number}",
        )
        curve += [{"stage": number, **entry} for entry in entries]
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


def _loss(
    parts: nn.ModuleDict,
    batches: TrainingScenes,
    alphas_cumprod: Tensor,
    batch_size: int,
    step: int,
    generator: torch.Generator,
) -> Tensor:
    """Timesteps have a density that grows with t: what is asked for is decided in the noise, and cleaning up is known already."""
    latents, captions = batches(step, batch_size)
    dropped = torch.rand(len(captions), generator=generator) < base.PROMPT_DROPOUT
    captions = ["" if d else c for c, d in zip(captions, dropped, strict=True)]
    noise = torch.randn(latents.shape, generator=generator)
    timestep = (torch.rand(len(latents), generator=generator).sqrt() * len(alphas_cumprod)).long()
    signal, noise_level = (level[timestep, None, None, None].sqrt() for level in (alphas_cumprod, 1 - alphas_cumprod))
    tokens = tokens_of(captions)
    with watched(parts["unet"]) as (features, askers, gazes):
        embedding = parts["text_encoder"](tokens).last_hidden_state
        prediction = parts["unet"](signal * latents + noise_level * noise, timestep, embedding).sample
    error = (prediction - noise).square()
    if "reader" not in parts:
        return error.mean()
    guesses = parts["reader"](features[0]).split(_ATTRIBUTES[1:], 1)
    told = told_map(captions, features[0].shape[-1])
    extra = sum(F.cross_entropy(guess, told[:, i], ignore_index=-1) for i, guess in enumerate(guesses))
    extra = extra + looking_away(gazes, captions, tokens)
    if "finders" in parts:
        places = where(askers[0].shape[1]).expand(len(captions), -1)
        found = [finder(asker).mT for finder, asker in zip(parts["finders"], askers, strict=True)]
        extra = extra + torch.stack([F.cross_entropy(guess, places) for guess in found]).mean()
    return (noise_level / signal * error).mean() + EXTRA_WEIGHT * extra


@contextmanager
def watched(unet: UNet2DConditionModel) -> Iterator[tuple[list[Tensor], list[Tensor], list[Tensor]]]:
    """Three lists that a forward pass fills: features (B, C, H, W) of the first upward block, and of each layer of that block and the
    middle one that looks at text: what looks (B, H·W, C), and where to, a mean over heads (B, H·W, 77)."""
    features: list[Tensor] = []
    askers: list[Tensor] = []
    gazes: list[Tensor] = []

    def record(attention: nn.Module, args: tuple[Tensor], options: dict[str, Any], output: Tensor) -> None:
        hidden, text = args[0] if args else options["hidden_states"], options["encoder_hidden_states"]
        query = attention.to_q(hidden).unflatten(2, (attention.heads, -1)).transpose(1, 2)
        key = attention.to_k(text).unflatten(2, (attention.heads, -1)).transpose(1, 2)
        askers.append(hidden)
        gazes.append((query @ key.mT * attention.scale).softmax(-1).mean(1))

    blocks = (unet.mid_block, unet.up_blocks[0])
    looking = [module for block in blocks for name, module in block.named_modules() if name.endswith("attn2")]
    hooks = [module.register_forward_hook(record, with_kwargs=True) for module in looking]
    hooks.append(unet.up_blocks[0].register_forward_hook(lambda *called: features.append(called[-1])))
    try:
        yield features, askers, gazes
    finally:
        for hook in hooks:
            hook.remove()


def looking_away(gazes: list[Tensor], captions: list[str], tokens: Tensor) -> Tensor:
    """−log of the attention that places of told cells pay to the sentence about them; the mean over places and layers."""
    number = sentence_numbers(tokens)
    place = torch.full_like(number, -1)
    for row, text in enumerate(captions):
        for position, one in enumerate(scenes.read_caption(text) if text else ()):
            place[row, number[row] == position] = one.place
    losses = []
    for gaze in gazes:
        own = place[:, None, :] == where(gaze.shape[1])[None, :, None]
        paid = (gaze * own).sum(2)
        losses.append(-paid[own.any(2)].clamp(min=1e-6).log().mean())
    return torch.stack(losses).mean()


def where(number: int) -> Tensor:
    """(number,): for each of that many positions of a square picture, row by row, the cell in which it lies."""
    half = int(number**0.5) // 2
    return scenes.join(torch.arange(len(scenes.PLACES))[:, None, None, None].expand(-1, 1, half, half)).flatten()


def told_map(captions: list[str], side: int) -> Tensor:
    """(B, 3, side, side): what each place of a picture shows by its caption (garment, colour, background); −1 in untold cells."""
    told = torch.full((len(captions), len(scenes.PLACES), 3), -1)
    for row, text in enumerate(captions):
        for one in scenes.read_caption(text) if text else ():
            told[row, one.place] = torch.tensor([one.garment, one.colour, one.background])
    return scenes.join(told.flatten(0, 1)[..., None, None].expand(-1, -1, side // 2, side // 2))
