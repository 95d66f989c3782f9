"""Win rates and their intervals: closed forms, symmetry, and coverage by simulation."""

import math
from statistics import NormalDist

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmalign.evaluation import paired_difference, share_difference, win_rate, win_rate_difference
from mmalign.evaluation.intervals import (
    as_clusters,
    bootstrap_means,
    clustered_standard_error,
    effective_comparisons,
    student_t,
    student_t_tails,
)


def outcomes(wins: int, ties: int, losses: int):
    """Scores of the two sides with so many wins, ties and losses for the first, one prompt each."""
    a = np.array([2.0] * wins + [1.0] * ties + [0.0] * losses)
    return a, np.ones(len(a)), np.arange(len(a))


def test_counts_and_rate():
    rate = win_rate([1.0, 2.0, 3.0, 4.0], [0.0, 2.0, 5.0, 1.0], ["a", "b", "c", "d"])
    assert (rate.wins, rate.ties, rate.losses) == (2, 1, 1)
    assert rate.rate == 0.625
    assert (rate.num_comparisons, rate.num_clusters, rate.confidence) == (4, 4, 0.95)


def test_tie_margin_turns_close_scores_into_ties():
    a, b = [1.0, 1.2, 1.6], [1.1, 1.0, 1.0]
    assert win_rate(a, b, [0, 1, 2]).ties == 0
    rate = win_rate(a, b, [0, 1, 2], tie_margin=0.25)
    assert (rate.wins, rate.ties, rate.losses) == (1, 2, 0)
    assert rate.rate == pytest.approx(2 / 3)


def test_tensors_of_any_dtype_are_accepted():
    rate = win_rate(torch.tensor([1.0, 0.0], dtype=torch.bfloat16), torch.tensor([0.5, 0.5]), torch.tensor([0, 1]))
    assert rate.rate == 0.5


def test_all_wins_gives_wilsons_interval_at_the_number_of_prompts():
    """30 prompts, all won with 4 pictures each: Wilson's lower end n / (n + z²), z being Student's t for 29 degrees."""
    rate = win_rate(np.ones(120), np.zeros(120), np.repeat(np.arange(30), 4))
    z = 2.0452296
    assert rate.method == "wilson"
    assert rate.high == 1.0
    assert rate.low == pytest.approx(30 / (30 + z * z), abs=1e-4)


def test_all_ties_is_not_an_interval_of_no_width():
    """No decisive comparison among 100: by the rule of three the decisive share is below 3 %, the rate within ±1.5 %."""
    rate = win_rate(*outcomes(0, 100, 0))
    assert rate.rate == 0.5
    assert 0.012 < 0.5 - rate.low < 0.016
    assert rate.high - 0.5 == pytest.approx(0.5 - rate.low)


def test_few_decisive_comparisons_agree_with_a_sign_test():
    """Five of five has p = 0.0625, six of six 0.031, two-sided."""
    assert not win_rate(*outcomes(5, 95, 0)).shows_difference
    assert win_rate(*outcomes(6, 94, 0)).shows_difference


def test_one_prompt_says_nothing_about_others():
    rate = win_rate([1.0, 1.0], [0.0, 0.0], ["same", "same"])
    assert (rate.low, rate.high, rate.method) == (0.0, 1.0, "none")
    difference = paired_difference([1.0, 1.0], [0.0, 0.0], ["same", "same"])
    assert (difference.low, difference.high) == (-math.inf, math.inf)
    assert not difference.shows_difference


def test_bootstrap_agrees_with_the_normal_interval_for_independent_prompts():
    rate = win_rate(*outcomes(600, 0, 400), num_resamples=20_000)
    half = 1.96 * math.sqrt(0.6 * 0.4 / 1000)
    assert rate.method == "bootstrap"
    assert rate.low == pytest.approx(0.6 - half, abs=0.0015)
    assert rate.high == pytest.approx(0.6 + half, abs=0.0015)


def test_prompts_whose_pictures_agree_count_once():
    """Four copies of every row: four times the comparisons and exactly the interval of one."""
    a, b, prompts = outcomes(60, 0, 40)
    once = win_rate(a, b, prompts)
    copied = win_rate(np.repeat(a, 4), np.repeat(b, 4), np.repeat(prompts, 4))
    assert (copied.low, copied.high) == pytest.approx((once.low, once.high))
    assert copied.num_comparisons == 400
    ignored = win_rate(np.repeat(a, 4), np.repeat(b, 4), np.arange(400))
    assert ignored.high - ignored.low < 0.6 * (once.high - once.low)


def test_bootstrap_spread_is_the_clustered_standard_error():
    rng = np.random.default_rng(0)
    prompts = np.repeat(np.arange(200), rng.integers(1, 6, size=200))
    values = rng.normal(size=200)[prompts] + rng.normal(size=len(prompts))
    clusters = as_clusters(prompts, len(prompts))
    spread = bootstrap_means(values, clusters, num_resamples=8000, seed=1).std()
    assert spread == pytest.approx(clustered_standard_error(values, clusters), rel=0.04)


