"""The trainer under every alignment: `transformers.Trainer` around one network, one loss a row, and draws that a seed decides."""

import logging
import math
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Sampler
from transformers import TrainerCallback
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from transformers.trainer_utils import get_last_checkpoint

from mmalign.denoisers.parts import evaluating, is_quantized
from mmalign.likelihood.draws import row_generators
from mmalign.likelihood.reference import Reference, make_reference
from mmalign.training.align_config import AlignConfig
from mmalign.training.average import MovingAverage
from mmalign.training.bucketing import InBuckets, bucket_batches
from mmalign.training.estimate import Announcement
from mmalign.training.findings import Finding
from mmalign.training.metrics import MetricSums
from mmalign.training.progress import Bar, LastStep, Lines
from mmalign.training.sampling import Shuffled
from mmalign.training.saving import RunData, SavingTrainer

logger = logging.getLogger("mmalign")
EVAL_EPOCH = -1


@dataclass(frozen=True, eq=False)
class Losses:
    """What a batch of rows is worth: losses (B,), the row that each belongs to, and metric name → (sum, weight).

    A row may stand there more than once. The panel has a "loss", of the losses as they are told; `loss` may be weighted.
    """

    loss: Tensor
    rows: list[int]
    panel: dict[str, tuple[float, float]]


