"""Log-probabilities of single tokens from hidden states, without ever holding all positions' logits.

A chunk of positions at a time goes through the head and is forgotten. What one token's score changes by with its hidden state is one
vector, whatever is made of the score later: where the head is not trained, it is found in the forward pass, from the logits that are
there anyway, and the backward pass only scales it. A trained head's chunks, if there are several, are made anew in the backward pass.
Everything behind the head's product is float32.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from jaxtyping import Float, Integer
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from mmalign.likelihood.token_head import TokenHead

Head: TypeAlias = Callable[[Float[Tensor, "N D"]], Float[Tensor, "N V"]]
# Some hundred positions of the largest vocabularies: with fewer, reading the head's weights costs more than using them.
CHUNK_BYTES = 2**27


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
    head: TokenHead,
    *,
    reference: tuple[Float[Tensor, "N D"], Head] | None = None,
    entropy: bool = False,
    chunk_bytes: int = CHUNK_BYTES,
) -> TokenScores:
    """The scores of tokens `labels`, each read off the hidden state before it; differentiable in `hidden` and the head's weights.

    reference: hidden states and head of the reference, for the KL; it gets no gradient. chunk_bytes: of float32 logits that may exist
    at once; a backward pass holds a few times as much.
    """
    expected, reference_head = (None, None) if reference is None else (reference[0].detach(), reference[1])
    trained = [weight for weight in head.module.parameters() if weight.requires_grad] if torch.is_grad_enabled() else []
    # A trained head's gradient is as large as its weights and is summed over chunks: fewer of them, as large as that.
    room = max(chunk_bytes, 4 * sum(weight.numel() for weight in trained))
    wanted = _Wanted(head, reference_head, entropy, max(1, room // (4 * head.vocabulary)))
    if torch.is_grad_enabled() and hidden.requires_grad and not trained:
        return TokenScores(*_ScoredByFrozenHead.apply(hidden, labels, expected, wanted))
    parts, chunks = [], wanted.chunks(len(labels))
    for chunk in chunks:
        given = (hidden[chunk], labels[chunk], None if expected is None else expected[chunk], wanted)
        again = bool(trained) and len(chunks) > 1
        parts.append(
            checkpoint(_score, *given, use_reentrant=False, preserve_rng_state=False) if again else _score(*given)
        )
    return TokenScores(*_joined(parts))


@dataclass(frozen=True, eq=False)
class _Wanted:
    """Heads, whether the entropy is wanted, and positions a chunk."""

    head: TokenHead
    reference_head: Head | None
    entropy: bool
    size: int

    def chunks(self, number: int) -> list[slice]:
        return [slice(start, start + self.size) for start in range(0, number, self.size)] or [slice(0, 0)]


class _ScoredByFrozenHead(torch.autograd.Function):
    """`_score` of all chunks, with its derivative in every hidden state kept instead of logits."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, labels: Tensor, expected: Tensor | None, wanted: _Wanted
    ) -> tuple[Tensor | None, ...]:
        parts, slopes = [], []
        for chunk in wanted.chunks(len(labels)):
            with torch.enable_grad():
                state = hidden[chunk].detach().requires_grad_()
                found = _score(state, labels[chunk], None if expected is None else expected[chunk], wanted)
                # Sums, because no score reads another's hidden state.
                told = [score for score in found[:2] if score is not None]
                slopes.append(
                    [torch.autograd.grad(score.sum(), state, retain_graph=score is not told[-1])[0] for score in told]
                )
            parts.append([None if score is None else score.detach() for score in found])
        ctx.save_for_backward(*(torch.cat(slope) for slope in zip(*slopes, strict=True)))
        ctx.set_materialize_grads(False)
        scores = _joined(parts)
        ctx.mark_non_differentiable(*(score for score in scores[2:] if score is not None))
        return scores

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        terms = [
            (gradient[:, None] * slope).to(slope.dtype)
            for gradient, slope in zip(gradients, ctx.saved_tensors, strict=False)
            if gradient is not None
        ]
        return sum(terms[1:], terms[0]), None, None, None


def _joined(parts: list[Any]) -> tuple[Any, ...]:
    return tuple(None if part[0] is None else torch.cat(part) for part in zip(*parts, strict=True))


def _score(
    hidden: Tensor, labels: Tensor, expected_hidden: Tensor | None, wanted: _Wanted
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    log_probs = wanted.head(hidden).log_softmax(-1)
    chosen = log_probs.gather(-1, labels[:, None])[:, 0]
    kl = None
    if expected_hidden is not None and wanted.reference_head is not None:
        with torch.no_grad():
            expected = wanted.reference_head(expected_hidden).log_softmax(-1)
        # A token of no probability adds nothing, whatever the difference of the logarithms is.
        kl = (expected.exp() * (expected - log_probs)).masked_fill(expected == -torch.inf, 0).sum(-1)
    with torch.no_grad():
        spread = -torch.special.xlogy(log_probs.exp(), log_probs.exp()).sum(-1) if wanted.entropy else None
    return chosen, kl, spread