def test_effective_comparisons_lies_between_prompts_and_pictures():
    prompts = as_clusters(np.repeat(np.arange(50), 4), 200)
    agreeing = np.repeat(np.arange(50) % 2, 4).astype(float)
    independent = np.random.default_rng(0).integers(0, 2, size=200).astype(float)
    assert effective_comparisons(agreeing, prompts) == pytest.approx(50, rel=0.03)
    assert 120 < effective_comparisons(independent, prompts) <= 200
    assert effective_comparisons(np.ones(200), prompts) == 50


@pytest.mark.parametrize(
    ("degrees", "probability", "value"),
    [
        (1, 0.975, 12.706205),
        (1, 0.9995, 636.619249),
        (2, 0.975, 4.302653),
        (3, 0.975, 3.182446),
        (3, 0.9995, 12.923979),
        (4, 0.9995, 8.610302),
        (9, 0.975, 2.262157),
        (9, 0.9995, 4.780913),
        (29, 0.975, 2.045230),
        (1000, 0.975, 1.962339),
    ],
)
def test_student_t_is_that_of_the_tables(degrees, probability, value):
    assert student_t(probability, degrees) == pytest.approx(value, rel=1e-6)
    assert student_t(1 - probability, degrees) == pytest.approx(-value, rel=1e-6)


def test_the_tails_of_three_degrees_of_freedom_have_their_closed_form():
    for t in (0.0, 0.5, 3.0, 20.0, 100.0):
        x = t / math.sqrt(3)
        closed = 1 - 2 / math.pi * (x / (1 + x * x) + math.atan(x))
        assert student_t_tails(t, 3) == pytest.approx(closed, rel=1e-6, abs=1e-13)
    assert student_t(0.5, 7) == pytest.approx(0.0, abs=1e-12)


def coverage(rate: float, num_prompts: int, pictures: int, agreement: float, trials: int = 300) -> float:
    """Share of simulated evaluations whose interval holds the true rate.

    A prompt's own rate is drawn from a beta distribution with this mean and intra-prompt correlation `agreement`.
    """
    rng = np.random.default_rng(7)
    prompts, held = np.repeat(np.arange(num_prompts), pictures), 0
    for trial in range(trials):
        own = np.full(num_prompts, rate)
        if agreement:
            strength = (1 - agreement) / agreement
            own = rng.beta(rate * strength, (1 - rate) * strength, size=num_prompts)
        wins = rng.binomial(1, own[prompts]).astype(float)
        found = win_rate(wins, 1 - wins, prompts, num_resamples=400, seed=trial)
        held += found.low - 1e-9 <= rate <= found.high + 1e-9
    return held / trials


@pytest.mark.parametrize("rate", [0.5, 0.8, 0.97])
@pytest.mark.parametrize(("pictures", "agreement"), [(1, 0.0), (4, 0.0), (4, 0.3)])
def test_coverage_of_the_95_percent_interval(rate, pictures, agreement):
    assert 0.92 <= coverage(rate, 200, pictures, agreement) <= 0.98


@pytest.mark.parametrize("rate", [0.5, 0.8])
def test_coverage_with_few_prompts(rate):
    assert 0.92 <= coverage(rate, 20, 4, 0.3) <= 0.985


score = st.floats(-5, 5, width=16)
rows = st.lists(st.tuples(score, score, st.integers(0, 30)), min_size=1, max_size=80)


@settings(max_examples=40, deadline=None)
@given(rows, st.sampled_from([0.0, 0.5]))
def test_swapping_the_sides_mirrors_everything(rows, tie_margin):
    a, b, prompts = map(list, zip(*rows, strict=True))
    forward = win_rate(a, b, prompts, tie_margin=tie_margin, num_resamples=200)
    backward = win_rate(b, a, prompts, tie_margin=tie_margin, num_resamples=200)
    assert (forward.wins, forward.ties, forward.losses) == (backward.losses, backward.ties, backward.wins)
    assert forward.rate == pytest.approx(1 - backward.rate)
    assert (forward.low, forward.high) == pytest.approx((1 - backward.high, 1 - backward.low))


@settings(max_examples=40, deadline=None)
@given(rows, st.randoms(use_true_random=False))
def test_interval_holds_the_rate_and_does_not_depend_on_row_order(rows, random):
    a, b, prompts = map(list, zip(*rows, strict=True))
    found = win_rate(a, b, prompts, num_resamples=200)
    assert 0.0 <= found.low <= found.rate <= found.high <= 1.0
    assert found.high > found.low
    random.shuffle(rows)
    a, b, prompts = map(list, zip(*rows, strict=True))
    again = win_rate(a, b, prompts, num_resamples=200)
    assert (again.rate, again.low, again.high) == pytest.approx((found.rate, found.low, found.high))


