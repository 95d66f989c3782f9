"""The options of a denoiser's preference training: `transformers.TrainingArguments` plus the three axes of every method.

latents     how the log-ratio is measured: forward noise, DDIM inversion, ReNoise inversion
comparison  what a pair is worth: human label, relabelled by a reward, smoothed weight, Bradley–Terry weight
loss_type   the link, any pair loss of `mmalign.losses`
"""

import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any, ClassVar, Literal, Self

import torch
from transformers import TrainingArguments

from mmalign import losses
from mmalign.data import ComparisonConfig
from mmalign.likelihood.config import InversionConfig
from mmalign.training.inherited import RUN_OPTIONS, refuse_unsupported

# What the methods' presets for the playground share. Learning rate, beta and number of inversion steps were chosen on training
# prompts by judge A (benchmarks/playground_settings.py), before judge B had told anything.
PLAYGROUND: dict[str, Any] = {
    "beta": 2000.0,
    "learning_rate": 3e-4,
    "max_steps": 100,
    "warmup_steps": 20,
    "per_device_train_batch_size": 16,
    "prompt_dropout": 0.1,
}


@dataclass
class DenoiserConfig(TrainingArguments):
    """Options shared by SmPO, InPO, Diffusion-DPO and SFT; each method's own class sets their defaults.

    beta               scale of the log-ratio −½ · (mean squared error of policy − that of reference); the code convention of
                       Diffusion-DPO, in which 2000–5000 is usual for Stable Diffusion
    inversion_*        `mmalign.likelihood.config.InversionConfig`, for latents "ddim" and "renoise"
    inversion_model    whose path: the policy's (the papers) or the reference's
    inversion_landings   "last" (the papers): one training point a path; "all": every landing of a path over the whole fixed grid, so
                       that a batch holds inversion_steps points a pair, for one inversion
    scorer             reward for comparisons other than "human": "playground", "pickscore", "hpsv2", "hpsv2.1", "aesthetic",
                       "imagereward", "clip:<id or folder>"
    reference          "adapter" (the LoRA off), "copy" (a frozen copy), or "auto": whichever fits
    reference_cache    keep the reference's errors in cache_dir: a second run over the same pairs and seed (another beta, learning rate,
                       loss) then needs no reference, and evaluation needs it once; for points that the policy does not choose
    smoothing_gamma    SmPO's γ: a pair counts γ · (2p − 1)
    prompt_dropout     share of pairs whose prompt becomes empty, for both sides at once
    share_noise        forward latents: both sides of a pair get the same noise (the published code) or each its own (the paper)
    sdpo_mu            with loss_type "sdpo": how much of the winner's progress is protected
    train_split, eval_split   which split of a hub data set or of "playground"; "train" unless given
    num_frames         frames of a clip, sampled evenly from it; None is the model's own; for video models only
    resolution         pixels of the short side and of the centre crop; None is the model's own
    validation_*       pictures drawn from fixed prompts and seeds every `validation_steps` optimiser steps (0: never)
    """

    method: ClassVar[str] = "denoiser"
    needs_pairs: ClassVar[bool] = True
    presets: ClassVar[dict[str, dict[str, Any]]] = {}

    beta: float = 2000.0
    loss_type: list[str] = field(default_factory=lambda: ["sigmoid"])
    loss_weights: list[float] | None = None
    label_smoothing: float | None = None
    f_divergence_type: str | None = None
    f_alpha_divergence_coef: float | None = None
    discopop_tau: float | None = None
    simpo_gamma: float | None = None
    cpo_alpha: float | None = None
    sdpo_mu: float | None = None

    latents: Literal["forward", "ddim", "renoise"] = "forward"
    share_noise: bool = True
    inversion_steps: int = 10
    inversion_renoise_steps: int = 1
    inversion_combine: Literal["last", "mean", "mean_refined"] = "mean"
    inversion_solver: Literal["euler", "heun"] = "euler"
    inversion_eta: float = 0.0
    inversion_eta_form: Literal["bayes", "published"] = "bayes"
    inversion_share_eta_noise: bool = False
    inversion_compat: Literal["official-0.20"] | None = None
    inversion_fp16_alphas: bool = False
    inversion_model: Literal["policy", "reference"] = "policy"
    inversion_landings: Literal["last", "all"] = "last"

    comparison: Literal["human", "relabel", "smoothed", "bradley_terry"] = "human"
    scorer: str | None = None
    smoothing_gamma: float = 10.0
    smoothing_normalizer: Literal["extrema", "quantile", "official"] = "extrema"
    keep_human_ties: bool = False
    min_abs_strength: float = 0.0

    prompt_dropout: float = 0.2
    loss_space: Literal["epsilon", "velocity"] | None = None
    reference: Literal["auto", "adapter", "copy"] = "auto"
    reference_cache: bool = False
    train_split: str | None = None
    eval_split: str | None = None
    num_frames: int | None = None
    resolution: int | None = None
    cache_dir: str | None = None

    validation_prompts: list[str] = field(default_factory=list)
    validation_steps: int = 0
    validation_seed: int = 0
    validation_inference_steps: int = 20
    validation_guidance_scale: float | None = None

    learning_rate: float = 1e-5
    lr_scheduler_type: str = "constant_with_warmup"
    per_device_train_batch_size: int = 4
    weight_decay: float = 1e-2
    logging_steps: float = 10
    save_steps: float = 100
    dataloader_drop_last: bool = True
    remove_unused_columns: bool | None = False
    logging_nan_inf_filter: bool = False
    optim: str = "adamw_torch"
    hub_strategy: str = "end"

    def __post_init__(self) -> None:
        if isinstance(self.loss_type, str):
            self.loss_type = [self.loss_type]
        if self.comparison == "human" and self.scorer == self._default("scorer"):
            self.scorer = None
        if self.gradient_checkpointing is not None and self.activation_checkpointing is None:  # type: ignore[has-type]
            # transformers' new name for it; with it, its warning about the old one stays away.
            self.activation_checkpointing = self.gradient_checkpointing
        refuse_unsupported(self)
        super().__post_init__()
        self._check_choices()
        self._check_inherited()
        self._check_axes()
        self._check_losses()
        self.inversion()

    @property
    def place_model_on_device(self) -> bool:
        """False: the trainer moves the network itself, and back when training is over."""
        return False

    @property
    def pairs_per_step(self) -> int:
        """Pairs of one optimiser step, over all processes."""
        return self.per_device_train_batch_size * self.gradient_accumulation_steps * self.world_size

    def _default(self, name: str) -> Any:
        return type(self).__dataclass_fields__[name].default

    def _check_choices(self) -> None:
        for name, allowed in _choices(type(self)).items():  # type: ignore[arg-type]
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}; got {getattr(self, name)!r}")

    def _check_inherited(self) -> None:
        """What accelerate and transformers would ignore without a word."""
        if self.fp16 and self.device.type == "cpu":
            raise ValueError("fp16 has no effect on a CPU: use bf16=True there, or fp16=False")
        optim = _plain(self.optim)
        if not any(kind in optim for kind in ("adam", "lion", "lamb")):
            for name in ("adam_beta1", "adam_beta2", "adam_epsilon"):
                if getattr(self, name) != TrainingArguments.__dataclass_fields__[name].default:
                    raise ValueError(f"{name} has no effect with optim={optim!r}")

    def _check_axes(self) -> None:
        graded = self.comparison in ("smoothed", "bradley_terry")
        checks = {
            "beta must be positive": not self.beta > 0,
            "prompt_dropout must lie in 0 … 1": not 0 <= self.prompt_dropout <= 1,
            "min_abs_strength must be 0 or more": not self.min_abs_strength >= 0,
            "smoothing_gamma must be positive": not self.smoothing_gamma > 0,
            "num_frames must be positive": self.num_frames is not None and self.num_frames < 1,
            "resolution must be positive": self.resolution is not None and self.resolution < 1,
            "validation_steps must be 0 or more": self.validation_steps < 0,
            "validation_inference_steps must be at least 1": self.validation_inference_steps < 1,
            "share_noise=False belongs to latents='forward'": not self.share_noise and self.latents != "forward",
            "inversion_model='reference' needs latents 'ddim' or 'renoise'": self.inversion_model == "reference"
            and self.latents == "forward",
            "reference_cache needs points that the policy does not choose: latents='forward' or inversion_model='reference'": (
                self.reference_cache and self.latents != "forward" and self.inversion_model == "policy"
            ),
            "reference_cache keeps one point a pair: leave inversion_landings out": self.reference_cache
            and self.inversion_landings == "all",
            "inversion_landings='all' needs exact landings: leave inversion_compat out": self.inversion_landings
            == "all"
            and self.inversion_compat is not None,
            f"comparison={self.comparison!r} needs a scorer": self.comparison != "human" and self.scorer is None,
            "scorer has no effect with comparison='human'": self.comparison == "human" and self.scorer is not None,
            "keep_human_ties needs a comparison by a scorer": self.keep_human_ties and self.comparison == "human",
            "min_abs_strength needs comparison 'smoothed' or 'bradley_terry'": self.min_abs_strength > 0 and not graded,
            "smoothing_normalizer='official' fits the cosines of scorer='pickscore' only": self.comparison == "smoothed"
            and self.smoothing_normalizer == "official"
            and self.scorer != "pickscore",
            "f_alpha_divergence_coef belongs to f_divergence_type='alpha_divergence'": self.f_alpha_divergence_coef
            is not None
            and self.f_divergence_type != "alpha_divergence",
            "validation_steps needs validation_prompts": self.validation_steps > 0 and not self.validation_prompts,
            "validation_prompts have no effect without validation_steps": self.validation_steps == 0
            and bool(self.validation_prompts),
        }
        for message, violated in checks.items():
            if violated:
                raise ValueError(message)
        for name, readers in _READ_BY.items():
            read = self.latents in readers or self.comparison in readers or (self.validation_steps and not readers)
            if not read and getattr(self, name) != self._default(name):
                where = (
                    f"latents={self.latents!r} and comparison={self.comparison!r}" if readers else "validation_steps=0"
                )
                raise ValueError(f"{name} has no effect with {where}")

    def _check_losses(self) -> None:
        """Refuses, before any picture is encoded, what the losses would refuse at the first step."""
        infos = [losses.get(key) for key in self.loss_type]
        for info in infos:
            if info.unpaired:
                raise ValueError(f"loss_type {info.key!r} reads single labelled samples, and this trainer has pairs")
            if "denoiser" not in info.modalities:
                raise ValueError(f"loss_type {info.key!r} is for {' and '.join(info.modalities)} models, not denoisers")
        if coupled := [info.key for info in infos if info.batch_coupled]:
            self._check_batch_coupled(coupled[0])
        takes_beta = any("beta" in info.hyper for info in infos)
        if not takes_beta and self.beta != self._default("beta"):
            raise ValueError(f"beta has no effect with loss_type={'+'.join(self.loss_type)!r}")
        self._check_beta_of_reference_free([info for info in infos if "beta" in info.hyper])
        if self.is_reference_free and self.reference != "auto" and self.inversion_model == "policy":
            raise ValueError(
                f"reference has no effect with loss_type={'+'.join(self.loss_type)!r}: it is reference-free"
            )
        if self.is_reference_free and self.reference_cache:
            raise ValueError(
                f"reference_cache has no effect with loss_type={'+'.join(self.loss_type)!r}: it has no reference"
            )
        if ("sdpo" in self.loss_type) != (self.sdpo_mu is not None):
            raise ValueError("loss_type 'sdpo' and sdpo_mu go together; published: sdpo_mu=0.9 (SD 1.5), 0.6 (SDXL)")
        if self.sdpo_mu is not None and not 0 <= self.sdpo_mu <= 1:
            raise ValueError(f"sdpo_mu must lie in 0 … 1, got {self.sdpo_mu}")
        one = torch.ones(2)
        options = self.loss_options() | ({"rejected_scale": one} if self.sdpo_mu is not None else {})
        if self.comparison in ("smoothed", "bradley_terry"):
            options["strength"] = one
        losses.compute(
            self.loss_type,
            losses.PairLogProbs(-one, -one, -one, -one, one, one),
            loss_weights=self.loss_weights,
            **options,
        )

    def _check_batch_coupled(self, key: str) -> None:
        if self.inversion_landings == "all":
            raise ValueError(
                f"loss_type {key!r} sorts its batch, which must not mix the noise levels of inversion_landings='all'"
            )
        if self.reference_cache:
            raise ValueError(
                f"loss_type {key!r} takes one timestep a batch, so that reference_cache would seldom find a point again"
            )

    def _check_beta_of_reference_free(self, infos: list[Any]) -> None:
        alone = [info for info in infos if info.reference_free]
        if not alone:
            return
        published = f"set beta (published for it: {', '.join(f'{beta.here:g}' for beta in alone[0].betas) or 'none'})"
        if len(alone) < len(infos):
            raise ValueError(
                f"one beta cannot serve loss_type {alone[0].key!r}, which has no reference, and one that has: drop one"
            )
        if self.beta == self._default("beta"):
            raise ValueError(
                f"beta={self.beta:g} is a scale for log-ratios to a reference, and loss_type {alone[0].key!r} has none: {published}"
            )

    @property
    def is_reference_free(self) -> bool:
        """No loss of the sum needs a reference."""
        return all(losses.get(key).reference_free for key in self.loss_type)

    def loss_options(self) -> dict[str, Any]:
        """The hyper-parameters that go to `losses.compute`: beta, and those that were set."""
        names = (
            "label_smoothing",
            "f_divergence_type",
            "f_alpha_divergence_coef",
            "discopop_tau",
            "simpo_gamma",
            "cpo_alpha",
        )
        chosen = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        return chosen | {"beta": self.beta} if any("beta" in losses.get(k).hyper for k in self.loss_type) else chosen

    def inversion(self) -> InversionConfig | None:
        """How latents are inverted; None for forward noise."""
        if self.latents == "forward":
            return None
        return InversionConfig(
            num_steps=self.inversion_steps,
            renoise_steps=self.inversion_renoise_steps if self.latents == "renoise" else 0,
            combine=self.inversion_combine if self.latents == "renoise" else "mean",
            solver=self.inversion_solver,
            eta=self.inversion_eta,
            eta_form=self.inversion_eta_form,
            share_eta_noise=self.inversion_share_eta_noise,
            grid="fixed" if self.inversion_landings == "all" else "per_sample",
            compat=self.inversion_compat,
            fp16_alphas=self.inversion_fp16_alphas,
        )

    def comparison_config(self, **fitted: Any) -> ComparisonConfig:
        """What a pair is worth; `fitted` adds what is known only once the training rows are scored."""
        return ComparisonConfig(
            kind=self.comparison,
            gamma=self.smoothing_gamma,
            keep_human_ties=self.keep_human_ties,
            min_abs_strength=self.min_abs_strength,
            **fitted,
        )

    @classmethod
    def preset(cls, name: str, **options: Any) -> Self:
        """The settings `name`, published ("sd15", "sdxl") or chosen for the "playground", with `options` on top."""
        return cls(**cls.preset_options(name, options), **options)

    @classmethod
    def preset_options(cls, name: str, given: Mapping[str, Any]) -> dict[str, Any]:
        """What the preset adds to `given`: options that are not set there and that have an effect beside what is."""
        if name not in cls.presets:
            raise ValueError(f"{cls.__name__} has no preset {name!r}; it has {', '.join(sorted(cls.presets))}")
        chosen = {**cls.presets[name], **given}
        axes = {chosen.get(axis, cls.__dataclass_fields__[axis].default) for axis in ("latents", "comparison")}
        readers = {**_READ_BY, "scorer": ("relabel", "smoothed", "bradley_terry")}
        return {
            option: value
            for option, value in cls.presets[name].items()
            if option not in given and axes & set(readers.get(option, axes))
        }

    def identity(self) -> dict[str, Any]:
        """Every option that a checkpoint's run and one that continues it must share, as JSON values."""
        own = [name for name in type(self).__dataclass_fields__ if name not in TrainingArguments.__dataclass_fields__]
        names = [name for name in own if name not in _NOT_THE_RUN] + list(RUN_OPTIONS)
        return {name: _plain(getattr(self, name)) for name in names}

    def objective(self) -> str:
        """What is minimised, in one word or a sum of them."""
        weights = self.loss_weights or [1.0] * len(self.loss_type)
        return " + ".join(
            key if weight == 1 else f"{weight:g}·{key}" for key, weight in zip(self.loss_type, weights, strict=True)
        )

    def describe(self, num_processes: int = 1, *, elements: int | None = None) -> str:
        """The axes, the effective batch and learning rate, and the scale of β in the conventions that are around.

        `elements`: of one latent, to tell the β of papers that sum squared errors where this code takes their mean.
        """
        batch = self.per_device_train_batch_size * self.gradient_accumulation_steps * num_processes
        lines = [
            f"{self.method}: latents={self.latents}, comparison={self.comparison}, loss={self.objective()}",
            f"batch {batch} pairs a step = {self.per_device_train_batch_size} × {self.gradient_accumulation_steps} accumulated × "
            f"{num_processes} process(es); effective learning rate {self.learning_rate:g} (the batch does not scale it), "
            f"{self._schedule()}",
        ]
        if self.needs_pairs and any("beta" in losses.get(key).hyper for key in self.loss_type):
            lines.append(f"beta {self.beta:g} {self._convention(elements)}")
        inversion = self.inversion()
        if inversion is not None:
            lines.append(f"inversion by the {self.inversion_model}: {inversion}")
        if self.comparison == "smoothed":
            lines.append(
                f"strength γ(2p−1) from {self.scorer}: gamma {self.smoothing_gamma:g}, normaliser {self.smoothing_normalizer}"
            )
        elif self.comparison != "human":
            lines.append(f"pairs compared by {self.scorer}")
        return "\n".join(lines)

    def _schedule(self) -> str:
        warmup = f"{self.warmup_steps:g}" + (" of the steps" if 0 < self.warmup_steps < 1 else " steps")
        return f"{_plain(self.lr_scheduler_type)}, warm-up {warmup}"

    def _convention(self, elements: int | None) -> str:
        if self.is_reference_free:
            return "as the loss's own paper defines it"
        text = f"multiplies −½ · (mean squared error); scripts that leave out the ½ call this {self.beta / 2:g}"
        summed = (
            ""
            if elements is None
            else f"; for errors summed over {elements:,} elements it is {self.beta / (2 * elements):.3g}"
        )
        return text + summed


