"""RRPO: preferences of single phrases, held to the reference token by token (Sarkar & Etemad, NeurIPS 2025, arXiv:2504.12083).

    L = −log σ( u ) + α · Σ_t KL( π_ref(·|y⁺_<t) ‖ π_θ(·|y⁺_<t) ),   u = β · ( Σ_{t in marked y⁺} δ_t − Σ_{t in marked y⁻} δ_t )

with δ_t = log π_θ(y_t) − log π_ref(y_t). Marked are the phrases in which the answers differ in what they say; all other tokens are held
by the divergence alone. The paper writes both terms within one negative sign, which would reward divergence; its code, and this, adds
it. With everything marked and α = 0 this is DPO.
"""

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

from jaxtyping import Bool, Float
from torch import Tensor

from mmalign import losses
from mmalign.data.answer_marks import differing_spans
from mmalign.data.answer_records import AnswerPair, Span
from mmalign.data.answer_tokens import AnswerBatch, EncodedAnswers
from mmalign.data.records import BadRow, InvalidRow
from mmalign.training.config_checks import refuse
from mmalign.training.metrics import totals
from mmalign.training.token_checks import divides_by_lengths
from mmalign.training.token_config import PLAYGROUND, TokenConfig
from mmalign.training.token_measurement import AnswerMeasurement
from mmalign.training.token_pipeline import TokenPipeline
from mmalign.training.token_trainer import TokenTrainer


@dataclass
class RRPOConfig(TokenConfig):
    """Defaults of RRPO for LLaVA-Video; see `TokenConfig` for every other option.

    The presets, "playground" aside, are the released scripts' (32 pairs a step, one epoch): LoRAs of rank 128 and α 256, whose dropout
    their trainers switch off. Clips have 16 frames there.

    alpha          α, weight of the divergence; 0 leaves it out
    kl_on          of which answers: the "chosen" one (paper and code) or "both"
    normalize      "none": sums (paper and code); "phrase_tokens": u per marked token of its answer, "response_tokens": per token of it;
                   the divergence is then per token of its answer
    refined        False: whole answers are compared instead of their phrases, as in DPO (the paper's ablation)
    insertions, deletions   how phrases are found where the data mark none: `mmalign.data.answer_marks.differing_spans`
    """

    method: ClassVar[str] = "rrpo"
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        name: {
            "alpha": alpha, "beta": beta, "learning_rate": rate, "num_frames": 16, "num_train_epochs": 1,
            "per_device_train_batch_size": 1, "gradient_accumulation_steps": 32, "lr_scheduler_type": "cosine", **more,
        }
        for name, alpha, beta, rate, more in (
            ("llava-video", 0.01, 0.1, 5e-6, {"warmup_steps": 0.03, "bf16": True}),
            ("longvu", 0.05, 0.5, 5e-6, {"warmup_steps": 0.03, "bf16": True}),
            ("videochat2", 0.01, 0.9, 2e-5, {
                "weight_decay": 0.02, "fp16": True,
                "lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr_rate": 0.01},
            }),
        )
    } | {"playground": {**PLAYGROUND, "alpha": 0.1}}  # fmt: skip

    alpha: float = 0.01
    kl_on: Literal["chosen", "both"] = "chosen"
    normalize: Literal["none", "phrase_tokens", "response_tokens"] = "none"
    refined: bool = True
    insertions: Literal["neighbour", "skip"] = "neighbour"
    deletions: Literal["mark", "skip"] = "mark"

    learning_rate: float = 5e-6

    def __post_init__(self) -> None:
        super().__post_init__()
        refuse(
            {
                "alpha must not be negative: it would reward divergence": not self.alpha >= 0,
                "kl_on has no effect with alpha=0": self.alpha == 0 and self.kl_on != self.default("kl_on"),
                "normalize='phrase_tokens' needs refined=True": self.normalize == "phrase_tokens" and not self.refined,
                "RRPO sums its own tokens: leave logps out, and see normalize": self.logps != "sum",
                "normalize divides by tokens, and so does the loss: leave one of them out": self.normalize != "none"
                and any(divides_by_lengths(losses.get(key)) for key in self.loss_type),
                "joint has no meaning for RRPO: only answers have marked phrases": self.joint,
                "RRPO compares two answers: leave losses of single ones out": self.is_unpaired,
            }
        )
        for name in ("insertions", "deletions"):
            if not self.refined and getattr(self, name) != self.default(name):
                raise ValueError(f"{name} has no effect with refined=False")

    @property
    def needs_kl(self) -> bool:  # type: ignore[override]
        """Whether the divergence counts."""
        return self.alpha > 0

    def taken(self, pair: AnswerPair) -> AnswerPair:
        """The pair with its phrases marked; InvalidRow where an answer then has none, for nothing would be compared."""
        if not self.refined or pair.rejected is None:
            return super().taken(pair)
        marks = pair.chosen_marks, pair.rejected_marks
        if None in marks:
            marks = differing_spans(pair.chosen, pair.rejected, insertions=self.insertions, deletions=self.deletions)
        for found, field in zip(marks, pair.fields, strict=False):
            if not found:
                raise InvalidRow(BadRow(pair.row, field, _no_phrase(marks, pair)))
        return replace(pair, chosen_marks=marks[0], rejected_marks=marks[1])

    def taking(self) -> dict[str, Any]:
        """What decides about marks."""
        return {"refined": self.refined, "insertions": self.insertions, "deletions": self.deletions}

    def check_encoded(self, pair: AnswerPair, encoded: EncodedAnswers) -> None:
        """InvalidRow where no token of an answer lies in a phrase."""
        if not self.refined or pair.rejected is None:
            return
        for answer, field in zip(encoded.answers, pair.fields, strict=True):
            if not (answer.marked & answer.supervised).any():
                raise InvalidRow(BadRow(pair.row, field, "no token lies in its marked phrases"))

    def about(self) -> str:
        """Both terms."""
        compared = "marked phrases" if self.refined else "whole answers"
        return f"loss={self.objective()} of {compared} + {self.alpha:g}·KL on {self.kl_on}, normalize={self.normalize}"


