"""SmPO: smoothed preferences on ReNoise-inverted latents (Lu et al., ICML 2025, arXiv:2506.02698).

    L = −log σ( γ(2p−1) · β · (ρ_w − ρ_l) ),   ρ = −½ · (‖τ − ε_θ(x_t)‖² − ‖τ − ε_ref(x_t)‖²)

A reward relabels each pair and says how clear it is: p is the softmax of the two normalised rewards, so γ(2p−1) = γ·tanh(Δn/2).
x_t is reached by DDIM inversion with one averaged ReNoise correction a move, and τ is the noise that this path implies.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from mmalign.training.config import PLAYGROUND, DenoiserConfig
from mmalign.training.pipeline import AlignPipeline
from mmalign.training.trainer import DenoiserTrainer


@dataclass
class SmPOConfig(DenoiserConfig):
    """Defaults of SmPO; see `DenoiserConfig` for every option.

    The inversion is the exact one (it lands on the conditioning timestep). `inversion_compat="official-0.20"` repeats the released
    code, and the presets hold the published settings for 1,024 pairs a step.
    """

    method: ClassVar[str] = "smpo"
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "sd15": {
            "beta": 2000.0, "learning_rate": 1.024e-5, "max_steps": 200, "warmup_steps": 100, "inversion_steps": 10,
            "per_device_train_batch_size": 8, "gradient_accumulation_steps": 128, "scorer": "pickscore",
            "smoothing_normalizer": "official", "fp16": True,
        },
        "sdxl": {
            "beta": 5000.0, "learning_rate": 1.024e-5, "max_steps": 200, "warmup_steps": 100, "inversion_steps": 10,
            "per_device_train_batch_size": 1, "gradient_accumulation_steps": 1024, "scorer": "pickscore",
            "smoothing_normalizer": "official", "fp16": True, "gradient_checkpointing": True, "optim": "adafactor",
        },
        "playground": {**PLAYGROUND, "scorer": "playground", "inversion_steps": 2},
    }  # fmt: skip

    latents: Literal["forward", "ddim", "renoise"] = "renoise"
    comparison: Literal["human", "relabel", "smoothed", "bradley_terry"] = "smoothed"
    scorer: str | None = "pickscore"


class SmPOTrainer(DenoiserTrainer):
    """Trains SmPO; arguments as in `DenoiserTrainer`."""

    config_class = SmPOConfig


class SmPOPipeline(AlignPipeline):
    """A text-to-image pipeline that SmPO aligns: `SmPOPipeline.from_pretrained(…).align(…)`."""

    config_class = SmPOConfig
    trainer_class = SmPOTrainer
