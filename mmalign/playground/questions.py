"""What is asked about a picture or a clip, what is true, and whether an answer says it."""

import re
from dataclasses import dataclass

from mmalign.playground.photographs import GARMENTS

YES, NO = "yes", "no"
WORD = re.compile(r"[\w-]+")
PLURAL = ("trousers",)


@dataclass(frozen=True)
class Question:
    """kind: what it is about; answer: the truth.

    compared: what a yes-or-no question names and what is shown instead of it, as indices of one list, so that yes is their being the
    same; −1 where there is no such thing. Of an open question only what is shown.
    """

    kind: str
    text: str
    answer: str
    compared: tuple[int, int] = (-1, -1)


def is_right(question: Question, answer: str) -> bool:
    """Whether an answer is the true one: its first word for yes or no, else all its words."""
    said = words(answer)
    if question.answer in (YES, NO):
        return said[:1] == [question.answer]
    return said == words(question.answer)


def words(text: str) -> list[str]:
    """The words of a text in lower case, without punctuation."""
    return WORD.findall(text.lower())


def verb(garment: int, singular: str, plural: str) -> str:
    """ "does the sneaker", "do the trousers"."""
    name = GARMENTS[garment]
    return f"{plural if name in PLURAL else singular} the {name}"


def exists(garment: int) -> str:
    """Whether a garment is there."""
    name = GARMENTS[garment]
    return f"are there {name}?" if name in PLURAL else f"is there a {name}?"
