"""Gradients: exact against finite differences, finite everywhere, scaled and stopped where the text says so."""

import math

import pytest
import torch

from mmalign import losses


def with_policy(logps, *policy):
    """The record with other policy values."""
    if isinstance(logps, losses.UnpairedLogProbs):
        return losses.UnpairedLogProbs(*policy, logps.reference, logps.label, logps.kl)
    rest = (logps.reference_chosen, logps.reference_rejected, logps.chosen_length, logps.rejected_length)
    return losses.PairLogProbs(*policy, *rest)


def policy_of(logps):
    pair = isinstance(logps, losses.PairLogProbs)
    values = (logps.policy_chosen, logps.policy_rejected) if pair else (logps.policy,)
    return [value.clone().requires_grad_() for value in values]


def test_gradient_is_the_derivative(draw, key):
    logps, hyper = draw(key, 3, seed=1)
    if key == "sdpo":
        hyper = {"rejected_scale": torch.ones(3)}  # any other scale is, on purpose, not the derivative
    assert torch.autograd.gradcheck(
        lambda *policy: losses.compute(key, with_policy(logps, *policy), **hyper), policy_of(logps)
    )


@pytest.mark.parametrize("kind", ["forward_kl", "js_divergence", "alpha_divergence"])
@pytest.mark.parametrize("name", ["sigmoid", "sigmoid_norm", "hinge", "ipo", "exo_pair", "robust", "cdpo", "discopop"])
def test_gradient_through_a_divergence_is_the_derivative(draw, name, kind):
    logps, _ = draw(name, 2, seed=2)
    assert torch.autograd.gradcheck(
        lambda *policy: losses.compute(name, with_policy(logps, *policy), f_divergence_type=kind), policy_of(logps)
    )


# away from 0 a loss may push one way only; these are the ones that push the other way on purpose
NOT_UP = {"apo_down"}
NOT_DOWN = {"sft"}


def test_chosen_is_pushed_up_and_rejected_down(key):
    """The sign of every loss, near policy = reference."""
    if losses.get(key).unpaired:
        policy = [torch.tensor([-1.0, -1.0], dtype=torch.float64, requires_grad=True)]
        reference = torch.tensor([-1.0, -1.0], dtype=torch.float64)
        logps = losses.UnpairedLogProbs(*policy, reference, torch.tensor([True, False]), kl=0.0)
        losses.compute(key, logps).sum().backward()
        assert policy[0].grad[0] < 0 < policy[0].grad[1]
        return
    policy = [torch.tensor([-1.0], dtype=torch.float64, requires_grad=True) for _ in range(2)]
    same, length = torch.tensor([-1.0], dtype=torch.float64), torch.tensor([2])
    hyper = {"sdpo": {"rejected_scale": torch.tensor([0.5])}, "discopop": {"discopop_tau": 1.0}}.get(key, {})
    losses.compute(key, losses.PairLogProbs(*policy, same, same, length, length), **hyper).backward()
    chosen, rejected = (0.0 if p.grad is None else p.grad.item() for p in policy)
    assert chosen < 0 or key in NOT_UP
    assert rejected > 0 or key in NOT_DOWN


@pytest.mark.parametrize("scale", [0.0, 0.3, 1.0])
def test_sdpo_scales_the_rejected_gradient_only(draw, scale):
    start, _ = draw("sdpo", 3)
    found = []
    for name, hyper in (("sdpo", {"rejected_scale": torch.full((3,), scale)}), ("sigmoid", {})):
        policy = policy_of(start)
        loss = losses.compute(name, with_policy(start, *policy), beta=1.0, **hyper)
        found.append((loss, *torch.autograd.grad(loss.sum(), policy)))
    (value, chosen, rejected), (plain_value, plain_chosen, plain_rejected) = found
    assert torch.equal(value, plain_value)
    torch.testing.assert_close(chosen, plain_chosen)
    torch.testing.assert_close(rejected, scale * plain_rejected)


def test_zero_strength_gives_ln_2_and_no_gradient(draw):
    start, _ = draw("sigmoid", 3)
    policy = policy_of(start)
    loss = losses.compute("sigmoid", with_policy(start, *policy), beta=5.0, strength=torch.zeros(3))
    loss.sum().backward()
    assert loss.tolist() == pytest.approx([math.log(2)] * 3)
    assert all(p.grad.abs().max() == 0 for p in policy)


