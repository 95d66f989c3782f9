"""Who wins and by how much: closed forms, the published table, and symmetry under exchange of the sides."""

import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmalign.data import ComparisonConfig, Normalizer, compare
from mmalign.data.smoothing import OFFICIAL_LOW

UNIT = Normalizer("extrema", 0.0, 1.0, "test", "f")


def test_human_labels_keep_the_majority_side() -> None:
    compared = compare(torch.tensor([1.0, 0.0, 0.5, 0.8, 0.3]), None, ComparisonConfig())
    assert compared.kept.tolist() == [0, 1, 3, 4]
    assert compared.first.tolist() == [0, 1, 0, 1]
    assert compared.strength.tolist() == [1.0] * 4
    assert (compared.num_human_ties, compared.num_ties, compared.num_dropped, compared.num_flipped) == (1, 1, 1, 0)


def test_relabel_follows_the_score_and_counts_what_it_flips() -> None:
    labels = torch.tensor([1.0, 1.0, 0.0, 0.5, 1.0])
    scores = torch.tensor([[0.3, 0.2], [0.2, 0.3], [0.1, 0.1], [0.2, 0.1], [0.1, 0.4]])
    compared = compare(labels, scores, ComparisonConfig(kind="relabel"))
    assert compared.kept.tolist() == [0, 1, 4] and compared.first.tolist() == [0, 1, 1]
    assert (compared.num_human_ties, compared.num_score_ties, compared.num_flipped) == (1, 1, 2)
    kept_ties = compare(labels, scores, ComparisonConfig(kind="relabel", keep_human_ties=True))
    assert kept_ties.kept.tolist() == [0, 1, 3, 4] and kept_ties.num_human_ties == 0 and kept_ties.num_flipped == 2


@pytest.mark.parametrize("gap", [0.0, 1e-3, 0.2, 1.0, 5.0])
@pytest.mark.parametrize("gamma", [1.0, 10.0])
def test_smoothed_strength_is_gamma_times_2p_minus_1(gap: float, gamma: float) -> None:
    scores = torch.tensor([[gap, 0.0]], dtype=torch.float64)
    config = ComparisonConfig(kind="smoothed", normalizer=UNIT, gamma=gamma)
    compared = compare(torch.ones(1), scores, config)
    if gap == 0:
        assert len(compared) == 0 and compared.num_score_ties == 1
        return
    p = math.exp(gap) / (math.exp(gap) + 1)
    assert compared.strength.item() == pytest.approx(gamma * (2 * p - 1), rel=1e-6)
    assert compared.strength.item() == pytest.approx(gamma * math.tanh(gap / 2), rel=1e-6)


def test_p_of_055_at_gamma_10_is_plain_dpo() -> None:
    gap = math.log(0.55 / 0.45)
    scores = torch.tensor([[gap, 0.0]], dtype=torch.float64)
    compared = compare(torch.ones(1), scores, ComparisonConfig(kind="smoothed", normalizer=UNIT))
    assert compared.strength.item() == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize(
    ("points", "expected", "digits"),
    [(0.1, 0.03, 2), (0.25, 0.075, 3), (0.5, 0.15, 2), (1, 0.30, 2), (2, 0.60, 2), (3.34, 1.00, 2)]
    + [(5, 1.49, 2), (10, 2.91, 2), (16.658, 4.62, 2)],
)
def test_official_constants_reproduce_the_weight_table(points: float, expected: float, digits: int) -> None:
    scores = torch.tensor([[OFFICIAL_LOW + points / 100, OFFICIAL_LOW]], dtype=torch.float64)
    compared = compare(torch.ones(1), scores, ComparisonConfig(kind="smoothed", normalizer=Normalizer.official()))
    assert round(compared.strength.item(), digits) == expected


