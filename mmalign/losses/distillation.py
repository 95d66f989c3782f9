"""Tempered, decoupled top-K distillation (DTK, arXiv:2511.23404): a teacher of which K logits a position are kept.

A plain tempered KL needs the teacher's tail, which is not there. The chain rule splits it: how much probability lies on
the K tokens at all (untempered, both known), and how it lies within them (tempered, only the K logits needed). Third
parties describe the report's loss so; its τ, and whether it has a factor τ², are not known.

Shapes: N positions, V vocabulary, K kept tokens. Rows are independent: call it on chunks of positions.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Integer
from torch import Tensor

from mmalign.losses.checks import require_positive


@dataclass(frozen=True, slots=True, eq=False)
class TopK:
    """What is kept of a teacher: its K likeliest tokens, their logits up to a constant, and the log of their probability."""

    indices: Integer[Tensor, "N K"]
    logits: Float[Tensor, "N K"]
    log_mass: Float[Tensor, " N"]

    def __len__(self) -> int:
        return self.indices.shape[0]


def top_k_of(logits: Float[Tensor, "N V"], k: int = 32) -> TopK:
    """The teacher's K largest logits, in their own precision; the mass in float32 at least. Without gradient."""
    if not 1 <= k <= logits.shape[-1]:
        raise ValueError(f"k must lie between 1 and the vocabulary's {logits.shape[-1]}, got {k}")
    logits = logits.detach()
    largest, indices = logits.topk(k, dim=-1)
    mass = _wide(largest).logsumexp(-1) - _wide(logits).logsumexp(-1)
    return TopK(indices.int(), largest, mass)


def top_k_of_log_probs(indices: Integer[Tensor, "N K"], log_probs: Float[Tensor, "N K"]) -> TopK:
    """The same from a server that tells the log-probabilities of its K likeliest tokens: their mass is their own sum."""
    return TopK(indices, log_probs, _wide(log_probs).logsumexp(-1))


def decoupled_top_k(
    student_logits: Float[Tensor, "N V"], teacher: TopK, *, temperature: float = 1.0, tau_squared: bool = False
) -> Float[Tensor, " N"]:
    """KL(Bern(P_T) ‖ Bern(P_S)) + P_T · KL(softmax_K(z_T/τ) ‖ softmax_K(z_S/τ)), times τ² on the second with tau_squared.

    P: the probability on the teacher's K tokens at temperature 1. One number a position, in float32 at least; no gradient
    to the teacher. At τ = 1 it is the KL of the K tokens and one bucket for all others, so never above the full KL.
    """
    require_positive("temperature", temperature)
    _check_shapes(student_logits, teacher)
    student, index = _wide(student_logits), teacher.indices.long()
    kept, there = student.gather(-1, index), _wide(teacher.logits).detach()
    log_p = F.log_softmax(there / temperature, dim=-1)
    log_q = F.log_softmax(kept / temperature, dim=-1)
    within = F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)
    log_mass = _wide(teacher.log_mass).detach().clamp(max=0)
    scaled = within * temperature**2 if tau_squared else within
    if index.shape[-1] == student.shape[-1]:
        return scaled
    return _mass_kl(student, kept, index, log_mass) + log_mass.exp() * scaled


def _mass_kl(student: Tensor, kept: Tensor, index: Tensor, log_mass: Tensor) -> Float[Tensor, " N"]:
    """KL of the two masses, from the student's log-odds d = log P_S/(1 − P_S).

    d comes from the tail itself: log(1 − P_S) from P_S would lose all its digits where P_S nears 1, and its slope is 1/(1 − P_S),
    where that of softplus is at most 1.
    """
    tail = student.scatter(-1, index, -torch.inf).logsumexp(-1)
    odds = kept.logsumexp(-1) - tail
    inside, outside = log_mass.exp(), -torch.expm1(log_mass)
    entropy = -torch.xlogy(inside, inside) - torch.xlogy(outside, outside)
    return inside * F.softplus(-odds) + outside * F.softplus(odds) - entropy


def _wide(x: Tensor) -> Tensor:
    return x.float() if x.dtype.itemsize < 4 else x


def _check_shapes(student: Tensor, teacher: TopK) -> None:
    rows = tuple(student.shape[:-1])
    if teacher.indices.shape != teacher.logits.shape or tuple(teacher.indices.shape[:-1]) != rows:
        raise ValueError(
            f"teacher has indices {tuple(teacher.indices.shape)} and logits {tuple(teacher.logits.shape)} for student logits "
            f"{tuple(student.shape)}: give K of each for every position"
        )
    if tuple(teacher.log_mass.shape) != rows:
        raise ValueError(f"teacher.log_mass has shape {tuple(teacher.log_mass.shape)}, expected {rows}: one a position")
    largest = int(teacher.indices.max()) if teacher.indices.numel() else 0
    if largest >= student.shape[-1]:
        raise ValueError(
            f"teacher keeps token {largest} and the student's vocabulary has {student.shape[-1]}: both must share a tokenizer"
        )
