"""One short adapter a model family: encode, noise, predict, target. Importing this needs torch only."""

from typing import Any

from mmalign.denoisers.base import Denoiser
from mmalign.denoisers.conditioning import Conditioning
from mmalign.denoisers.schedule import LossSpace, PredictionType, Schedule
from mmalign.denoisers.stable_diffusion import StableDiffusionDenoiser
from mmalign.denoisers.stable_diffusion_xl import StableDiffusionXLDenoiser

__all__ = [
    "adapter_for",
    "Conditioning",
    "Denoiser",
    "LossSpace",
    "PredictionType",
    "Schedule",
    "StableDiffusionDenoiser",
    "StableDiffusionXLDenoiser",
]

_SD = {"vae", "text_encoder", "tokenizer", "unet", "scheduler"}
_SDXL = _SD | {"text_encoder_2", "tokenizer_2"}


def adapter_for(pipe: Any) -> Denoiser:
    """The adapter that fits a diffusers pipeline, chosen by its components."""
    present = {name for name, part in pipe.components.items() if part is not None}
    problem = _why_not(pipe, present)
    if problem is None:
        return StableDiffusionXLDenoiser(pipe) if "text_encoder_2" in present else StableDiffusionDenoiser(pipe)
    raise ValueError(
        f"no denoiser adapter for {type(pipe).__name__}: {problem}.\n"
        f"Found components: {', '.join(sorted(present))}.\n"
        f"Supported: Stable Diffusion 1.x/2.x ({', '.join(sorted(_SD))}) and "
        f"SDXL base ({', '.join(sorted(_SDXL))}), text-to-image."
    )


def _why_not(pipe: Any, present: set[str]) -> str | None:
    wanted = _SDXL if "text_encoder_2" in present else _SD
    if wanted - present:
        return f"it lacks {', '.join(sorted(wanted - present))}"
    if blocked := present & {"controlnet", "motion_adapter"}:
        return f"{', '.join(sorted(blocked))} would be ignored in training"
    if "requires_aesthetics_score" in pipe.config and pipe.config["requires_aesthetics_score"]:
        return "the SDXL refiner is conditioned on an aesthetic score"
    channels, latent = pipe.unet.config["in_channels"], pipe.vae.config["latent_channels"]
    if channels != latent:
        return f"its UNet reads {channels} channels but latents have {latent} (an inpainting or editing model)"
    return None
