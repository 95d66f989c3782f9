"""Trains a reward for scenes: a small CLIP that reads a caption sentence by sentence and has seen none of judge B's photographs.

`train` teaches it what pictures show, by single sentences. `preferences` are composed scenes that the playground's raters compared:
trained on them by its segments it becomes a Denscore, which also knows what raters like whatever was asked.
"""

from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

from mmalign.playground import judges, photographs, raters, scene_text, scenes, tokenizer, world
from mmalign.playground.fit import FitConfig, fit

FIT = FitConfig(steps=1_500, batch_size=64, learning_rate=1e-3, warmup=100, weight_decay=1e-2, ema=0.99, seed=32)
STREAM, PAIR_STREAM = 241, 242
MAX_LENGTH = 32
EXTRA_WEIGHT = 0.3
PLACE_SCALE = 2.0
_CHANGES = ("garment", "colour", "background", "place")


def build_tokenizer() -> CLIPTokenizer:
    """A tokenizer in which every word of a sentence is one token, but for the t-shirt."""
    cells = scenes.draw_scenes(photographs.load("train").labels, torch.arange(1_000), seed=STREAM)
    texts = [scenes.sentence(cells, cell, cell // 4 % 4) for cell in range(len(cells))]
    return tokenizer.learn(texts, vocab_size=700, max_length=MAX_LENGTH)


def build(vocabulary: CLIPTokenizer, seed: int = 0) -> CLIPModel:
    """An untrained CLIP of 0.7 M parameters: 64 patches of 8×8 pixels, sentences of up to 32 tokens.

    Its patches know from the start where they lie. With the usual small embeddings of places, what they show drowns it, and a picture
    stays a bag of colours (docs/log.md).
    """
    torch.manual_seed(seed)
    special = {f"{name}_token_id": getattr(vocabulary, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    size = {"hidden_size": 96, "intermediate_size": 192, "num_attention_heads": 4, "projection_dim": 96}
    length = {"vocab_size": len(vocabulary), "max_position_embeddings": MAX_LENGTH, "num_hidden_layers": 2}
    vision = size | {"image_size": scenes.SIZE, "patch_size": 8, "num_hidden_layers": 4}
    model = CLIPModel(CLIPConfig(text_config=size | special | length, vision_config=vision, projection_dim=96))
    places = model.vision_model.embeddings.position_embedding.weight.data
    waves = _waves(scenes.SIZE // 8)
    places.zero_()[1:, : waves.shape[1]] = PLACE_SCALE * waves
    return model


def train(
    checkpoint: Path | None = None, *, stop_after: int | None = None
) -> tuple[CLIPModel, CLIPTokenizer, list[dict[str, float]]]:
    """Contrastive, two sentences of each scene: against the batch's other scenes, and against themselves with one thing changed.

    Beside it, linear maps read what every cell shows from a picture's embedding, and what a sentence says from the sentence's: so each
    side learns by itself what the two are to agree on. They are not kept.
    """
    data = photographs.load("train").half("A")
    vocabulary = build_tokenizer()
    model = build(vocabulary)
    width, shown = model.config.projection_dim, scene_text.ATTRIBUTES[1:]
    seer, reader = nn.Linear(width, len(scenes.PLACES) * sum(shown)), nn.Linear(width, sum(scene_text.ATTRIBUTES))

    def loss_of(step: int, generator: torch.Generator) -> Tensor:
        rows = torch.arange(step * FIT.batch_size, (step + 1) * FIT.batch_size)
        cells = scenes.draw_scenes(data.labels, rows, seed=STREAM)
        rng = np.random.default_rng([FIT.seed, step])
        places = np.stack([rng.permutation(len(scenes.PLACES))[:2] for _ in rows])
        chosen = (torch.arange(len(rows))[:, None] * len(scenes.PLACES) + torch.from_numpy(places)).flatten()
        texts, _ = told(cells, chosen, rng)
        changed, _ = told(cells, chosen, rng, changed=True)
        pixels = scenes.compose(data, rows, cells) * 2 - 1
        seen, read = _embedded(model, vocabulary, pixels, texts + changed)
        true, false = read.chunk(2)
        scale = model.logit_scale.exp()
        logits, same = scale * seen @ true.T, _fits(cells, chosen)
        gap = scale * (seen.repeat_interleave(2, 0) * (true - false)).sum(1)
        told_of = torch.stack([cells.garment, cells.colour, cells.background], 1)
        cell_guesses = scale * seer(seen).view(-1, sum(shown))
        text_guesses = scale * reader(true)
        said = torch.cat([(chosen % 4)[:, None], told_of[chosen]], 1)
        extra = _guessed(cell_guesses, told_of, shown) + _guessed(text_guesses, said, scene_text.ATTRIBUTES)
        return 0.5 * (_soft(logits, same) + _soft(logits.T, same.T)) + F.softplus(-gap).mean() + EXTRA_WEIGHT * extra

    parts = nn.ModuleList([model, seer, reader])
    curve = fit(parts, loss_of, FIT, checkpoint=checkpoint, stop_after=stop_after, name="scene reward")
    return model, vocabulary, curve


def told(
    cells: world.Scenes, chosen: Int[Tensor, " N"], rng: np.random.Generator, *, changed: bool = False
) -> tuple[list[str], Int[np.ndarray, " N"]]:
    """A sentence of each chosen cell with some of its properties, and what `changed` makes another one: garment, colours or place."""
    what, turn = rng.integers(len(_CHANGES), size=len(chosen)), rng.integers(1, 8, size=len(chosen))
    kept = rng.random((len(chosen), scenes.NUM_PROPERTIES)) < 0.5
    wordings = rng.integers(4, size=len(chosen))
    for number, name in enumerate(_CHANGES[:3]) if changed else ():
        turned, mine = getattr(cells, name).clone(), torch.from_numpy(what == number)
        turned[chosen[mine]] = (turned[chosen[mine]] + torch.from_numpy(turn)[mine]) % 8
        cells = replace(cells, **{name: turned})
    texts = [
        scenes.sentence(cells, cell, int(wording), tuple(map(bool, keep)))
        for cell, wording, keep in zip(chosen.tolist(), wordings, kept, strict=True)
    ]
    for at in np.flatnonzero(what == 3) if changed else ():
        place = int(chosen[at]) % 4
        texts[at] = texts[at].lower().replace(scenes.PLACES[place], scenes.PLACES[(place + 1 + turn[at] % 3) % 4])
    return texts, what


def measure(model: CLIPModel, vocabulary: CLIPTokenizer, number: int = 300) -> dict[str, float]:
    """How often scenes of test photographs fit their sentences better than the same with one thing changed, by what was changed."""
    data, rows = photographs.load("test"), torch.arange(number)
    cells, chosen = scenes.draw_scenes(data.labels, rows, seed=STREAM), torch.arange(4 * number)
    texts, _ = told(cells, chosen, np.random.default_rng(0))
    changed, what = told(cells, chosen, np.random.default_rng(0), changed=True)
    with torch.no_grad():
        seen, read = _embedded(model, vocabulary, scenes.compose(data, rows, cells) * 2 - 1, texts + changed)
    true, false = read.chunk(2)
    right = ((seen.repeat_interleave(4, 0) * (true - false)).sum(1) > 0).numpy()
    return {name: round(float(right[what == i].mean()), 4) for i, name in enumerate(_CHANGES)}


def save(model: CLIPModel, vocabulary: CLIPTokenizer, folder: Path) -> None:
    """Writes a folder that `scorer("clip:FOLDER")` reads."""
    side = {"height": scenes.SIZE, "width": scenes.SIZE}
    pictures = CLIPImageProcessorPil(
        do_resize=True, size=side, do_center_crop=False, image_mean=[0.5] * 3, image_std=[0.5] * 3
    )
    for part in (model, vocabulary, pictures):
        part.save_pretrained(folder)


def preferences(number: int) -> list[dict[str, Any]]:
    """Pairs of composed scenes in Pick-a-Pic's columns, compared by the raters, who look through judge A.

    Each sentence of a pair's caption is true of one of the two pictures, by a coin; pictures are damaged as judges learn to see it.
    """
    data, rng = photographs.load("train").half("A"), np.random.default_rng(PAIR_STREAM)
    rows = torch.arange(2 * number)
    drawn = scenes.draw_scenes(data.labels, rows, seed=PAIR_STREAM)
    generator = torch.Generator().manual_seed(PAIR_STREAM)
    pixels, _ = judges.damaged(scenes.compose(data, rows, drawn), generator)
    side = torch.from_numpy(rng.integers(2, size=(number, 4)))
    picked = ((2 * torch.arange(number)[:, None] + side) * 4 + torch.arange(4)).flatten()
    asked = world.Scenes(*(getattr(drawn, field.name)[picked] for field in fields(drawn)))
    captions = [scenes.caption(asked, row, rng) for row in range(number)]
    liking = _liking(pixels, asked.captions(), rng.integers(raters.NUM_USERS, size=number))
    labels = raters.compare(liking[:, 0], liking[:, 1], rng).tolist()
    images = [Image.fromarray(one) for one in (pixels.movedim(1, -1) * 255).round().byte().numpy()]
    return [
        {"caption": text, "jpg_0": images[2 * i], "jpg_1": images[2 * i + 1], "label_0": label, "label_1": 1 - label}
        for i, (text, label) in enumerate(zip(captions, labels, strict=True))
    ]


def _liking(
    pixels: Float[Tensor, "B 3 64 64"], asked: list[str], user_ids: Int[np.ndarray, " N"]
) -> Float[Tensor, "N 2"]:
    """What the user of each pair thinks of its two pictures: the mean over their cells, each with what it should show."""
    reading = judges.load("A").read(scenes.split(pixels))
    both = [text for at in range(0, len(asked), 4) for _ in range(2) for text in asked[at : at + 4]]
    matched = judges.match(reading, both)
    by_user = torch.stack([raters.utility(taste, reading, matched) for taste in raters.users()])
    mine = torch.from_numpy(user_ids).repeat_interleave(8)
    return by_user[mine, torch.arange(len(both))].view(-1, 2, 4).mean(2)


def _embedded(model: CLIPModel, vocabulary: CLIPTokenizer, pixels: Tensor, texts: list[str]) -> tuple[Tensor, Tensor]:
    """Unit vectors of pictures in [−1, 1] and of texts."""
    tokens = vocabulary(texts, padding="max_length", max_length=MAX_LENGTH, return_tensors="pt").input_ids
    seen = model.get_image_features(pixel_values=pixels).pooler_output
    return F.normalize(seen, dim=1), F.normalize(model.get_text_features(input_ids=tokens).pooler_output, dim=1)


def _waves(side: int) -> Float[Tensor, "P P"]:
    """For each of side² places, row by row, its cosines of side² frequencies, the slow ones larger; without their mean."""
    k = torch.arange(side)
    wave = torch.cos(torch.pi * k[:, None] * (k + 0.5) / side)
    both = torch.einsum("kr,lc->rckl", wave, wave) / (1 + k[:, None] + k)
    return (both - both.mean((0, 1))).reshape(side**2, side**2)


def _fits(cells: world.Scenes, chosen: Int[Tensor, " N"]) -> Float[Tensor, "B N"]:
    """Whether what a chosen cell shows is shown by scene i at the same place."""
    shown = torch.stack([cells.garment, cells.colour, cells.background], 1).unflatten(0, (-1, 4))
    return (shown[:, chosen % 4] == shown.flatten(0, 1)[chosen][None]).all(-1).float()


def _guessed(guesses: Float[Tensor, "N K"], truth: Int[Tensor, "N A"], sizes: Sequence[int]) -> Tensor:
    """Cross-entropies of A attributes, whose guesses stand side by side, summed."""
    parts = zip(guesses.split(list(sizes), 1), truth.unbind(1), strict=True)
    return torch.stack([F.cross_entropy(guess, true) for guess, true in parts]).sum()


def _soft(logits: Tensor, same: Tensor) -> Tensor:
    return F.cross_entropy(logits, same / same.sum(1, keepdim=True))
