"""Judges of answers: both orders, and what is left of a win rate when lengths are held equal."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmalign.data.questions import Question
from mmalign.evaluation.answer_wins import judge_answers, length_controlled
from mmalign.evaluation.answering import Answered, AnswerFile


def questions(number):
    return [Question(row, f"question {row}", (), str(row)) for row in range(number)]


def file(answers, data="d"):
    return AnswerFile(tuple(Answered(row, "", text, True) for row, text in enumerate(answers)), "m", data, {})


def ids(number):
    return [str(row) for row in range(number)]


def test_equal_answers_are_ties_that_nobody_is_asked_about():
    def judge(question, first, second):
        raise AssertionError("asked")

    found = judge_answers(judge, questions(4), file(["x"] * 4), file(["x"] * 4))
    assert found.verdicts == ("same",) * 4
    assert found.win_rate.rate == found.controlled.rate == 0.5 and found.inconsistent == 0


def test_a_judge_by_place_is_told_and_counts_for_nobody():
    found = judge_answers(lambda question, first, second: "1", questions(3), file("abc"), file("xyz"))
    assert found.inconsistent == 1 and found.win_rate is None and found.controlled is None


def test_the_better_answer_wins_in_both_orders():
    def judge(question, first, second):
        if question.row == 4:
            return "both"
        return " 1\n" if first > second else "2"

    found = judge_answers(judge, questions(5), file("babab"), file("abbbb"))
    assert found.verdicts == ("a", "b", "same", "b", "same")
    assert found.win_rate.rate == pytest.approx((1 + 0.5 + 0.5) / 5)
    assert judge_answers(judge, questions(5), file("babac"), file("abbbb")).unreadable == pytest.approx(1 / 4)


def test_a_judge_who_likes_length_has_a_positive_weight_of_it():
    ours, theirs = ["long enough" if row % 2 else "no" for row in range(20)], ["medium"] * 20
    found = judge_answers(
        lambda question, a, b: "1" if len(a) > len(b) else "2", questions(20), file(ours), file(theirs)
    )
    assert found.win_rate.rate == 0.5 and found.controlled.length_weight > 1


def test_a_judge_may_say_numbers():
    found = judge_answers(
        lambda question, first, second: 1 if first == "a" else 2, questions(2), file("ab"), file("ba")
    )
    assert found.verdicts == ("a", "b")


def test_answers_to_other_data_are_refused():
    with pytest.raises(ValueError, match="answer different data"):
        judge_answers(lambda *_: "1", questions(1), file("a"), file("b", data="e"))
    for unfinished in [file("a"), file("bb")], [file("aa"), file("b")]:
        with pytest.raises(ValueError, match="1 answers do not belong to these 2 questions row by row"):
            judge_answers(lambda *_: "1", questions(2), *unfinished)


def test_without_an_effect_of_length_the_rate_is_the_plain_one():
    # Three wins in four at each of two lengths.
    wins, longer = [1, 1, 1, 0] * 20, [5, 5, 5, 5, -5, -5, -5, -5] * 10
    found = length_controlled(wins, longer, ids(80))
    assert found.rate == pytest.approx(0.75, abs=1e-9) and found.length_weight == pytest.approx(0, abs=1e-9)
    # The sandwich is then the binomial error, on the scale of log-odds.
    error = math.sqrt(1 / (80 * 0.75 * 0.25)) * math.sqrt(80 / 79)
    half = math.log(found.high / (1 - found.high)) - math.log(3)
    assert half == pytest.approx(1.9905 * error, rel=1e-3)


def test_a_judge_of_length_alone_says_nothing_once_lengths_are_equal():
    longer = np.array([3, 1, 2, -3, -1, -2] * 20)
    found = length_controlled((longer > 0).astype(float), longer, ids(120))
    assert found.rate == pytest.approx(0.5, abs=1e-9) and found.length_weight > 4
    # And where one side's answers are longer more often, its plain rate is high and the controlled one is not.
    more = np.concatenate([longer, np.full(120, 2)])
    biased = length_controlled((more > 0).astype(float), more, ids(240))
    assert (more > 0).mean() == 0.75 and biased.low < 0.5 < biased.high


@pytest.mark.parametrize(("wins", "longer"), [([1, 0] * 50, [10, -10] * 50), ([1, 1, 1, 0] * 25, [100, 101] * 50)])
def test_where_no_answers_of_about_equal_length_were_compared_the_interval_says_that_nothing_is_known(wins, longer):
    """A judge who always takes the longer of two answers that differ much, or a side that is always longer by as much."""
    found = length_controlled(wins, longer, ids(100))
    assert found.low < 0.05 and found.high > 0.95


@pytest.mark.parametrize("taste", [8.0, 1.0])
def test_the_interval_holds_what_it_promises_also_where_length_decides_nearly_everything(taste):
    """Drawn anew a hundred times from θ = ½; answers differ by ten letters, or one side's are longer by three deviations."""
    rng, covered = np.random.default_rng(0), 0
    for _ in range(100):
        longer = rng.choice([-10.0, 10.0], 100) if taste > 1 else rng.normal(3, 1, 100)
        chance = 1 / (1 + np.exp(-(0.5 + taste * np.tanh(longer / longer.std()))))
        found = length_controlled((rng.random(100) < chance).astype(float), longer, ids(100))
        covered += found.low <= 1 / (1 + math.exp(-0.5)) <= found.high
    assert covered >= 90


