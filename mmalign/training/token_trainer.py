"""The trainer of models that answer in tokens: `AlignTrainer` around a transformers model and its processor."""

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from mmalign import losses
from mmalign.data.answer_tokens import AnswerBatch, padding_token
from mmalign.denoisers.parts import evaluating
from mmalign.likelihood.answers import token_weights
from mmalign.likelihood.media import media_inputs
from mmalign.likelihood.reference import Reference, make_reference
from mmalign.likelihood.token_head import check_head
from mmalign.training.align_trainer import AlignTrainer, Losses
from mmalign.training.answer_cache import VERIFIED
from mmalign.training.devices import on_device
from mmalign.training.estimate import trained_passes
from mmalign.training.findings import Finding
from mmalign.training.gradients import EveryWeightLearns
from mmalign.training.kept_reference import KeptReference
from mmalign.training.token_batches import Collator, placeholders_of, text_of_prompts
from mmalign.training.token_card import write_token_card
from mmalign.training.token_config import TokenConfig
from mmalign.training.token_data import Answers, check_answers, check_held_out, prepare_answers
from mmalign.training.token_health import token_findings, token_panel
from mmalign.training.token_loading import check_model, load_answering_model
from mmalign.training.token_measurement import (
    AnswerMeasurement,
    AnswerPolicy,
    measure_answers,
    media_features,
    reference_scores,
    states,
)
from mmalign.training.token_parts import parts_of, sees
from mmalign.training.token_weights import answers_trainable, load_answering, save_answering
from mmalign.training.weights import has_adapter

logger = logging.getLogger("mmalign")


