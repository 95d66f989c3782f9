"""Questions about clips of moving garments, and one-sentence descriptions, each with its truth.

Yes or no: exists, coloured, moves, order. Open: colour, way, background, first. And the whole clip: describe.
"""

import re

import numpy as np

from mmalign.playground.moving import WAYS, Clip
from mmalign.playground.photographs import GARMENTS
from mmalign.playground.questions import NO, YES, Question, exists, verb
from mmalign.playground.world import COLOURS

YES_OR_NO = ("exists", "coloured", "moves", "order")
OPEN = ("colour", "way", "background", "first")
KINDS = (*YES_OR_NO, *OPEN, "describe")
_OF_TWO = ("order", "first")
_SENTENCE = re.compile(
    rf"(?P<colour>{'|'.join(COLOURS)}) (?P<garment>{'|'.join(GARMENTS)}) moving (?P<way>{'|'.join(WAYS)})"
)
_BACKGROUND = re.compile(rf"(?P<colour>{'|'.join(COLOURS)}) background")


def kinds_of(clip: Clip) -> tuple[str, ...]:
    """The kinds of question that can be asked about a clip: what comes first only where there are two."""
    return tuple(kind for kind in KINDS if len(clip.things) == 2 or kind not in _OF_TWO)


def ask(clip: Clip, kind: str, rng: np.random.Generator, *, true: bool = True) -> Question:
    """A question of a kind about a clip, about which of its things `rng` draws. true: whether the answer to a yes-or-no one is yes."""
    at = int(rng.integers(len(clip.things)))
    thing = clip.things[at]

    def other(number: int, *but: int) -> int:
        return int(rng.choice([index for index in range(number) if index not in but]))

    there = -1
    match kind:
        case "exists":
            named = thing.garment if true else other(len(GARMENTS), *(t.garment for t in clip.things))
            text = exists(named)
        case "coloured":
            named, there = thing.colour if true else other(len(COLOURS), thing.colour), thing.colour
            text = f"{verb(thing.garment, 'is', 'are')} {COLOURS[named]}?"
        case "moves":
            named, there = thing.way if true else other(len(WAYS), thing.way), thing.way
            text = f"{verb(thing.garment, 'does', 'do')} move {WAYS[named]}?"
        case "order":
            named, late = (thing.garment for thing in (clip.things if true else clip.things[::-1]))
            there = clip.things[0].garment
            text = f"{verb(named, 'does', 'do')} appear before the {GARMENTS[late]}?"
        case "colour":
            asked = f"what colour {verb(thing.garment, 'is', 'are')}?"
            return Question(kind, asked, COLOURS[thing.colour], (-1, thing.colour))
        case "way":
            asked = f"which way {verb(thing.garment, 'does', 'do')} move?"
            return Question(kind, asked, WAYS[thing.way], (-1, thing.way))
        case "background":
            return Question(kind, "what colour is the background?", COLOURS[clip.background], (-1, clip.background))
        case "first":
            first = clip.things[0]
            return Question(kind, "what appears first?", f"{COLOURS[first.colour]} {GARMENTS[first.garment]}")
        case "describe":
            return Question(kind, "describe the clip.", describe(clip))
        case _:
            raise ValueError(f"kind must be one of {KINDS}, got {kind!r}")
    return Question(kind, text, YES if true else NO, (named, there))


def hallucination_pair(clip: Clip, kind: str, rng: np.random.Generator) -> tuple[Question, Question]:
    """A basic question, whose answer is yes, and its hallucinated twin about the same thing; both must be answered right."""
    state = rng.bit_generator.state
    basic = ask(clip, kind, rng)
    rng.bit_generator.state = state
    return basic, ask(clip, kind, rng, true=False)


def describe(clip: Clip) -> str:
    """ "red sneaker moving left, then blue bag moving up, green background"."""
    told = [f"{COLOURS[t.colour]} {GARMENTS[t.garment]} moving {WAYS[t.way]}" for t in clip.things]
    return f"{', then '.join(told)}, {COLOURS[clip.background]} background"


def is_description(text: str) -> bool:
    """Whether a text is a sentence that `describe` could say of some clip."""
    *told, behind = text.replace(", then ", ", ").split(", ")
    return bool(0 < len(told) <= 2 and all(map(_SENTENCE.fullmatch, told)) and _BACKGROUND.fullmatch(behind))


def facts(clip: Clip) -> list[int]:
    """Garment, colour and way of both things, then the background; −1 for what is not there."""
    told = [fact for thing in clip.things for fact in (thing.garment, thing.colour, thing.way)]
    return [*told, *[-1] * (6 - len(told)), clip.background]


FACT_SIZES = (*(len(GARMENTS), len(COLOURS), len(WAYS)) * 2, len(COLOURS))
