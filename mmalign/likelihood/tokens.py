"""Log-probabilities of single tokens from hidden states, without ever holding all positions' logits.

A chunk of positions at a time goes through the head and is forgotten; its backward pass makes its logits anew. Everything behind the
head's product is float32.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import torch
from jaxtyping import Float, Integer
from torch import Tensor
from torch.utils.checkpoint import checkpoint

Head: TypeAlias = Callable[[Float[Tensor, "N D"]], Float[Tensor, "N V"]]
CHUNK_BYTES = 2**26


@dataclass(frozen=True, eq=False)
class TokenScores:
    """Of N tokens, float32.

    log_prob: log π(y_t | what stands before it). kl: KL(π_ref ‖ π) over the whole vocabulary at its position (arXiv:2504.12083, D_TKL,
    one term), ≥ 0 up to rounding. entropy: of π, a constant. None where they were not asked for.
    """

    log_prob: Float[Tensor, " N"]
    kl: Float[Tensor, " N"] | None = None
    entropy: Float[Tensor, " N"] | None = None


def score_tokens(
    hidden: Float[Tensor, "N D"],
    labels: Integer[Tensor, " N"],
    head: Head,
    *,
    vocabulary: int,
    reference: tuple[Float[Tensor, "N D"], Head] | None = None,
    entropy: bool = False,
    chunk_bytes: int = CHUNK_BYTES,
) -> TokenScores:
    """The scores of tokens `labels`, each read off the hidden state before it; differentiable in `hidden` and the head's weights.

    reference: hidden states and head of the reference, for the KL; it gets no gradient. vocabulary: V. chunk_bytes: of float32 logits
    that may exist at once; backward holds a few times as much.
    """
    size = max(1, chunk_bytes // (4 * vocabulary))
    chunks = [slice(start, start + size) for start in range(0, len(labels), size)] or [slice(0, 0)]
    remembers = torch.is_grad_enabled()
    parts = []
    for chunk in chunks:
        of_reference = None if reference is None else reference[0][chunk].detach()
        arguments = (
            hidden[chunk],
            labels[chunk],
            head,
            of_reference,
            None if reference is None else reference[1],
            entropy,
        )
        parts.append(
            checkpoint(_score, *arguments, use_reentrant=False, preserve_rng_state=False)
            if remembers
            else _score(*arguments)
        )
    log_prob, kl, spread = (None if part[0] is None else torch.cat(part) for part in zip(*parts, strict=True))
    assert log_prob is not None
    return TokenScores(log_prob, kl, spread)


def _score(
    hidden: Tensor, labels: Tensor, head: Head, of_reference: Tensor | None, reference_head: Head | None, entropy: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    log_probs = head(hidden).log_softmax(-1)
    chosen = log_probs.gather(-1, labels[:, None])[:, 0]
    kl = None
    if of_reference is not None and reference_head is not None:
        with torch.no_grad():
            expected = reference_head(of_reference).log_softmax(-1)
        # A token of no probability adds nothing, whatever the difference of the logarithms is.
        kl = (expected.exp() * (expected - log_probs)).masked_fill(expected == -torch.inf, 0).sum(-1)
    with torch.no_grad():
        spread = -torch.special.xlogy(log_probs.exp(), log_probs.exp()).sum(-1) if entropy else None
    return chosen, kl, spread
