"""Self-NPO: guidance away from a network that was trained to be worse, by its own predictions and without labels (arXiv:2505.11777).

    ε = ε_neg(x, c⁻) + g · (ε_pos(x, c) − ε_neg(x, c⁻)),   θ_neg = θ + α·(θ_pos − θ) + β·(θ_npo − θ)

θ_npo comes of truncated diffusion fine-tuning (`mmalign.likelihood.truncated`) or, in Diffusion-NPO (Wang et al., ICLR 2025,
arXiv:2505.11245), of Diffusion-DPO on swapped pairs (`DiffusionDPOConfig(swap_pairs=True)`); either is loaded and drawn with here.
"""

import copy
import inspect
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Any, ClassVar, Literal, Self, cast

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from mmalign.data import ComparisonConfig
from mmalign.data.texts import EncodedPrompts, encode_prompts, load_prompts
from mmalign.denoisers import Conditioning
from mmalign.denoisers.base import module_dtype
from mmalign.denoisers.parts import evaluating
from mmalign.files import write_file
from mmalign.likelihood import draws
from mmalign.likelihood.reference import Reference, make_reference
from mmalign.likelihood.truncated import TruncatedConfig, TruncatedPoint, data_error, draw_stops, truncated_point
from mmalign.training import health
from mmalign.training.card import is_hub_id
from mmalign.training.following import REFERENCE_FOLDER, FollowingReference
from mmalign.training.loading import plain_class
from mmalign.training.negative import (
    COMPONENTS,
    NEGATIVE,
    Negative,
    become_negative,
    check_branches,
    drawing,
    has_negative,
    load_negative,
    save_negative,
    unload_negative,
)
from mmalign.training.pipeline import AlignPipeline, AlignResult
from mmalign.training.prepare import Prepared, batch_of, prepare
from mmalign.training.run_config import RunConfig
from mmalign.training.run_trainer import Losses, RunTrainer
from mmalign.training.weights import aligned_network, has_adapter, load_trained, save_trained

# Beside a saved pipeline.
_CARD = """---
library_name: diffusers
tags:
- mmalign
- self-npo
---
# A pipeline with a negative side

Plain diffusers loads this folder, and draws with plain guidance. What runs in the negative branch lies in `negative/`, as it acts
beside the merged weights, and mmalign draws with both:

```python
from mmalign import SelfNPOPipeline

pipe = SelfNPOPipeline.from_pretrained(FOLDER)
```
"""


