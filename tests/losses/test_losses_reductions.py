"""Special cases: which loss becomes which other one, and under what choice."""

import math

import pytest
import torch

from mmalign import losses

BETA = 0.3


def reference_free_of(logps):
    """The same record with a reference of 0: log-ratios become the policy's own log-probabilities."""
    zero = torch.zeros_like(logps.policy_chosen)
    return losses.PairLogProbs(
        logps.policy_chosen, logps.policy_rejected, zero, zero, logps.chosen_length, logps.rejected_length
    )


def with_lengths(logps, length):
    lengths = torch.full((len(logps),), length)
    return losses.PairLogProbs(
        logps.policy_chosen, logps.policy_rejected, logps.reference_chosen, logps.reference_rejected, lengths, lengths
    )


# name, its hyper-parameters: each is `sigmoid`
ARE_SIGMOID = [
    ("cdpo", {"label_smoothing": 0.0}),
    ("robust", {"label_smoothing": 0.0}),
    ("sdpo", {"rejected_scale": torch.ones(5)}),
    ("sigmoid", {"f_divergence_type": "reverse_kl"}),
    ("sigmoid", {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 1.0}),
    ("sigmoid", {"strength": 1.0}),
    ("sigmoid", {"weight": torch.ones(5)}),
    (["sigmoid"], {"loss_weights": [1.0]}),
    (["sigmoid", "hinge"], {"loss_weights": [1.0, 0.0]}),
]


@pytest.mark.parametrize(("name", "hyper"), ARE_SIGMOID)
def test_becomes_sigmoid_in_value_and_gradient(draw, name, hyper):
    start, _ = draw("sigmoid", 5)
    results = []
    for which, options in ((name, hyper), ("sigmoid", {})):
        policy = [start.policy_chosen.clone().requires_grad_(), start.policy_rejected.clone().requires_grad_()]
        logps = losses.PairLogProbs(*policy, start.reference_chosen, start.reference_rejected)
        loss = losses.compute(which, logps, beta=BETA, **options)
        results.append((loss, *torch.autograd.grad(loss.sum(), policy)))
    for ours, plain in zip(*results, strict=True):
        torch.testing.assert_close(ours, plain)


@pytest.mark.parametrize("name", ["aot", "aot_unpaired"])
def test_transport_of_one_pair_is_cdpo(draw, name):
    logps, _ = draw(name, 1)
    for epsilon in (0.0, 0.2):
        torch.testing.assert_close(
            losses.compute(name, logps, beta=BETA, label_smoothing=epsilon),
            losses.compute("cdpo", logps, beta=BETA, label_smoothing=epsilon),
        )


@pytest.mark.parametrize("length", [1, 7])
def test_sigmoid_norm_with_equal_lengths_is_sigmoid_at_beta_over_length(draw, length):
    logps = with_lengths(draw("sigmoid", 5)[0], length)
    expected = losses.compute("sigmoid", logps, beta=BETA / length)
    torch.testing.assert_close(losses.compute("sigmoid_norm", logps, beta=BETA), expected)


def test_sigmoid_norm_does_not_see_repeated_tokens(draw):
    logps, _ = draw("sigmoid_norm", 5)
    twice = losses.PairLogProbs(
        *(
            2 * x
            for x in (logps.policy_chosen, logps.policy_rejected, logps.reference_chosen, logps.reference_rejected)
        ),
        2 * logps.chosen_length,
        2 * logps.rejected_length,
    )
    torch.testing.assert_close(losses.compute("sigmoid_norm", twice), losses.compute("sigmoid_norm", logps))


def test_ln_dpo_is_another_name(draw):
    logps, _ = draw("ln_dpo", 5)
    assert torch.equal(losses.compute("ln_dpo", logps), losses.compute("sigmoid_norm", logps))
    assert losses.get("ln_dpo").alias_of == "sigmoid_norm" and losses.get("sigmoid_norm").alias_of == ""


