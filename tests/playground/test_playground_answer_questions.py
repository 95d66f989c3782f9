"""Held-out questions about the worlds: each kind, twins with opposite truths, and no right answer that the world does not have."""

from typing import Any

import pytest

from mmalign.playground import answer_pairs, answer_questions, answer_worlds

WORLDS = ("vision", "video")


@pytest.mark.parametrize("world", WORLDS)
def test_every_kind_is_asked_and_what_is_answered_by_yes_or_no_in_twins(world: Any) -> None:
    source = answer_questions.load(world, rows=range(6))
    questions = answer_worlds.questions_of(world)
    asked = [source[row] for row in range(len(source))]
    assert {one.kind for one in asked} == set(questions.KINDS)
    assert len({one.cluster for one in asked}) == 6
    twins: dict[str, list[Any]] = {}
    for one in asked:
        assert (one.pair is not None) == (one.kind in questions.YES_OR_NO)
        if one.pair is not None:
            twins.setdefault(one.pair, []).append(one)
    for yes, no in twins.values():
        assert (yes.right, no.right) == (("yes",), ("no",))
        assert (yes.cluster, yes.kind) == (no.cluster, no.kind) and yes.text != no.text


@pytest.mark.parametrize("world", WORLDS)
def test_a_part_is_the_beginning_of_the_whole_and_splits_differ(world: Any) -> None:
    few, more = answer_questions.load(world, rows=range(2)), answer_questions.load(world, rows=range(4))
    assert [few[row] for row in range(len(few))] == [more[row] for row in range(len(few))]
    assert few.fingerprint() != more.fingerprint() != answer_questions.load(world, "train", rows=range(4)).fingerprint()
    assert len(answer_questions.load(world, rows=range(4), max_rows=3)) == 3


@pytest.mark.parametrize("world", WORLDS)
def test_pairs_of_some_kinds_are_these_and_no_others(world: Any) -> None:
    all_pairs = answer_pairs.load(world, "test")
    kept = answer_pairs.load(world, "test", kinds=("colour", "describe"))
    wanted = [pair for pair in answer_pairs.load_mistakes(world, "test") if pair.kind in ("colour", "describe")]
    assert 0 < len(kept) == len(wanted) < len(all_pairs)
    assert [kept[row].rejected for row in range(len(kept))] == [one.pred for one in wanted]
