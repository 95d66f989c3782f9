"""The trainer of every method that learns from pairs: one measurement and one loss of `mmalign.losses`."""

import logging
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from mmalign import losses
from mmalign.denoisers import adapter_for
from mmalign.denoisers.base import module_dtype
from mmalign.denoisers.parts import is_quantized
from mmalign.likelihood.reference import Reference, make_reference
from mmalign.training import health
from mmalign.training.align_trainer import EVAL_EPOCH, Losses
from mmalign.training.auto_beta import AutoBeta
from mmalign.training.bucketing import InBuckets, told_buckets
from mmalign.training.config import DenoiserConfig
from mmalign.training.estimate import forward_equivalents
from mmalign.training.measurement import Measurement, Method, Pairs, draw, dropped_prompts, measure
from mmalign.training.prepare import Prepared, batch_of, check_held_out, prepare
from mmalign.training.reuse import Reuse
from mmalign.training.run_trainer import RunTrainer
from mmalign.training.sampling import Shuffled, ShuffledByProbability, inclusion_probabilities

logger = logging.getLogger("mmalign")


class DenoiserTrainer(RunTrainer):
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
    args: DenoiserConfig
    beta: float
    _train: Prepared
    _eval: Prepared | None

    def check_arguments(self, args: DenoiserConfig, train_dataset: Any, eval_dataset: Any, peft_config: Any) -> None:
        """ValueError for what cannot work, before anything is read or moved."""
        super().check_arguments(args, train_dataset, eval_dataset, peft_config)
        if self.denoiser.schedule.is_flow and args.latents != "forward" and args.inversion_eta > 0:
            raise ValueError("inversion_eta is noise of variance-preserving models; a flow model needs inversion_eta=0")
        if args.reference == "adapter" and peft_config is None:
            raise ValueError("reference='adapter' needs a LoRA to switch off: pass a peft_config, or reference='copy'")
        if args.inversion_refresh is not None and args.world_size > 1:
            raise ValueError(
                "inversion_refresh keeps paths in the memory of one process: leave it out, or start one process"
            )

    def prepare_data(self, data: Any, args: DenoiserConfig, *, like: Prepared | None = None) -> Prepared:
        """Encoded and compared pairs, from whatever `load_pairs` reads."""
        return prepare(data, self.denoiser, args, like=like)

    @staticmethod
    def collate(items: list[Any]) -> dict[str, Any]:
        """Pairs as a batch."""
        return batch_of(items)

    def check_data(self, args: DenoiserConfig, alike: str = "") -> None:
        """ValueError where the pairs fill no batch, or come too seldom for what is kept of them."""
        if self._eval is not None:
            check_held_out(self._train, self._eval)
        data = self._train.dataset
        if data.buckets is not None:
            told = told_buckets(self._train.encoded.shapes, data.buckets, args.per_device_train_batch_size)
            logger.info("%s: %s", self._train.name, told)
            alike = f" of one shape ({told})"
        elif args.strength_sampling is not None:
            alike = f" with strength_sampling={args.strength_sampling:g}"
        super().check_data(args, alike)
        steps_an_epoch = len(self.sampler(args)) / args.rows_per_step
        if args.inversion_refresh is not None and args.inversion_refresh <= steps_an_epoch:
            raise ValueError(
                f"inversion_refresh={args.inversion_refresh}: no pair comes twice in so few steps, since an epoch has "
                f"{steps_an_epoch:.0f}; raise it, or take inversion_landings='all'"
            )

    def make_reference(self, ref_model: Any) -> Reference:
        """The policy with its adapter off, a frozen copy, or none where no loss needs one."""
        args = self.args
        needed = args.needs_pairs and (not args.is_reference_free or args.inversion_model == "reference")
        if ref_model is not None and not isinstance(ref_model, nn.Module):
            ref_model = adapter_for(ref_model).module
        if ref_model is not None and _precision(ref_model) != _precision(self.network):
            raise ValueError(
                "ref_model has another dtype or quantisation than the policy, and rounding would look like preference: load both alike"
            )
        return make_reference(self.network, ref_model, kind=args.reference if needed else "none")

    def set_up(self) -> None:
        """How points are measured, what of them is kept, and β."""
        args = self.args
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
        self.beta = args.starting_beta
        self._auto_beta = AutoBeta(self) if args.beta == "auto" else None

    def card_settings(self) -> dict[str, Any]:
        """The three axes and the loss's options, β as training ended with it."""
        options = self.args.loss_options()
        if "beta" in options:
            options["beta"] = self.beta
        axes = {"latents": self.args.latents, "comparison": self.args.comparison, "loss": self.args.objective()}
        return {**axes, **options}

    def own_callbacks(self) -> list[TrainerCallback]:
        """What moves β, where it is found in training."""
        return [self._auto_beta] if self._auto_beta else []

    def own_metrics(self) -> dict[str, float]:
        """β, where it moves."""
        return {"beta": self.beta} if self._auto_beta else {}

    @property
    def elements(self) -> int:
        """Numbers in one latent."""
        return self._train.dataset[0]["chosen"].numel()

    @property
    def num_pairs(self) -> int:
        """Pairs that are trained on."""
        return len(self._train.dataset)

    def forward_passes(self, steps: int) -> float:
        """Of the policy with its backward, the reference and the inversion."""
        args = self.args
        visits = (args.inversion_refresh or steps) * args.rows_per_step / self.num_pairs
        return forward_equivalents(
            self.denoiser.schedule,
            args.inversion(),
            has_reference=self.reference.kind != "none",
            adapted=not all(parameter.requires_grad for parameter in self.network.parameters()),
            recomputes=bool(args.gradient_checkpointing),
            every_landing=args.inversion_landings == "all",
            visits=visits if args.inversion_landings == "in_turn" else None,
        )

    def train(self, resume_from_checkpoint: str | bool | None = None, **options: Any) -> Any:
        """As `RunTrainer.train`; what was kept of the pairs is written when it is over."""
        result = super().train(resume_from_checkpoint, **options)
        self._reuse.write()
        return result

    def sampler(self, args: DenoiserConfig) -> Shuffled | InBuckets:
        """All pairs shuffled, a share of them drawn by strength, or in batches of one shape."""
        if args.strength_sampling is not None:
            return ShuffledByProbability(
                self._probabilities(args.strength_sampling), args.order_seed, lambda: self._epoch
            )
        rows, buckets = super().sampler(args), self._train.dataset.buckets
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

    # One batch.

    def row_losses(self, model: nn.Module, inputs: dict[str, Any], *, epoch: int, data: Prepared) -> Losses:
        """`pair_losses` with the health panel; in training divided by how likely a pair was to be drawn, where that differs."""
        loss, measured, pairs = self.pair_losses(model, inputs, epoch=epoch, data=data)
        panel = health.panel(measured, pairs, loss.detach(), beta=self.beta, schedule=self._schedule)
        if epoch >= 0:
            if self.args.strength_sampling is not None:
                loss = loss * torch.tensor([self._sampling_weights[row] for row in pairs.rows]).to(loss)
            if self._auto_beta and measured.logps is not None:
                self._auto_beta.observe(pairs.strength * measured.logps.margin)
        return Losses(loss, pairs.rows, panel)

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
        if self._train.normalizer is not None:
            self._train.normalizer.save(folder / "smoothing.json")
        if self._auto_beta:
            self._auto_beta.save(folder)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        if self._auto_beta:
            self._auto_beta.load(Path(resume_from_checkpoint))

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        self._reuse.write()

    @cached_property
    def _is_batch_coupled(self) -> bool:
        return self.args.needs_pairs and any(losses.get(key).batch_coupled for key in self.args.loss_type)

    def _loss_of(self, measured: Measurement, pairs: Pairs) -> Tensor:
        assert measured.logps is not None
        options = self.args.loss_options()
        if "beta" in options:
            options["beta"] = self.beta
        if self.args.comparison in ("smoothed", "bradley_terry"):
            options["strength"] = pairs.strength
        if measured.rejected_scale is not None:
            options["rejected_scale"] = measured.rejected_scale
        return losses.compute(self.args.loss_type, measured.logps, loss_weights=self.args.loss_weights, **options)

    def _pairs(self, data: Prepared, inputs: dict[str, Any], epoch: int) -> Pairs:
        device, encoded = self.args.device, data.encoded
        rows: list[int] = inputs["row"]
        share = self.args.prompt_dropout if epoch >= 0 else 0.0
        dropped = dropped_prompts(rows, seed=self.args.seed, epoch=epoch, share=share)
        text = encoded.conditioning(torch.tensor(inputs["prompt_index"])).where(~dropped, encoded.empty).to(device)
        sides = ("chosen", "rejected") if self.args.needs_pairs else ("chosen",)
        sizes = torch.cat([inputs[f"size_{side}"] for side in sides])
        return Pairs(
            x0=torch.cat([inputs[side] for side in sides]).to(device, self._precision),
            conditioning=self.denoiser.with_sizes(text.repeat_pair() if len(sides) == 2 else text, sizes),
            rows=rows,
            strength=inputs["strength"].to(device, self._precision),
        )

    def network_inputs(self, inputs: dict[str, Any]) -> tuple[Tensor, Any]:
        """Both sides of a training batch."""
        pairs = self._pairs(self._train, inputs, epoch=0)
        return pairs.x0, pairs.conditioning

    @torch.no_grad()
    def held_out_losses(self, data: Prepared, draw: int = 0) -> Iterator[tuple[Tensor, Measurement, Pairs]]:
        """`pair_losses` of this process's batches of `data`, with every prompt kept, at (t, noise) fixed by pair and `draw`."""
        for inputs in self.held_out_batches(data):
            yield self.pair_losses(self.model, inputs, epoch=EVAL_EPOCH - draw, data=data)


def _precision(network: nn.Module) -> tuple[torch.dtype, bool]:
    return module_dtype(network), is_quantized(network)
