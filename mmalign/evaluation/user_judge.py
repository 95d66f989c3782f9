"""Would this user prefer it? A judge who has seen a few of a user's pairs predicts the choice, asked in both orders (PPD's protocol).

The judge is any callable: a language model behind an API, a local one, a person. One that answers by place and not by picture
contradicts itself when the order is swapped; such answers are counted by themselves and never as half a win.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from mmalign.data.users import Shot
from mmalign.evaluation.verdicts import Verdicts, in_both_orders
from mmalign.evaluation.win_rate import win_rate

if TYPE_CHECKING:
    from PIL import Image

Verdict = Literal["target", "other", "inconsistent", "unreadable"]


@dataclass(frozen=True)
class Example:
    """A pair of the user as the judge sees it: two pictures in an order drawn by lot, and which of them, 1 or 2, the user chose."""

    prompt: str
    first: Image.Image
    second: Image.Image
    chosen: int


@dataclass(frozen=True)
class Question:
    """What the judge is asked: of which of two pictures, target or other, the user with these shots would say it is the better one."""

    user: str
    shots: tuple[Shot, ...]
    prompt: str
    target: Image.Image
    other: Image.Image


# (the user's examples, the prompt, first picture, second picture) → what the judge says: "1", "2", or something that is neither.
Judge = Callable[[Sequence[Example], str, "Image.Image", "Image.Image"], str]


@dataclass(frozen=True, slots=True)
class UserVerdicts(Verdicts):
    """verdicts: one a question. win_rate: of the target among those that the judge answered alike in both orders, None for none."""

    verdicts: tuple[Verdict, ...]

    def __str__(self) -> str:
        told = "none was answered alike in both orders"
        if self.win_rate is not None:
            found = self.win_rate
            told = (
                f"target preferred in {found.rate:.1%} [{found.low:.1%}, {found.high:.1%}] of {found.num_comparisons} "
                f"that were answered alike in both orders"
            )
        changed = f"{self.inconsistent:.1%} of {len(self.verdicts)} changed with the order"
        return f"{told}; {changed}, {self.unreadable:.1%} could not be read"


def judge_for_users(
    judge: Judge, questions: Sequence[Question], *, seed: int = 0, confidence: float = 0.95
) -> UserVerdicts:
    """Asks every question twice, the order of the two pictures swapped; the order in the user's examples is drawn by lot.

    The interval treats a user's questions as one draw. To know the judge itself, ask it of held-out pairs of people, the chosen
    picture as target. What the judge raises is not caught.
    """
    if not questions:
        raise ValueError("there are no questions to ask")
    verdicts = tuple(
        _verdict(judge, question, np.random.default_rng([seed, i])) for i, question in enumerate(questions)
    )
    told = [(verdict, question.user) for verdict, question in zip(verdicts, questions, strict=True)]
    clear = [(float(verdict == "target"), user) for verdict, user in told if verdict in ("target", "other")]
    rate = None
    if clear:
        wins, users = zip(*clear, strict=True)
        rate = win_rate(wins, [1 - win for win in wins], users, confidence=confidence, seed=seed)
    return UserVerdicts(verdicts, rate)


def _verdict(judge: Judge, question: Question, rng: np.random.Generator) -> Verdict:
    examples = [_example(shot, bool(rng.integers(2))) for shot in question.shots]

    def ask(first: Image.Image, second: Image.Image) -> str:
        return judge(examples, question.prompt, first, second)

    found = in_both_orders(ask, question.target, question.other)
    return "target" if found == "one" else found


def _example(shot: Shot, swapped: bool) -> Example:
    if swapped:
        return Example(shot.prompt, shot.rejected, shot.preferred, 2)
    return Example(shot.prompt, shot.preferred, shot.rejected, 1)