def test_ln_pref_has_sigmoid_norm_and_apo_zero_as_its_ends(draw):
    """In value and in gradient; apo_zero where a side is one token, for it divides by no length."""
    start, _ = draw("ln_pref", 5)
    cases = [
        (start, {}, "sigmoid_norm"),
        (with_lengths(start, 1), {"ln_pref_omega": 0.0, "ln_pref_lambda": 1.0}, "apo_zero"),
    ]
    for logps, hyper, neighbour in cases:
        found = []
        for name, options in (("ln_pref", hyper), (neighbour, {})):
            policy = [logps.policy_chosen.clone().requires_grad_(), logps.policy_rejected.clone().requires_grad_()]
            rest = (logps.reference_chosen, logps.reference_rejected, logps.chosen_length, logps.rejected_length)
            loss = losses.compute(name, losses.PairLogProbs(*policy, *rest), beta=BETA, **options)
            found.append((loss, *torch.autograd.grad(loss.sum(), policy)))
        for ours, theirs in zip(*found, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)


def test_ln_pref_is_the_weighted_sum_of_its_ends(draw):
    logps, _ = draw("ln_pref", 5)
    ends = [
        losses.compute("ln_pref", logps, ln_pref_omega=omega, ln_pref_lambda=1 - omega, ln_pref_margin=omega * 0.4)
        for omega in (1.0, 0.0)
    ]
    both = losses.compute("ln_pref", logps, ln_pref_omega=0.7, ln_pref_lambda=0.2, ln_pref_margin=0.4)
    torch.testing.assert_close(both, 0.7 * ends[0] + 0.2 * ends[1])


def test_cpo_without_likelihood_is_sigmoid_without_reference(draw):
    logps, _ = draw("cpo", 5)
    expected = losses.compute("sigmoid", reference_free_of(logps), beta=BETA)
    torch.testing.assert_close(losses.compute("cpo", logps, beta=BETA, cpo_alpha=0.0), expected)


def test_cpo_is_its_preference_plus_sft(draw):
    logps, _ = draw("cpo", 5)
    parts = losses.compute("cpo", logps, cpo_alpha=0.0) + 0.7 * losses.compute("sft", logps)
    torch.testing.assert_close(losses.compute("cpo", logps, cpo_alpha=0.7), parts)


def test_simpo_without_margin_and_length_is_cpo_without_likelihood(draw):
    logps = with_lengths(draw("simpo", 5)[0], 1)
    expected = losses.compute("cpo", logps, beta=BETA, cpo_alpha=0.0)
    torch.testing.assert_close(losses.compute("simpo", logps, beta=BETA, simpo_gamma=0.0), expected)


def test_simpo_without_margin_is_sigmoid_norm_without_reference(draw):
    logps, _ = draw("simpo", 5)
    expected = losses.compute("sigmoid_norm", reference_free_of(logps), beta=BETA)
    torch.testing.assert_close(losses.compute("simpo", logps, beta=BETA, simpo_gamma=0.0), expected)


def unpaired_of(logps, **kl):
    """Chosen samples liked, rejected ones disliked, as one batch of twice the size."""
    label = torch.arange(2 * len(logps)) < len(logps)
    policy = torch.cat([logps.policy_chosen, logps.policy_rejected])
    reference = torch.cat([logps.reference_chosen, logps.reference_rejected])
    return losses.UnpairedLogProbs(policy, reference, label, **kl)


@pytest.mark.parametrize(("name", "kl"), [("kto", {"kl": 0.0}), ("apo_zero_unpaired", {})])
def test_kto_without_baseline_summed_over_a_pair_is_apo_zero(draw, name, kl):
    logps, _ = draw("apo_zero", 4)
    both = losses.compute(name, unpaired_of(logps, **kl), beta=BETA)
    torch.testing.assert_close(both[:4] + both[4:], losses.compute("apo_zero", logps, beta=BETA))


def test_bco_without_shift_summed_over_a_pair_is_bco_pair(draw):
    logps, _ = draw("bco_pair", 4)
    both = losses.compute("bco", unpaired_of(logps), beta=BETA, delta=0.0)
    torch.testing.assert_close(both[:4] + both[4:], losses.compute("bco_pair", logps, beta=BETA))


def test_bco_of_one_pair_is_twice_dpo_at_half_beta_and_never_less_than_dpo(draw):
    logps, _ = draw("sigmoid", 1, seed=3)
    best = losses.compute("bco", unpaired_of(logps), beta=BETA).sum()
    torch.testing.assert_close(best, 2 * losses.compute("sigmoid", logps, beta=BETA / 2).sum())
    for delta in (-2.0, 0.0, 0.3, 4.0):
        other = losses.compute("bco", unpaired_of(logps), beta=BETA, delta=delta).sum()
        assert other >= best >= losses.compute("sigmoid", logps, beta=BETA).sum()


