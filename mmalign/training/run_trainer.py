"""The trainer under every denoiser method: `transformers.Trainer` around one network, one loss a row, and draws that a seed decides."""

import logging
import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, Self, cast

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Sampler
from transformers import TrainerCallback
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from transformers.trainer_utils import get_last_checkpoint

from mmalign.denoisers import Denoiser, adapter_for
from mmalign.denoisers.base import module_dtype
from mmalign.denoisers.cascade_decoder import check_draws
from mmalign.denoisers.long_prompts import long_prompts_of, read_long_prompts
from mmalign.denoisers.parts import evaluating, is_quantized, networks
from mmalign.likelihood.draws import row_generators
from mmalign.likelihood.reference import Reference, make_reference
from mmalign.training import health
from mmalign.training.average import MovingAverage
from mmalign.training.bucketing import InBuckets, bucket_batches
from mmalign.training.devices import on_device, refuse_offloading, storable
from mmalign.training.estimate import Announcement
from mmalign.training.loading import load_base
from mmalign.training.metrics import MetricSums
from mmalign.training.negative import check_branches
from mmalign.training.progress import Bar, LastStep, Lines
from mmalign.training.run_config import RunConfig
from mmalign.training.samples import SamplePictures
from mmalign.training.sampling import Shuffled
from mmalign.training.saving import RunData, SavingTrainer
from mmalign.training.weights import check_takes_lora, made_trainable

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


class PolicyModule(nn.Module):
    """The network that is trained, behind the forward that several processes wrap; maps transformers' checkpointing verb."""

    def __init__(self, denoiser: Denoiser) -> None:
        super().__init__()
        self.network = denoiser.module
        self._predict, self._stays_in_eval = denoiser.predict, denoiser.has_own_dropout

    def forward(self, x_t: Tensor, t: Tensor, conditioning: Any) -> Tensor:
        """The raw output of the network, as `Denoiser.predict`."""
        return self._predict(self.network, x_t, t, conditioning)

    def train(self, mode: bool = True) -> Self:
        """As in torch; a network with dropout of its own stays in eval mode, so that it is compared and not its noise."""
        super().train(mode)
        if self._stays_in_eval:
            self.network.eval()
        return self

    def activation_checkpointing_enable(self, **options: Any) -> None:
        """diffusers' own verb; it takes no options, and `inherited.py` refuses any."""
        cast(Any, self.network).enable_gradient_checkpointing()


