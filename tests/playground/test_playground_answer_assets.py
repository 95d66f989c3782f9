"""The models that answer and their mistakes, as they ship: what is told of them is so."""

import json
from functools import cache
from typing import Any

import numpy as np
import pytest
from transformers import Lfm2VlForConditionalGeneration, LlavaOnevisionForConditionalGeneration

from mmalign.data.answers import load_answers
from mmalign.playground import answer_pairs, answer_worlds, answering, build
from mmalign.playground.answer_pairs import Mistake
from mmalign.playground.paths import CURVES

WORLDS = ("vision", "video")


@cache
def _model(world: Any) -> tuple[Any, Any]:
    return answering.load(build.ANSWERERS[world])


def _mistakes(world: Any, split: Any) -> list[Mistake]:
    return [Mistake(**row) for row in json.loads(answer_pairs.path_of(world, split).read_text())]


@pytest.mark.parametrize("world", WORLDS)
def test_small_and_in_the_classes_of_transformers(world: Any) -> None:
    classes = {"vision": Lfm2VlForConditionalGeneration, "video": LlavaOnevisionForConditionalGeneration}
    assert type(_model(world)[0]) is classes[world]
    files = list(build.ANSWERERS[world].rglob("*"))
    assert all(file.stat().st_size < 0.65e6 for file in files)


@pytest.mark.parametrize("world", WORLDS)
def test_answers_held_out_questions_as_often_as_told_and_not_always(world: Any) -> None:
    told = json.loads((CURVES / f"{world}-base-measured.json").read_text())
    assert 0.8 < told["accuracy"] < 0.95 and told["hallucination_pairs"] < 0.95
    assert set(told["by_kind"]) == set(answer_worlds.questions_of(world).KINDS)
    few = answering.held_out(*_model(world), world, number=12)
    assert abs(few["accuracy"] - told["accuracy"]) < 0.12


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize("world", WORLDS)
def test_chosen_is_the_truth_and_rejected_a_marked_error(world: Any, split: Any) -> None:
    mistakes = _mistakes(world, split)
    assert len(mistakes) == answer_pairs.NUMBER[split]
    assert len({(one.row, one.question, one.pred) for one in mistakes}) == len(mistakes)
    seen = answer_worlds.see(world, split, [one.row for one in mistakes], seed=answer_pairs._STREAM[world])
    questions = answer_worlds.questions_of(world)
    for mistake, row in zip(mistakes, seen, strict=True):
        asked = [questions.ask(row.shown, mistake.kind, np.random.default_rng(seed), true=true)
                 for seed in range(40) for true in (True, False)]  # fmt: skip
        assert mistake.answer in {one.answer for one in asked if one.text == mistake.question} | (
            # No is the truth of whatever is not there; 40 draws may miss the one that was asked about.
            {"no"} if mistake.question not in {one.text for one in asked if one.answer == "yes"} else set()
        )
        assert answer_pairs.could_be_true(world, mistake) and mistake.pred != mistake.answer
    pairs = load_answers(answer_pairs.load(world, split))
    assert len(pairs) == len(mistakes)
    for at in range(0, len(pairs), 40):
        pair = pairs[at]
        assert pair.chosen_marks and pair.rejected_marks and len(pair.chosen_marks) == len(pair.rejected_marks)


@pytest.mark.parametrize("world", WORLDS)
def test_the_mistakes_are_this_models_own(world: Any) -> None:
    model, processor = _model(world)
    clean = [one for one in _mistakes(world, "test") if not one.perturbed][:12]
    seen = answer_worlds.see(world, "test", [one.row for one in clean], seed=answer_pairs._STREAM[world])
    said = answering.answer(model, processor, [one.medium for one in seen], [one.question for one in clean])
    # Of two answers that are nearly alike, another processor's arithmetic may take the other.
    assert sum(text.strip() == one.pred for text, one in zip(said, clean, strict=True)) >= len(clean) - 1