def test_bradley_terry_is_the_scorer_s_own_link() -> None:
    scores = torch.tensor([[0.21, 0.20], [0.20, 0.23]], dtype=torch.float64)
    compared = compare(torch.ones(2), scores, ComparisonConfig(kind="bradley_terry", logit_scale=100.0))
    expected = [2 / (1 + math.exp(-1)) - 1, 2 / (1 + math.exp(-3)) - 1]
    assert compared.first.tolist() == [0, 1]
    torch.testing.assert_close(compared.strength, torch.tensor(expected))


def test_weak_pairs_are_dropped_and_counted_once() -> None:
    scores = torch.tensor([[0.0, 0.1], [0.0, 1.0], [0.0, 0.0], [0.0, 0.01]])
    config = ComparisonConfig(kind="smoothed", normalizer=UNIT, min_abs_strength=1.0)
    compared = compare(torch.tensor([0.0, 0.0, 1.0, 0.5]), scores, config)
    assert compared.kept.tolist() == [1]
    assert (compared.num_human_ties, compared.num_score_ties, compared.num_weak, compared.num_dropped) == (1, 1, 1, 3)
    assert "1 of 4 pairs kept" in str(compared)


CONFIGS = [
    ComparisonConfig(),
    ComparisonConfig(kind="relabel"),
    ComparisonConfig(kind="relabel", keep_human_ties=True),
    ComparisonConfig(kind="smoothed", normalizer=UNIT),
    ComparisonConfig(kind="smoothed", normalizer=UNIT, gamma=3.0, min_abs_strength=0.2, keep_human_ties=True),
    ComparisonConfig(kind="bradley_terry", logit_scale=20.0),
]
_labels = st.one_of(st.sampled_from([0.0, 0.5, 1.0]), st.integers(0, 64).map(lambda votes: votes / 64))
_scores = st.floats(-1, 1, width=32)


