"""One short adapter a model family: encode, noise, predict, target. Importing this needs torch only."""

import inspect
from typing import Any

from mmalign.denoisers.base import Denoiser
from mmalign.denoisers.cogvideox import CogVideoXDenoiser
from mmalign.denoisers.conditioning import Conditioning
from mmalign.denoisers.flux import FluxDenoiser
from mmalign.denoisers.parts import ALIGNED, latent_channels
from mmalign.denoisers.schedule import LossSpace, PredictionType, Schedule
from mmalign.denoisers.stable_cascade import StableCascadeDenoiser
from mmalign.denoisers.stable_diffusion import StableDiffusionDenoiser
from mmalign.denoisers.stable_diffusion_3 import StableDiffusion3Denoiser
from mmalign.denoisers.stable_diffusion_xl import StableDiffusionXLDenoiser
from mmalign.denoisers.wan import WanDenoiser

__all__ = [
    "adapter_for",
    "CogVideoXDenoiser",
    "Conditioning",
    "Denoiser",
    "FluxDenoiser",
    "LossSpace",
    "PredictionType",
    "Schedule",
    "StableCascadeDenoiser",
    "StableDiffusion3Denoiser",
    "StableDiffusionDenoiser",
    "StableDiffusionXLDenoiser",
    "WanDenoiser",
]

# The network's class → the adapters that can drive it; of several, the first whose components are all there.
_FAMILIES: dict[str, tuple[type[Denoiser], ...]] = {
    "UNet2DConditionModel": (StableDiffusionXLDenoiser, StableDiffusionDenoiser),
    "SD3Transformer2DModel": (StableDiffusion3Denoiser,),
    "FluxTransformer2DModel": (FluxDenoiser,),
    "CogVideoXTransformer3DModel": (CogVideoXDenoiser,),
    "WanTransformer3DModel": (WanDenoiser,),
    "StableCascadeUNet": (StableCascadeDenoiser,),
}


def adapter_for(pipe: Any) -> Denoiser:
    """The adapter that fits a diffusers pipeline, chosen by its components."""
    present = {name for name, part in pipe.components.items() if part is not None}
    network = next((type(pipe.components[name]).__name__ for name in ALIGNED if name in present), "none")
    adapters = _FAMILIES.get(network, ())
    fitting = next((adapter for adapter in adapters if adapter.components <= present), None)
    problem = _why_not(pipe, present) if adapters else f"its network is {network}"
    if network == "none" and "StableCascade" in type(pipe).__name__:
        problem = (
            "Stable Cascade is aligned in its prior (StableCascadePriorPipeline, stabilityai/stable-cascade-prior)"
        )
    if fitting is None and problem is None:
        problem = f"it lacks {', '.join(sorted(adapters[-1].components - present))}"
    if fitting is None or problem is not None:
        raise ValueError(
            f"no denoiser adapter for {type(pipe).__name__}: {problem}.\n"
            f"Found components: {', '.join(sorted(present))}.\n"
            "Supported, text-to-image: Stable Diffusion 1.x, 2.x, XL base, 3 and 3.5, FLUX.1, Stable Cascade's prior; "
            "text-to-video: CogVideoX, Wan 2.1"
        )
    return fitting(pipe)


def _why_not(pipe: Any, present: set[str]) -> str | None:
    if blocked := present & {"controlnet", "motion_adapter"}:
        return f"{', '.join(sorted(blocked))} would be ignored in training"
    if "requires_aesthetics_score" in pipe.config and pipe.config["requires_aesthetics_score"]:
        return "the SDXL refiner is conditioned on an aesthetic score"
    if "transformer_2" in present or pipe.config.get("boundary_ratio") is not None:
        return "it draws with two networks, one for much noise and one for little (Wan 2.2), and training knows one"
    if pipe.config.get("expand_timesteps", False):
        return "its network is told a timestep for each patch (Wan 2.2 5B), and training tells one for each clip"
    if "vae" in present and type(pipe.components.get("transformer")).__name__ in (
        "CogVideoXTransformer3DModel",
        "WanTransformer3DModel",
    ):
        # Pipelines that draw from a picture or a video hold the same parts; only their call tells them apart.
        given = {"image", "video", "control_video"} & inspect.signature(type(pipe).__call__).parameters.keys()
        if given:
            return f"it draws from a given {given.pop()}, and training knows clips and prompts only"
        return _read_besides_latents(pipe, pipe.transformer, "an image-to-video or control model")
    if "unet" not in present or "vae" not in present:
        return None
    return _read_besides_latents(pipe, pipe.unet, "an inpainting or editing model")


def _read_besides_latents(pipe: Any, network: Any, kind: str) -> str | None:
    channels, latent = network.config["in_channels"], latent_channels(pipe.vae)
    if channels == latent:
        return None
    return f"its network reads {channels} channels but latents have {latent} ({kind})"