class AlignTrainer(SavingTrainer):
    """Trains a network on rows, whatever it makes of them: denoisers and models that answer in tokens.

    A kind of model gives `adopt`, `network`, `policy_module`, where things stand (`_reading`, `_at_work`) and how its weights are
    written; a method gives `prepare_data`, `row_losses`, and what it needs besides in `set_up`. Where the constructor raises, the model
    is as it was.
    """

    config_class: type[AlignConfig] = AlignConfig
    # Rows as a batch, in which "row" stays a list of numbers.
    collate: Callable[[list[Any]], dict[str, Any]]
    # What a data set may be, for the error where there is none.
    data_forms: ClassVar[str]
    # What takes time beside the steps.
    on_top: ClassVar[str] = "evaluation and saving"

    def __init__(
        self,
        model: Any,
        args: AlignConfig,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        peft_config: Any = None,
        ref_model: Any = None,
        callbacks: list[TrainerCallback] | None = None,
    ) -> None:
        self.adopt(model, args)
        self.check_arguments(args, train_dataset, eval_dataset, peft_config)
        with self._prepared(args):
            self._build(args, train_dataset, eval_dataset, peft_config, ref_model, callbacks)

    def _build(
        self, args: Any, train_dataset: Any, eval_dataset: Any, peft_config: Any, ref_model: Any, callbacks: Any
    ) -> None:
        with self._reading(args):
            self._train = self.prepare_data(train_dataset, args)
            self._eval = None if eval_dataset is None else self.prepare_data(eval_dataset, args, like=self._train)
        self.check_data(args)
        # One process drives one device; more of them are started by `accelerate launch`. Without one there is nothing to pin for.
        args._n_gpu = min(1, args.n_gpu)
        args.dataloader_pin_memory = args.dataloader_pin_memory and torch.accelerator.is_available()
        # Every trained weight gets a gradient in every step.
        args.ddp_find_unused_parameters = bool(args.ddp_find_unused_parameters)
        with self.made_trainable(args, peft_config):
            super().__init__(
                model=self.policy_module(),
                args=args,
                data_collator=self.collate,
                train_dataset=self._train.dataset,
                eval_dataset=None if self._eval is None else self._eval.dataset,
                callbacks=callbacks,
            )
            if self.is_deepspeed_enabled or self.is_fsdp_enabled:
                raise ValueError(
                    "the launcher asked for DeepSpeed or FSDP, which are not supported yet: launch plain data parallelism"
                )
            self.reference = self.make_reference(ref_model)
        self._sums = {mode: MetricSums(args.world_size) for mode in ("train", "eval")}
        self._warned: set[str] = set()
        self._rows_in_step = 0
        self._logged_at: tuple[int, float] | None = None
        self.set_up()
        self._add_our_callbacks()

    # What a kind of model says of itself.

    def adopt(self, model: Any, args: Any) -> None:
        """Takes what is to be aligned, a loaded one or its name."""
        raise NotImplementedError

    def policy_module(self) -> nn.Module:
        """The network that is trained, behind the forward that several processes wrap, with transformers' checkpointing verbs."""
        raise NotImplementedError

    def _prepared(self, args: Any) -> AbstractContextManager[None]:
        """How the model must stand from the reading of rows on; put back where the block raises."""
        return nullcontext()

    def _reading(self, args: Any) -> AbstractContextManager[None]:
        """A block in which rows are read and encoded."""
        return nullcontext()

    def _at_work(self) -> AbstractContextManager[None]:
        """A block in which the network and the reference's own copy are on the device; afterwards they are where they were."""
        raise NotImplementedError

    def _own_copies(self) -> list[nn.Module]:
        """The reference's network, where it is a copy."""
        frozen = self.reference.module
        return [frozen] if self.reference.kind == "copy" and frozen is not None else []

    # What a method says of itself.

    def check_arguments(self, args: Any, train_dataset: Any, eval_dataset: Any, peft_config: Any) -> None:
        """ValueError for what cannot work, before anything is read or moved."""
        if peft_config is None and is_quantized(self.network):
            raise ValueError(
                "quantised weights cannot be trained: pass a peft_config, or load the pipeline unquantised"
            )
        if train_dataset is None:
            raise ValueError(f"train_dataset is missing: {self.data_forms}")
        if eval_dataset is None and args.eval_split is not None:
            raise ValueError("eval_split has no effect without an eval_dataset")

    def prepare_data(self, data: Any, args: Any, *, like: Any = None) -> RunData:
        """What the user calls a data set as rows with a number, a "row", each; `like`: for evaluation data, the training data."""
        raise NotImplementedError

    def made_trainable(self, args: Any, peft_config: Any) -> AbstractContextManager[None]:
        """What is trained, put on the network and marked; undone where the block raises."""
        raise NotImplementedError

    def check_data(self, args: Any, alike: str = "") -> None:
        """ValueError where the rows do not fill a batch; `alike`: what rows of one batch have in common."""
        size = args.per_device_train_batch_size
        if len(self.sampler(args)) < size * args.world_size and args.dataloader_drop_last:
            raise ValueError(
                f"{len(self._train.dataset)} usable {args.unit} do not fill one batch of {size}{alike} in each of {args.world_size} "
                "process(es): lower per_device_train_batch_size"
            )

    def make_reference(self, ref_model: Any) -> Reference:
        """The network that the trained one is compared with; none here."""
        if ref_model is not None:
            raise ValueError(f"{self.args.method} compares with no reference: leave ref_model out")
        return make_reference(self.network, None, kind="none")

    def set_up(self) -> None:
        """What a method keeps besides, made once everything else stands."""

    def row_losses(self, model: nn.Module, inputs: dict[str, Any], *, epoch: int, data: Any) -> Losses:
        """The losses of a batch of `data`: seed, row and epoch decide what is drawn; an epoch below 0 is evaluation."""
        raise NotImplementedError

    def sampler(self, args: Any) -> Shuffled | InBuckets:
        """In which order an epoch visits the training rows."""
        return Shuffled(len(self._train.dataset), args.order_seed, lambda: self._epoch)

    def forward_passes(self, steps: int) -> float:
        """Forward passes that one batch costs in a run of `steps` optimiser steps."""
        raise NotImplementedError

    def one_forward(self) -> Callable[[], Tensor]:
        """A call that runs the network once on a training batch, to be timed."""
        raise NotImplementedError

    @property
    def elements(self) -> int | None:
        """Numbers in one sample, where the announcement needs them."""
        return None

    # A run.

    def _add_our_callbacks(self) -> None:
        for kind in (ProgressCallback, PrinterCallback):
            self.callback_handler.callbacks = [c for c in self.callback_handler.callbacks if type(c) is not kind]
        self.add_callback(Announcement(self))
        self.add_callback(Lines() if self.args.disable_tqdm else Bar())
        self.add_callback(LastStep())
        if self.args.ema_decay is not None:
            self._average = MovingAverage(self.network, self.args.ema_decay, self._read_weights)
            self.add_callback(self._average)
        for callback in self.own_callbacks():
            self.add_callback(callback)

    def own_callbacks(self) -> list[TrainerCallback]:
        """A method's own."""
        return []

    def train(self, resume_from_checkpoint: str | bool | None = None, **options: Any) -> Any:
        """As in transformers; True or "latest" resumes from the newest checkpoint in `output_dir`, if there is one.

        `args.resume_from_checkpoint` acts where nothing is passed. Afterwards the network is where it was, in eval mode,
        and with `ema_decay` holds the averaged weights.
        """
        resume = self.args.resume_from_checkpoint if resume_from_checkpoint is None else resume_from_checkpoint
        if resume is True or str(resume).lower() in ("latest", "true"):
            resume = get_last_checkpoint(self.args.output_dir) if Path(str(self.args.output_dir)).is_dir() else None
            if resume is None:
                logger.info("no checkpoint in %s yet: starting at step 0", self.args.output_dir)
        try:
            with self._at_work():
                if self._average is not None:
                    self._average.start()
                return super().train(resume_from_checkpoint=resume or None, **options)
        finally:
            if self._average is not None:
                self._average.finish()
            self.network.eval()
            if self.args.gradient_checkpointing:
                cast(Any, self.model).activation_checkpointing_disable()

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int]:
        return self.sampler(self.args)

    @property
    def _epoch(self) -> int:
        # transformers counts k + (batches done)/(batches in all), which at the end of an epoch is a whole number.
        return math.floor(self.state.epoch or 0)

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """The micro-batches of one optimiser step, counted, so that a short one does not weigh more than its rows."""
        samples, number = super().get_batch_samples(*args, **kwargs)
        self._rows_in_step = sum(len(batch["row"]) for batch in samples)
        return samples, number

    # One batch.

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Mean of the losses of one micro-batch; raises FloatingPointError, naming rows, where one is not finite."""
        found = self.row_losses(model, inputs, epoch=self._epoch, data=self._train)
        self._record("train", found)
        mean = found.loss.mean()
        if self._rows_in_step:
            mean = mean * (len(inputs["row"]) * self.current_gradient_accumulation_steps / self._rows_in_step)
        return (mean, {"losses": found.loss.detach()}) if return_outputs else mean

    @contextmanager
    def _dropout_keyed(self, rows: list[int], epoch: int) -> Iterator[None]:
        """Dropout, which draws from the process's own random state, drawn like everything else: keyed by (seed, epoch, row)."""
        if not self._has_dropout:
            yield
            return
        device = self.args.device
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(row_generators(self.args.seed, epoch, rows[:1], "dropout")[0].initial_seed())
            yield

    @cached_property
    def _has_dropout(self) -> bool:
        return any(isinstance(module, nn.Dropout) and module.p > 0 for module in self.network.modules())

    # Metrics.

    def _record(self, mode: str, found: Losses) -> None:
        if not math.isfinite(found.panel["loss"][0]):
            rows = [row for row, value in zip(found.rows, found.loss.tolist(), strict=True) if not math.isfinite(value)]
            raise FloatingPointError(
                f"the loss is not finite at step {self.state.global_step + 1} for rows {rows[:5]}: lower the learning rate or beta; "
                "with float16, train in bf16 or float32"
            )
        self._sums[mode].add(found.panel)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the health panel to transformers' own numbers, and prints named warnings once each."""
        if "loss" in logs:
            logs.update({name: value for name, value in self._sums["train"].drain().items() if name != "loss"})
            logs.update(self._speed(start_time))
            logs.update(self.own_metrics())
        super().log(logs, start_time)
        if "loss" in logs and self.is_world_process_zero():
            for finding in self.findings():
                if finding.name not in self._warned:
                    self._warned.add(finding.name)
                    logger.warning("step %d, %s: %s", self.state.global_step, finding.name, finding.message)

    def own_metrics(self) -> dict[str, float]:
        """A method's own numbers, which stand in every logged entry."""
        return {}

    def findings(self) -> list[Finding]:
        """Named warnings about the run so far."""
        return []

    def _speed(self, start_time: float | None) -> dict[str, float]:
        step, now = self.state.global_step, time.time()
        before = self._logged_at or (self._initial_global_step, start_time)
        self._logged_at = step, now
        if before[1] is None or step <= before[0] or now <= before[1]:
            return {}
        return {f"{self.args.unit}_per_second": (step - before[0]) * self.args.rows_per_step / (now - before[1])}

    def held_out_batches(self, data: Any) -> Iterator[dict[str, Any]]:
        """This process's batches of `data`, with the network ready to be evaluated on them."""
        mine = list(range(self.args.process_index, len(data.dataset), self.args.world_size))
        size, buckets = self.args.per_device_eval_batch_size, data.dataset.buckets
        alike = torch.zeros(len(data.dataset), dtype=torch.long) if buckets is None else buckets
        batches = bucket_batches(alike, mine, size, drop_last=False)
        loader = DataLoader(data.dataset, batch_sampler=batches, collate_fn=self.collate)
        with self._at_work(), self.averaged(), evaluating([self.network]):
            for inputs in loader:
                yield self._prepare_inputs(inputs)

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Loss and panel on every evaluation row, at draws that its row alone decides, so that steps can be compared.

        `eval_dataset`: other rows than the trainer was made with, in any form that it reads.
        """
        if ignore_keys:
            raise ValueError("ignore_keys has no effect: evaluation keeps metrics, not model outputs")
        data = self._eval
        if eval_dataset is not None and eval_dataset is not self.eval_dataset:
            with self._reading(self.args):
                data = self.prepare_data(eval_dataset, self.args, like=self._train)
        if data is None:
            raise ValueError("there is no eval_dataset to evaluate on")
        with torch.no_grad():
            for inputs in self.held_out_batches(data):
                self._record("eval", self.row_losses(self.model, inputs, epoch=EVAL_EPOCH, data=data))
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in self._sums["eval"].drain().items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)  # type: ignore[has-type]
        return metrics
