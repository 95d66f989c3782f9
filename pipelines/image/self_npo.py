"""Self-NPO: guidance away from a network that was trained to be worse, by its own predictions and without labels (arXiv:2505.11777).

    ε = ε_neg(x, c⁻) + g · (ε_pos(x, c) − ε_neg(x, c⁻)),   θ_neg = θ + α·(θ_pos − θ) + β·(θ_npo − θ)

θ_npo comes of truncated diffusion fine-tuning (`mmalign.likelihood.truncated`). That of Diffusion-NPO (diffusion_npo.py, or
`DiffusionDPOConfig(swap_pairs=True)`) is loaded and drawn with alike.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from mmalign.denoisers import Conditioning
from mmalign.denoisers.parts import evaluating
from mmalign.likelihood import draws
from mmalign.likelihood.reference import Reference, make_reference
from mmalign.likelihood.truncated import TruncatedConfig, TruncatedPoint, data_error, draw_stops, truncated_point
from mmalign.training import health
from mmalign.training.align_trainer import Losses
from mmalign.training.following import REFERENCE_FOLDER, FollowingReference
from mmalign.training.negative_pipeline import NegativePipeline
from mmalign.training.prompt_trainer import PromptConfig, PromptTrainer
from mmalign.training.weights import load_trained, save_trained


@dataclass
class SelfNPOConfig(PromptConfig):
    """Defaults of Self-NPO; see `RunConfig` for the options of every run.

    The presets "sd15" and "sdxl" are the released launchers' (full weights, pictures, one GPU), "paper" is what the equations say.

    source                 "noise": paths start from pure noise, and prompts are all that is needed; "images": from pictures with
                           captions, or the preferred sides of pairs
    solver_steps           moves of the solver before the target is taken
    grid_points            times at which paths start (images) or end (noise)
    target_guidance_scale  guidance of the targets, as `guidance_scale` means it: 1 is the prompt's prediction (the paper), 0 the empty
                           prompt's (the released SD 1.5 run, w = −1), −4 away from the prompt (SDXL, w = −5): w is this less 1
    norm                   "huber" (the released code, c = 1e-3) or "l2" (the paper), of the difference between estimates of the data
    target_model           whose predictions are targets: "frozen", the base's, or "ema", those of a copy that follows what is trained
    target_decay           with target_model "ema": how slowly it follows
    prompt_dropout         share of rows for which the student is given no prompt; the target keeps its own
    """

    method: ClassVar[str] = "self-npo"
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "sd15": {
            "source": "images", "target_guidance_scale": 0.0, "target_model": "ema", "learning_rate": 1e-6, "weight_decay": 1e-3,
            "max_steps": 1000, "lr_scheduler_type": "constant", "per_device_train_batch_size": 20, "fp16": True,
        },
        "sdxl": {
            "source": "images", "target_guidance_scale": -4.0, "target_model": "ema", "learning_rate": 1e-7, "weight_decay": 0.0,
            "max_steps": 1000, "lr_scheduler_type": "constant", "per_device_train_batch_size": 10, "fp16": True,
            "gradient_checkpointing": True,
        },
        "paper": {"source": "noise", "target_guidance_scale": 1.0, "target_model": "frozen", "norm": "l2"},
        "playground": {
            "learning_rate": 3e-4, "max_steps": 60, "warmup_steps": 20, "per_device_train_batch_size": 16, "prompt_dropout": 0.1,
            "target_guidance_scale": -4.0,
        },
    }  # fmt: skip

    source: Literal["noise", "images"] = "noise"
    solver_steps: int = 5
    grid_points: int = 25
    target_guidance_scale: float = 1.0
    norm: Literal["huber", "l2"] = "huber"
    target_model: Literal["frozen", "ema"] = "frozen"
    target_decay: float = 0.999
    prompt_dropout: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.truncated()
        if self.target_model == "frozen" and self.target_decay != self.default("target_decay"):
            raise ValueError("target_decay has no effect with target_model='frozen'")
        if not 0 <= self.target_decay < 1:
            raise ValueError(f"target_decay must be 0 or more and below 1, got {self.target_decay:g}")

    @property
    def trains_negative(self) -> bool:
        """True."""
        return True

    def truncated(self) -> TruncatedConfig:
        """How targets are made."""
        return TruncatedConfig(
            solver_steps=self.solver_steps,
            grid_points=self.grid_points,
            guidance_scale=self.target_guidance_scale,
            source=self.source,
        )

    @property
    def reads_pictures(self) -> bool:
        """Where paths start at them."""
        return self.source == "images"

    def about(self) -> str:
        """Where paths start, and what is compared."""
        return (
            f"truncated fine-tuning from {self.source}, {self.solver_steps} solver steps by the {self.target_model} model at guidance "
            f"{self.target_guidance_scale:g}, {self.norm} in data space"
        )


class SelfNPOTrainer(PromptTrainer):
    """Trains a network on its own truncated predictions; arguments as in `DenoiserTrainer`.

    train_dataset: prompts (a list, a prompt file, or the prompts of whatever `load_pairs` reads); with source "images" pictures with
    captions, or pairs, of which the preferred side is used.
    """

    config_class = SelfNPOConfig
    args: SelfNPOConfig
    _following: FollowingReference | None = None

    def make_reference(self, ref_model: Any) -> Reference:
        """The network with its adapter off or a frozen copy; none where a copy of the trained weights follows."""
        if ref_model is not None:
            raise ValueError("Self-NPO learns from its own base: leave ref_model out")
        return make_reference(self.network, None, kind="auto" if self.args.target_model == "frozen" else "none")

    def set_up(self) -> None:
        """The reference that follows, where there is one."""
        if self.args.target_model == "ema":
            self._following = FollowingReference(self.network, self.args.target_decay)

    def own_callbacks(self) -> list[TrainerCallback]:
        """What moves the reference."""
        return [] if self._following is None else [self._following]

    def card_settings(self) -> dict[str, Any]:
        """How targets were made."""
        names = ("source", "solver_steps", "grid_points", "target_guidance_scale", "norm", "target_model")
        return {name: getattr(self.args, name) for name in names}

    def forward_passes(self, steps: int) -> float:
        """Of the reference on the way and at its end, and of the student with its backward."""
        args = self.args
        stops = draw_stops(self.denoiser.schedule, args.truncated(), draws.row_generators(0, 0, range(256), "stops"))
        moves = (stops[:, 1:] != stops[:, :-1]).sum(1).double().mean().item()
        branches = 1 if args.target_guidance_scale in (0, 1) else 2
        return (moves + 1) * branches + self._trained_passes

    def row_losses(self, model: nn.Module, inputs: dict[str, Any], *, epoch: int, data: Any) -> Losses:
        """ρ(f_θ(x_s, s, c) − x̂_0) of each row."""
        rows: list[int] = inputs["row"]
        x0, conditioning, empty = self._rows(inputs, data)
        point = self._point(x0, rows, epoch, conditioning, empty)
        with self._dropout_keyed(rows, epoch):
            output = model(point.x_s, point.timestep, conditioning.where(~self._dropped(rows, epoch), empty))
        found = self._schedule.to_data(output, point.x_s, point.timestep)
        loss = data_error(found, point.target, self.args.norm)
        return Losses(loss, rows, self._panel(loss.detach(), point))

    def _point(
        self, x0: Tensor, rows: list[int], epoch: int, conditioning: Conditioning, empty: Conditioning
    ) -> TruncatedPoint:
        config = self.args.truncated()
        stops = draw_stops(self.denoiser.schedule, config, self._drawn(rows, epoch, "path"))
        start = draws.randn(self._drawn(rows, epoch, "noise"), x0.shape[1:], x0.dtype, x0.device)
        if config.source == "images":
            start = self._schedule.add_noise(x0, start, stops[:, 0].to(x0.device))
        with self._teacher() as teacher, self.accelerator.autocast():

            def predict(x: Tensor, t: Tensor, at: Tensor, prompted: bool) -> Tensor:
                return self.denoiser.predict(teacher, x, t, (conditioning if prompted else empty)[at])

            return truncated_point(
                predict,
                self._schedule,
                start,
                stops,
                config,
                time=self._drawn(rows, epoch, "timestep"),
                noise=self._drawn(rows, epoch, "renoise"),
            )

    @contextmanager
    def _teacher(self) -> Iterator[nn.Module]:
        """The network whose predictions are targets, in eval mode and without gradients."""
        if self._following is None:
            with self.reference.model(self.network) as module:
                yield module
            return
        with self._following.in_place(), evaluating([self.network]), torch.no_grad():
            yield self.network

    def _panel(self, loss: Tensor, point: TruncatedPoint) -> dict[str, tuple[float, float]]:
        values = {
            "loss": loss,
            "target/rms": point.target.flatten(1).square().mean(1).sqrt(),
            "time/landing": point.landing.to(loss) / self._schedule.num_timesteps,
            "time/student": point.timestep.to(loss) / self._schedule.num_timesteps,
        }
        return health.plain_panel(values, {"loss_by_time": loss}, point.timestep, self._schedule.num_timesteps)

    def _write(self, folder: Path) -> None:
        super()._write(folder)
        if self._following is not None and self._run_dir is not None:
            with self._following.in_place():
                save_trained(self.pipe, self.network, folder / REFERENCE_FOLDER)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        if self._following is not None:
            with self._following.in_place():
                load_trained(self.network, Path(resume_from_checkpoint) / REFERENCE_FOLDER)


class SelfNPOPipeline(NegativePipeline):
    """A pipeline of any family whose negative branch has a side of its own, which `align` trains by Self-NPO."""

    config_class = SelfNPOConfig
    trainer_class = SelfNPOTrainer
