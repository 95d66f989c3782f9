"""Values and slopes that are known in closed form."""

import math

import pytest
import torch

from mmalign import losses

LN2 = math.log(2)
ONES = {"chosen_length": torch.ones(1), "rejected_length": torch.ones(1)}

# These need lengths, and are told below and in test_losses_reductions.py.
BY_LENGTH = {"sigmoid_norm", "ln_dpo", "ln_pref"}

# key, hyper-parameters, loss at policy = reference
AT_START = [
    ("sigmoid", {}, LN2),
    ("cdpo", {"label_smoothing": 0.3}, LN2),
    ("robust", {"label_smoothing": 0.3}, LN2),
    ("hinge", {}, 1.0),
    ("ipo", {"beta": 0.1}, 25.0),
    ("exo_pair", {"label_smoothing": 1e-3}, 2.76123071),
    ("discopop", {}, (1 + LN2) / 2),
    ("nca_pair", {}, 2 * LN2),
    ("bco_pair", {}, 2 * LN2),
    ("sppo_hard", {"beta": 0.5}, 2.0),
    ("apo_zero", {}, 1.0),
    ("apo_down", {}, 1.0),
    ("aot", {}, LN2),
    ("aot_unpaired", {}, LN2),
    ("sdpo", {"rejected_scale": torch.ones(1)}, LN2),
]

# key, hyper-parameters, (∂/∂log π_w, ∂/∂log π_l) at policy = reference, β = 1
SLOPES = [
    ("sigmoid", {}, (-0.5, 0.5)),
    ("cdpo", {"label_smoothing": 0.1}, (-0.4, 0.4)),
    ("robust", {"label_smoothing": 0.1}, (-0.625, 0.625)),
    ("hinge", {}, (-1.0, 1.0)),
    ("ipo", {}, (-1.0, 1.0)),
    ("exo_pair", {"label_smoothing": 1e-3}, (-math.log(999) / 4, math.log(999) / 4)),
    ("discopop", {"discopop_tau": 0.05}, (5 * (1 - LN2) - 0.75, 0.75 - 5 * (1 - LN2))),
    ("nca_pair", {}, (-0.25, 0.25)),
    ("bco_pair", {}, (-0.5, 0.5)),
    ("sppo_hard", {}, (-1.0, 1.0)),
    ("apo_zero", {}, (-0.25, 0.25)),
    ("apo_down", {}, (0.0, 0.25)),
    ("aot", {}, (-0.5, 0.5)),
    ("aot_unpaired", {"label_smoothing": 0.1}, (-0.4, 0.4)),
    ("sdpo", {"rejected_scale": torch.tensor([0.25])}, (-0.5, 0.125)),
    ("cpo", {"cpo_alpha": 1.0}, (-1.5, 0.5)),
]


@pytest.mark.parametrize(("name", "hyper", "expected"), AT_START)
def test_value_at_policy_equal_reference(name, hyper, expected):
    same = torch.tensor([-3.7], dtype=torch.float64)
    logps = losses.PairLogProbs(same, same - 1, same, same - 1)
    assert losses.compute(name, logps, **hyper).item() == pytest.approx(expected, abs=1e-8)