def test_diffusion_kto_with_a_given_baseline_is_kto(draw):
    logps, _ = draw("kto", 6)
    torch.testing.assert_close(
        losses.compute("diffusion_kto", logps, beta=BETA, desirable_weight=1.5),
        losses.compute("kto", logps, beta=BETA, desirable_weight=1.5),
    )


def test_divergence_limits(draw):
    logps, _ = draw("sigmoid", 5)

    def loss(kind, **coefficient):
        return losses.compute("sigmoid", logps, beta=BETA, f_divergence_type=kind, **coefficient)

    forward = loss("forward_kl")
    torch.testing.assert_close(loss("alpha_divergence", f_alpha_divergence_coef=0.0), forward)
    near = loss("alpha_divergence", f_alpha_divergence_coef=1 + 1e-5)
    torch.testing.assert_close(near, loss("reverse_kl"), rtol=0, atol=1e-4)
    assert (forward - loss("reverse_kl")).abs().min() > 1e-4


@pytest.mark.parametrize("name", ["sigmoid", "robust", "cdpo", "hinge", "exo_pair", "discopop"])
def test_strength_is_a_beta_of_each_pair(draw, name):
    logps, _ = draw(name, 4)
    strength = torch.tensor([0.2, 1.0, 2.5, 4.0])
    together = losses.compute(name, logps, beta=BETA, strength=strength)
    for i, s in enumerate(strength.tolist()):
        assert together[i].item() == pytest.approx(losses.compute(name, logps, beta=BETA * s)[i].item(), rel=1e-6)


def test_smpo_weights_of_the_paper():
    """γ(2p − 1) with p = softmax of the normalised rewards is γ·tanh(Δn/2); p = .55 at γ = 10 is plain DPO."""
    p, gap = torch.tensor([0.5, 0.55]), torch.tensor([0.0, math.log(0.55 / 0.45)])
    torch.testing.assert_close(10 * (2 * p - 1), 10 * torch.tanh(gap / 2))
    logps = losses.PairLogProbs(*torch.tensor([[-1.0, -1.0], [-2.0, -2.0], [-1.5, -1.5], [-1.0, -1.0]]).double())
    tie, plain = losses.compute("sigmoid", logps, beta=BETA, strength=10 * (2 * p - 1))
    assert tie.item() == pytest.approx(math.log(2), abs=1e-7)
    assert plain.item() == pytest.approx(losses.compute("sigmoid", logps, beta=BETA)[1].item(), abs=1e-6)


def test_diffusion_dpo_by_its_errors():
    """z = −½·β·[(m_w − r_w) − (m_l − r_l)], loss softplus(−z): log-probabilities are −½ · mean squared error."""
    m_w, r_w, m_l, r_l = torch.tensor([[0.10, 0.2], [0.12, 0.2], [0.30, 0.1], [0.25, 0.3]], dtype=torch.float64)
    logps = losses.PairLogProbs(*(-x / 2 for x in (m_w, m_l, r_w, r_l)))
    z = -0.5 * 5000 * ((m_w - r_w) - (m_l - r_l))
    expected = torch.nn.functional.softplus(-z, threshold=1e6)
    torch.testing.assert_close(losses.compute("sigmoid", logps, beta=5000.0), expected)


def test_rpo_is_a_list_of_sigmoid_and_sft():
    """Slope −β·(σ(−z) + η): the likelihood term never stops pushing the chosen side up."""
    beta, eta = 0.2, 0.4
    chosen = torch.tensor([1.5], dtype=torch.float64, requires_grad=True)
    logps = losses.PairLogProbs(chosen, *torch.tensor([[0.3], [0.2], [0.4]], dtype=torch.float64))
    loss = losses.compute(["sigmoid", "sft"], logps, beta=beta, loss_weights=[1.0, eta * beta])
    loss.backward()
    z = beta * logps.margin.detach()
    assert chosen.grad.item() == pytest.approx(-beta * (torch.sigmoid(-z).item() + eta))


def test_label_smoothing_identity(at_ratios):
    """q·φ(z) + (1 − q)·φ(−z) = φ(z) + (1 − q)·z for any q, also outside [0, 1]."""
    from mmalign.losses.template import pair_loss

    z = torch.linspace(-6, 6, 13, dtype=torch.float64)
    for q in (-0.5, 0.0, 0.3, 1.0, 1.7):
        torch.testing.assert_close(pair_loss(z, q=q), pair_loss(z) + (1 - q) * z)
