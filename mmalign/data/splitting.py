"""Two parts of a source without a prompt in common."""

from __future__ import annotations

import hashlib
from typing import TypeVar

from mmalign.data.answers import AnswerSource
from mmalign.data.pairs import PairSource

Source = TypeVar("Source", PairSource, AnswerSource)


def split_by_prompt(source: Source, held_out: float, *, seed: int = 0) -> tuple[Source, Source]:
    """(rest, held-out part): all rows of a prompt go to the same part, which its hash and `seed` decide.

    Of answers, rows that ask about the same pictures and clips are of one prompt, whatever they ask.

    held_out in (0, 1): the share of prompts held out on average; the share of rows follows how often prompts recur. The
    place of a prompt depends neither on the order of the rows nor on the other prompts, so adding rows moves none.
    Prompts that differ in capitals or white space only are one. Rows without a readable prompt stay in the first part,
    where they are named as bad rows. Rows of a part are counted from 0. Raises ValueError where a part would be empty.
    """
    if not 0 < held_out < 1:
        raise ValueError(f"held_out must lie between 0 and 1, got {held_out}")
    parts: tuple[list[int], list[int]] = ([], [])
    for row, prompt in enumerate(source.prompts()):
        parts[prompt is not None and place_of_prompt(prompt, seed) < held_out].append(row)
    if not parts[0] or not parts[1]:
        empty = "held-out" if parts[0] else "first"
        raise ValueError(
            f"no prompt of {source.name} falls into the {empty} part with held_out={held_out:g}, seed={seed}: "
            "choose others, or a source with more prompts"
        )
    return (
        source.select(parts[0], f"{source.name}[without {held_out:g} of prompts]"),
        source.select(parts[1], f"{source.name}[{held_out:g} of prompts]"),
    )


def place_of_prompt(prompt: str, seed: int) -> float:
    """A number in [0, 1) for a prompt, evenly spread; prompts below a share are held out."""
    same = " ".join(prompt.casefold().split())
    digest = hashlib.sha256(f"split/{seed}/{same}".encode()).digest()
    return int.from_bytes(digest[:6], "big") / 2**48