@settings(max_examples=60, deadline=None)
@given(rows=st.lists(st.tuples(_labels, _scores, _scores), min_size=1, max_size=8), config=st.sampled_from(CONFIGS))
def test_exchanging_the_images_exchanges_the_winner_and_nothing_else(
    rows: list[tuple[float, float, float]], config: ComparisonConfig
) -> None:
    labels = torch.tensor([row[0] for row in rows], dtype=torch.float64)
    scores = torch.tensor([row[1:] for row in rows], dtype=torch.float64)
    one, other = compare(labels, scores, config), compare(1 - labels, scores.flip(1), config)
    assert torch.equal(one.kept, other.kept) and torch.equal(one.first, 1 - other.first)
    assert torch.equal(one.strength, other.strength) and (one.strength > 0).all()
    counts = ("num_pairs", "num_human_ties", "num_score_ties", "num_weak", "num_flipped")
    assert [getattr(one, name) for name in counts] == [getattr(other, name) for name in counts]
    assert len(one) + one.num_human_ties + one.num_score_ties + one.num_weak == one.num_pairs


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"kind": "best"}, "bradley_terry"),
        ({"kind": "smoothed"}, "Normalizer.official"),
        ({"kind": "bradley_terry"}, "scorer.logit_scale"),
        ({"kind": "human", "gamma": 5.0}, "no effect"),
        ({"kind": "human", "keep_human_ties": True}, "no effect"),
        ({"kind": "relabel", "normalizer": UNIT}, "no effect"),
        ({"kind": "relabel", "min_abs_strength": 0.1}, "no effect"),
        ({"kind": "smoothed", "normalizer": UNIT, "logit_scale": 100.0}, "no effect"),
        ({"kind": "smoothed", "normalizer": UNIT, "gamma": 0.0}, "positive"),
        ({"kind": "smoothed", "normalizer": UNIT, "min_abs_strength": -1.0}, "0 or more"),
    ],
)
def test_an_option_acts_or_is_refused(options: dict, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        ComparisonConfig(**options)


@pytest.mark.parametrize("wrong", [1.2, -0.1, math.nan, math.inf])
def test_labels_outside_0_1_are_refused_with_their_row(wrong: float) -> None:
    with pytest.raises(ValueError, match="label of pair 1 .* drop these rows"):
        compare(torch.tensor([1.0, wrong]), None, ComparisonConfig())


def test_scores_are_asked_for_and_checked() -> None:
    config = ComparisonConfig(kind="relabel")
    with pytest.raises(ValueError, match="score_pairs"):
        compare(torch.ones(2), None, config)
    with pytest.raises(ValueError, match=r"scores\[encoded.rows\]"):
        compare(torch.ones(2), torch.zeros(3, 2), config)
    holes = torch.tensor([[0.1, 0.2], [math.nan, 0.1]])
    with pytest.raises(ValueError, match="1 pairs have no finite score, the first is pair 1"):
        compare(torch.ones(2), holes, config)
    # A pair that is dropped anyway needs no score.
    assert len(compare(torch.tensor([1.0, 0.5]), holes, config)) == 1


def test_normalizer_fits_extrema_and_quantiles() -> None:
    scores = torch.linspace(2, 3, 1001, dtype=torch.float64)
    scores[-1] = 100.0
    extrema = Normalizer.fit(scores, scorer_name="a", scorer_fingerprint="b")
    assert (extrema.low, extrema.high, extrema.num_scores) == (2.0, 100.0, 1001)
    quantile = Normalizer.fit(scores, "quantile", scorer_name="a", scorer_fingerprint="b", quantiles=(0.01, 0.99))
    assert quantile.low == pytest.approx(2.01) and quantile.high == pytest.approx(2.99)
    assert quantile.high == pytest.approx(torch.quantile(scores, 0.99).item(), rel=1e-12)
    torch.testing.assert_close(quantile(torch.tensor([2.01, 2.99, 3.97])), torch.tensor([0.0, 1.0, 2.0]).double())
    with_holes = torch.cat([scores, torch.tensor([math.nan])])
    assert Normalizer.fit(with_holes, scorer_name="a", scorer_fingerprint="b") == extrema


@pytest.mark.parametrize("scores", [[0.2, 0.2], [0.2], [0.1, math.inf]])
def test_normalizer_refuses_scores_without_a_range(scores: list[float]) -> None:
    with pytest.raises(ValueError, match="scores"):
        Normalizer.fit(torch.tensor(scores), scorer_name="a", scorer_fingerprint="b")


def test_official_normalizer_wants_raw_cosines() -> None:
    official = Normalizer.official()
    with pytest.raises(ValueError, match="without scaled=True"):
        official(torch.tensor([[21.0, 22.0]]))
    with pytest.raises(ValueError, match="another scorer"):
        Normalizer.official(torch.tensor([[0.9, 0.8], [math.nan, math.nan]]))
    assert Normalizer.official(torch.tensor([[0.2, 0.21], [math.nan, math.nan]])) == official
    # Dropped ties do not count against it.
    config = ComparisonConfig(kind="smoothed", normalizer=official)
    labels, scores = torch.tensor([1.0, 0.5]), torch.tensor([[0.22, 0.21], [math.nan, math.nan]])
    assert len(compare(labels, scores, config)) == 1
    official.check_scorer("pickscore", "anything")
    with pytest.raises(ValueError, match="fit a new one"):
        official.check_scorer("playground", "anything")


def test_normalizer_saves_loads_and_notices_changes(tmp_path: Path) -> None:
    normalizer = Normalizer.fit(
        torch.rand(50), "quantile", scorer_name="a", scorer_fingerprint="b", quantiles=(0.1, 0.9)
    )
    path = normalizer.save(tmp_path / "normalizer.json")
    assert Normalizer.load(path) == normalizer and Normalizer.load(path).sha256 == normalizer.sha256
    assert [file.name for file in tmp_path.iterdir()] == ["normalizer.json"]
    path.write_text(json.dumps(json.loads(path.read_text()) | {"low": -1.0}))
    with pytest.raises(ValueError, match="changed after it was saved"):
        Normalizer.load(path)
    path.write_text("{}")
    with pytest.raises(ValueError, match="not a saved normalizer"):
        Normalizer.load(path)
    with pytest.raises(ValueError, match="fits a"):
        normalizer.check_scorer("a", "other")
