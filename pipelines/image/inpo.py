"""DDIM-InPO: preferences on DDIM-inverted latents (Lu et al., CVPR 2025, arXiv:2503.18454).

    L = −log σ( β · (ρ_w − ρ_l) ),   ρ = −½ · (‖τ − ε_θ(x_t)‖² − ‖τ − ε_ref(x_t)‖²)

x_t is reached by inverting each picture with the current policy, with a little noise (η = 0.1), and τ = (x_t − √ᾱ_t·x_0)/√(1−ᾱ_t).
"""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from mmalign.training.config import PLAYGROUND, DenoiserConfig
from mmalign.training.pipeline import AlignPipeline
from mmalign.training.trainer import DenoiserTrainer


@dataclass
class InPOConfig(DenoiserConfig):
    """Defaults of DDIM-InPO; see `DenoiserConfig` for every option. The presets hold the published settings."""

    method: ClassVar[str] = "inpo"
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "sd15": {
            "beta": 2000.0, "learning_rate": 1.024e-5, "max_steps": 400, "warmup_steps": 200,
            "per_device_train_batch_size": 8, "gradient_accumulation_steps": 128, "fp16": True,
        },
        "sdxl": {
            "beta": 5000.0, "learning_rate": 1.024e-5, "max_steps": 400, "warmup_steps": 200,
            "per_device_train_batch_size": 1, "gradient_accumulation_steps": 1024, "fp16": True,
            "gradient_checkpointing": True, "optim": "adafactor",
        },
        "playground": {**PLAYGROUND},
    }  # fmt: skip

    latents: Literal["forward", "ddim", "renoise"] = "ddim"
    inversion_eta: float = 0.1


class InPOTrainer(DenoiserTrainer):
    """Trains DDIM-InPO; arguments as in `DenoiserTrainer`."""

    config_class = InPOConfig


class InPOPipeline(AlignPipeline):
    """A text-to-image pipeline that DDIM-InPO aligns."""

    config_class = InPOConfig
    trainer_class = InPOTrainer
