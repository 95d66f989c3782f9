"""The trainer of every denoiser method: `transformers.Trainer` around one measurement and one loss of `mmalign.losses`."""

import logging
import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Sampler
from transformers import TrainerCallback
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from transformers.trainer_utils import get_last_checkpoint

from mmalign import losses
from mmalign.denoisers import Denoiser, adapter_for
from mmalign.denoisers.base import module_dtype
from mmalign.denoisers.parts import evaluating, is_quantized, networks
from mmalign.likelihood.draws import row_generators
from mmalign.likelihood.reference import Reference, make_reference
from mmalign.training import health
from mmalign.training.auto_beta import AutoBeta
from mmalign.training.average import MovingAverage
from mmalign.training.bucketing import InBuckets, bucket_batches, told_buckets
from mmalign.training.config import DenoiserConfig
from mmalign.training.devices import on_device, refuse_offloading, storable
from mmalign.training.estimate import Announcement
from mmalign.training.loading import load_base
from mmalign.training.measurement import Measurement, Method, Pairs, draw, dropped_prompts, measure
from mmalign.training.metrics import MetricSums
from mmalign.training.prepare import Prepared, batch_of, check_held_out, prepare
from mmalign.training.progress import Bar, LastStep, Lines
from mmalign.training.reuse import Reuse
from mmalign.training.samples import SamplePictures
from mmalign.training.sampling import Shuffled, ShuffledByProbability, inclusion_probabilities
from mmalign.training.saving import SavingTrainer
from mmalign.training.weights import made_trainable

logger = logging.getLogger("mmalign")
_EVAL_EPOCH = -1


class PolicyModule(nn.Module):
    """The network that is aligned, behind the forward that several processes wrap; maps transformers' checkpointing verb."""

    def __init__(self, denoiser: Denoiser) -> None:
        super().__init__()
        self.network = denoiser.module
        self._predict = denoiser.predict

    def forward(self, x_t: Tensor, t: Tensor, conditioning: Any) -> Tensor:
        """The raw output of the network, as `Denoiser.predict`."""
        return self._predict(self.network, x_t, t, conditioning)

    def activation_checkpointing_enable(self, **options: Any) -> None:
        """diffusers' own verb; it takes no options, and `inherited.py` refuses any."""
        cast(Any, self.network).enable_gradient_checkpointing()