class RRPOTrainer(TokenTrainer):
    """Compares phrases, and holds the rest to the reference; arguments as in `TokenTrainer`."""

    config_class = RRPOConfig
    args: RRPOConfig

    def loss_of(self, measured: AnswerMeasurement, kl: Tensor | None = None) -> Float[Tensor, " B"]:
        """`rrpo_loss`."""
        return rrpo_loss(measured, self.args)

    def panel(self, measured: AnswerMeasurement, loss: Tensor) -> dict[str, tuple[float, float]]:
        """Also the divergence of both sides, a sum over an answer's tokens each, and the share of tokens that are marked."""
        values = {"marked": measured.weights[measured.supervised] != 0}
        if measured.policy.kl is not None:
            sums = measured.policy.kl.detach().sum(1).chunk(2)
            values |= {f"kl/{side}": value for side, value in zip(("chosen", "rejected"), sums, strict=True)}
        return super().panel(measured, loss) | totals(values)

    def _weights(self, batch: AnswerBatch) -> Float[Tensor, "R T"]:
        return phrase_weights(batch.supervised, batch.marked, self.args)


class RRPOPipeline(TokenPipeline):
    """A model that watches clips (or looks at pictures), aligned by RRPO."""

    config_class = RRPOConfig
    trainer_class = RRPOTrainer


def phrase_weights(
    supervised: Bool[Tensor, "R T"], marked: Bool[Tensor, "R T"], args: RRPOConfig
) -> Float[Tensor, "R T"]:
    """By how much each token counts in u: marked ones, of unrefined answers all."""
    weights = (supervised & marked if args.refined else supervised).float()
    if args.normalize == "none":
        return weights
    among = weights if args.normalize == "phrase_tokens" else supervised.float()
    return weights / among.sum(1, keepdim=True).clamp(min=1)


def rrpo_loss(measured: AnswerMeasurement, args: RRPOConfig) -> Float[Tensor, " B"]:
    """−log σ(u) + α · divergence, one number a pair; another pair loss in place of −log σ by `loss_type`."""
    loss = losses.compute(args.loss_type, measured.pairs(), loss_weights=args.loss_weights, **args.loss_options())
    if args.alpha == 0:
        return loss
    assert measured.policy.kl is not None
    total = measured.policy.kl.sum(1)
    if args.normalize != "none":
        total = total / measured.supervised.sum(1).clamp(min=1)
    chosen, rejected = total.chunk(2)
    return loss + args.alpha * (chosen if args.kl_on == "chosen" else chosen + rejected)


def _no_phrase(marks: tuple[tuple[Span, ...] | None, ...], pair: AnswerPair) -> str:
    if pair.chosen == pair.rejected:
        return "both answers are the same"
    return "no phrase is marked in it" if any(marks) else "no phrase is marked in either answer"
