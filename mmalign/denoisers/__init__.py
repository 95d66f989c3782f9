"""One short adapter a model family: encode, noise, predict, target. Importing this needs torch only."""

from typing import Any

from mmalign.denoisers.base import Denoiser
from mmalign.denoisers.conditioning import Conditioning
from mmalign.denoisers.flux import FluxDenoiser
from mmalign.denoisers.schedule import LossSpace, PredictionType, Schedule
from mmalign.denoisers.stable_diffusion import StableDiffusionDenoiser
from mmalign.denoisers.stable_diffusion_3 import StableDiffusion3Denoiser
from mmalign.denoisers.stable_diffusion_xl import StableDiffusionXLDenoiser

__all__ = [
    "adapter_for",
    "Conditioning",
    "Denoiser",
    "FluxDenoiser",
    "LossSpace",
    "PredictionType",
    "Schedule",
    "StableDiffusion3Denoiser",
    "StableDiffusionDenoiser",
    "StableDiffusionXLDenoiser",
]

# The network's class → the adapters that can drive it; of several, the first whose components are all there.
_FAMILIES: dict[str, tuple[type[Denoiser], ...]] = {
    "UNet2DConditionModel": (StableDiffusionXLDenoiser, StableDiffusionDenoiser),
    "SD3Transformer2DModel": (StableDiffusion3Denoiser,),
    "FluxTransformer2DModel": (FluxDenoiser,),
}


def adapter_for(pipe: Any) -> Denoiser:
    """The adapter that fits a diffusers pipeline, chosen by its components."""
    present = {name for name, part in pipe.components.items() if part is not None}
    network = next(
        (type(pipe.components[name]).__name__ for name in ("unet", "transformer") if name in present), "none"
    )
    adapters = _FAMILIES.get(network, ())
    fitting = next((adapter for adapter in adapters if adapter.components <= present), None)
    problem = f"its network is {network}" if not adapters else _why_not(pipe, present)
    if fitting is None and problem is None:
        problem = f"it lacks {', '.join(sorted(adapters[-1].components - present))}"
    if fitting is None or problem is not None:
        raise ValueError(
            f"no denoiser adapter for {type(pipe).__name__}: {problem}.\n"
            f"Found components: {', '.join(sorted(present))}.\n"
            "Supported, text-to-image: Stable Diffusion 1.x, 2.x, XL base, 3 and 3.5, FLUX.1"
        )
    return fitting(pipe)


def _why_not(pipe: Any, present: set[str]) -> str | None:
    if blocked := present & {"controlnet", "motion_adapter"}:
        return f"{', '.join(sorted(blocked))} would be ignored in training"
    if "requires_aesthetics_score" in pipe.config and pipe.config["requires_aesthetics_score"]:
        return "the SDXL refiner is conditioned on an aesthetic score"
    if "unet" not in present or "vae" not in present:
        return None
    channels, latent = pipe.unet.config["in_channels"], pipe.vae.config["latent_channels"]
    if channels != latent:
        return f"its UNet reads {channels} channels but latents have {latent} (an inpainting or editing model)"
    return None
