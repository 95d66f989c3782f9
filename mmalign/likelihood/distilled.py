"""Decoupled top-K distillation from hidden states of student and teacher, without ever holding all positions' logits."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from mmalign.likelihood.token_head import TokenHead
from mmalign.likelihood.tokens import CHUNK_BYTES
from mmalign.losses.distillation import decoupled_top_k, top_k_of


def distil_tokens(
    hidden: Float[Tensor, "N D"],
    head: TokenHead,
    teacher_hidden: Float[Tensor, "N E"],
    teacher_head: TokenHead,
    *,
    top_k: int = 32,
    temperature: float = 1.0,
    tau_squared: bool = False,
    chunk_bytes: int = CHUNK_BYTES,
) -> Float[Tensor, " N"]:
    """`decoupled_top_k` at each of N positions, from the hidden states before them.

    A chunk's logits are made anew for the backward pass. chunk_bytes: of float32 logits of the student that may exist at once; there
    are as many of the teacher, and a few copies.
    """
    if head.vocabulary != teacher_head.vocabulary:
        raise ValueError(
            f"the teacher tells {teacher_head.vocabulary} tokens apart and the student {head.vocabulary}: both must share a tokenizer"
        )
    size = max(1, chunk_bytes // (4 * head.vocabulary))

    def part(states: Tensor, taught: Tensor) -> Tensor:
        with torch.no_grad():
            kept = top_k_of(teacher_head(taught), top_k)
        return decoupled_top_k(head(states), kept, temperature=temperature, tau_squared=tau_squared)

    parts = [hidden.new_zeros(0, dtype=torch.float32)]
    for start in range(0, len(hidden), size):
        chunk = (hidden[start : start + size], teacher_hidden[start : start + size])
        anew = torch.is_grad_enabled()
        parts.append(checkpoint(part, *chunk, use_reentrant=False, preserve_rng_state=False) if anew else part(*chunk))
    return torch.cat(parts)
