"""Diffusion-DPO: preferences on forward-noised latents (Wallace et al., CVPR 2024, arXiv:2311.12908).

    L = −log σ( β · (ρ_w − ρ_l) ),   ρ = −½ · (‖ε − ε_θ(x_t)‖² − ‖ε − ε_ref(x_t)‖²)

Errors are means over the latent; both sides of a pair share the timestep and, as in the published code, the noise. On swapped pairs the
same loss trains the negative side of Diffusion-NPO (Wang et al., ICLR 2025, arXiv:2505.11245).
"""

import hashlib
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

from mmalign.data import PreferenceDataset
from mmalign.training.config import PLAYGROUND, DenoiserConfig
from mmalign.training.pipeline import AlignPipeline
from mmalign.training.prepare import Prepared
from mmalign.training.trainer import DenoiserTrainer


@dataclass
class DiffusionDPOConfig(DenoiserConfig):
    """Defaults of Diffusion-DPO; see `DenoiserConfig` for every option.

    The presets are the released launchers' (β 5000, learning rate 2.048e-5 for 2,048 pairs a step). The paper's text gives β 2000 for
    SD 1.5: say `beta=2000`. Those of Diffusion-NPO, "npo-sd15" and "npo-sdxl", are for 64 and 60 pairs a step on one GPU; the
    published β 500 for SD 1.5 stands without a factor ½, and is 1000 here.

    swap_pairs     take the rejected side of each pair for the chosen one: the result is no aligned model, but a negative side for
                   `SelfNPOPipeline.load_negative`
    """

    method: ClassVar[str] = "dpo"
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "sd15": {
            "beta": 5000.0, "learning_rate": 2.048e-5, "max_steps": 2000, "warmup_steps": 500,
            "per_device_train_batch_size": 8, "gradient_accumulation_steps": 256, "fp16": True,
        },
        "sdxl": {
            "beta": 5000.0, "learning_rate": 2.048e-5, "max_steps": 2000, "warmup_steps": 200,
            "per_device_train_batch_size": 1, "gradient_accumulation_steps": 2048, "fp16": True,
            "gradient_checkpointing": True, "optim": "adafactor",
        },
        "npo-sd15": {
            "swap_pairs": True, "beta": 1000.0, "learning_rate": 5e-6, "max_steps": 2000, "lr_scheduler_type": "constant",
            "per_device_train_batch_size": 64, "prompt_dropout": 0.0, "fp16": True, "gradient_checkpointing": True,
        },
        "npo-sdxl": {
            "swap_pairs": True, "beta": 2000.0, "learning_rate": 5e-6, "max_steps": 2000, "lr_scheduler_type": "constant",
            "per_device_train_batch_size": 30, "gradient_accumulation_steps": 2, "prompt_dropout": 0.0, "fp16": True,
            "gradient_checkpointing": True,
        },
        "playground": {**PLAYGROUND},
    }  # fmt: skip

    beta: float | Literal["auto"] = 5000.0
    swap_pairs: bool = False

    @property
    def trains_negative(self) -> bool:
        """True on swapped pairs."""
        return self.swap_pairs

    def objective(self) -> str:
        """The loss, and whether it is on swapped pairs."""
        return super().objective() + (" on swapped pairs" if self.swap_pairs else "")


class DiffusionDPOTrainer(DenoiserTrainer):
    """Trains Diffusion-DPO; arguments as in `DenoiserTrainer`."""

    config_class = DiffusionDPOConfig

    def prepare_data(self, data: Any, args: DiffusionDPOConfig, *, like: Prepared | None = None) -> Prepared:
        """Encoded and compared pairs, their sides exchanged where that is asked for; prepared data stay as they are."""
        prepared = super().prepare_data(data, args, like=like)
        return _swapped(prepared) if args.swap_pairs and not isinstance(data, Prepared) else prepared


def _swapped(prepared: Prepared) -> Prepared:
    compared = prepared.dataset.compared
    other = PreferenceDataset(prepared.encoded, replace(compared, first=1 - compared.first))
    fingerprint, points = (
        hashlib.sha256(f"swapped {part}".encode()).hexdigest() for part in (prepared.fingerprint, prepared.points)
    )
    return replace(prepared, dataset=other, fingerprint=fingerprint, points=points)


class DiffusionDPOPipeline(AlignPipeline):
    """A text-to-image pipeline that Diffusion-DPO aligns."""

    config_class = DiffusionDPOConfig
    trainer_class = DiffusionDPOTrainer
