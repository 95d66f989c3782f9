"""How likely a language model finds answers: log-probabilities of their tokens, of policy and reference, and what pairs make of them.

Rows are answers: of B pairs first the B chosen ones, then the B rejected ones. Every (R, T) tensor has a token's value at the token's
own place, and 0 where nothing is supervised.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from jaxtyping import Bool, Float, Integer
from torch import Tensor, nn

from mmalign.likelihood.media import media_inputs
from mmalign.likelihood.token_head import head_of, trunk_of
from mmalign.likelihood.tokens import CHUNK_BYTES, Head, TokenScores, score_tokens
from mmalign.losses import PairLogProbs, UnpairedLogProbs

Form = Literal["sum", "mean", "ld"]


@dataclass(frozen=True, eq=False)
class AnswerScores:
    """What a model says of a batch of answers: `TokenScores`, each as (R, T)."""

    log_prob: Float[Tensor, "R T"]
    kl: Float[Tensor, "R T"] | None = None
    entropy: Float[Tensor, "R T"] | None = None


def hidden_states(
    model: nn.Module,
    inputs: Mapping[str, Tensor],
    supervised: Bool[Tensor, "R T"],
    media: Mapping[str, Tensor],
    features: Mapping[str, Any] | None,
    *,
    copies: int = 2,
) -> Float[Tensor, "N D"]:
    """The hidden states from which the supervised tokens are told, one pass over whole rows (prompt and answer).

    inputs: "input_ids", "attention_mask" and whatever else has one value a token, padded on the right. media: of the prompts once;
    features: of `encode_media`, or None to have the model encode media for every row.
    """
    more = media_inputs(model, media, features, copies=copies)
    hidden = trunk_of(model)(**inputs, **more, use_cache=False).last_hidden_state
    return hidden[:, :-1][supervised[:, 1:]]


def shared_prompt_states(
    model: nn.Module,
    prompt: Mapping[str, Tensor],
    answers: Mapping[str, Tensor],
    supervised: Bool[Tensor, "R A"],
    media: Mapping[str, Tensor],
    features: Mapping[str, Any] | None,
) -> Float[Tensor, "N D"]:
    """`hidden_states` where the prompts are read once, and their cache by both answers; the gradient passes through it.

    prompt: (B, P), padded on the left. answers: (R, A), padded on the right, with R a multiple of B; supervised belongs to them.
    """
    trunk = cast(Any, trunk_of(model))
    mask = prompt["attention_mask"]
    copies = len(supervised) // len(mask)
    # Multimodal rotary positions, which a model of this kind counts itself where there are media.
    counts_itself = hasattr(trunk, "rope_deltas") and any(name.endswith("grid_thw") for name in media)
    places = {} if counts_itself else {"position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}
    read = trunk(**prompt, **places, **media_inputs(model, media, features, copies=1), use_cache=True)
    cache = read.past_key_values
    cache.reorder_cache(torch.arange(len(mask), device=mask.device).repeat(copies))
    whole = torch.cat([mask.repeat(copies, 1), answers["attention_mask"]], dim=1)
    following = (whole.cumsum(-1) - 1)[:, mask.shape[1] :]
    if counts_itself:
        # After the prompt all three axes count on from where its media left them.
        following = (following + trunk.rope_deltas.to(following).repeat(copies, 1)).expand(3, -1, -1)
    told = trunk(
        input_ids=answers["input_ids"],
        attention_mask=whole,
        position_ids=following,
        past_key_values=cache,
        use_cache=True,
    ).last_hidden_state
    last = read.last_hidden_state[:, -1:].repeat(copies, 1, 1)
    return torch.cat([last, told[:, :-1]], dim=1)[supervised]


def score_answers(
    model: nn.Module,
    hidden: Float[Tensor, "N D"],
    input_ids: Integer[Tensor, "R T"],
    supervised: Bool[Tensor, "R T"],
    *,
    reference: tuple[Float[Tensor, "N D"], Head] | None = None,
    entropy: bool = False,
    chunk_bytes: int = CHUNK_BYTES,
) -> AnswerScores:
    """The scores of the supervised tokens; `reference` as in `score_tokens`, for the KL."""
    found = score_tokens(
        hidden,
        input_ids[supervised],
        head_of(model),
        reference=reference,
        entropy=entropy,
        chunk_bytes=chunk_bytes,
    )
    return AnswerScores(*(None if value is None else _placed(value, supervised) for value in _parts(found)))  # type: ignore[arg-type]


def token_weights(
    counted: Bool[Tensor, "R T"], form: Form = "sum", *, ld_alpha: float | None = None
) -> Float[Tensor, "R T"]:
    """By how much each token counts in its row's log-probability.

    sum: one each. mean: one over how many the row has (ln-DPO, arXiv:2407.15229). ld: one up to the length of the pair's shorter answer
    and `ld_alpha` behind it (LD-DPO, arXiv:2409.06411); rows are then pairs.
    """
    counts = counted.float()
    lengths = counts.sum(1, keepdim=True)
    if form == "mean":
        return counts / lengths.clamp(min=1)
    if form == "sum":
        return counts
    if ld_alpha is None or len(counted) % 2:
        raise ValueError("form 'ld' needs ld_alpha, and pairs")
    shared = torch.minimum(*lengths.chunk(2)).repeat(2, 1)
    return torch.where(counts.cumsum(1) <= shared, counts, ld_alpha * counts)


def pair_log_probs(
    policy: Float[Tensor, "R T"], reference: Float[Tensor, "R T"] | None, weights: Float[Tensor, "R T"]
) -> PairLogProbs:
    """Pairs of weighted sums of token log-probabilities; lengths are the numbers of tokens that count."""
    chosen, rejected = (policy * weights).sum(1).chunk(2)
    first, second = (None, None) if reference is None else (reference * weights).sum(1).chunk(2)
    lengths = (weights != 0).sum(1).chunk(2)
    return PairLogProbs(chosen, rejected, first, second, *lengths)


def unpaired_log_probs(
    policy: Float[Tensor, "R T"],
    reference: Float[Tensor, "R T"],
    weights: Float[Tensor, "R T"],
    liked: Bool[Tensor, " R"],
    kl: Tensor | float | None = None,
) -> UnpairedLogProbs:
    """Every answer for itself, liked or not."""
    return UnpairedLogProbs((policy * weights).sum(1), (reference * weights).sum(1), liked, kl)


def _placed(values: Tensor, where: Tensor) -> Tensor:
    return values.new_zeros(where.shape).masked_scatter(where, values)


def _parts(found: TokenScores) -> tuple[Tensor | None, ...]:
    return found.log_prob, found.kl, found.entropy
