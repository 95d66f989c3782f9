"""Looking at several scorers: Holm's correction, the p-values it takes, and what both promise under the null."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmalign.evaluation import conclusion, holm, paired_difference, scorer_line, win_rate, win_rate_difference
from mmalign.evaluation.holm import corrected
from mmalign.evaluation.intervals import as_clusters, proportion_interval, student_t, student_t_tails

WINS = [(100, 100 + 2 * row) for row in range(1, 31)]


def test_holms_own_steps():
    """Sorted 0.01, 0.02, 0.03, 0.04 times 4, 3, 2, 1, none below the one before it."""
    assert holm([0.04, 0.01, 0.03, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert holm([0.3]) == [0.3] and holm([]) == []
    assert holm([0.9, 0.6]) == [1.0, 1.0]


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8), st.floats(0.001, 0.5))
def test_holm_rejects_what_the_step_down_procedure_rejects(p_values, alpha):
    rejected, order = set(), sorted(range(len(p_values)), key=lambda at: p_values[at])
    for place, at in enumerate(order):
        if p_values[at] * (len(p_values) - place) > alpha:
            break
        rejected.add(at)
    assert {at for at, adjusted in enumerate(holm(p_values)) if adjusted <= alpha} == rejected


def test_a_training_scorer_neither_concludes_nor_costs_the_held_out_ones():
    found = corrected([0.001, 0.03, 0.02], [True, False, False])
    assert [p.held_out for p in found] == [None, pytest.approx(0.04), pytest.approx(0.04)]
    assert [p.all for p in found] == pytest.approx([0.003, 0.04, 0.04])


@pytest.mark.parametrize("num_prompts", [1, 5, 100])
def test_identical_sides_have_p_1(num_prompts):
    scores, prompts = np.linspace(0, 1, num_prompts), np.arange(num_prompts)
    assert win_rate(scores, scores, prompts).p_value == 1.0
    assert paired_difference(scores, scores, prompts).p_value == 1.0
    assert win_rate_difference(scores, scores, 1 - scores, prompts).p_value == 1.0


def test_as_many_wins_as_losses_have_p_1():
    a = np.tile([0.0, 1.0], 100)
    assert win_rate(a, 1 - a, np.arange(200)).p_value == 1.0


def test_six_of_six_and_five_of_five():
    """A sign test gives 0.0625 and 0.031 with the other 95 and 94 tied; the p-value stands on the same sides of 0.05."""
    tied = np.zeros(100)
    for wins, significant in ((5, False), (6, True)):
        a = tied.copy()
        a[:wins] = 1.0
        assert (win_rate(a, tied, np.arange(100)).p_value <= 0.05) == significant


def test_the_p_value_of_many_prompts_is_the_normal_one():
    a = np.array([1.0] * 540 + [0.0] * 460)
    exact = math.erfc(0.08 * math.sqrt(1000 / 2) / math.sqrt(1 - 0.08**2))
    assert win_rate(a, 1 - a, np.arange(1000), num_resamples=20_000).p_value == pytest.approx(exact, rel=0.15)


@pytest.mark.parametrize("num_resamples", [100, 2000])
def test_a_clear_difference_is_still_one_among_a_hundred(num_resamples):
    """No resample of 500 prompts comes near 50 %: their number must not be what the p-value is."""
    a = np.array([1.0] * 300 + [0.0] * 200)
    found = win_rate(a, 1 - a, np.arange(500), num_resamples=num_resamples)
    assert found.method == "bootstrap" and found.p_value == pytest.approx(
        math.erfc(0.1 / math.sqrt(0.48 / 500)), rel=0.5
    )
    assert max(holm([found.p_value] * 100)) < 0.001


@pytest.mark.parametrize("degrees", [1, 2, 3, 9, 400])
@pytest.mark.parametrize("tails", [0.5, 0.05, 1e-4])
def test_tails_of_student_t_invert_its_quantile(degrees, tails):
    assert student_t_tails(student_t(1 - tails / 2, degrees), degrees) == pytest.approx(tails, rel=1e-6)


score = st.floats(-2, 2, width=16)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(score, score, st.integers(0, 60)), min_size=2, max_size=120), st.sampled_from([0.8, 0.95]))
def test_a_small_p_value_means_that_the_interval_leaves_out_one_half(rows, confidence):
    a, b, prompts = map(list, zip(*rows, strict=True))
    found = win_rate(a, b, prompts, confidence=confidence, num_resamples=200)
    assert 0 < found.p_value <= 1
    if found.p_value < 1 - confidence - 1e-9:
        assert found.shows_difference
    if found.method == "wilson" and found.p_value > 1 - confidence + 1e-9:
        assert not found.shows_difference
    mirrored = win_rate(b, a, prompts, confidence=confidence, num_resamples=200)
    assert mirrored.p_value == pytest.approx(found.p_value)


@pytest.mark.parametrize(("num_prompts", "num_scorers"), [(25, 4), (120, 4)])
def test_the_family_wise_error_stays_below_5_percent_under_the_null(num_prompts, num_scorers):
    """Independent scorers, which see no difference, are the hard case; uncorrected, 19 % of evaluations would err."""
    rng, trials, groups = (
        np.random.default_rng(11),
        400,
        as_clusters(np.repeat(np.arange(num_prompts), 2), 2 * num_prompts),
    )
    own = rng.beta(1.0, 1.0, size=(trials, num_scorers, num_prompts))
    outcomes = rng.binomial(1, np.repeat(own, 2, axis=-1)).astype(float)
    p_values = [
        [proportion_interval(row, groups, num_resamples=1000, confidence=0.95, seed=0).p_value for row in trial]
        for trial in outcomes
    ]
    uncorrected = np.mean(np.min(p_values, axis=1) <= 0.05)
    family = np.mean([min(holm(trial)) <= 0.05 for trial in p_values])
    assert uncorrected > 0.13
    assert family <= 0.05 + 2 * math.sqrt(0.05 * 0.95 / trials)


def test_a_result_tells_both_corrections_and_the_conclusion(make_result):
    result = make_result(WINS)
    red, blue, green = result.ranked_scorers
    assert red.p_corrected.held_out == pytest.approx(2 * red.win_rate.p_value)
    assert blue.p_corrected.held_out == 1.0 and green.p_corrected.held_out is None
    assert red.p_corrected.all == pytest.approx(3 * red.win_rate.p_value)
    assert conclusion(result) == (
        "Corrected for looking at 2 held-out scorers (Holm, 5% for any error): aligned wins more often by red."
    )
    assert scorer_line(result, red).endswith("corrected p < 0.001: aligned wins more often")
    assert scorer_line(result, blue).endswith("corrected p = 1: no difference is shown")
    assert scorer_line(result, green).startswith("green (seen in training): 0.0%")
    assert scorer_line(result, green).endswith("base wins more often")
    lost = make_result([(after, before) for before, after in WINS], trained_on=("green", "blue"))
    assert conclusion(lost) == "", "one held-out scorer needs no correction"
