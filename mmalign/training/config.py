"""The options of a denoiser's preference training: `transformers.TrainingArguments` plus the three axes of every method.

latents     how the log-ratio is measured: forward noise, DDIM inversion, ReNoise inversion
comparison  what a pair is worth: human label, relabelled by a reward, smoothed weight, Bradley–Terry weight
loss_type   the link, any pair loss of `mmalign.losses`
"""

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Self

from transformers import TrainingArguments

from mmalign import losses
from mmalign.data import ComparisonConfig
from mmalign.likelihood.config import InversionConfig
from mmalign.training.inherited import refuse_unsupported


@dataclass
class DenoiserConfig(TrainingArguments):
    """Options shared by SmPO, InPO, Diffusion-DPO and SFT; each method's own class sets their defaults.

    beta               scale of the log-ratio −½ · (mean squared error of policy − that of reference); the code convention of
                       Diffusion-DPO, in which 2000–5000 is usual for Stable Diffusion
    inversion_*        `mmalign.likelihood.config.InversionConfig`, for latents "ddim" and "renoise"
    inversion_model    whose path: the policy's (the papers) or the reference's
    scorer             reward for comparisons other than "human": "playground", "pickscore", "clip:<id or folder>"
    smoothing_gamma    SmPO's γ: a pair counts γ · (2p − 1)
    prompt_dropout     share of pairs whose prompt becomes empty, for both sides at once
    share_noise        forward latents: both sides of a pair get the same noise (the published code) or each its own (the paper)
    sdpo_mu            with loss_type "sdpo": how much of the winner's progress is protected
    train_split, eval_split   which split of a hub data set or of "playground"; "train" unless given
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

    comparison: Literal["human", "relabel", "smoothed", "bradley_terry"] = "human"
    scorer: str | None = None
    smoothing_gamma: float = 10.0
    smoothing_normalizer: Literal["extrema", "quantile", "official"] = "extrema"
    keep_human_ties: bool = False
    min_abs_strength: float = 0.0

    prompt_dropout: float = 0.2
    loss_space: Literal["epsilon", "velocity"] | None = None
    reference: Literal["auto", "adapter", "copy"] = "auto"
    train_split: str | None = None
    eval_split: str | None = None
    resolution: int | None = None
    cache_dir: str | None = None

    validation_prompts: list[str] = field(default_factory=list)
    validation_steps: int = 0
    validation_seed: int = 0
    validation_inference_steps: int = 20
    validation_guidance_scale: float | None = None

    learning_rate: float = 1e-5
    lr_scheduler_type: str = "constant_with_warmup"  # type: ignore[assignment]
    per_device_train_batch_size: int = 4
    weight_decay: float = 1e-2
    logging_steps: float = 10
    save_steps: float = 100
    dataloader_drop_last: bool = True
    remove_unused_columns: bool | None = False  # type: ignore[assignment]
    logging_nan_inf_filter: bool = False
    optim: str = "adamw_torch"

    def __post_init__(self) -> None:
        if isinstance(self.loss_type, str):
            self.loss_type = [self.loss_type]
        refuse_unsupported(self)
        super().__post_init__()
        self._check_axes()
        self.inversion()

    def _check_axes(self) -> None:
        checks = {
            "beta must be positive": self.beta <= 0,
            "prompt_dropout must lie in 0 … 1": not 0 <= self.prompt_dropout <= 1,
            "share_noise=False belongs to latents='forward'": not self.share_noise and self.latents != "forward",
            "inversion_model='reference' needs latents 'ddim' or 'renoise'": self.inversion_model == "reference"
            and self.latents == "forward",
            f"comparison={self.comparison!r} needs a scorer": self.comparison != "human" and self.scorer is None,
            "scorer has no effect with comparison='human'": self.comparison == "human" and self.scorer is not None,
            "keep_human_ties needs a comparison by a scorer": self.keep_human_ties and self.comparison == "human",
            "min_abs_strength needs comparison 'smoothed' or 'bradley_terry'": self.min_abs_strength > 0
            and self.comparison not in ("smoothed", "bradley_terry"),
            "validation_steps needs validation_prompts": self.validation_steps > 0 and not self.validation_prompts,
            "sdpo_mu belongs to loss_type='sdpo'": self.sdpo_mu is not None and "sdpo" not in self.loss_type,
        }
        for message, violated in checks.items():
            if violated:
                raise ValueError(message)
        for name in _OPTIONS_OF_AXES:
            defaults = type(self).__dataclass_fields__
            used = self.latents in _OPTIONS_OF_AXES[name] or self.comparison in _OPTIONS_OF_AXES[name]
            if not used and getattr(self, name) != defaults[name].default:
                raise ValueError(
                    f"{name} has no effect with latents={self.latents!r} and comparison={self.comparison!r}"
                )
        for key in self.loss_type:
            info = losses.get(key)
            if info.unpaired:
                raise ValueError(f"loss_type {key!r} reads single labelled samples, and this trainer has pairs")

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
        """The published settings `name` ("sd15", "sdxl", …) with `options` on top."""
        if name not in cls.presets:
            raise ValueError(f"{cls.__name__} has no preset {name!r}; it has {', '.join(sorted(cls.presets))}")
        return cls(**{**cls.presets[name], **options})

    def describe(self, num_processes: int = 1) -> str:
        """The axes, the effective batch and learning rate, and the scale of β in both conventions."""
        batch = self.per_device_train_batch_size * self.gradient_accumulation_steps * num_processes
        lines = [
            f"{self.method}: latents={self.latents}, comparison={self.comparison}, loss_type={'+'.join(self.loss_type)}",
            f"batch {batch} pairs a step = {self.per_device_train_batch_size} × {self.gradient_accumulation_steps} accumulated × "
            f"{num_processes} process(es); learning rate {self.learning_rate:g}, not scaled by the batch",
        ]
        if self.needs_pairs:
            lines.append(
                f"beta {self.beta:g} multiplies −½ · (mean squared error); scripts that leave out the ½ call this {self.beta / 2:g}"
            )
        inversion = self.inversion()
        if inversion is not None:
            lines.append(f"inversion by the {self.inversion_model}: {inversion}")
        if self.comparison != "human":
            lines.append(
                f"pairs compared by {self.scorer}; gamma {self.smoothing_gamma:g}, normaliser {self.smoothing_normalizer}"
            )
        return "\n".join(lines)


_INVERTED = ("ddim", "renoise")
_OPTIONS_OF_AXES: dict[str, tuple[str, ...]] = {
    "inversion_steps": _INVERTED,
    "inversion_renoise_steps": ("renoise",),
    "inversion_combine": ("renoise",),
    "inversion_solver": _INVERTED,
    "inversion_eta": _INVERTED,
    "inversion_eta_form": _INVERTED,
    "inversion_share_eta_noise": _INVERTED,
    "inversion_compat": _INVERTED,
    "inversion_fp16_alphas": _INVERTED,
    "smoothing_gamma": ("smoothed",),
    "smoothing_normalizer": ("smoothed",),
}
