"""The trainer under every denoiser method: `AlignTrainer` around the network of a diffusers pipeline."""

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar, Self, cast

import torch
from torch import Tensor, nn

from mmalign.denoisers import Denoiser, adapter_for
from mmalign.denoisers.base import module_dtype
from mmalign.denoisers.cascade_decoder import check_draws
from mmalign.denoisers.long_prompts import long_prompts_of, read_long_prompts
from mmalign.denoisers.parts import evaluating, is_quantized, networks
from mmalign.denoisers.user_attention import user_attention
from mmalign.training import health
from mmalign.training.align_trainer import AlignTrainer
from mmalign.training.devices import on_device, refuse_offloading, storable
from mmalign.training.loading import load_base
from mmalign.training.negative import check_branches
from mmalign.training.picture_card import write_picture_card
from mmalign.training.run_config import RunConfig
from mmalign.training.samples import SamplePictures
from mmalign.training.weights import (
    check_takes_lora,
    component_name,
    has_adapter,
    load_trained,
    made_trainable,
    save_trained,
)


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

    def activation_checkpointing_disable(self) -> None:
        """Undoes it."""
        cast(Any, self.network).disable_gradient_checkpointing()


class RunTrainer(AlignTrainer):
    """Trains a pipeline's network on rows: what is common to methods that learn from pairs, from prompts, or from pictures.

    A method gives `prepare_data`, `row_losses`, and what it needs besides in `set_up`. Arguments as in `DenoiserTrainer`. Where the
    constructor raises, the pipeline is as it was.
    """

    config_class: type[RunConfig] = RunConfig
    data_forms: ClassVar[str] = "a hub id, a folder, a parquet file, rows, or 'playground'"
    on_top: ClassVar[str] = "sample pictures, evaluation and saving"
    args: RunConfig
    pipe: Any
    denoiser: Denoiser

    def adopt(self, model: Any, args: Any) -> None:
        """A pipeline, or the name of one."""
        if isinstance(model, (str, os.PathLike)):
            model = load_base(model)
        self.pipe, self.denoiser = model, adapter_for(model)
        # Grids are made on the CPU, losses on the device: each has the tables where it works.
        self.denoiser.schedule = storable(self.denoiser.schedule, args.device)
        self._schedule = self.denoiser.schedule.to(args.device)

    @property
    def network(self) -> nn.Module:
        """The bare network that is trained."""
        return self.denoiser.module

    def policy_module(self) -> PolicyModule:
        """The network behind `Denoiser.predict`."""
        return PolicyModule(self.denoiser)

    @contextmanager
    def _prepared(self, args: Any) -> Iterator[None]:
        """The pipeline reads long prompts as `args` say, from now on unless the block raises."""
        before, config = long_prompts_of(self.pipe), args.long_prompt_reading()
        try:
            if config is not None:
                read_long_prompts(self.pipe, config, None if before is None else before.tail)
            yield
        except BaseException:
            read_long_prompts(self.pipe, *((None,) if before is None else (before.config, before.tail)))
            raise

    @contextmanager
    def _reading(self, args: Any) -> Iterator[None]:
        """Every part of the pipeline on the device."""
        with on_device(list(networks(self.pipe).values()), args.device):
            yield

    def check_arguments(self, args: Any, train_dataset: Any, eval_dataset: Any, peft_config: Any) -> None:
        """ValueError for what cannot work, before anything is read or moved."""
        refuse_offloading(self.pipe)
        if args.trains_negative:
            check_branches(self.pipe)
        if args.validation_steps:
            check_draws(self.pipe)
        if peft_config is not None:
            check_takes_lora(self.network)
        super().check_arguments(args, train_dataset, eval_dataset, peft_config)

    def made_trainable(self, args: Any, peft_config: Any) -> AbstractContextManager[None]:
        """What is trained, put on the network and marked; undone where the block raises."""
        return made_trainable(self.network, peft_config, args.seed)

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

    # A run.

    def _add_our_callbacks(self) -> None:
        super()._add_our_callbacks()
        if self.args.validation_steps:
            self.add_callback(SamplePictures(self.pipe, self.averaged))

    @contextmanager
    def _at_work(self) -> Iterator[None]:
        # Text encoders and VAE have done their part; those that bitsandbytes holds cannot all be moved.
        idle = [part for part in networks(self.pipe).values() if part is not self.network and not is_quantized(part)]
        with on_device(idle, torch.device("cpu")), on_device([self.network, *self._own_copies()], self.args.device):
            yield

    @property
    def _precision(self) -> torch.dtype:
        """Of latents: the network's, or float32 where that is less."""
        return torch.promote_types(module_dtype(self.network), torch.float32)

    def findings(self) -> list[health.Finding]:
        """What the health panel says."""
        return health.findings(self.state.log_history)

    def _write_weights(self, folder: Path) -> None:
        save_trained(self.pipe, self.network, folder)

    def _read_weights(self, folder: Path) -> None:
        load_trained(self.network, folder)

    def _write_card(self, folder: Path) -> None:
        whole = (component_name(self.pipe, self.network), type(self.network).__name__)
        write_picture_card(
            folder,
            self.args,
            base_model=str(self.pipe.config.get("_name_or_path") or "unknown"),
            data=self._train.name,
            metrics=self.last_metrics(),
            settings=self.card_settings(),
            trained=None if has_adapter(self.network) else whole,
            users=user_attention(self.network) is not None,
            task="text-to-image" if self.denoiser.native_frames is None else "text-to-video",
        )