@dataclass
class SelfNPOConfig(RunConfig):
    """Defaults of Self-NPO; see `RunConfig` for the options of every run.

    The presets "sd15" and "sdxl" are the released launchers' (full weights, pictures, one GPU), "paper" is what the equations say.

    source                 "noise": paths start from pure noise, and prompts are all that is needed; "images": from pictures with
                           captions, the preferred sides of pairs
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
    unit: ClassVar[str] = "prompts"
    # Of pairs that serve as pictures: their sides are told apart by their labels, and all have one shape.
    comparison: ClassVar[str] = "human"
    aspect_buckets: ClassVar[bool] = False
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

    def comparison_config(self) -> ComparisonConfig:
        """The preferred side is the one that people preferred."""
        return ComparisonConfig()

    def about(self) -> str:
        """Where paths start, and what is compared."""
        return (
            f"truncated fine-tuning from {self.source}, {self.solver_steps} solver steps by the {self.target_model} model at guidance "
            f"{self.target_guidance_scale:g}, {self.norm} in data space"
        )


class SelfNPOTrainer(RunTrainer):
    """Trains a network on its own truncated predictions; arguments as in `DenoiserTrainer`.

    train_dataset: prompts (a list, a prompt file, or the prompts of whatever `load_pairs` reads); with source "images" pairs, of which
    the preferred side is used.
    """

    config_class = SelfNPOConfig
    args: SelfNPOConfig
    _following: FollowingReference | None = None

    def check_arguments(self, args: Any, train_dataset: Any, eval_dataset: Any, peft_config: Any) -> None:
        """ValueError for what cannot work, a pipeline without a negative branch of ours among it."""
        check_branches(self.pipe)
        super().check_arguments(args, train_dataset, eval_dataset, peft_config)

    def prepare_data(self, data: Any, args: SelfNPOConfig, *, like: Any = None) -> Any:
        """Encoded prompts or, for paths from pictures, encoded pairs."""
        if args.source == "images":
            return prepare(data, self.denoiser, cast(Any, args), like=like)
        if isinstance(data, EncodedPrompts):
            return data
        source = load_prompts(data, split=args.train_split if like is None else args.eval_split)
        return encode_prompts(source, self.denoiser, cache_dir=args.cache_dir, progress=not args.disable_tqdm)

    @staticmethod
    def collate(items: list[Any]) -> dict[str, Any]:
        """Pairs as a batch, or the rows of prompts."""
        return batch_of(items) if "chosen" in items[0] else {"row": [item["row"] for item in items]}

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
        student = (2.0 if has_adapter(self.network) else 3.0) + bool(args.gradient_checkpointing)
        return (moves + 1) * branches + student

    def one_forward(self) -> Callable[[], Tensor]:
        """A call that runs the network once on a training batch, to be timed."""
        size = min(self.args.per_device_train_batch_size, len(self._train.dataset))
        inputs = self._prepare_inputs(self.collate([self._train.dataset[item] for item in range(size)]))
        x, conditioning, _ = self._rows(inputs, self._train)
        t = torch.zeros(len(x), dtype=torch.long, device=x.device)

        def forward() -> Tensor:
            with torch.no_grad(), evaluating([self.network]), self.accelerator.autocast():
                return self.denoiser.predict(self.network, x, t, conditioning)

        return forward

    def row_losses(self, model: nn.Module, inputs: dict[str, Any], *, epoch: int, data: Any) -> Losses:
        """ρ(f_θ(x_s, s, c) − x̂_0) of each row."""
        rows: list[int] = inputs["row"]
        x0, conditioning, empty = self._rows(inputs, data)
        point = self._point(x0, rows, epoch, conditioning, empty)
        share = self.args.prompt_dropout if epoch >= 0 else 0.0
        dropped = draws.rand(self._drawn(rows, epoch, "prompt dropout")) < share
        with self._dropout_keyed(rows, epoch):
            output = model(point.x_s, point.timestep, conditioning.where(~dropped, empty))
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

    def _drawn(self, rows: list[int], epoch: int, purpose: str) -> list[torch.Generator]:
        return draws.row_generators(self.args.seed, epoch, rows, purpose)

    @contextmanager
    def _teacher(self) -> Iterator[nn.Module]:
        """The network whose predictions are targets, in eval mode and without gradients."""
        if self._following is None:
            with self.reference.model(self.network) as module:
                yield module
            return
        with self._following.in_place(), evaluating([self.network]), torch.no_grad():
            yield self.network

    def _rows(self, inputs: dict[str, Any], data: Any) -> tuple[Tensor, Conditioning, Conditioning]:
        """Clean latents (zeros without pictures), the prompts, and the empty prompt beside the same sizes, a row each."""
        args, device = self.args, self.args.device
        dtype = torch.float64 if module_dtype(self.network) == torch.float64 else torch.float32
        height, width = (args.resolution, args.resolution) if args.resolution else self.denoiser.native_size
        if isinstance(data, Prepared):
            x0, sizes = inputs["chosen"].to(device, dtype), inputs["size_chosen"]
            source, index = data.encoded, torch.tensor(inputs["prompt_index"])
        else:
            frames = args.num_frames or self.denoiser.native_frames
            source, index = data, torch.tensor(inputs["row"])
            x0 = torch.zeros(len(index), *self.denoiser.latent_shape(height, width, frames), device=device, dtype=dtype)
            sizes = torch.tensor([[height, width, 0, 0, height, width]] * len(index))
        text = source.conditioning(index)
        empty = text.where(torch.zeros(len(index), dtype=torch.bool), source.empty)
        with_sizes = self.denoiser.with_sizes
        return x0, with_sizes(text.to(device), sizes), with_sizes(empty.to(device), sizes)

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


class SelfNPOPipeline(AlignPipeline):
    """A pipeline of any family whose negative branch has a side of its own: `align` trains one, `load_negative` loads one.

    `guidance_scale` and everything else mean what they mean without it, and a step costs what it costs without it. At a guidance
    scale of 1 or less there is no negative branch, and it is never run.
    """

    config_class = SelfNPOConfig
    trainer_class = SelfNPOTrainer
    negative = Negative()

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        plain = plain_class(cls)
        if plain is cls:
            return

        # Of the plain class's signature, by which a pipeline's kind is told.
        @wraps(plain.__call__)
        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            if not has_negative(self):
                return plain.__call__(self, *args, **kwargs)
            bound = inspect.signature(plain.__call__).bind(self, *args, **kwargs)
            bound.apply_defaults()
            with drawing(self, self.negative, bound):
                return plain.__call__(self, *args, **kwargs)

        cls.__call__ = call  # type: ignore[method-assign]

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike[str], **options: Any) -> Self:
        """As `AlignPipeline.from_pretrained`; the negative side that `save_pretrained` left there is loaded too."""
        pipe = super().from_pretrained(pretrained_model_name_or_path, **options)
        folder = Path(pretrained_model_name_or_path).expanduser()
        if is_hub_id(str(pretrained_model_name_or_path)):
            from huggingface_hub import snapshot_download

            wanted = [f"{NEGATIVE}/*", f"{NEGATIVE}/*/*"]
            folder = Path(snapshot_download(str(folder), revision=options.get("revision"), allow_patterns=wanted))
        if (folder / NEGATIVE).is_dir():
            pipe.load_negative(folder / NEGATIVE)
        return pipe

    def align(
        self,
        train_dataset: Any,
        *,
        output_dir: str | os.PathLike[str],
        eval_dataset: Any = None,
        peft_config: Any = "default",
        ref_model: Any = None,
        preset: str | None = None,
        **options: Any,
    ) -> AlignResult:
        """Trains a negative side for this pipeline, and has it in its negative branch; what it draws with stays as it was.

        Arguments as in `AlignPipeline.align`; with peft_config None the negative side is a second network.
        """
        if has_negative(self):
            raise ValueError("the pipeline has a negative side already: unload_negative() first")
        base = copy.deepcopy(aligned_network(self)[1]) if peft_config is None else None
        result = super().align(
            train_dataset,
            output_dir=output_dir,
            eval_dataset=eval_dataset,
            peft_config=peft_config,
            ref_model=ref_model,
            preset=preset,
            **options,
        )
        self.negative = become_negative(self, base)
        return result

    def load_negative(
        self,
        path: str | os.PathLike[str],
        *,
        alpha: float = 1.0,
        beta: float = 1.0,
        base: Any = None,
        allow_pickle: bool = False,
    ) -> None:
        """Loads a negative side: a LoRA (diffusers, peft, kohya) or a whole network, from a folder, a file or the Hub.

        A LoRA shares the pipeline's network. A whole network becomes a second one, `negative_unet` or `negative_transformer`; load what
        aligned the positive side before it.

        alpha: how much of the positive side's own alignment the negative branch keeps; 0 is the base's.
        beta: how much of the negative offset it takes; 0 with alpha 1 is plain guidance.
        base: with a whole network on a pipeline whose whole network was aligned: what both were trained from.
        allow_pickle: also read state dicts in .bin, .ckpt, .pth and .pt, as tensors only.
        """
        self.negative = load_negative(self, path, alpha=alpha, beta=beta, base=base, allow_pickle=allow_pickle)

    def set_negative(self, *, alpha: float = 1.0, beta: float = 1.0) -> None:
        """Other weights for a negative LoRA; ValueError for a whole network, which is mixed when it is loaded."""
        if not has_negative(self) or self.negative.positive is not None:
            raise ValueError("alpha and beta are set of a negative LoRA: load one, or pass them to load_negative")
        self.negative = Negative(alpha, beta)

    def unload_negative(self) -> None:
        """Back to plain guidance."""
        unload_negative(self)
        self.negative = Negative()

    def _save_more(self, folder: Path) -> None:
        if has_negative(self):
            save_negative(self, self.negative, folder / NEGATIVE)
            write_file(folder / "README.md", _CARD)

    @classmethod
    def _get_signature_keys(cls, obj: Any) -> tuple[list[str], list[str]]:
        """As in diffusers, with the second network, so that it is moved and offloaded with the others."""
        expected, optional = super()._get_signature_keys(obj)  # type: ignore[misc]
        held = [] if isinstance(obj, type) else [name for name in COMPONENTS if name in obj.config]
        return sorted({*expected, *held}), optional
