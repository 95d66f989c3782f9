"""The options of a denoiser's preference training: those of every run, plus the three axes of every method.

latents     how the log-ratio is measured: forward noise, DDIM inversion, ReNoise inversion
comparison  what a pair is worth: human label, relabelled by a reward, smoothed weight, Bradley–Terry weight
loss_type   the link, any pair loss of `mmalign.losses`
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from mmalign.data import ComparisonConfig
from mmalign.data.reward_columns import PREFIX
from mmalign.likelihood.config import InversionConfig
from mmalign.training.auto_beta import check_auto_beta
from mmalign.training.config_checks import READ_BY, check_axes, check_losses
from mmalign.training.loss_config import LossConfig
from mmalign.training.run_config import RunConfig

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
class DenoiserConfig(LossConfig, RunConfig):
    """Options shared by SmPO, InPO, Diffusion-DPO and SFT, beside those of `RunConfig`; each method's own class sets their defaults.

    A prompt is dropped for both sides of a pair at once.

    beta               scale of the log-ratio −½ · (mean squared error of policy − that of reference); the code convention of
                       Diffusion-DPO, in which 2000–5000 is usual for Stable Diffusion. "auto" starts at the method's default and is
                       found in training (`mmalign.training.auto_beta`)
    beta_saturation    with beta "auto": the share of the link's slope that pairs have lost when β is held
    beta_calibration_steps   with beta "auto": optimiser steps after the warm-up in which β moves; it is then held
    inversion_*        `mmalign.likelihood.config.InversionConfig`, for latents "ddim" and "renoise"
    inversion_model    whose path: the policy's (the papers) or the reference's
    inversion_landings   "last" (the papers): one training point a path; "all": every landing of a path over the whole schedule, so
                       that a batch holds inversion_steps points a pair, for one inversion; "in_turn": paths are kept, with the
                       reference's errors on them, and every visit of a pair takes the next landing: those of the reference in
                       cache_dir, for later runs too, those of the policy in memory
    inversion_refresh    for how many optimiser steps a kept path of the policy serves
    scorer             reward for comparisons other than "human": a name that `mmalign.rewards.scorer` knows, such as "pickscore",
                       or "column:<name>", rewards that the data carry (`PairSource.score_names`)
    reference          "adapter" (the LoRA off), "copy" (a frozen copy), or "auto": whichever fits
    reference_cache    keep the reference's errors in cache_dir: a second run over the same pairs and seed (another beta, learning rate,
                       loss) then needs no reference, and evaluation needs it once; for points that the policy does not choose
    smoothing_gamma    SmPO's γ: a pair counts γ · (2p − 1)
    strength_sampling  share of the pairs that an epoch draws, in proportion to their |strength|; losses are divided by how likely
                       they were to be drawn: the same expectation, and pairs of little weight seldom cost anything
    share_noise        forward latents: both sides of a pair get the same noise (the published code) or each its own (the paper)
    sdpo_mu            with loss_type "sdpo": how much of the winner's progress is protected
    aspect_buckets     each pair in a shape near its own, of about resolution² pixels, instead of one square (`mmalign.data.buckets`); a
                       batch holds one shape, and pairs that fill no batch of theirs wait for another epoch
    """

    unit: ClassVar[str] = "pairs"
    needs_pairs: ClassVar[bool] = True

    beta: float | Literal["auto"] = 2000.0
    beta_saturation: float = 0.2
    beta_calibration_steps: int = 50
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
    inversion_landings: Literal["last", "all", "in_turn"] = "last"
    inversion_refresh: int | None = None

    comparison: Literal["human", "relabel", "smoothed", "bradley_terry"] = "human"
    scorer: str | None = None
    smoothing_gamma: float = 10.0
    smoothing_normalizer: Literal["extrema", "quantile", "official"] = "extrema"
    keep_human_ties: bool = False
    min_abs_strength: float = 0.0
    strength_sampling: float | None = None

    loss_space: Literal["epsilon", "velocity"] | None = None
    reference: Literal["auto", "adapter", "copy"] = "auto"
    reference_cache: bool = False
    aspect_buckets: bool = False

    def __post_init__(self) -> None:
        self.list_losses()
        if self.comparison == "human" and self.scorer == self.default("scorer"):
            self.scorer = None
        super().__post_init__()
        check_axes(self)
        self._check_losses()
        check_auto_beta(self)
        self.inversion()

    def _check_losses(self) -> None:
        check_losses(self)

    @property
    def starting_beta(self) -> float:
        """β at the first step: as given, or the method's default with "auto"."""
        if isinstance(self.beta, str) and self.beta != "auto":
            raise ValueError(f"beta must be a number or 'auto', got {self.beta!r}")
        return float(self.default("beta") if self.beta == "auto" else self.beta)

    @property
    def trained_on(self) -> str | None:
        """The scorer of the comparison, if it is not the human label."""
        # A reward that the data carry judges no other picture.
        judges = self.comparison != "human" and self.scorer is not None and not self.scorer.startswith(PREFIX)
        return self.scorer if judges else None

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
            grid="per_sample" if self.inversion_landings == "last" else "strided",
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
    def preset_options(cls, name: str, given: Mapping[str, Any]) -> dict[str, Any]:
        """What the preset adds to `given`: options that are not set there and that have an effect beside what is."""
        added = super().preset_options(name, given)
        chosen = {**added, **given}
        axes = {chosen.get(axis, cls.__dataclass_fields__[axis].default) for axis in ("latents", "comparison")}
        readers = {**READ_BY, "scorer": ("relabel", "smoothed", "bradley_terry")}
        return {option: value for option, value in added.items() if axes & set(readers.get(option, axes))}

    def about(self) -> str:
        """The three axes."""
        return f"latents={self.latents}, comparison={self.comparison}, loss={self.objective()}"

    def details(self, elements: int | None) -> list[str]:
        """The scale of β in the conventions that are around, and how points and strengths are made.

        `elements`: of one latent, to tell the β of papers that sum squared errors where this code takes their mean.
        """
        lines = []
        if self.needs_pairs and self.takes_beta:
            lines.append(f"beta {self.starting_beta:g} {self._convention(elements)}")
            if self.beta == "auto":
                lines.append(
                    f"beta then moves to a saturation of {self.beta_saturation:g} and is held "
                    f"{self.beta_calibration_steps} steps after the warm-up"
                )
        inversion = self.inversion()
        if inversion is not None:
            lines.append(f"inversion by the {self.inversion_model}: {inversion}")
        if self.comparison == "smoothed":
            lines.append(
                f"strength γ(2p−1) from {self.scorer}: gamma {self.smoothing_gamma:g}, normaliser {self.smoothing_normalizer}"
            )
        elif self.comparison != "human":
            lines.append(f"pairs compared by {self.scorer}")
        return lines

    def _convention(self, elements: int | None) -> str:
        if self.is_reference_free:
            return "as the loss's own paper defines it"
        text = (
            f"multiplies −½ · (mean squared error); scripts that leave out the ½ call this {self.starting_beta / 2:g}"
        )
        summed = (
            ""
            if elements is None
            else f"; for errors summed over {elements:,} elements it is {self.starting_beta / (2 * elements):.3g}"
        )
        return text + summed