@cache
def _choices(config_class: type) -> dict[str, tuple[Any, ...]]:
    """Field → the values that its Literal type allows."""
    result = {}
    for name, hint in typing.get_type_hints(config_class).items():
        parts = [hint, *typing.get_args(hint)]
        allowed = [value for part in parts if typing.get_origin(part) is Literal for value in typing.get_args(part)]
        if allowed and name not in TrainingArguments.__dataclass_fields__:
            result[name] = (*allowed, None) if type(None) in typing.get_args(hint) else tuple(allowed)
    return result


def _plain(value: Any) -> Any:
    """JSON values: enums by their value."""
    return getattr(value, "value", value)


# Options of ours that change neither losses nor weights, so that a resumed run may have others.
_NOT_THE_RUN = frozenset(
    """
    train_split eval_split cache_dir reference_cache scorer validation_prompts validation_steps validation_seed
    validation_inference_steps validation_guidance_scale
    """.split()
)

_INVERTED = ("ddim", "renoise")
# Option → the latents or comparisons that read it; none: sample pictures do.
_READ_BY: dict[str, tuple[str, ...]] = {
    "inversion_steps": _INVERTED,
    "inversion_renoise_steps": ("renoise",),
    "inversion_combine": ("renoise",),
    "inversion_solver": _INVERTED,
    "inversion_eta": _INVERTED,
    "inversion_eta_form": _INVERTED,
    "inversion_share_eta_noise": _INVERTED,
    "inversion_compat": _INVERTED,
    "inversion_fp16_alphas": _INVERTED,
    "inversion_landings": _INVERTED,
    "smoothing_gamma": ("smoothed",),
    "smoothing_normalizer": ("smoothed",),
    "validation_seed": (),
    "validation_inference_steps": (),
    "validation_guidance_scale": (),
}
