"""Long captions of scenes, to align with and to be measured on: four sentences, of which 77 tokens hold two."""

from dataclasses import replace
from functools import cache
from itertools import count, islice

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from mmalign.playground import pairs, scene_text, scenes, world
from mmalign.playground.photographs import GARMENTS, Split

NUM_TRAIN = 2_000
NUM_TEST = 560
_STREAM = {"train": 221, "test": 222}
_SHORT_STREAM = {"train": 231, "test": 232}


@cache
def prompts() -> pairs.Prompts:
    """Captions of four sentences whose third garment is named beyond token 77.

    Their cells show what the first world's prompts of the same split ask for: what is asked in `test` is never asked in `train`.
    """
    return pairs.Prompts(train=_long_captions("train", NUM_TRAIN), test=_long_captions("test", NUM_TEST))


def short_prompts(split: Split, number: int, sentences: int) -> list[str]:
    """`number` captions of one or two sentences, as the base was trained on, of what `split` asks for."""
    drawn = (_draw(split, row, _SHORT_STREAM[split]) for row in range(number))
    return [scenes.short_caption(cells, 0, sentences, rng, scene_text.fits) for cells, rng in drawn]


def names_beyond(text: str, sentence: int) -> bool:
    """Whether the garment of a caption's sentence (from 0) begins beyond token 77, the begin token counted."""
    parts = text.split(".")
    garment = next(word for word in parts[sentence].replace(",", " ").split() if word in GARMENTS)
    before = ".".join(parts[:sentence]) + "." + parts[sentence].split(garment)[0]
    return len(scene_text.build_tokenizer()(before, verbose=False).input_ids) - 1 >= scene_text.MAX_LENGTH


def recoloured(cells: world.Scenes, split: Split, rng: np.random.Generator) -> world.Scenes:
    """Cells of the same garments in colours, on backgrounds, in which `split` asks for them."""
    asked = _asked(split)
    picked = torch.stack(
        [(of := asked[asked[:, 0] == garment])[int(rng.integers(len(of)))] for garment in cells.garment]
    )
    return replace(cells, colour=picked[:, 1], background=picked[:, 2])


def _long_captions(split: Split, number: int) -> list[str]:
    """Rows 0, 1, … of the split's stream, as far as `number` of them are long enough."""
    drawn = (_draw(split, row, _STREAM[split]) for row in count())
    texts = (scenes.caption(cells, 0, rng) for cells, rng in drawn)
    return list(islice((text for text in texts if names_beyond(text, 2)), number))


def _draw(split: Split, row: int, seed: int) -> tuple[world.Scenes, np.random.Generator]:
    """One scene whose four cells show what `split` asks for, all else drawn from (seed, row); and a generator for its caption."""
    rng = np.random.default_rng([seed, row])
    asked = _asked(split)
    garment, colour, background = asked[rng.integers(len(asked), size=len(scenes.PLACES))].unbind(1)
    cells = scenes.draw_scenes(np.zeros(1, np.int64), torch.tensor([row]), seed=seed)
    return replace(cells, garment=garment, colour=colour, background=background), rng


@cache
def _asked(split: Split) -> Int[Tensor, "N 3"]:
    """Every (garment, colour, background) that the first world's prompts of `split` ask for."""
    return torch.tensor(sorted({world.read_caption(text) for text in getattr(pairs.prompts(), split)}))
