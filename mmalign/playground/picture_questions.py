"""Questions about the pictures of the first world, each with its truth.

Yes or no: exists, coloured, behind. Open: garment, colour, background. And the whole picture: describe.
"""

import re

import numpy as np
import torch

from mmalign.playground import world
from mmalign.playground.photographs import GARMENTS
from mmalign.playground.questions import NO, YES, Question, exists, verb
from mmalign.playground.world import COLOURS

YES_OR_NO = ("exists", "coloured", "behind")
OPEN = ("garment", "colour", "background")
KINDS = (*YES_OR_NO, *OPEN, "describe")
FACT_SIZES = (len(GARMENTS), len(COLOURS), len(COLOURS))
_DESCRIBING = 3
_SENTENCE = re.compile(rf"({'|'.join(COLOURS)}) ({'|'.join(GARMENTS)}), ({'|'.join(COLOURS)}) background")

Shown = tuple[int, int, int]


def shown(scenes: world.Scenes) -> list[Shown]:
    """(garment, colour, background) of each picture."""
    facts = torch.stack([scenes.garment, scenes.colour, scenes.background], 1)
    return [(garment, colour, background) for garment, colour, background in facts.tolist()]


def kinds_of(picture: Shown) -> tuple[str, ...]:
    """The kinds of question that can be asked about a picture: all."""
    return KINDS


def ask(picture: Shown, kind: str, rng: np.random.Generator, *, true: bool = True) -> Question:
    """A question of a kind about a picture. true: whether the answer to a yes-or-no one is yes."""
    garment, colour, background = picture

    def unless_true(truth: int, number: int) -> int:
        return truth if true else int(rng.choice([index for index in range(number) if index != truth]))

    match kind:
        case "exists":
            named, there = unless_true(garment, len(GARMENTS)), garment
            text = exists(named)
        case "coloured":
            named, there = unless_true(colour, len(COLOURS)), colour
            text = f"{verb(garment, 'is', 'are')} {COLOURS[named]}?"
        case "behind":
            named, there = unless_true(background, len(COLOURS)), background
            text = f"is the background {COLOURS[named]}?"
        case "garment":
            return Question(kind, "what is shown?", GARMENTS[garment], (-1, garment))
        case "colour":
            return Question(kind, f"what colour {verb(garment, 'is', 'are')}?", COLOURS[colour], (-1, colour))
        case "background":
            return Question(kind, "what colour is the background?", COLOURS[background], (-1, background))
        case "describe":
            return Question(kind, "describe the picture.", world.caption(garment, colour, background, _DESCRIBING))
        case _:
            raise ValueError(f"kind must be one of {KINDS}, got {kind!r}")
    return Question(kind, text, YES if true else NO, (named, there))


def hallucination_pair(picture: Shown, kind: str, rng: np.random.Generator) -> tuple[Question, Question]:
    """A basic question, whose answer is yes, and its hallucinated twin; both must be answered right."""
    return ask(picture, kind, rng), ask(picture, kind, rng, true=False)


def is_description(text: str) -> bool:
    """Whether a text is a sentence that describes some picture."""
    return _SENTENCE.fullmatch(text) is not None


def facts(picture: Shown) -> list[int]:
    """Garment, colour and background."""
    return list(picture)
