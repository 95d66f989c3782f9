"""Decoupled top-K distillation against the KL it splits, in double precision unless told otherwise."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmalign.losses.distillation import TopK, decoupled_top_k, top_k_of, top_k_of_log_probs

VOCABULARY = 23


def logits(seed=0, rows=4, scale=3.0, vocabulary=VOCABULARY, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(rows, vocabulary, generator=generator, dtype=torch.float64)).to(dtype)


def kl(p, q):
    return (p * (p.log() - q.log())).sum(-1)


def bucketed(x, index):
    """Probabilities of the kept tokens, and of all others together as one more."""
    kept = x.softmax(-1).gather(-1, index.long())
    return torch.cat([kept, 1 - kept.sum(-1, keepdim=True)], dim=-1)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), k=st.integers(1, VOCABULARY - 1), scale=st.floats(0.1, 4.0))
def test_at_temperature_one_it_is_the_kl_with_the_tail_as_one_token_and_at_most_the_whole_kl(seed, k, scale):
    student, teacher = logits(seed, scale=scale), logits(seed + 1, scale=scale)
    kept = top_k_of(teacher, k)
    found = decoupled_top_k(student, kept)
    expected = kl(bucketed(teacher, kept.indices), bucketed(student, kept.indices))
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    assert (found <= kl(teacher.softmax(-1), student.softmax(-1)) + 1e-12).all()


def test_the_chain_rule_holds_to_a_trillionth():
    student, teacher = logits(1), logits(2)
    kept = top_k_of(teacher, 5)
    expected = kl(bucketed(teacher, kept.indices), bucketed(student, kept.indices))
    torch.testing.assert_close(decoupled_top_k(student, kept), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("tau", [0.5, 1.0, 2.0, 7.0])
@pytest.mark.parametrize("k", [1, 5, VOCABULARY])
def test_equal_models_have_no_loss_and_no_gradient(tau, k):
    student = logits().requires_grad_()
    loss = decoupled_top_k(student, top_k_of(student, k), temperature=tau)
    (gradient,) = torch.autograd.grad(loss.sum(), student)
    torch.testing.assert_close(loss, torch.zeros_like(loss), rtol=0, atol=1e-13)
    assert gradient.abs().max() < 1e-13


@pytest.mark.parametrize("tau_squared", [False, True])
@pytest.mark.parametrize("tau", [0.5, 2.0])
def test_temperature_acts_within_the_kept_tokens_only(tau, tau_squared):
    student, teacher = logits(3), logits(4)
    kept = top_k_of(teacher, 4)
    index = kept.indices.long()
    masses = [torch.stack([b[:, :-1].sum(-1), b[:, -1]], -1) for b in (bucketed(x, index) for x in (teacher, student))]
    within = kl(*((x.gather(-1, index) / tau).softmax(-1) for x in (teacher, student)))
    expected = kl(*masses) + masses[0][:, 0] * within * (tau**2 if tau_squared else 1)
    found = decoupled_top_k(student, kept, temperature=tau, tau_squared=tau_squared)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


def test_the_gradient_is_the_derivative_and_its_rows_sum_to_zero():
    kept = top_k_of(logits(5), 4)
    student = logits(6).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: decoupled_top_k(x, kept, temperature=1.7, tau_squared=True), [student])
    (gradient,) = torch.autograd.grad(decoupled_top_k(student, kept, temperature=1.7).sum(), student)
    assert gradient.sum(-1).abs().max() < 1e-13 < gradient.abs().max()


@pytest.mark.parametrize("gap", [30.0, 120.0, 1e4])
@pytest.mark.parametrize("certain", ["student", "teacher", "both"])
def test_certainty_is_finite_and_never_teaches_by_more_than_its_temperature_allows(certain, gap):
    """A slope in a logit is a difference of probabilities, so it stays within [−1, 1] also where 1 − P is below float32."""
    x, y = logits(7, dtype=torch.float32), logits(8, dtype=torch.float32)
    if certain in ("student", "both"):
        x[:, 3] += gap
    if certain in ("teacher", "both"):
        y[:, 3] += gap
    student = x.requires_grad_()
    loss = decoupled_top_k(student, top_k_of(y, 6))
    (gradient,) = torch.autograd.grad(loss.sum(), student)
    assert loss.isfinite().all() and gradient.isfinite().all()
    assert gradient.abs().max() <= 1 + 1e-5 and (loss > -1e-5).all()
    if certain == "teacher":
        assert (loss > 0.1).all()


def test_all_of_the_vocabulary_is_plain_distillation():
    """The mass is 1 on both sides: what rounding leaves of 1 − P must not count."""
    student, teacher = logits(9, dtype=torch.float32), logits(10, dtype=torch.float32)
    found = decoupled_top_k(student, top_k_of(teacher, VOCABULARY), temperature=2.0)
    expected = kl((teacher.double() / 2).softmax(-1), (student.double() / 2).softmax(-1))
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(dtype):
    student, teacher = logits(11, dtype=dtype), logits(12, dtype=dtype)
    found = decoupled_top_k(student, top_k_of(teacher, 5))
    assert found.dtype == torch.float32
    assert torch.equal(found, decoupled_top_k(student.float(), top_k_of(teacher.float(), 5)))


def test_what_is_kept_is_small_and_can_be_stored():
    kept = top_k_of(logits(dtype=torch.float16), 5)
    assert (kept.indices.dtype, kept.logits.dtype, kept.log_mass.dtype) == (torch.int32, torch.float16, torch.float32)
    assert len(kept) == 4 and not kept.logits.requires_grad


def test_log_probabilities_of_a_server_give_the_same():
    student, teacher = logits(13), logits(14)
    kept = top_k_of(teacher, 5)
    told = top_k_of_log_probs(kept.indices, teacher.log_softmax(-1).gather(-1, kept.indices.long()))
    torch.testing.assert_close(
        decoupled_top_k(student, told, temperature=2.0), decoupled_top_k(student, kept, temperature=2.0)
    )


def test_chunks_of_positions_give_what_the_whole_gives():
    student, teacher = logits(15, rows=7), logits(16, rows=7)
    kept = top_k_of(teacher, 5)
    parts = [
        decoupled_top_k(student[rows], TopK(kept.indices[rows], kept.logits[rows], kept.log_mass[rows]))
        for rows in (slice(0, 3), slice(3, 4), slice(4, 7))
    ]
    assert torch.equal(torch.cat(parts), decoupled_top_k(student, kept))


def test_two_tokens_by_hand():
    """The teacher keeps the first of two with p = 3/4, the student gives it 1/2: only the mass differs."""
    teacher = torch.tensor([[math.log(3), 0.0]], dtype=torch.float64)
    loss = decoupled_top_k(torch.zeros(1, 2, dtype=torch.float64), top_k_of(teacher, 1), temperature=5.0)
    assert loss.item() == pytest.approx(0.75 * math.log(1.5) + 0.25 * math.log(0.5), rel=1e-12)


def test_a_mass_that_rounding_puts_above_one_is_one():
    kept = top_k_of(logits(17), 5)
    above, one = (TopK(kept.indices, kept.logits, torch.full((4,), mass, dtype=torch.float64)) for mass in (1e-7, 0.0))
    assert torch.equal(decoupled_top_k(logits(18), above), decoupled_top_k(logits(18), one))


def kept_of(token, mass_shape):
    return TopK(torch.full((4, 2), token), torch.zeros(4, 2), torch.zeros(mass_shape))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: top_k_of(logits(), 24), "k must lie between 1 and the vocabulary's 23, got 24"),
        (lambda: top_k_of(logits(), 0), "k must lie between 1"),
        (lambda: decoupled_top_k(logits(), top_k_of(logits(), 3), temperature=0.0), "temperature must be a finite"),
        (lambda: decoupled_top_k(logits(), top_k_of(logits(rows=3), 3)), "K of each for every position"),
        (lambda: decoupled_top_k(logits(vocabulary=9), kept_of(9, (4,))), "token 9 .* has 9"),
        (lambda: decoupled_top_k(logits(), kept_of(1, (4, 1))), r"log_mass has shape \(4, 1\), expected \(4,\)"),
    ],
)  # fmt: skip
def test_errors(call, message):
    with pytest.raises(ValueError, match=message) as error:
        call()
    assert "\n" not in str(error.value)
