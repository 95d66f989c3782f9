"""From a batch of answers to log-probabilities of policy and reference: media once, policy with gradient, reference live or known."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Self, cast

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from mmalign.data.answer_tokens import AnswerBatch
from mmalign.likelihood.answers import (
    AnswerScores,
    hidden_states,
    pair_log_probs,
    score_answers,
    shared_prompt_states,
    unpaired_log_probs,
)
from mmalign.likelihood.media import encode_media
from mmalign.likelihood.reference import Reference
from mmalign.likelihood.token_head import TokenHead, base_head_of
from mmalign.losses import PairLogProbs, UnpairedLogProbs


class AnswerPolicy(nn.Module):
    """The model that is trained, behind the forward that several processes wrap; maps transformers' checkpointing verbs."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, batch: AnswerBatch, features: Any = None, **options: Any) -> AnswerScores:
        """The scores of the supervised tokens; `features` as `media_features` gives them, None: encoded here. options: `scores`."""
        return scores(self.network, batch, features or media_features(self.network, batch), **options)

    def train(self, mode: bool = True) -> Self:
        """As in torch, but without the model's own dropout, so that it is compared and not its noise; a LoRA keeps its dropout."""
        super().train(mode)
        for name, module in self.network.named_modules():
            if isinstance(module, nn.Dropout) and ".lora_dropout." not in name:
                module.eval()
        return self

    def activation_checkpointing_enable(self, **options: Any) -> None:
        """transformers' own verb, without re-entrance; it takes no options, and `inherited.py` refuses any."""
        network = cast(Any, self.network)
        network.activation_checkpointing_enable()
        # Without re-entrance nothing needs a gradient at the embeddings, and through the frozen layers below a LoRA it costs time.
        network.disable_input_require_grads()

    def activation_checkpointing_disable(self) -> None:
        """Undoes it."""
        cast(Any, self.network).activation_checkpointing_disable()


@dataclass(frozen=True, eq=False)
class Features:
    """A batch's media, encoded; None of a model that cannot be given features, and encodes them for every answer."""

    encoded: dict[str, Any] | None


@dataclass(frozen=True, eq=False)
class AnswerMeasurement:
    """What policy and reference say of a batch, each (R, T) with a token's value at its place, and how much each token counts.

    supervised, marked: as in the batch. reference: None for a run without one.
    """

    policy: AnswerScores
    reference: Float[Tensor, "R T"] | None
    weights: Float[Tensor, "R T"]
    supervised: Bool[Tensor, "R T"]
    marked: Bool[Tensor, "R T"]
    label: Float[Tensor, " B"]

    @property
    def sides(self) -> int:
        """Answers a row."""
        return len(self.supervised) // len(self.label)

    def pairs(self) -> PairLogProbs:
        """Weighted sums, as pair losses read them."""
        return pair_log_probs(self.policy.log_prob, self.reference, self.weights)

    def singles(self, kl: Tensor | None = None) -> UnpairedLogProbs:
        """Every answer for itself: of a pair the chosen one is liked and the rejected one is not."""
        liked = self.label > 0.5 if self.sides == 1 else torch.arange(len(self.weights)) < len(self.label)
        reference = self.policy.log_prob.detach() if self.reference is None else self.reference
        return unpaired_log_probs(self.policy.log_prob, reference, self.weights, liked.to(self.weights.device), kl)

    @property
    def log_ratios(self) -> Float[Tensor, " R"] | None:
        """Weighted sums of policy minus reference, without gradient."""
        if self.reference is None:
            return None
        return ((self.policy.log_prob.detach() - self.reference) * self.weights).sum(1)


def media_features(model: nn.Module, batch: AnswerBatch) -> Features:
    """The features of a batch's media."""
    return Features(encode_media(model, batch.media) if batch.media else {})


def scores(
    model: nn.Module,
    batch: AnswerBatch,
    features: Features,
    *,
    reference: tuple[Tensor, TokenHead] | None = None,
    entropy: bool = False,
) -> AnswerScores:
    """The scores of the supervised tokens; `reference`: its hidden states and head, where the KL is wanted."""
    hidden = states(model, batch, features)
    return score_answers(
        model, hidden, batch.inputs["input_ids"], batch.supervised, reference=reference, entropy=entropy
    )


def states(model: nn.Module, batch: AnswerBatch, features: Features) -> Float[Tensor, "N D"]:
    """The hidden states before the supervised tokens, prompts read with each answer or once for both."""
    if batch.prompt_inputs is not None:
        return shared_prompt_states(
            model, batch.prompt_inputs, batch.inputs, batch.supervised, batch.media, features.encoded
        )
    copies = len(batch.supervised) // len(batch.rows)
    return hidden_states(model, batch.inputs, batch.supervised, batch.media, features.encoded, copies=copies)


@torch.no_grad()
def reference_scores(
    network: nn.Module, reference: Reference, batch: AnswerBatch, features: Features | None
) -> tuple[Float[Tensor, "R T"], tuple[Tensor, TokenHead]]:
    """The reference's log-probabilities, with its hidden states and head for the KL; `features` None: it encodes its own."""
    with reference.model(network) as frozen:
        hidden = states(frozen, batch, features or media_features(frozen, batch))
        found = score_answers(frozen, hidden, batch.inputs["input_ids"], batch.supervised)
        return found.log_prob, (hidden, base_head_of(frozen))


def measure_answers(
    policy: Callable[..., AnswerScores],
    network: nn.Module,
    reference: Reference,
    batch: AnswerBatch,
    *,
    weights: Callable[[AnswerBatch], Tensor],
    shares_media: bool,
    known_reference: Float[Tensor, "R T"] | None = None,
    kl: bool = False,
    entropy: bool = False,
    autocast: Callable[[], AbstractContextManager] = nullcontext,
) -> AnswerMeasurement:
    """Policy and reference on the same tokens, in the same precision.

    `policy` carries gradient and may be wrapped for several processes; `network` is the bare model behind it. weights: of the tokens.
    shares_media: nothing that encodes media is trained, so that media are encoded once for both. known_reference: from an earlier
    measurement; the reference is then not called.
    """
    features, told, of_reference = None, known_reference, None
    with autocast():
        if shares_media:
            with torch.no_grad():
                features = media_features(network, batch)
        if told is None and reference.kind != "none":
            told, of_reference = reference_scores(network, reference, batch, features)
        found = policy(batch, features, reference=of_reference if kl else None, entropy=entropy)
    return AnswerMeasurement(found, told, weights(batch), batch.supervised, batch.marked, batch.label)
