"""How a model weighs given answers beside its base: whether it ranks held-out pairs as people do, and how far it went from the base."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from mmalign.data.answer_tokens import AnswerBatch, collate_answers, encode_answers, padding_token
from mmalign.data.answers import AnswerSource
from mmalign.data.fingerprints import digest_of
from mmalign.denoisers.parts import evaluating
from mmalign.evaluation.intervals import as_clusters, as_scores, mean_interval, proportion_interval
from mmalign.likelihood.answers import hidden_states, score_answers
from mmalign.likelihood.token_head import base_head_of

_TIE = 0.5


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean over answers or pairs, with its interval over prompts."""

    value: float
    low: float
    high: float
    number: int
    num_clusters: int
    confidence: float


@dataclass(frozen=True, slots=True)
class AnswerLikelihoods:
    """ranking: share of pairs whose preferred answer gained more log-probability over the base than the other, a tie counting ½; ½ is
    what the base itself has, None where the data have no pairs. kl: mean over the preferred answers, or all single ones, of
    KL(base ‖ model) per token. margins: a pair each.
    """

    ranking: Estimate | None
    kl: Estimate
    margins: tuple[float, ...]


@torch.no_grad()
def compare_likelihoods(
    model: nn.Module,
    base: Callable[[], AbstractContextManager[nn.Module]],
    processor: Any,
    data: AnswerSource,
    *,
    batch_size: int = 4,
    processor_kwargs: dict[str, Any] | None = None,
    num_resamples: int = 2000,
    confidence: float = 0.95,
    progress: bool = True,
) -> AnswerLikelihoods:
    """Both models on the answers of `data`; pairs that are ties are left out. base: gives the base model for a while, which may be the
    model itself with its adapter off. A row that cannot be read raises InvalidRow.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    margins: list[float] = []
    divergences: list[float] = []
    prompts = data.prompts()
    rows = [row for row in range(len(data)) if data.raw(row).rejected is None or data.raw(row).label != _TIE]
    if not rows:
        raise ValueError(f"{data.name} holds nothing but ties")
    for start in tqdm(range(0, len(rows), batch_size), desc="Weighing answers", disable=not progress):
        pairs = [data[row] for row in rows[start : start + batch_size]]
        options: dict[str, Any] = {"processor_kwargs": processor_kwargs}
        encoded = [encode_answers(pair, processor, cast(Any, model).config, **options) for pair in pairs]
        batch = collate_answers(encoded, padding_token(processor)).to(cast(Any, model).device)
        log_ratios, kl = _measured(model, base, batch)
        number = len(pairs)
        if len(log_ratios) > number:
            margins += (log_ratios[:number] - log_ratios[number:]).tolist()
        divergences += kl[:number].tolist()
    clusters = as_clusters([digest_of(prompts[row]) for row in rows], len(rows))
    shared = {"num_resamples": num_resamples, "confidence": confidence, "seed": 0}

    def estimated(values: Sequence[float], interval: Any) -> Estimate:
        array = as_scores(values, "What the models say of the answers")
        found = interval(array, clusters, **shared)
        return Estimate(float(array.mean()), found.low, found.high, len(array), clusters.count, confidence)

    ranks = [float(np.sign(margin)) / 2 + 0.5 for margin in margins]
    ranking = estimated(ranks, proportion_interval) if ranks else None
    return AnswerLikelihoods(ranking, estimated(divergences, mean_interval), tuple(margins))


def _measured(
    model: nn.Module, base: Callable[[], AbstractContextManager[nn.Module]], batch: AnswerBatch
) -> tuple[Tensor, Tensor]:
    """Log-ratios summed over tokens, and the KL per token, of every answer (R,)."""
    copies, ids = len(batch.supervised) // len(batch.rows), batch.inputs["input_ids"]

    def states(network: nn.Module) -> Tensor:
        return hidden_states(network, batch.inputs, batch.supervised, batch.media, None, copies=copies)

    with base() as reference, evaluating([reference]):
        hidden = states(reference)
        head = base_head_of(reference)
        expected = score_answers(reference, hidden, ids, batch.supervised).log_prob
    with evaluating([model]):
        found = score_answers(model, states(model), ids, batch.supervised, reference=(hidden, head))
    assert found.kl is not None
    return (found.log_prob - expected).sum(1), found.kl.sum(1) / batch.supervised.sum(1)