def test_ties_do_not_widen_what_they_make_narrow():
    found = length_controlled([1, 0] * 5 + [0.5] * 90, [1, -1] * 50, ids(100))
    plain = length_controlled([1, 0] * 50, [1, -1, -1, 1] * 25, ids(100))
    assert found.high - found.low < 0.5 * (plain.high - plain.low)


@pytest.mark.parametrize(("wins", "longer"), [([], []), ([1, math.nan], [1, 2]), ([1, 0], [1, math.inf])])
def test_outcomes_and_lengths_that_are_no_numbers_are_refused(wins, longer):
    with pytest.raises(ValueError, match="wins|longer"):
        length_controlled(wins, longer, ids(len(wins)))


def test_the_fit_finds_what_the_outcomes_were_drawn_from():
    rng = np.random.default_rng(0)
    longer = rng.normal(3, 10, 20000)
    chance = 1 / (1 + np.exp(-(0.4 + 1.5 * np.tanh(longer / longer.std()))))
    found = length_controlled((rng.random(20000) < chance).astype(float), longer, ids(20000))
    assert found.low < 1 / (1 + math.exp(-0.4)) < found.high and found.high - found.low < 0.04
    assert found.length_weight == pytest.approx(1.5, abs=0.1)


@given(st.lists(st.tuples(st.sampled_from([0.0, 0.5, 1.0]), st.integers(-50, 50)), min_size=2, max_size=30))
def test_swapping_the_sides_mirrors_the_rate(rows):
    wins, longer = (np.array(column, dtype=float) for column in zip(*rows, strict=True))
    found = length_controlled(wins, longer, ids(len(rows)))
    mirrored = length_controlled(1 - wins, -longer, ids(len(rows)))
    assert found.rate == pytest.approx(1 - mirrored.rate, abs=1e-6)
    assert found.low == pytest.approx(1 - mirrored.high, abs=1e-6)
    assert 0 <= found.low <= found.rate <= found.high <= 1
    # The unit of length does not matter.
    assert length_controlled(wins, 7 * longer, ids(len(rows))).rate == pytest.approx(found.rate, abs=1e-6)


def test_questions_of_one_clip_are_one_draw():
    wins, longer = [0] * 10 + [1] * 30, [1, -1] * 20
    apart = length_controlled(wins, longer, ids(40))
    together = length_controlled(wins, longer, [str(row // 10) for row in range(40)])
    assert apart.rate == pytest.approx(together.rate, abs=1e-6)
    assert together.high - together.low > 1.5 * (apart.high - apart.low)
    alone = length_controlled(wins, longer, ["x"] * 40)
    assert (alone.low, alone.high) == (0, 1)