class DenoiserTrainer(SavingTrainer):
    """Aligns a diffusers pipeline on pairs. SmPO, InPO, Diffusion-DPO and SFT differ only in the defaults of their configs.

    Args:
        model: a pipeline, or a hub id or folder to load one from.
        args: the method's config.
        train_dataset, eval_dataset: whatever `mmalign.data.load_pairs` reads.
        peft_config: a `peft.LoraConfig`; None trains every weight of the network.
        ref_model: another network (or pipeline) to compare with; None takes the policy with its adapter off, or a frozen copy.
        callbacks: as in transformers.

    Raises ValueError for half-precision weights that would be trained without an adapter, and for rows that cannot be used. Where it
    raises, the pipeline is as it was.
    """

    config_class: type[DenoiserConfig] = DenoiserConfig

    def __init__(
        self,
        model: Any,
        args: DenoiserConfig,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        peft_config: Any = None,
        ref_model: Any = None,
        callbacks: list[TrainerCallback] | None = None,
    ) -> None:
        if isinstance(model, (str, os.PathLike)):
            model = load_base(model)
        self.pipe, self.denoiser = model, adapter_for(model)
        self._check_arguments(args, train_dataset, eval_dataset, peft_config)
        with on_device(list(networks(model).values()), args.device):
            self._train = prepare(train_dataset, self.denoiser, args)
            self._eval = None if eval_dataset is None else prepare(eval_dataset, self.denoiser, args, like=self._train)
        if self._eval is not None:
            check_held_out(self._train, self._eval)
        self._check_batches(args)
        # One process drives one device; more of them are started by `accelerate launch`. Without one there is nothing to pin for.
        args._n_gpu = min(1, args.n_gpu)
        args.dataloader_pin_memory = args.dataloader_pin_memory and torch.accelerator.is_available()
        # Every trained weight of a denoiser gets a gradient in every step.
        args.ddp_find_unused_parameters = bool(args.ddp_find_unused_parameters)
        with made_trainable(self.network, peft_config, args.seed):
            super().__init__(
                model=PolicyModule(self.denoiser),
                args=args,
                data_collator=batch_of,
                train_dataset=self._train.dataset,
                eval_dataset=None if self._eval is None else self._eval.dataset,
                callbacks=callbacks,
            )
            if self.is_deepspeed_enabled or self.is_fsdp_enabled:
                raise ValueError(
                    "the launcher asked for DeepSpeed or FSDP, which are not supported yet: launch plain data parallelism"
                )
            self.reference = self._make_reference(ref_model)
        self.args: DenoiserConfig = args
        # Grids are made on the CPU, losses on the device: each has the tables where it works.
        self.denoiser.schedule = storable(self.denoiser.schedule, args.device)
        self._schedule = self.denoiser.schedule.to(args.device)
        self._method = Method(
            inversion=args.inversion(),
            inversion_by_reference=args.inversion_model == "reference",
            landings=args.inversion_landings,
            loss_space=args.loss_space,
            sdpo_mu=args.sdpo_mu,
        )
        self._reuse = Reuse(
            args,
            self.denoiser,
            self.reference,
            method=self._method,
            schedule=self._schedule,
            autocast=self.accelerator.autocast,
        )
        self._sums = {mode: MetricSums(args.world_size) for mode in ("train", "eval")}
        self._warned: set[str] = set()
        self._pairs_in_step = 0
        self._logged_at: tuple[int, float] | None = None
        self.beta = args.starting_beta
        self._auto_beta = AutoBeta(self) if args.beta == "auto" else None
        self._add_our_callbacks()

    def _check_arguments(self, args: DenoiserConfig, train_dataset: Any, eval_dataset: Any, peft_config: Any) -> None:
        refuse_offloading(self.pipe)
        if peft_config is None and is_quantized(self.network):
            raise ValueError(
                "quantised weights cannot be trained: pass a peft_config, or load the pipeline unquantised"
            )
        if train_dataset is None:
            raise ValueError("train_dataset is missing: a hub id, a folder, a parquet file, rows, or 'playground'")
        if eval_dataset is None and args.eval_split is not None:
            raise ValueError("eval_split has no effect without an eval_dataset")
        if self.denoiser.schedule.is_flow and args.latents != "forward" and args.inversion_eta > 0:
            raise ValueError("inversion_eta is noise of variance-preserving models; a flow model needs inversion_eta=0")
        if args.reference == "adapter" and peft_config is None:
            raise ValueError("reference='adapter' needs a LoRA to switch off: pass a peft_config, or reference='copy'")
        if args.inversion_refresh is not None and args.world_size > 1:
            raise ValueError(
                "inversion_refresh keeps paths in the memory of one process: leave it out, or start one process"
            )

    def _check_batches(self, args: DenoiserConfig) -> None:
        data, size, alike = self._train.dataset, args.per_device_train_batch_size, ""
        usable = len(self._sampler(args))
        if data.buckets is not None:
            told = told_buckets(self._train.encoded.shapes, data.buckets, size)
            logger.info("%s: %s", self._train.name, told)
            alike = f" of one shape ({told})"
        elif args.strength_sampling is not None:
            alike = f" with strength_sampling={args.strength_sampling:g}"
        if usable < size * args.world_size and args.dataloader_drop_last:
            raise ValueError(
                f"{len(data)} usable pairs do not fill one batch of {size}{alike} in each of {args.world_size} process(es): "
                "lower per_device_train_batch_size"
            )
        steps_an_epoch = usable / args.pairs_per_step
        if args.inversion_refresh is not None and args.inversion_refresh <= steps_an_epoch:
            raise ValueError(
                f"inversion_refresh={args.inversion_refresh}: no pair comes twice in so few steps, since an epoch has "
                f"{steps_an_epoch:.0f}; raise it, or take inversion_landings='all'"
            )

    def _make_reference(self, ref_model: Any) -> Reference:
        args = self.args
        needed = args.needs_pairs and (not args.is_reference_free or args.inversion_model == "reference")
        if ref_model is not None and not isinstance(ref_model, nn.Module):
            ref_model = adapter_for(ref_model).module
        if ref_model is not None and _precision(ref_model) != _precision(self.network):
            raise ValueError(
                "ref_model has another dtype or quantisation than the policy, and rounding would look like preference: load both alike"
            )
        return make_reference(self.network, ref_model, kind=args.reference if needed else "none")

    def _add_our_callbacks(self) -> None:
        for kind in (ProgressCallback, PrinterCallback):
            self.callback_handler.callbacks = [c for c in self.callback_handler.callbacks if type(c) is not kind]
        self.add_callback(Announcement(self))
        self.add_callback(Lines() if self.args.disable_tqdm else Bar())
        self.add_callback(LastStep())
        if self.args.ema_decay is not None:
            self._average = MovingAverage(self.network, self.args.ema_decay)
            self.add_callback(self._average)
        if self._auto_beta:
            self.add_callback(self._auto_beta)
        if self.args.validation_steps:
            self.add_callback(SamplePictures(self.pipe, self.averaged))

    @property
    def elements(self) -> int:
        """Numbers in one latent."""
        return self._train.dataset[0]["chosen"].numel()

    @property
    def num_pairs(self) -> int:
        """Pairs that are trained on."""
        return len(self._train.dataset)

    # A run.

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
                result = super().train(resume_from_checkpoint=resume or None, **options)
            self._reuse.write()
            return result
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
        return self._sampler(self.args)

    def _sampler(self, args: DenoiserConfig) -> Shuffled | InBuckets:
        seed = args.seed if args.data_seed is None else args.data_seed
        if args.strength_sampling is not None:
            return ShuffledByProbability(self._probabilities(args.strength_sampling), seed, lambda: self._epoch)
        rows, buckets = Shuffled(len(self._train.dataset), seed, lambda: self._epoch), self._train.dataset.buckets
        return rows if buckets is None else InBuckets(rows, buckets, args.per_device_train_batch_size)

    def _probabilities(self, share: float) -> Tensor:
        """How likely an epoch that draws `share` of them is to draw each training pair (R,)."""
        return inclusion_probabilities(self._train.dataset.compared.strength, share)

    @cached_property
    def _sampling_weights(self) -> dict[int, float]:
        """Row → by how much its loss counts more for being drawn seldom: mean 1 over the rows of an epoch."""
        compared, encoded = self._train.dataset.compared, self._train.encoded
        probabilities = self._probabilities(self.args.strength_sampling or 1.0)
        weights = probabilities.sum() / (len(probabilities) * probabilities)
        return dict(zip(encoded.rows[compared.kept].tolist(), weights.tolist(), strict=True))

    @property
    def _epoch(self) -> int:
        # transformers counts k + (batches done)/(batches in all), which at the end of an epoch is a whole number.
        return math.floor(self.state.epoch or 0)

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """The micro-batches of one optimiser step, counted, so that a short one does not weigh more than its pairs."""
        samples, number = super().get_batch_samples(*args, **kwargs)
        self._pairs_in_step = sum(len(batch["row"]) for batch in samples)
        return samples, number

    # One batch.

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Mean of the per-pair losses of one micro-batch; raises FloatingPointError, naming rows, where one is not finite."""
        loss, measured, pairs = self.pair_losses(model, inputs, epoch=self._epoch)
        self._record("train", measured, pairs, loss.detach())
        if self.args.strength_sampling is not None:
            loss = loss * torch.tensor([self._sampling_weights[row] for row in pairs.rows]).to(loss)
        if self._auto_beta and measured.logps is not None:
            self._auto_beta.observe(pairs.strength * measured.logps.margin)
        mean = loss.mean()
        if self._pairs_in_step:
            mean = mean * (len(inputs["row"]) * self.current_gradient_accumulation_steps / self._pairs_in_step)
        return (mean, {"losses": loss.detach()}) if return_outputs else mean

    def pair_losses(
        self, model: nn.Module, inputs: dict[str, Any], *, epoch: int, data: Prepared | None = None
    ) -> tuple[Tensor, Measurement, Pairs]:
        """The per-pair losses (B,) of a batch, before any mean, with what they were made of; `data`: not the training's.

        With inversion_landings="all" a pair stands there once a landing, in the losses as in the pairs that are returned.
        """
        args, data = self.args, data or self._train
        key = self._draws_key(epoch)
        pairs = self._pairs(data, inputs, key)
        drawn = draw(
            pairs.rows,
            seed=args.seed,
            epoch=key,
            schedule=self.denoiser.schedule,
            share_noise=args.share_noise,
            share_eta_noise=args.inversion_share_eta_noise,
            one_timestep=self._is_batch_coupled,
            last_stratum_of=None if args.inversion_landings == "last" else args.inversion_steps,
        )
        point, known = self._reuse.find(data, pairs, drawn, round_=key, epoch=epoch)
        with self._dropout_keyed(pairs.rows, epoch):
            measured = measure(
                self.denoiser,
                model,
                self.network,
                self.reference,
                pairs,
                drawn,
                self._method,
                schedule=self._schedule,
                autocast=self.accelerator.autocast,
                known_point=point,
                known_reference=known,
            )
        if known is None:
            self._reuse.keep(data, pairs.rows, epoch, measured.reference_error)
        return self._loss_of(measured, measured.pairs), measured, measured.pairs

    def _draws_key(self, epoch: int) -> int:
        """What a row's draws are keyed by: the epoch or, where its path is kept, how often paths were renewed."""
        if self.args.inversion_landings != "in_turn" or epoch < 0:
            return epoch
        every = self.args.inversion_refresh
        return 0 if every is None else self.state.global_step // every

    def _write(self, folder: Path) -> None:
        super()._write(folder)
        if self._auto_beta:
            self._auto_beta.save(folder)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        if self._auto_beta:
            self._auto_beta.load(Path(resume_from_checkpoint))

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        self._reuse.write()

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

    @cached_property
    def _is_batch_coupled(self) -> bool:
        return self.args.needs_pairs and any(losses.get(key).batch_coupled for key in self.args.loss_type)

    def _loss_of(self, measured: Measurement, pairs: Pairs) -> Tensor:
        assert measured.logps is not None
        options = self.args.loss_options()
        if self._auto_beta:
            options["beta"] = self.beta
        if self.args.comparison in ("smoothed", "bradley_terry"):
            options["strength"] = pairs.strength
        if measured.rejected_scale is not None:
            options["rejected_scale"] = measured.rejected_scale
        return losses.compute(self.args.loss_type, measured.logps, loss_weights=self.args.loss_weights, **options)

    def _pairs(self, data: Prepared, inputs: dict[str, Any], epoch: int) -> Pairs:
        device, encoded = self.args.device, data.encoded
        dtype = torch.float64 if module_dtype(self.network) == torch.float64 else torch.float32
        rows: list[int] = inputs["row"]
        share = self.args.prompt_dropout if epoch >= 0 else 0.0
        dropped = dropped_prompts(rows, seed=self.args.seed, epoch=epoch, share=share)
        text = encoded.conditioning(torch.tensor(inputs["prompt_index"])).where(~dropped, encoded.empty).to(device)
        sides = ("chosen", "rejected") if self.args.needs_pairs else ("chosen",)
        sizes = torch.cat([inputs[f"size_{side}"] for side in sides])
        return Pairs(
            x0=torch.cat([inputs[side] for side in sides]).to(device, dtype),
            conditioning=self.denoiser.with_sizes(text.repeat_pair() if len(sides) == 2 else text, sizes),
            rows=rows,
            strength=inputs["strength"].to(device, dtype),
        )

    def one_forward(self) -> Callable[[], Tensor]:
        """A call that runs the network once on a training batch, to be timed."""
        size, buckets = self.args.per_device_train_batch_size, self._train.dataset.buckets
        items = range(len(self._train.dataset)) if buckets is None else self._sampler(self.args)
        chosen = list(islice(items, size))
        inputs = self._prepare_inputs(batch_of([self._train.dataset[item] for item in chosen]))
        pairs = self._pairs(self._train, inputs, epoch=0)
        t = torch.zeros(len(pairs.x0), dtype=torch.long, device=pairs.x0.device)

        def forward() -> Tensor:
            with torch.no_grad(), evaluating([self.network]), self.accelerator.autocast():
                return self.denoiser.predict(self.network, pairs.x0, t, pairs.conditioning)

        return forward

    # Metrics.

    def _record(self, mode: str, measured: Measurement, pairs: Pairs, loss: Tensor) -> None:
        panel = health.panel(measured, pairs, loss, beta=self.beta, schedule=self._schedule)
        if not math.isfinite(panel["loss"][0]):
            rows = [row for row, value in zip(pairs.rows, loss.tolist(), strict=True) if not math.isfinite(value)]
            raise FloatingPointError(
                f"the loss is not finite at step {self.state.global_step + 1} for rows {rows[:5]}: lower the learning rate or beta; "
                "with float16, train in bf16 or float32"
            )
        self._sums[mode].add(panel)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the health panel to transformers' own numbers, and prints named warnings once each."""
        if "loss" in logs:
            logs.update({name: value for name, value in self._sums["train"].drain().items() if name != "loss"})
            logs.update(self._speed(start_time))
            if self._auto_beta:
                logs["beta"] = self.beta
        super().log(logs, start_time)
        if "loss" in logs and self.is_world_process_zero():
            for finding in health.findings(self.state.log_history):
                if finding.name not in self._warned:
                    self._warned.add(finding.name)
                    logger.warning("step %d, %s: %s", self.state.global_step, finding.name, finding.message)

    def _speed(self, start_time: float | None) -> dict[str, float]:
        step, now = self.state.global_step, time.time()
        before = self._logged_at or (self._initial_global_step, start_time)
        self._logged_at = step, now
        if before[1] is None or step <= before[0] or now <= before[1]:
            return {}
        return {"pairs_per_second": (step - before[0]) * self.args.pairs_per_step / (now - before[1])}

    @torch.no_grad()
    def held_out_losses(self, data: Prepared, draw: int = 0) -> Iterator[tuple[Tensor, Measurement, Pairs]]:
        """`pair_losses` of this process's batches of `data`, with every prompt kept, at (t, noise) fixed by pair and `draw`."""
        mine = list(range(self.args.process_index, len(data.dataset), self.args.world_size))
        size, buckets = self.args.per_device_eval_batch_size, data.dataset.buckets
        alike = torch.zeros(len(data.dataset), dtype=torch.long) if buckets is None else buckets
        batches = bucket_batches(alike, mine, size, drop_last=False)
        loader = DataLoader(data.dataset, batch_sampler=batches, collate_fn=batch_of)
        with self._at_work(), self.averaged(), evaluating([self.network]):
            for inputs in loader:
                yield self.pair_losses(self.model, self._prepare_inputs(inputs), epoch=_EVAL_EPOCH - draw, data=data)

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Loss and health panel on every evaluation pair, at fixed (pair, t, noise), so that steps can be compared.

        `eval_dataset`: other pairs than the trainer was made with, in any form that `load_pairs` reads.
        """
        if ignore_keys:
            raise ValueError("ignore_keys has no effect: evaluation keeps metrics, not model outputs")
        data = self._eval
        if eval_dataset is not None and eval_dataset is not self.eval_dataset:
            with on_device(list(networks(self.pipe).values()), self.args.device):
                data = prepare(eval_dataset, self.denoiser, self.args, like=self._train)
        if data is None:
            raise ValueError("there is no eval_dataset to evaluate on")
        for loss, measured, pairs in self.held_out_losses(data):
            self._record("eval", measured, pairs, loss)
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in self._sums["eval"].drain().items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)  # type: ignore[has-type]
        return metrics


def _precision(network: nn.Module) -> tuple[torch.dtype, bool]:
    return module_dtype(network), is_quantized(network)