class RunTrainer(SavingTrainer):
    """Trains a pipeline's network on rows: what is common to methods that learn from pairs, from prompts, or from pictures.

    A method gives `prepare_data`, `row_losses`, and what it needs besides in `set_up`. Arguments as in `DenoiserTrainer`. Where the
    constructor raises, the pipeline is as it was.
    """

    config_class: type[RunConfig] = RunConfig

    def __init__(
        self,
        model: Any,
        args: RunConfig,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        peft_config: Any = None,
        ref_model: Any = None,
        callbacks: list[TrainerCallback] | None = None,
    ) -> None:
        if isinstance(model, (str, os.PathLike)):
            model = load_base(model)
        self.pipe, self.denoiser = model, adapter_for(model)
        self.check_arguments(args, train_dataset, eval_dataset, peft_config)
        with self._reading_long_prompts(args):
            self._build(args, train_dataset, eval_dataset, peft_config, ref_model, callbacks)

    def _build(
        self, args: Any, train_dataset: Any, eval_dataset: Any, peft_config: Any, ref_model: Any, callbacks: Any
    ) -> None:
        model = self.pipe
        with on_device(list(networks(model).values()), args.device):
            self._train = self.prepare_data(train_dataset, args)
            self._eval = None if eval_dataset is None else self.prepare_data(eval_dataset, args, like=self._train)
        self.check_data(args)
        # One process drives one device; more of them are started by `accelerate launch`. Without one there is nothing to pin for.
        args._n_gpu = min(1, args.n_gpu)
        args.dataloader_pin_memory = args.dataloader_pin_memory and torch.accelerator.is_available()
        # Every trained weight of a denoiser gets a gradient in every step.
        args.ddp_find_unused_parameters = bool(args.ddp_find_unused_parameters)
        with self.made_trainable(args, peft_config):
            super().__init__(
                model=PolicyModule(self.denoiser),
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
        # Grids are made on the CPU, losses on the device: each has the tables where it works.
        self.denoiser.schedule = storable(self.denoiser.schedule, args.device)
        self._schedule = self.denoiser.schedule.to(args.device)
        self._sums = {mode: MetricSums(args.world_size) for mode in ("train", "eval")}
        self._warned: set[str] = set()
        self._rows_in_step = 0
        self._logged_at: tuple[int, float] | None = None
        self.set_up()
        self._add_our_callbacks()

    @contextmanager
    def _reading_long_prompts(self, args: Any) -> Iterator[None]:
        """The pipeline reads long prompts as `args` say, from now on unless the block raises."""
        before, config = long_prompts_of(self.pipe), args.long_prompt_reading()
        try:
            if config is not None:
                read_long_prompts(self.pipe, config, None if before is None else before.tail)
            yield
        except BaseException:
            read_long_prompts(self.pipe, *((None,) if before is None else (before.config, before.tail)))
            raise

    # What a method says of itself.

    def check_arguments(self, args: Any, train_dataset: Any, eval_dataset: Any, peft_config: Any) -> None:
        """ValueError for what cannot work, before anything is read or moved."""
        refuse_offloading(self.pipe)
        if args.trains_negative:
            check_branches(self.pipe)
        if args.validation_steps:
            check_draws(self.pipe)
        if peft_config is not None:
            check_takes_lora(self.network)
        if peft_config is None and is_quantized(self.network):
            raise ValueError(
                "quantised weights cannot be trained: pass a peft_config, or load the pipeline unquantised"
            )
        if train_dataset is None:
            raise ValueError("train_dataset is missing: a hub id, a folder, a parquet file, rows, or 'playground'")
        if eval_dataset is None and args.eval_split is not None:
            raise ValueError("eval_split has no effect without an eval_dataset")

    def prepare_data(self, data: Any, args: Any, *, like: Any = None) -> RunData:
        """What the user calls a data set as rows with a number, a "row", each; `like`: for evaluation data, the training data."""
        raise NotImplementedError

    def made_trainable(self, args: Any, peft_config: Any) -> AbstractContextManager[None]:
        """What is trained, put on the network and marked; undone where the block raises."""
        return made_trainable(self.network, peft_config, args.seed)

    @staticmethod
    def collate(items: list[Any]) -> dict[str, Any]:
        """Rows as a batch; "row" stays a list of numbers."""
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

    def network_inputs(self, inputs: dict[str, Any]) -> tuple[Tensor, Any]:
        """Latents and conditioning of a training batch, on which a forward pass of the network is timed."""
        raise NotImplementedError

    def one_forward(self) -> Callable[[], Tensor]:
        """A call that runs the network once on a training batch, to be timed."""
        data = self._train.dataset
        items = range(len(data)) if data.buckets is None else self.sampler(self.args)
        chosen = list(islice(items, self.args.per_device_train_batch_size))
        x, conditioning = self.network_inputs(self._prepare_inputs(self.collate([data[item] for item in chosen])))
        t = torch.zeros(len(x), dtype=torch.long, device=x.device)

        def forward() -> Tensor:
            with torch.no_grad(), evaluating([self.network]), self.accelerator.autocast():
                return self.denoiser.predict(self.network, x, t, conditioning)

        return forward

    @property
    def elements(self) -> int | None:
        """Numbers in one latent, where the announcement needs them."""
        return None

    # A run.

    def _add_our_callbacks(self) -> None:
        for kind in (ProgressCallback, PrinterCallback):
            self.callback_handler.callbacks = [c for c in self.callback_handler.callbacks if type(c) is not kind]
        self.add_callback(Announcement(self))
        self.add_callback(Lines() if self.args.disable_tqdm else Bar())
        self.add_callback(LastStep())
        if self.args.ema_decay is not None:
            self._average = MovingAverage(self.network, self.args.ema_decay)
            self.add_callback(self._average)
        for callback in self.own_callbacks():
            self.add_callback(callback)
        if self.args.validation_steps:
            self.add_callback(SamplePictures(self.pipe, self.averaged))

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
                cast(Any, self.network).disable_gradient_checkpointing()

    @contextmanager
    def _at_work(self) -> Iterator[None]:
        frozen = [self.reference.module] if self.reference.kind == "copy" and self.reference.module is not None else []
        # Text encoders and VAE have done their part; those that bitsandbytes holds cannot all be moved.
        idle = [part for part in networks(self.pipe).values() if part is not self.network and not is_quantized(part)]
        with on_device(idle, torch.device("cpu")), on_device([self.network, *frozen], self.args.device):
            yield

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

    @property
    def _precision(self) -> torch.dtype:
        """Of latents: the network's, or float32 where that is less."""
        return torch.promote_types(module_dtype(self.network), torch.float32)

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
            for finding in health.findings(self.state.log_history):
                if finding.name not in self._warned:
                    self._warned.add(finding.name)
                    logger.warning("step %d, %s: %s", self.state.global_step, finding.name, finding.message)

    def own_metrics(self) -> dict[str, float]:
        """A method's own numbers, which stand in every logged entry."""
        return {}

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
            with on_device(list(networks(self.pipe).values()), self.args.device):
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