def test_zero_strength_stops_every_signed_loss(draw, signed_key):
    start, hyper = draw(signed_key, 3)
    policy = policy_of(start)
    losses.compute(signed_key, with_policy(start, *policy), strength=0.0, **hyper).sum().backward()
    assert all(p.grad.abs().max() == 0 for p in policy)


def test_strength_weight_and_reference_get_no_gradient(draw):
    start, _ = draw("sigmoid", 3)
    strength, weight = torch.ones(3, requires_grad=True), torch.ones(3, requires_grad=True)
    reference = [start.reference_chosen.clone().requires_grad_(), start.reference_rejected.clone().requires_grad_()]
    logps = losses.PairLogProbs(*policy_of(start), *reference)
    losses.compute("sigmoid", logps, strength=strength, weight=weight).sum().backward()
    scale = torch.ones(3, requires_grad=True)
    losses.compute("sdpo", logps, rejected_scale=scale).sum().backward()
    assert all(x.grad is None for x in (strength, weight, scale, *reference))


EXTREMES = [1e4, -1e4, 0.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_finite_at_ten_thousand_and_at_zero(key, dtype):
    """Value and gradient at every combination of extremes; where a probability is asked for, it stays one."""
    low = -1e4
    grid = torch.tensor([[a, b] for a in EXTREMES for b in EXTREMES], dtype=dtype)
    if key in ("orpo", "mapo"):
        grid = torch.tensor([[a, b] for a in (low, -1e-9, 0.0) for b in (low, -1e-9, 0.0)], dtype=dtype)
    policy = [grid[:, 0].clone().requires_grad_(), grid[:, 1].clone().requires_grad_()]
    zero, ones = torch.zeros(len(grid), dtype=dtype), torch.ones(len(grid))
    hyper = {"sdpo": {"rejected_scale": ones / 2}}.get(key, {})
    if losses.get(key).unpaired:
        policy, label = policy[:1], torch.arange(len(grid)) % 2 == 0
        logps = losses.UnpairedLogProbs(*policy, zero, label, kl=0.5)
    else:
        logps = losses.PairLogProbs(*policy, zero, zero, ones, ones)
    beta = {} if key == "sft" else {"beta": 1.0}
    loss = losses.compute(key, logps, **beta, **hyper)
    loss.sum().backward()
    assert loss.isfinite().all()
    assert all(p.grad is None or p.grad.isfinite().all() for p in policy)


@pytest.mark.parametrize("kind", ["forward_kl", "js_divergence", "alpha_divergence"])
def test_divergences_are_finite_at_ten_thousand(kind):
    policy = [torch.tensor(values, requires_grad=True) for values in ([1e4, -1e4, -1e4], [-1e4, 1e4, -1e4])]
    loss = losses.compute(
        "sigmoid", losses.PairLogProbs(*policy, torch.zeros(3), torch.zeros(3)), f_divergence_type=kind
    )
    loss.sum().backward()
    assert loss.isfinite().all() and all(p.grad.isfinite().all() for p in policy)


def test_orpo_keeps_teaching_at_certainty():
    """p_l = 1: the slope is large, down, and finite."""
    rejected = torch.zeros(1, requires_grad=True)
    logps = losses.PairLogProbs(
        torch.tensor([-1.0]), rejected, chosen_length=torch.ones(1), rejected_length=torch.ones(1)
    )
    losses.compute("orpo", logps).backward()
    assert 1e3 < rejected.grad.item() < 1e8


def test_orpo_refuses_what_is_no_probability():
    logps = losses.PairLogProbs(
        torch.tensor([0.5]), torch.tensor([-1.0]), chosen_length=torch.ones(1), rejected_length=torch.ones(1)
    )
    assert losses.compute("orpo", logps).isnan().all()


def test_discopop_is_not_zero_times_infinity():
    policy = torch.tensor([-800.0], requires_grad=True)
    loss = losses.compute("discopop", losses.PairLogProbs(policy, *torch.zeros(3, 1)), beta=1.0)
    loss.backward()
    assert loss.item() == pytest.approx(800) and policy.grad.item() == pytest.approx(-1)