@settings(max_examples=30, deadline=None)
@given(rows, st.floats(-3, 3, width=16))
def test_paired_difference_moves_with_the_scores(rows, shift):
    a, b, prompts = map(np.array, zip(*rows, strict=True))
    plain, moved = paired_difference(a, b, prompts), paired_difference(a + shift, b, prompts)
    assert plain.low <= plain.value <= plain.high
    assert (moved.value, moved.low, moved.high) == pytest.approx(
        (plain.value + shift, plain.low + shift, plain.high + shift), abs=1e-9
    )


def test_paired_difference_agrees_with_student():
    rng = np.random.default_rng(3)
    for num_prompts, quantile in ((10, 2.26216), (400, NormalDist().inv_cdf(0.975))):
        a, b = rng.normal(1.0, 1.0, size=(2, num_prompts))
        found = paired_difference(a, b, np.arange(num_prompts), num_resamples=8000)
        half = quantile * np.std(a - b, ddof=1) / math.sqrt(num_prompts)
        assert found.value == pytest.approx(np.mean(a - b))
        assert found.high - found.low == pytest.approx(2 * half, rel=0.05)


def test_difference_of_two_methods_is_the_difference_of_their_win_rates():
    rng = np.random.default_rng(5)
    prompts = np.repeat(np.arange(150), 2)
    base, x, y = rng.normal(size=(3, 300)) + np.array([[0.0], [0.8], [0.3]])
    found = win_rate_difference(x, y, base, prompts)
    assert found.value == pytest.approx(win_rate(x, base, prompts).rate - win_rate(y, base, prompts).rate)
    mirrored = win_rate_difference(y, x, base, prompts)
    assert (mirrored.low, mirrored.high) == pytest.approx((-found.high, -found.low))


def test_difference_of_equal_methods_contains_zero_and_has_a_width():
    rng = np.random.default_rng(6)
    base, x = rng.normal(size=(2, 100))
    found = win_rate_difference(x, x, base, np.arange(100))
    assert found.low < 0.0 == found.value < found.high
    assert found.high < 0.05


def test_what_is_refused():
    with pytest.raises(ValueError, match="rows 1, 3"):
        win_rate([0.0, math.nan, 1.0, math.inf], [0.0] * 4, [0, 1, 2, 3])
    with pytest.raises(ValueError, match="second side has 1 of 2"):
        win_rate([0.0, 1.0], [0.0, math.nan], [0, 1])
    with pytest.raises(ValueError, match="2 and 3 scores"):
        win_rate([0.0, 1.0], [0.0, 1.0, 2.0], [0, 1])
    with pytest.raises(ValueError, match="names 3 rows"):
        win_rate([0.0, 1.0], [0.0, 1.0], [0, 1, 2])
    with pytest.raises(ValueError, match="tie_margin"):
        win_rate([0.0, 1.0], [0.0, 1.0], [0, 1], tie_margin=-0.1)
    with pytest.raises(ValueError, match="confidence"):
        win_rate([0.0, 1.0], [0.0, 1.0], [0, 1], confidence=95)
    with pytest.raises(ValueError, match="num_resamples"):
        win_rate([0.0, 1.0], [0.0, 1.0], [0, 1], num_resamples=10)
    with pytest.raises(TypeError, match="one number or one string a row"):
        win_rate([0.0, 1.0], [0.0, 1.0], [("a", 1), ("b", 2)])
    with pytest.raises(ValueError, match="non-empty vector"):
        win_rate([], [], [])


def test_seed_decides_and_repeats():
    a, b, prompts = outcomes(60, 10, 50)
    same = [win_rate(a, b, prompts, seed=1) for _ in range(2)]
    assert same[0] == same[1]
    assert win_rate(a, b, prompts, confidence=0.5).high < same[0].high


def test_the_difference_of_shares_is_the_paired_one_where_there_is_enough_of_it_and_never_without_a_width():
    a, b = (np.random.default_rng(seed).integers(0, 2, 400) for seed in (0, 1))
    found, paired = share_difference(a, b, range(400)), paired_difference(a, b, range(400))
    assert (found.value, found.num_comparisons) == (paired.value, 400)
    assert (found.low, found.high) == pytest.approx((paired.low, paired.high), abs=0.01)
    assert found.p_value == pytest.approx(paired.p_value, abs=0.02)
    same = share_difference(a, a, range(400))
    assert same.value == 0 and same.low == pytest.approx(-same.high) and 0 < same.high < 0.02
    with pytest.raises(ValueError, match="Shares lie between 0 and 1"):
        share_difference([0, 2], [0, 1], [0, 1])