@pytest.mark.parametrize(("name", "hyper", "expected"), SLOPES)
def test_slope_at_policy_equal_reference(name, hyper, expected):
    policy = [torch.zeros(1, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    zero = torch.zeros(1, dtype=torch.float64)
    losses.compute(name, losses.PairLogProbs(*policy, zero, zero), beta=1.0, **hyper).backward()
    assert [p.grad.item() for p in policy] == pytest.approx(expected, abs=1e-9)


def test_the_pairs_above_name_every_reference_based_pair_loss():
    here = {key for key in losses.names() if not losses.get(key).unpaired and not losses.get(key).reference_free}
    assert here - {row[0] for row in AT_START} == here - {row[0] for row in SLOPES} == BY_LENGTH


@pytest.mark.parametrize(
    ("hyper", "value", "slope"),
    [
        ({}, LN2, 0.5),
        ({"ln_pref_omega": 3.0}, 3 * LN2, 1.5),
        ({"ln_pref_omega": 0.0, "ln_pref_lambda": 2.0}, 2.0, 0.5),
        ({"ln_pref_lambda": 1.0}, LN2 + 1, 0.75),
        ({"ln_pref_margin": math.log(3)}, math.log(4), 0.75),
    ],
)
def test_ln_pref_at_policy_equal_reference(hyper, value, slope):
    """With β = 1 each slope is that of a reward per token, divided by the side's own length."""
    policy = [torch.zeros(1, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    zero = torch.zeros(1, dtype=torch.float64)
    logps = losses.PairLogProbs(*policy, zero, zero, torch.tensor([2]), torch.tensor([5]))
    loss = losses.compute("ln_pref", logps, beta=1.0, **hyper)
    loss.backward()
    assert loss.item() == pytest.approx(value, abs=1e-12)
    assert [p.grad.item() for p in policy] == pytest.approx([-slope / 2, slope / 5], abs=1e-12)


@pytest.mark.parametrize(
    ("hyper", "told"),
    [
        ({"ln_pref_omega": 0.0}, "both 0, which leaves no loss"),
        ({"ln_pref_omega": 0.0, "ln_pref_lambda": 1.0, "ln_pref_margin": 0.1}, "no effect with ln_pref_omega=0"),
        ({"ln_pref_omega": -1.0}, "ln_pref_omega must not be negative"),
        ({"ln_pref_lambda": -1.0}, "ln_pref_lambda must not be negative"),
    ],
)
def test_an_ln_pref_of_nothing_is_refused(hyper, told):
    zero, one = torch.zeros(1), torch.ones(1)
    with pytest.raises(ValueError, match=told):
        losses.compute("ln_pref", losses.PairLogProbs(zero, zero, zero, zero, one, one), **hyper)


def test_ln_pref_by_hand():
    chosen, rejected = torch.tensor([1.2], dtype=torch.float64), torch.tensor([-0.8], dtype=torch.float64)
    zero = torch.zeros(1, dtype=torch.float64)
    logps = losses.PairLogProbs(chosen, rejected, zero, zero, torch.tensor([3]), torch.tensor([4]))
    hyper = {"ln_pref_omega": 0.5, "ln_pref_lambda": 2.0, "ln_pref_margin": 0.3}
    r_w, r_l = 5 * 0.4, 5 * -0.2
    expected = 0.5 * math.log1p(math.exp(0.3 - (r_w - r_l))) + 2 * (1 / (1 + math.exp(r_w)) + 1 / (1 + math.exp(-r_l)))
    assert losses.compute("ln_pref", logps, **hyper).item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("margin", [0.0, 10.0, -10.0, 20.0, -20.0])
def test_sigmoid_is_softplus_of_minus_the_margin(at_ratios, margin):
    loss = losses.compute("sigmoid", at_ratios(margin, 0.0), beta=1.0)
    assert loss.item() == pytest.approx(math.log1p(math.exp(-margin)), rel=1e-12)


@pytest.mark.parametrize("epsilon", [0.05, 0.2, 0.4])
def test_cdpo_has_its_minimum_at_the_log_odds_of_the_label(at_ratios, epsilon):
    best = math.log((1 - epsilon) / epsilon)
    values = losses.compute(
        "cdpo", at_ratios([best, best - 0.1, best + 0.1], [0.0] * 3), beta=1.0, label_smoothing=epsilon
    )
    assert values.argmin() == 0


@pytest.mark.parametrize("epsilon", [0.0, 0.1, 0.3, 0.45])
@pytest.mark.parametrize("margin", [-2.0, 0.4, 7.0])
def test_robust_is_unbiased_under_flips(at_ratios, epsilon, margin):
    kept, flipped = losses.compute("robust", at_ratios([margin, -margin], [0, 0]), beta=1.0, label_smoothing=epsilon)
    clean = losses.compute("sigmoid", at_ratios(margin, 0), beta=1.0)
    assert ((1 - epsilon) * kept + epsilon * flipped).item() == pytest.approx(clean.item(), abs=1e-12)


def test_robust_is_unbounded_below(at_ratios):
    assert losses.compute("robust", at_ratios(60, 0), beta=1.0, label_smoothing=0.2).item() == pytest.approx(-20)


@pytest.mark.parametrize("beta", [0.1, 0.5, 2.0])
def test_ipo_is_zero_at_its_target(at_ratios, beta):
    assert losses.compute("ipo", at_ratios(1 / (2 * beta), 0), beta=beta).item() == pytest.approx(0, abs=1e-15)


def test_ipo_divides_each_side_by_its_length_if_it_knows_it(at_ratios):
    logps = at_ratios(6.0, 2.0)
    counted = losses.PairLogProbs(
        logps.policy_chosen,
        logps.policy_rejected,
        logps.reference_chosen,
        logps.reference_rejected,
        torch.tensor([3]),
        torch.tensor([4]),
    )
    assert losses.compute("ipo", counted, beta=1.0).item() == pytest.approx((2.0 - 0.5 - 0.5) ** 2)
    assert losses.compute("ipo", logps, beta=1.0).item() == pytest.approx((4.0 - 0.5) ** 2)


def test_hinge_stops_at_its_margin(at_ratios):
    assert losses.compute("hinge", at_ratios([1.0, 1.5, -0.5], [0] * 3), beta=1.0).tolist() == [0.0, 0.0, 1.5]


def test_exo_is_zero_only_at_the_smoothed_label(at_ratios):
    best = math.log(999)
    at, beside = losses.compute("exo_pair", at_ratios([best, best + 0.1], [0, 0]), beta=1.0, label_smoothing=1e-3)
    assert at.item() == pytest.approx(0, abs=1e-12) and beside > 1e-6


def test_discopop_has_a_dip_below_and_a_bump_above_zero(at_ratios):
    z = torch.linspace(-0.5, 0.5, 2001, dtype=torch.float64)
    values = losses.compute("discopop", at_ratios(z, torch.zeros_like(z)), beta=1.0)
    left, right = (z > -0.2) & (z < 0), (z > 0) & (z < 0.2)
    assert z[left][values[left].argmin()].item() == pytest.approx(-0.119, abs=1e-3)
    assert z[right][values[right].argmax()].item() == pytest.approx(0.072, abs=1e-3)


def test_discopop_is_exponential_far_above_and_logistic_far_below(at_ratios):
    up, down = losses.compute("discopop", at_ratios([5.0, -5.0], [0, 0]), beta=1.0)
    assert up.item() == pytest.approx(math.exp(-5)) and down.item() == pytest.approx(math.log1p(math.exp(5)))


def test_nca_holds_the_chosen_reward_at_ln_2(at_ratios):
    values = losses.compute("nca_pair", at_ratios([LN2, LN2 - 0.05, LN2 + 0.05], [0] * 3), beta=1.0)
    assert values.argmin() == 0


def test_kto_by_hand():
    logps = losses.UnpairedLogProbs(
        torch.tensor([0.5, 0.5], dtype=torch.float64), torch.zeros(2, dtype=torch.float64), torch.tensor([1, 0]), kl=0.1
    )
    assert losses.compute("kto", logps, beta=1.0).tolist() == pytest.approx([0.40131234, 0.59868766], abs=1e-8)
    weighted = losses.compute("kto", logps, beta=1.0, desirable_weight=2.0, undesirable_weight=3.0)
    assert weighted.tolist() == pytest.approx([2 * 0.40131234, 3 * 0.59868766], abs=1e-7)


def test_kto_baseline_is_the_mean_clamped_at_zero_without_gradient():
    kl = torch.tensor([-3.0, 1.0], requires_grad=True)
    policy = torch.zeros(2, requires_grad=True)
    logps = losses.UnpairedLogProbs(policy, torch.zeros(2), torch.tensor([True, False]), kl=kl)
    loss = losses.compute("kto", logps, beta=1.0)
    loss.sum().backward()
    assert loss.tolist() == [0.5, 0.5] and kl.grad is None
    assert policy.grad.tolist() == pytest.approx([-0.25, 0.25])


def test_labels_may_be_boolean_zero_one_or_plus_minus_one():
    ratio, zero = torch.tensor([0.4, 0.4]), torch.zeros(2)
    labels = [torch.tensor([True, False]), torch.tensor([1, 0]), torch.tensor([1, -1])]
    values = [losses.compute("apo_zero_unpaired", losses.UnpairedLogProbs(ratio, zero, label)) for label in labels]
    assert torch.equal(values[0], values[1]) and torch.equal(values[0], values[2])


def test_bco_shift_is_the_class_balanced_midpoint():
    from mmalign.losses.unpaired import bco_shift

    label = torch.tensor([True, True, True, False])
    logps = losses.UnpairedLogProbs(torch.tensor([3.0, 3.0, 3.0, 1.0]), torch.zeros(4), label)
    state = bco_shift(logps, beta=1.0)
    assert state.delta.item() == 2.0
    liked_only = losses.UnpairedLogProbs(torch.tensor([5.0]), torch.zeros(1), torch.tensor([True]))
    later = bco_shift(liked_only, beta=1.0, state=state, decay=0.5)
    assert later.desirable.item() == 4.0 and later.undesirable.item() == 1.0 and later.delta.item() == 2.5
    assert bco_shift(liked_only, beta=1.0).delta.item() == 5.0
    batch = losses.compute("bco", logps, beta=1.0)
    assert torch.equal(batch, losses.compute("bco", logps, beta=1.0, delta=2.0))


def test_diffusion_kto_by_hand():
    """m and r are the errors themselves; the release's β multiplies r − m, ours −½(m − r)."""
    m, r = torch.tensor([0.30, 0.20], dtype=torch.float64), torch.tensor([0.31, 0.22], dtype=torch.float64)
    logps = losses.UnpairedLogProbs(-m / 2, -r / 2, torch.tensor([1, -1]))
    published = 100.0
    gain = r - m
    expected = 1 - torch.sigmoid(torch.tensor([1, -1]) * published * (gain - gain.mean().clamp(min=0)))
    torch.testing.assert_close(losses.compute("diffusion_kto", logps, beta=2 * published), expected)
    averse = losses.compute("diffusion_kto", logps, beta=2 * published, utility="loss_averse")
    torch.testing.assert_close(averse, 1 - torch.log(1 - expected))


def test_mapo_by_hand():
    m_w, m_l = 0.4, 0.7
    logps = losses.PairLogProbs(torch.tensor([-m_w / 2], dtype=torch.float64), torch.tensor([-m_l / 2]).double())

    def score(m):
        return 0.5 * m / (math.exp(0.5 * m) - 1)

    expected = m_w + 0.1 * math.log1p(math.exp(-1000 * (score(m_w) - score(m_l))))
    assert losses.compute("mapo", logps).item() == pytest.approx(expected, rel=1e-6)
    short = losses.compute("mapo", logps, num_train_timesteps=3, snr_value=0.5, beta=2.0).item()
    assert short == pytest.approx(m_w + 2 * math.log1p(math.exp(-3 * (score(m_w) - score(m_l)))), rel=1e-6)


def test_mapo_of_a_perfect_prediction():
    policy = [torch.zeros(1, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    loss = losses.compute("mapo", losses.PairLogProbs(*policy), num_train_timesteps=4, beta=1.0)
    loss.backward()
    assert loss.item() == pytest.approx(LN2)
    # dL/dm = 1 + ½·4·½·½ on the chosen side, since g′(0) = −½ in s·m; m = −2·log π
    assert policy[0].grad.item() == pytest.approx(-3.0) and policy[1].grad.item() == pytest.approx(1.0)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-12)])
def test_mapo_score_and_its_slope_on_both_sides_of_its_series(dtype, tolerance):
    """g(x) = x/(e^x − 1) for either sign; g′ = −½ + x/6 − x³/180 near 0, where the quotient rule would cancel."""
    from mmalign.losses.diffusion import _bose

    x = torch.tensor([-40.0, -3.0, -0.021, -0.019, -1e-4, 1e-4, 0.019, 0.021, 3.0, 40.0], dtype=torch.float64)
    values = _bose(x.to(dtype)).double()
    torch.testing.assert_close(values, x / torch.expm1(x), rtol=tolerance, atol=0)
    near = torch.tensor([-0.019, -1e-4, 0.0, 1e-4, 0.019], dtype=dtype, requires_grad=True)
    (slope,) = torch.autograd.grad(_bose(near).sum(), near)
    expected = -0.5 + near.detach() / 6 - near.detach() ** 3 / 180
    torch.testing.assert_close(slope, expected, rtol=0, atol=max(tolerance, 1e-11))


def test_orpo_by_hand():
    p_w, p_l, n_w, n_l = 0.6, 0.3, 4, 2
    logps = losses.PairLogProbs(
        torch.tensor([n_w * math.log(p_w)], dtype=torch.float64),
        torch.tensor([n_l * math.log(p_l)], dtype=torch.float64),
        chosen_length=torch.tensor([n_w]),
        rejected_length=torch.tensor([n_l]),
    )
    odds_ratio = (p_w / (1 - p_w)) / (p_l / (1 - p_l))
    expected = -math.log(p_w) + 0.1 * math.log1p(1 / odds_ratio)
    assert losses.compute("orpo", logps).item() == pytest.approx(expected, rel=1e-12)


def test_orpo_at_equal_probabilities_is_nll_plus_beta_ln_2():
    logps = losses.PairLogProbs(torch.tensor([-0.4]), torch.tensor([-0.4]), **ONES)
    assert losses.compute("orpo", logps, beta=0.5).item() == pytest.approx(0.4 + 0.5 * LN2)


def test_simpo_by_hand():
    logps = losses.PairLogProbs(
        torch.tensor([-6.0]),
        torch.tensor([-2.0]),
        chosen_length=torch.tensor([12]),
        rejected_length=torch.tensor([2]),
    )
    assert losses.compute("simpo", logps, beta=2.0, simpo_gamma=1.0).item() == pytest.approx(LN2)


def test_per_item_label_smoothing(at_ratios):
    logps, epsilon = at_ratios([1.0, 2.0], [0.0, 0.0]), torch.tensor([0.1, 0.3])
    for name in ("cdpo", "robust", "exo_pair"):
        together = losses.compute(name, logps, beta=1.0, label_smoothing=epsilon)
        for i in range(2):
            alone = losses.compute(name, logps, beta=1.0, label_smoothing=epsilon[i].item())
            assert together[i].item() == pytest.approx(alone[i].item(), rel=1e-6)


@pytest.mark.parametrize(
    ("kind", "slope", "value"),
    [("reverse_kl", 1.0, 0.7), ("forward_kl", 1.0, 1 - math.exp(-0.7)), ("alpha_divergence", 1.0, 1.1803)],
)
def test_divergences_at_a_point(kind, slope, value):
    from mmalign.losses.divergences import f_prime

    coefficient = 2.5 if kind == "alpha_divergence" else 0.5
    if kind == "alpha_divergence":
        value = (math.exp(1.5 * 0.7) - 1) / 1.5
    rho = torch.tensor([0.0, 0.7], dtype=torch.float64, requires_grad=True)
    scores = f_prime(rho, f_divergence_type=kind, f_alpha_divergence_coef=coefficient)
    scores.sum().backward()
    assert scores.tolist() == pytest.approx([0.0, value]) and rho.grad[0].item() == pytest.approx(slope)


def test_js_divergence_at_a_point():
    from mmalign.losses.divergences import f_prime

    rho = torch.tensor([0.0, 1.0], dtype=torch.float64, requires_grad=True)
    scores = f_prime(rho, f_divergence_type="js_divergence", f_alpha_divergence_coef=0.5)
    scores.sum().backward()
    assert scores.tolist() == pytest.approx([0.0, LN2 - math.log1p(math.exp(-1))])
    assert rho.grad[0].item() == pytest.approx(0.5)
