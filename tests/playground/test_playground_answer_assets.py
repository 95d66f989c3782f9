"""The models that answer and their mistakes, as they ship: what is told of them is so."""

import json
from functools import cache
from typing import Any, get_args

import numpy as np
import pytest
from transformers import Lfm2VlForConditionalGeneration, LlavaOnevisionForConditionalGeneration

from mmalign.playground import answer_pairs, answer_worlds, answering
from mmalign.playground.paths import CURVES
from mmalign.training.loading import playground_folder
from mmalign.training.token_pipeline import TokenPipeline

WORLDS = ("vision", "video")


@cache
def _pipe(world: Any) -> TokenPipeline:
    return TokenPipeline.from_pretrained(f"playground-{world}")


@pytest.mark.parametrize("world", WORLDS)
def test_small_and_in_the_classes_of_transformers(world: Any) -> None:
    classes = {"vision": Lfm2VlForConditionalGeneration, "video": LlavaOnevisionForConditionalGeneration}
    assert type(_pipe(world).model) is classes[world]
    files = list(playground_folder(f"playground-{world}").rglob("*"))
    assert all(file.stat().st_size < 0.65e6 for file in files)


@pytest.mark.parametrize("world", WORLDS)
def test_answers_held_out_questions_as_often_as_told_and_not_always(world: Any) -> None:
    told = json.loads((CURVES / f"{world}-base-measured.json").read_text())
    assert 0.8 < told["accuracy"] < 0.95 and told["hallucination_pairs"] < 0.95
    assert set(told["by_kind"]) == set(answer_worlds.questions_of(world).KINDS)
    few = answering.held_out(_pipe(world), world, rows=range(12))
    assert abs(few["accuracy"] - told["accuracy"]) < 0.12


@pytest.mark.parametrize("kept", get_args(answer_pairs.Which))
@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize("world", WORLDS)
def test_chosen_is_the_truth_and_rejected_a_marked_error(world: Any, split: Any, kept: Any) -> None:
    mistakes = answer_pairs.load_mistakes(world, split, kept)
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
    pairs = answer_pairs.load(world, split, mistakes=kept)
    assert len(pairs) == len(mistakes)
    for at in range(0, len(pairs), 40):
        pair = pairs[at]
        assert pair.chosen_marks and pair.rejected_marks and len(pair.chosen_marks) == len(pair.rejected_marks)


@pytest.mark.parametrize("world", WORLDS)
def test_any_mistakes_are_of_the_questions_of_perturbed_views_and_clear_ones_where_there_are(world: Any) -> None:
    views, any_ = (answer_pairs.load_mistakes(world, "train", kept) for kept in ("perturbed", "any"))
    asked = [[(one.row, one.question, one.answer) for one in side] for side in (views, any_)]
    assert asked[0] == asked[1]
    assert [one.pred for one in any_] == [one.pred if one.clear is None else one.clear for one in views]
    clear = sum(not one.perturbed for one in any_)
    assert clear == sum(one.clear is not None for one in views) and 100 < clear < 300


@pytest.mark.parametrize("world", WORLDS)
def test_the_mistakes_are_this_models_own(world: Any) -> None:
    pipe = _pipe(world)
    clean = answer_pairs.load_mistakes(world, "test", "clear")[:12]
    seen = answer_worlds.see(world, "test", [one.row for one in clean], seed=answer_pairs._STREAM[world])
    said = answering.answer(pipe.model, pipe.processor, [one.medium for one in seen], [one.question for one in clean])
    # Of two answers that are nearly alike, another processor's arithmetic may take the other.
    assert sum(text.strip() == one.pred for text, one in zip(said, clean, strict=True)) >= len(clean) - 1
