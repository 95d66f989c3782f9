"""Pairs made of mistakes: the truth against what was said, in words that could be true, with the errors marked."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from mmalign.data.answer_records import Picture, VideoClip
from mmalign.data.answers import load_answers
from mmalign.playground import answer_pairs, answer_worlds
from mmalign.playground.answer_pairs import Mistake, as_rows, could_be_true, tagged

WORLDS = ("vision", "video")


class _OneBehind:
    """Answers a question with the truth about the row before, and notes which media it was shown."""

    def __init__(self, world: Any, split: Any) -> None:
        self.questions = answer_worlds.questions_of(world)
        self.world, self.split = world, split
        self.shown: list[Any] = []

    def __call__(self, model: Any, processor: Any, media: Sequence[Any], texts: Sequence[str]) -> list[str]:
        self.shown += media
        before = answer_worlds.see(self.world, self.split, range(500, 564), seed=1)
        rng = np.random.default_rng(0)

        def said(at: int, text: str) -> str:
            if text.split()[0] in ("is", "are", "does", "do"):
                return "no" if at % 3 else "yes"
            other = before[at % 64].shown
            for kind in self.questions.kinds_of(other):
                question = self.questions.ask(other, kind, rng)
                if question.text.split()[:2] == text.split()[:2]:
                    return question.answer
            return "nothing"

        return [said(at, text) for at, text in enumerate(texts)]


@pytest.mark.parametrize("perturbed", [False, True])
@pytest.mark.parametrize("world", WORLDS)
def test_found_mistakes_are_wrong_usable_and_of_all_kinds(
    world: Any, perturbed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    answerer = _OneBehind(world, "test")
    monkeypatch.setattr(answer_pairs, "answer", answerer)
    mistakes, told = answer_pairs.find(None, None, world, "test", 60, perturbed=perturbed)
    assert len(mistakes) == 60 and told["usable"] >= 60 and told["answers"] * (1 + perturbed) == len(answerer.shown)
    assert all(could_be_true(world, one) and one.pred != one.answer for one in mistakes)
    assert len({(one.row, one.question, one.pred) for one in mistakes}) == 60
    kinds = Counter(one.kind for one in mistakes)
    assert kinds["describe"] == 30 and set(kinds) == set(answer_worlds.questions_of(world).KINDS)
    truths = Counter((one.kind, one.answer) for one in mistakes if one.answer in ("yes", "no"))
    assert all(
        abs(truths[kind, "yes"] - truths[kind, "no"]) <= 1 for kind in answer_worlds.questions_of(world).YES_OR_NO
    )
    assert {one.perturbed for one in mistakes} == {perturbed}
    # This one answers the same whatever it sees.
    assert all(one.clear == (one.pred if perturbed else None) for one in mistakes)


@pytest.mark.parametrize("world", WORLDS)
def test_the_same_is_asked_about_a_row_clean_and_perturbed(world: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    answerer = _OneBehind(world, "train")
    monkeypatch.setattr(answer_pairs, "answer", answerer)
    clean, hidden = (answer_pairs.ask(None, None, world, "train", [5], perturbed=view) for view in (False, True))
    asked = [[(one.mistake.question, one.mistake.answer) for one in side] for side in (clean, hidden)]
    assert asked[0] == asked[1] and len(asked[0]) == 1 + answer_pairs.KINDS_A_ROW
    (seen,) = answer_worlds.see(world, "train", [5], seed=answer_pairs._STREAM[world])
    same = [_bytes(medium) == _bytes(seen.medium) for medium in answerer.shown]
    assert same == [True] * len(clean) + [False] * len(hidden)


def test_too_few_mistakes_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answer_pairs, "answer", lambda model, processor, media, texts: ["yes"] * len(texts))
    monkeypatch.setattr(answer_pairs, "_MOST_ROWS", {"test": 64})
    with pytest.raises(RuntimeError, match="the test rows of vision hold fewer than 60 mistakes"):
        answer_pairs.find(None, None, "vision", "test", 60, perturbed=True)


@pytest.mark.parametrize("world", WORLDS)
def test_a_pair_shows_the_clean_row_and_marks_the_errors(world: Any) -> None:
    (seen,) = answer_worlds.see(world, "test", [9], seed=answer_pairs._STREAM[world])
    truth = answer_worlds.questions_of(world).ask(seen.shown, "describe", np.random.default_rng(0))
    background = truth.answer.split()[-2]
    pred = truth.answer.replace(background, "mauve")
    rows = as_rows(world, "test", [Mistake(9, "describe", truth.text, truth.answer, pred, True)])
    pair = load_answers(rows)[0]
    (medium,) = pair.media
    assert isinstance(medium, Picture if world == "vision" else VideoClip) and _bytes(medium) == _bytes(seen.medium)
    assert medium == seen.medium or world == "vision"
    assert pair.prompt[0].parts[1] == truth.text and (pair.chosen, pair.rejected) == (truth.answer, pred)
    assert [pair.chosen[slice(*span)] for span in pair.chosen_marks or ()] == [background]
    assert [pair.rejected[slice(*span)] for span in pair.rejected_marks or ()] == ["mauve"]


def test_what_could_be_true() -> None:
    def usable(kind: str, answer: str, pred: str, world: Any = "video") -> bool:
        return could_be_true(world, Mistake(0, kind, "", answer, pred, False))

    assert usable("exists", "yes", "no") and not usable("exists", "yes", "red") and not usable("exists", "yes", "")
    assert usable("way", "left", "up") and not usable("way", "left", "bag")
    assert usable("first", "red bag", "red boot") and not usable("first", "red bag", "bag red")
    one, two = "red bag moving up, pink background", "red bag moving up, then red boot moving up, pink background"
    assert usable("describe", one, one.replace("red", "blue")) and not usable("describe", one, two)
    assert not usable("describe", one, one.replace("moving", "red"))
    assert usable("describe", "red bag, pink background", "red boot, pink background", "vision")


def test_words_that_differ_are_tagged_without_punctuation() -> None:
    chosen, rejected = "red bag moving up, pink background", "red t-shirt moving left, pink background"
    assert tagged(chosen, rejected) == (
        "red <MASK>bag</MASK> moving <MASK>up</MASK>, pink background",
        "red <MASK>t-shirt</MASK> moving <MASK>left</MASK>, pink background",
    )


def _bytes(medium: Any) -> list[bytes]:
    return [frame.tobytes() for frame in ([medium.image] if isinstance(medium, Picture) else medium.frames)]
