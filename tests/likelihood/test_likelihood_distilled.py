"""Distillation over chunks of positions: the numbers and gradients of all logits at once, in a few rows of them."""

import pytest
import torch
from torch import Tensor, nn

from mmalign.likelihood.distilled import distil_tokens
from mmalign.likelihood.token_head import TokenHead
from mmalign.losses.distillation import decoupled_top_k, top_k_of


class Counting(nn.Linear):
    """Remembers the largest number of positions that went through it at once."""

    most = 0

    def forward(self, hidden: Tensor) -> Tensor:
        self.most = max(self.most, len(hidden))
        return super().forward(hidden)


def heads(dtype: torch.dtype = torch.float64, vocabulary: int = 40) -> tuple[TokenHead, TokenHead]:
    torch.manual_seed(0)
    return (
        TokenHead(Counting(6, vocabulary, bias=False).to(dtype), multiplier=0.7, cap=4.0),
        TokenHead(Counting(9, vocabulary, bias=False).to(dtype)),
    )


def test_chunks_give_what_all_logits_give_and_hold_a_few_of_them() -> None:
    student, teacher = heads()
    hidden = torch.randn(11, 6, dtype=torch.float64, requires_grad=True)
    taught = torch.randn(11, 9, dtype=torch.float64)
    kept = top_k_of(teacher(taught), 5)
    whole = decoupled_top_k(student(hidden), kept, temperature=2.0, tau_squared=True)
    student.module.most = 0
    found = distil_tokens(
        hidden, student, taught, teacher, top_k=5, temperature=2.0, tau_squared=True, chunk_bytes=3 * 4 * 40
    )
    torch.testing.assert_close(found, whole, rtol=1e-12, atol=1e-14)
    trained = (hidden, student.module.weight)
    scale = torch.linspace(-1, 2, 11, dtype=torch.float64)
    gradients = torch.autograd.grad((found * scale).sum(), trained)
    for ours, expected in zip(gradients, torch.autograd.grad((whole * scale).sum(), trained), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-13)
    assert student.module.most == 3
    with torch.no_grad():
        torch.testing.assert_close(distil_tokens(hidden, student, taught, teacher, top_k=5).shape, found.shape)


def test_the_teacher_learns_nothing() -> None:
    student, teacher = heads(torch.float32)
    taught = torch.randn(4, 9, requires_grad=True)
    distil_tokens(torch.randn(4, 6), student, taught, teacher, top_k=5).sum().backward()
    assert taught.grad is None and teacher.module.weight.grad is None
    assert student.module.weight.grad is not None


def test_no_positions_are_no_loss() -> None:
    student, teacher = heads(torch.float32)
    assert distil_tokens(torch.zeros(0, 6), student, torch.zeros(0, 9), teacher).shape == (0,)


def test_another_vocabulary_is_refused() -> None:
    student, _ = heads()
    _, teacher = heads(vocabulary=41)
    with pytest.raises(ValueError, match="the teacher tells 41 tokens apart and the student 40"):
        distil_tokens(torch.zeros(1, 6).double(), student, torch.zeros(1, 9).double(), teacher)
