"""The trainer of every denoiser method: `transformers.Trainer` around one measurement and one loss of `mmalign.losses`."""

import json
import logging
import math
import os
import shutil
from collections import defaultdict
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset
from transformers import Trainer, TrainerCallback
from transformers.trainer_utils import rotate_checkpoints

from mmalign import losses
from mmalign.data import EncodedPairs, collate
from mmalign.denoisers import Denoiser, adapter_for
from mmalign.likelihood.reference import make_reference
from mmalign.training import health
from mmalign.training.checkpoints import (
    STAGING,
    check_facts,
    full_disk_explained,
    read_manifest,
    write_manifest,
    write_text,
)
from mmalign.training.config import DenoiserConfig
from mmalign.training.measurement import Measurement, Pairs, draw, dropped_prompts, measure
from mmalign.training.prepare import Prepared, prepare
from mmalign.training.weights import add_adapter, load_trained, save_trained

logger = logging.getLogger("mmalign")
_EVAL_EPOCH = -1


class PolicyModule(nn.Module):
    """The network that is aligned, behind the forward that several processes wrap; maps transformers' checkpointing verbs."""

    def __init__(self, denoiser: Denoiser) -> None:
        super().__init__()
        self.network = denoiser.module
        self._predict = denoiser.predict

    def forward(self, x_t: Tensor, t: Tensor, conditioning: Any) -> Tensor:
        """The raw output of the network, as `Denoiser.predict`."""
        return self._predict(self.network, x_t, t, conditioning)

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: dict[str, Any] | None = None) -> None:
        """diffusers' own verb; it takes no options."""
        if gradient_checkpointing_kwargs:
            raise ValueError(
                "gradient_checkpointing_kwargs is refused: diffusers' networks choose their own checkpointing function"
            )
        cast(Any, self.network).enable_gradient_checkpointing()


