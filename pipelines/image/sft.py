"""Supervised fine-tuning on the preferred pictures: plain denoising error, no reference, the baseline of every method here.

L = ‖ε − ε_θ(x_t^w)‖²   (mean over the latent)
"""

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from mmalign.training.config import PLAYGROUND, DenoiserConfig
from mmalign.training.measurement import Measurement, Pairs
from mmalign.training.pipeline import AlignPipeline
from mmalign.training.trainer import DenoiserTrainer

_COMPARES_NOTHING = (
    "beta beta_saturation beta_calibration_steps loss_type loss_weights label_smoothing "
    "f_divergence_type f_alpha_divergence_coef discopop_tau simpo_gamma cpo_alpha "
    "ln_pref_omega ln_pref_lambda ln_pref_margin sdpo_mu "
    "reference reference_cache share_noise inversion_model inversion_share_eta_noise"
).split()


@dataclass
class DiffusionSFTConfig(DenoiserConfig):
    """Defaults of supervised fine-tuning; options of the pair losses have no effect and are refused."""

    method: ClassVar[str] = "sft"
    needs_pairs: ClassVar[bool] = False
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "sd15": {
            "learning_rate": 1.024e-5, "max_steps": 2000, "warmup_steps": 500,
            "per_device_train_batch_size": 8, "gradient_accumulation_steps": 128, "fp16": True,
        },
        "playground": {name: value for name, value in PLAYGROUND.items() if name != "beta"},
    }  # fmt: skip

    def _check_losses(self) -> None:
        for name in _COMPARES_NOTHING:
            default = ["sigmoid"] if name == "loss_type" else self.default(name)
            if getattr(self, name) != default:
                raise ValueError(f"{name} has no effect on supervised fine-tuning, which compares nothing")
        if self.comparison in ("smoothed", "bradley_terry"):
            raise ValueError("supervised fine-tuning has no strength: use comparison 'human' or 'relabel'")

    def objective(self) -> str:
        """The denoising error of the preferred side."""
        return "denoising error"

    def loss_options(self) -> dict[str, Any]:
        """None: there is no pair loss."""
        return {}


class DiffusionSFTTrainer(DenoiserTrainer):
    """Trains on the preferred side alone; arguments as in `DenoiserTrainer`."""

    config_class = DiffusionSFTConfig

    def _loss_of(self, measured: Measurement, pairs: Pairs) -> Tensor:
        return measured.policy_error


class DiffusionSFTPipeline(AlignPipeline):
    """A text-to-image pipeline that supervised fine-tuning trains on preferred pictures."""

    config_class = DiffusionSFTConfig
    trainer_class = DiffusionSFTTrainer