class TokenTrainer(AlignTrainer):
    """Aligns a transformers model on answers: pairs, or single ones that are liked or not.

    Args:
        model: a `TokenPipeline`, a transformers model, or a hub id or folder to load one from.
        args: the method's config.
        train_dataset, eval_dataset: whatever `mmalign.data.answers.load_answers` reads.
        processing_class: the model's processor or tokenizer, where `model` is a transformers model.
        peft_config: a `peft.LoraConfig`; None trains every weight of `args.trained_parts`.
        ref_model: another model to compare with; None takes the policy with its adapter off, or a frozen copy.
        callbacks: as in transformers.

    Raises ValueError for half-precision weights that would be trained without an adapter, for targets of the LoRA that name no layer,
    and for rows that cannot be used. Where it raises, the model is as it was.
    """

    config_class: type[TokenConfig] = TokenConfig
    data_forms: ClassVar[str] = "a hub id, a folder, a .json, .jsonl or parquet file, or rows"
    args: TokenConfig
    collate: Collator
    _model: Any
    _kept: KeptReference | None
    _train: Answers
    _eval: Answers | None

    def __init__(
        self,
        model: Any,
        args: TokenConfig,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        peft_config: Any = None,
        ref_model: Any = None,
        callbacks: list[TrainerCallback] | None = None,
    ) -> None:
        self._given_processor = processing_class
        super().__init__(model, args, train_dataset, eval_dataset, peft_config, ref_model, callbacks)

    def adopt(self, model: Any, args: Any) -> None:
        """A pipeline, a model with its processor, or the name of both."""
        if isinstance(model, (str, os.PathLike)):
            self._model, self.processor = load_answering_model(model)
        elif isinstance(model, nn.Module):
            self._model, self.processor = model, self._given_processor
        else:
            self._model, self.processor = model.model, model.processor
        self._part_of = parts_of(self._model)
        self._placeholders = placeholders_of(self.processor)
        if self.processor is None:
            raise ValueError(f"processing_class is missing: the processor or tokenizer of {type(model).__name__}")
        self.collate = Collator(padding_token(self.processor), args.share_prompt, mismatched="kto" in args.loss_type)

    @property
    def network(self) -> nn.Module:
        """The bare model that is trained."""
        return self._model

    def policy_module(self) -> AnswerPolicy:
        """The model behind the scores of a batch."""
        return AnswerPolicy(self.network)

    @contextmanager
    def _at_work(self) -> Iterator[None]:
        with on_device([self.network, *self._own_copies()], self.args.device):
            yield

    def check_arguments(self, args: TokenConfig, train_dataset: Any, eval_dataset: Any, peft_config: Any) -> None:
        """ValueError for what cannot work, before anything is read or moved."""
        super().check_arguments(args, train_dataset, eval_dataset, peft_config)
        check_model(self.network)
        if args.reference == "adapter" and peft_config is None:
            raise ValueError("reference='adapter' needs a LoRA to switch off: pass a peft_config, or reference='copy'")
        if args.trained_parts != "lm" and not sees(self.network):
            raise ValueError(
                f"trained_parts={args.trained_parts!r}: {type(self.network).__name__} is a language model and has no other parts"
            )

    def prepare_data(self, data: Any, args: TokenConfig, *, like: Answers | None = None) -> Answers:
        """Checked rows, from whatever `load_answers` reads; ValueError where they do not suit the loss, or the training data `like`."""
        answers = prepare_answers(data, self.processor, self._model.config, args, evaluated=like is not None)
        check_answers(answers, args, like)
        if self.collate.mismatched:
            self._check_mismatches(answers, args, "train" if like is None else "eval")
        return answers

    def check_data(self, args: TokenConfig, alike: str = "") -> None:
        """ValueError where the rows fill no batch, or are evaluated and trained on."""
        if self._eval is not None:
            check_held_out(self._train, self._eval)
        super().check_data(args, alike)

    def _check_mismatches(self, data: Answers, args: TokenConfig, name: str) -> None:
        """KTO's baseline needs another row in every batch."""
        size = getattr(args, f"per_device_{name}_batch_size")
        mine = len(range(args.process_index, len(data.dataset), args.world_size))
        if size < 2 or (mine % size == 1 and (name == "eval" or not args.dataloader_drop_last)):
            raise ValueError(
                "loss_type 'kto' measures its baseline on prompts with another row's answer, and a batch would have one row: "
                f"change per_device_{name}_batch_size"
            )

    def made_trainable(self, args: TokenConfig, peft_config: Any) -> AbstractContextManager[None]:
        """A LoRA, or the weights of the parts that are trained."""
        return answers_trainable(self.network, peft_config, args.trained_parts, args.seed)

    def make_reference(self, ref_model: Any) -> Reference:
        """The policy with its adapter off, a frozen copy, or none where no loss needs one."""
        args = self.args
        if isinstance(ref_model, (str, os.PathLike)):
            ref_model, _ = load_answering_model(ref_model, dtype=self._model.dtype)
        elif ref_model is not None and not isinstance(ref_model, nn.Module):
            ref_model = ref_model.model
        if ref_model is not None and ref_model.dtype != self._model.dtype:
            raise ValueError("ref_model has another dtype than the policy, and rounding would look like preference")
        # A model of somebody else's may see otherwise.
        trained = {self._part_of(name) for name, p in self.network.named_parameters() if p.requires_grad}
        self._shares_media = ref_model is None and trained <= {"lm"}
        needed = not args.is_reference_free or args.needs_kl
        self._kept = None
        if args.reference_cache:
            fingerprint = Reference("copy", ref_model or self._model).fingerprint()
            self._kept = KeptReference(args, fingerprint, self._model.dtype, self.accelerator.mixed_precision)
            copied = ref_model is None and (args.reference == "copy" or not has_adapter(self._model))
            if copied and self._kept.holds(self._train, self._eval):
                self._verify_kept(self._kept)
                return make_reference(self.network, kind="none")
        return make_reference(self.network, ref_model, kind=args.reference if needed else "none")

    @torch.no_grad()
    def _verify_kept(self, kept: KeptReference) -> None:
        """What is kept is compared with the model itself, which has not been trained yet, so that no copy of it is needed."""
        reference, rows = Reference("copy", self._model), self._train.dataset
        with on_device([self.network], self.args.device), evaluating([self.network]):
            for index in range(min(VERIFIED, len(rows))):
                batch = self._counted(self.collate([rows[index]])["batch"].to(self.args.device))
                with self.accelerator.autocast():
                    live, _ = reference_scores(self.network, reference, batch, None)
                kept.settle(self._train, batch, kept.find(self._train, batch), live)

    def set_up(self) -> None:
        """What is still to be looked at."""
        self._saw_media = self._checked_head = False

    def own_callbacks(self) -> list[TrainerCallback]:
        """What sees that every trained weight learns."""
        return [EveryWeightLearns(self._learning)]

    def _learning(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The trained weights that the batches so far must have reached: the encoders' only where there were media."""
        for name, parameter in self.network.named_parameters():
            if parameter.requires_grad and (self._saw_media or self._part_of(name) == "lm"):
                yield name, parameter

    # One batch.

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """The micro-batches of one optimiser step; their tokens are counted over all processes, and resumed with the state."""
        samples, number = super().get_batch_samples(*args, **kwargs)
        tokens = sum(int(batch["batch"].inputs["attention_mask"].sum()) for batch in samples)
        tokens += sum(
            len(batch["batch"].supervised) // len(batch["row"]) * int(shared["attention_mask"].sum())
            for batch in samples
            if (shared := batch["batch"].prompt_inputs) is not None
        )
        counted = torch.tensor([tokens], device=self.args.device)
        self.state.num_input_tokens_seen += int(self.accelerator.reduce(counted, "sum"))
        self._saw_media = self._saw_media or any(batch["batch"].media for batch in samples)
        return samples, number

    def row_losses(self, model: nn.Module, inputs: dict[str, Any], *, epoch: int, data: Answers) -> Losses:
        """The losses of a batch: of B pairs B, of single answers one each (a pair is two), with the panel."""
        measured = self.measure(model, inputs["batch"], epoch=epoch, data=data)
        kl = self._baseline(inputs["mismatched"], epoch) if "mismatched" in inputs else None
        loss = self.loss_of(measured, kl)
        panel = self.panel(measured, loss.detach())
        if kl is not None:
            panel["kl_baseline"] = float(kl), 1.0
        return Losses(loss, inputs["row"] * (len(loss) // len(inputs["row"])), panel)

    def panel(self, measured: AnswerMeasurement, loss: Tensor) -> dict[str, tuple[float, float]]:
        """Metric name → (sum, weight)."""
        return token_panel(measured, loss, beta=self.args.beta, per_token=self.args.is_per_token)

    def measure(self, model: nn.Module, batch: AnswerBatch, *, epoch: int, data: Answers) -> AnswerMeasurement:
        """Policy and reference on a batch's tokens; the reference from the cache where it is kept there."""
        batch = self._counted(batch.to(self.args.device))
        self._check_head(batch)
        kept = self._kept
        known = None if kept is None else kept.find(data, batch)
        verifies = kept is not None and kept.of(data).to_verify and self.reference.kind != "none"
        if kept is not None and known is None and self.reference.kind == "none":
            raise ValueError(
                f"the reference of row {batch.rows[0]} is not in {kept.of(data).path}, and no copy of it was made, since all other "
                "rows were there: give these rows as eval_dataset when the trainer is made"
            )
        with self._dropout_keyed(batch.rows, epoch):
            measured = measure_answers(
                model,
                self.network,
                self.reference,
                batch,
                weights=self._weights,
                shares_media=self._shares_media,
                known_reference=None if verifies else known,
                kl=self.args.needs_kl or (epoch < 0 and known is None and self.reference.kind != "none"),
                entropy=True,
                autocast=self.accelerator.autocast,
            )
        if kept is None:
            return measured
        return replace(measured, reference=kept.settle(data, batch, known, measured.reference))

    def _check_head(self, batch: AnswerBatch) -> None:
        """Once: the head is read as the model reads it."""
        if self._checked_head:
            return
        copies = 1 if batch.prompt_inputs is not None else len(batch.supervised) // len(batch.rows)
        more = media_inputs(self.network, batch.media, None, copies=copies)
        with evaluating([self.network]), self.accelerator.autocast():
            check_head(self.network, {**(batch.prompt_inputs or batch.inputs), **more})
        self._checked_head = True

    def loss_of(self, measured: AnswerMeasurement, kl: Tensor | None = None) -> Tensor:
        """One loss a pair or a single answer; `kl`: KTO's baseline."""
        args = self.args
        logps = measured.singles(kl) if args.is_unpaired else measured.pairs()
        return losses.compute(args.loss_type, logps, loss_weights=args.loss_weights, **args.loss_options())

    def _counted(self, batch: AnswerBatch) -> AnswerBatch:
        """The batch with the prompt's words among what is scored, where they count."""
        if not self.args.joint:
            return batch
        return replace(batch, supervised=batch.supervised | text_of_prompts(batch, self._placeholders))

    def _weights(self, batch: AnswerBatch) -> Tensor:
        return token_weights(batch.supervised, self.args.logps, ld_alpha=self.args.ld_alpha)

    @torch.no_grad()
    def _baseline(self, batch: AnswerBatch, epoch: int) -> Tensor:
        """KTO's mean log-ratio of prompts with another row's answer; in training over all processes."""
        with evaluating([self.network]):
            measured = measure_answers(
                AnswerPolicy(self.network),
                self.network,
                self.reference,
                self._counted(batch.to(self.args.device)),
                weights=self._weights,
                shares_media=self._shares_media,
                autocast=self.accelerator.autocast,
            )
        ratios = measured.log_ratios
        assert ratios is not None
        told = torch.stack([ratios.sum(), ratios.new_tensor(float(len(ratios)))])
        # Processes evaluate as many batches as each has.
        total, count = self.accelerator.reduce(told, "sum") if epoch >= 0 else told
        return total / count

    # What is kept of the reference.

    def _reference_fingerprint(self) -> str:
        return super()._reference_fingerprint() if self._kept is None else self._kept.fingerprint

    def _write_kept(self) -> None:
        if self._kept is not None:
            self._kept.write()

    def train(self, resume_from_checkpoint: str | bool | None = None, **options: Any) -> Any:
        """As `AlignTrainer.train`; what was kept of the reference is written when it is over."""
        result = super().train(resume_from_checkpoint, **options)
        self._write_kept()
        return result

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        self._write_kept()

    # What is told and saved.

    def own_metrics(self) -> dict[str, float]:
        """Tokens that were read so far."""
        return {"num_tokens": float(self.state.num_input_tokens_seen)}

    def findings(self) -> list[Finding]:
        """What the panel says."""
        return token_findings(self.state.log_history)

    def forward_passes(self, steps: int) -> float:
        """Of the policy with its backward, and the reference."""
        adapted = not all(parameter.requires_grad for parameter in self.network.parameters())
        policy = trained_passes(adapted=adapted, recomputes=bool(self.args.gradient_checkpointing))
        return policy + (self.reference.kind != "none")

    def one_forward(self) -> Callable[[], Tensor]:
        """A call that reads a training batch once, to be timed."""
        rows = self._train.dataset
        items = [rows[index] for index in range(min(len(rows), self.args.per_device_train_batch_size))]
        batch = self.collate(items)["batch"].to(self.args.device)

        def forward() -> Tensor:
            with torch.no_grad(), evaluating([self.network]), self.accelerator.autocast():
                return states(self.network, batch, media_features(self.network, batch))

        return forward

    def card_settings(self) -> dict[str, Any]:
        """The loss and its options."""
        return {"loss": self.args.objective(), "logps": self.args.logps, **self.args.loss_options()}

    def _write_weights(self, folder: Path) -> None:
        save_answering(self.network, folder)

    def _read_weights(self, folder: Path) -> None:
        load_answering(self.network, folder)

    def _write(self, folder: Path) -> None:
        super()._write(folder)
        self.processor.save_pretrained(folder)

    def _write_card(self, folder: Path) -> None:
        write_token_card(
            folder,
            self.args,
            model=self.network,
            data=self._train.name,
            left_out=self._train.left_out,
            metrics=self.last_metrics(),
            settings=self.card_settings(),
        )