class DenoiserTrainer(Trainer):
    """Aligns a diffusers pipeline on pairs. SmPO, InPO, Diffusion-DPO and SFT differ only in the defaults of their configs.

    Args:
        model: a pipeline, or a hub id or folder to load one from.
        args: the method's config.
        train_dataset, eval_dataset: whatever `mmalign.data.load_pairs` reads.
        peft_config: a `peft.LoraConfig`; None trains every weight of the network.
        ref_model: another network to compare with; None takes the policy with its adapter off, or a frozen copy.
        callbacks: as in transformers.

    Raises ValueError for half-precision weights that would be trained without an adapter, and for rows that cannot be used.
    """

    config_class: type[DenoiserConfig] = DenoiserConfig

    def __init__(
        self,
        model: Any,
        args: DenoiserConfig,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        peft_config: Any = None,
        ref_model: nn.Module | None = None,
        callbacks: list[TrainerCallback] | None = None,
    ) -> None:
        if isinstance(model, (str, os.PathLike)):
            from mmalign.training.pipeline import load_base

            model = load_base(model)
        self.pipe = model
        self.denoiser = adapter_for(model)
        self.denoiser.module.requires_grad_(peft_config is None)
        if peft_config is not None:
            add_adapter(self.denoiser.module, peft_config)
        self._check_precision()
        if train_dataset is None:
            raise ValueError("train_dataset is missing: a hub id, a folder, a parquet file, rows, or 'playground'")
        train = prepare(train_dataset, self.denoiser, args)
        evaluated = None if eval_dataset is None else prepare(eval_dataset, self.denoiser, args, like=train)
        if evaluated is not None and evaluated.encoded.key == train.encoded.key:
            raise ValueError("eval_dataset is the training data: name another one, or another eval_split")
        self._train, self._eval = train, evaluated
        super().__init__(
            model=PolicyModule(self.denoiser),
            args=args,
            data_collator=collate,
            train_dataset=train.dataset,
            eval_dataset=None if evaluated is None else evaluated.dataset,
            callbacks=callbacks,
        )
        self.args: DenoiserConfig = args
        self.denoiser.schedule = self.denoiser.schedule.to(args.device)
        needed = args.needs_pairs and (not args.is_reference_free or args.inversion_model == "reference")
        kind = args.reference if needed else "none"
        self.reference = make_reference(self.denoiser.module, ref_model, kind=kind)
        self._sums: dict[str, dict[str, list[float]]] = {"train": defaultdict(_zero), "eval": defaultdict(_zero)}
        self._step_seconds: list[float] = []
        if len(train.dataset) < args.train_batch_size and args.dataloader_drop_last:
            raise ValueError(
                f"{len(train.dataset)} usable pairs do not fill one batch of {args.train_batch_size}: lower per_device_train_batch_size"
            )

    @property
    def network(self) -> nn.Module:
        """The bare network that is trained."""
        return self.denoiser.module

    def _check_precision(self) -> None:
        half = [
            n
            for n, p in self.network.named_parameters()
            if p.requires_grad and p.dtype in (torch.float16, torch.bfloat16)
        ]
        if half:
            raise ValueError(
                f"{len(half)} trained weights are in half precision ({half[0]}, …) and would round small steps away: load the pipeline "
                "with dtype=torch.float32 and train with bf16=True, or pass a peft_config"
            )

    # One batch.

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Mean of the per-pair losses of one batch; raises FloatingPointError, naming rows, where one is not finite."""
        mode = "train" if model.training else "eval"
        epoch = math.floor((self.state.epoch or 0) + 1e-6) if mode == "train" else _EVAL_EPOCH
        loss, measured, pairs = self.pair_losses(model, inputs, epoch=epoch)
        wrong = ~torch.isfinite(loss)
        if wrong.any():
            rows = pairs.rows[wrong.cpu()].tolist()[:5]
            raise FloatingPointError(
                f"the loss is not finite at step {self.state.global_step + 1} for rows {rows}: lower the learning rate or beta; with "
                "float16, train in bf16 or float32"
            )
        self._record(mode, measured, pairs, loss.detach())
        return (loss.mean(), {"losses": loss.detach()}) if return_outputs else loss.mean()

    def pair_losses(self, model: nn.Module, inputs: dict[str, Any], *, epoch: int) -> tuple[Tensor, Measurement, Pairs]:
        """The per-pair losses (B,) of a batch, before any mean, with what they were made of."""
        prepared = self._train if epoch != _EVAL_EPOCH else cast(Prepared, self._eval)
        pairs = self._pairs(prepared.encoded, inputs, epoch)
        args = self.args
        drawn = draw(
            pairs.rows,
            seed=args.seed,
            epoch=epoch,
            max_timestep=self.denoiser.schedule.max_timestep,
            share_noise=args.share_noise,
            share_eta_noise=args.inversion_share_eta_noise,
        )
        measured = measure(
            self.denoiser,
            model,
            self.network,
            self.reference,
            pairs,
            drawn,
            inversion=args.inversion(),
            inversion_by_reference=args.inversion_model == "reference",
            loss_space=args.loss_space,
            sdpo_mu=args.sdpo_mu,
            autocast=self.accelerator.autocast,
        )
        return self._loss_of(measured, pairs), measured, pairs

    def _loss_of(self, measured: Measurement, pairs: Pairs) -> Tensor:
        assert measured.logps is not None
        options = self.args.loss_options()
        if self.args.comparison in ("smoothed", "bradley_terry"):
            options["strength"] = pairs.strength
        if measured.rejected_scale is not None:
            options["rejected_scale"] = measured.rejected_scale
        return losses.compute(self.args.loss_type, measured.logps, loss_weights=self.args.loss_weights, **options)

    def _pairs(self, encoded: EncodedPairs, inputs: dict[str, Any], epoch: int) -> Pairs:
        device = self.args.device
        dtype = torch.float64 if next(self.network.parameters()).dtype == torch.float64 else torch.float32
        rows = inputs["row"].cpu()
        conditioning = encoded.conditioning(inputs["prompt_index"].cpu()).to(device)
        share = self.args.prompt_dropout if epoch != _EVAL_EPOCH else 0.0
        dropped = dropped_prompts(rows, seed=self.args.seed, epoch=epoch, share=share)
        conditioning = conditioning.where(~dropped, encoded.empty.to(device))
        sides = ("chosen", "rejected") if self.args.needs_pairs else ("chosen",)
        sizes = torch.cat([inputs[f"size_{side}"] for side in sides])
        return Pairs(
            x0=torch.cat([inputs[side] for side in sides]).to(device, dtype),
            conditioning=self.denoiser.with_sizes(
                conditioning.repeat_pair() if len(sides) == 2 else conditioning, sizes
            ),
            rows=rows,
            strength=inputs["strength"].to(device, dtype),
        )

    # Metrics.

    def _record(self, mode: str, measured: Measurement, pairs: Pairs, loss: Tensor) -> None:
        for name, (total, weight) in health.panel(
            measured, pairs, loss, beta=self.args.beta, schedule=self.denoiser.schedule
        ).items():
            self._sums[mode][name][0] += total
            self._sums[mode][name][1] += weight

    def _drain(self, mode: str) -> dict[str, float]:
        sums, self._sums[mode] = self._sums[mode], defaultdict(_zero)
        names = sorted(sums)
        if self.accelerator.num_processes > 1:
            gathered: list[dict[str, list[float]]] = [{} for _ in range(self.accelerator.num_processes)]
            torch.distributed.all_gather_object(gathered, dict(sums))
            names = sorted({name for part in gathered for name in part})
            sums = {n: [sum(part.get(n, [0.0, 0.0])[k] for part in gathered) for k in (0, 1)] for n in names}  # type: ignore[assignment]
        return {name: sums[name][0] / sums[name][1] for name in names}

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the health panel to transformers' own numbers, and prints named warnings once each."""
        if "loss" in logs:
            logs.update({name: value for name, value in self._drain("train").items() if name != "loss"})
        super().log(logs, start_time)
        if "loss" in logs and self.is_world_process_zero():
            for finding in health.findings(self.state.log_history):
                if finding.name not in self._said:
                    self._said.add(finding.name)
                    logger.warning("step %d, %s: %s", self.state.global_step, finding.name, finding.message)

    @cached_property
    def _said(self) -> set[str]:
        return set()

    def evaluate(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> dict[str, float]:
        """Loss and health panel on every evaluation pair, at fixed (pair, t, noise), so that steps can be compared."""
        if self._eval is None:
            raise ValueError("there is no eval_dataset to evaluate on")
        rank, world = self.args.process_index, self.args.world_size
        mine = Subset(self._eval.dataset, range(rank, len(self._eval.dataset), world))
        loader = DataLoader(mine, self.args.per_device_eval_batch_size, collate_fn=collate)
        was_training = self.model.training
        self.model.eval()
        with torch.no_grad():
            for inputs in loader:
                self.compute_loss(self.model, inputs)
        self.model.train(was_training)
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in self._drain("eval").items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    # Checkpoints.

    @cached_property
    def facts(self) -> dict[str, Any]:
        """What must be the same for a checkpoint to continue a run."""
        args = self.args
        return {
            "method": args.method,
            "reference": self.reference.fingerprint(),
            "data": self._train.fingerprint,
            "seed": args.seed,
            "batch": args.train_batch_size * args.gradient_accumulation_steps * args.world_size,
            "axes": json.loads(
                json.dumps([args.latents, args.comparison, args.loss_type, args.loss_options(), repr(args.inversion())])
            ),
        }

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        folder = Path(output_dir or cast(str, self.args.output_dir))
        if self.args.should_save:
            save_trained(self.pipe, self.network, folder)
            if self._train.normalizer is not None:
                self._train.normalizer.save(folder / "smoothing.json")

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        final = Path(cast(str, self.args.output_dir))
        name = f"checkpoint-{self.state.global_step}"
        staging = final / STAGING
        if self.args.should_save:
            shutil.rmtree(staging, ignore_errors=True)
            staging.mkdir(parents=True)
        self.accelerator.wait_for_everyone()
        self._run_dir, limit = str(staging), self.args.save_total_limit
        self.args.save_total_limit = None
        try:
            with full_disk_explained(staging):
                super()._save_checkpoint(model, trial)
                self.accelerator.wait_for_everyone()
                if self.args.should_save:
                    self._finish_checkpoint(staging / name, final / name)
        finally:
            self._run_dir, self.args.save_total_limit = None, limit
        if self.args.should_save:
            rotate_checkpoints(
                output_dir=str(final),
                save_total_limit=limit,
                best_model_checkpoint=self.state.best_model_checkpoint,
                use_mtime=True,
            )
        self.accelerator.wait_for_everyone()

    def _finish_checkpoint(self, staged: Path, final: Path) -> None:
        best = self.state.best_global_step
        if best:
            self.state.best_model_checkpoint = str(final.parent / f"checkpoint-{best}")
        self.state.save_to_json(str(staged / "trainer_state.json"))
        write_manifest(staged, self.facts)
        shutil.rmtree(final, ignore_errors=True)
        os.replace(staged, final)
        shutil.rmtree(staged.parent, ignore_errors=True)

    _run_dir: str | None = None

    def _get_output_dir(self, trial: Any) -> str:
        return self._run_dir or super()._get_output_dir(trial)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        folder = Path(resume_from_checkpoint)
        check_facts(read_manifest(folder), self.facts, folder)
        load_trained(self.network, folder)

    def _load_best_model(self) -> None:
        load_trained(self.network, Path(cast(str, self.state.best_model_checkpoint)))

    def write_history(self) -> None:
        """Writes every logged entry to `history.json` in the output folder."""
        write_text(Path(cast(str, self.args.output_dir)) / "history.json", json.dumps(self.state.log_history, indent=1))


def _zero() -> list[float]:
    return [0.0, 0.0]
