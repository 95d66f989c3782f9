"""The seam between a model family and everything else: one adapter encodes, names the shapes and calls the network."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any, ClassVar, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from mmalign.denoisers.conditioning import Conditioning
from mmalign.denoisers.long_prompts import long_prompts_of
from mmalign.denoisers.parts import latent_channels
from mmalign.denoisers.schedule import Schedule


class Denoiser(ABC):
    """A diffusers pipeline seen as: images and prompts in, latents and conditioning out, one network call between.

    A video family reads clips where others read images: pixels (B, 3, F, H, W), latents (B, C, F, h, w). It owns no weights and
    holds no state of its own; `pipe` stays the user's pipeline.
    """

    family: ClassVar[str]
    # What a pipeline of the family must hold.
    components: ClassVar[frozenset[str]]
    # Whether the network as published drops values in train mode, which a loss that compares two networks must not see.
    has_own_dropout: ClassVar[bool] = False

    def __init__(self, pipe: Any) -> None:
        self.pipe = pipe

    @property
    @abstractmethod
    def module(self) -> nn.Module:
        """The network that is aligned."""

    @property
    def latent_encoder(self) -> nn.Module:
        """What makes latents of pictures; not always a part of the pipeline."""
        return self.pipe.vae

    @property
    def latent_channels(self) -> int:
        """Channels of a latent."""
        return latent_channels(self.pipe.vae)

    @property
    def patch(self) -> int:
        """Latents that the network reads as one, in each direction."""
        return 1

    @property
    def pixels_per_latent(self) -> int:
        """Pixels that the VAE makes one latent of, in each direction."""
        return self.pipe.vae_scale_factor

    @property
    def native_frames(self) -> int | None:
        """Frames of the clips that the network was trained on, by its config; None for a family that draws pictures."""
        return None

    @property
    def native_size(self) -> tuple[int, int]:
        """(height, width) in pixels that the network was trained at, by its config."""
        size, factor = self.module.config.sample_size, self.pixels_per_latent  # type: ignore[union-attr]
        height, width = (size, size) if isinstance(size, int) else cast(tuple[int, int], size)
        return height * factor, width * factor

    @cached_property
    def schedule(self) -> Schedule:
        """The pipeline's training schedule; inference schedulers may be swapped later without touching it."""
        return Schedule.from_scheduler(self.pipe.scheduler)

    @abstractmethod
    def encode_prompt(self, prompts: Sequence[str]) -> Conditioning:
        """Text to conditioning, without gradient, exactly as the pipeline does it when it samples."""

    @abstractmethod
    def count_truncated(self, prompts: Sequence[str]) -> int:
        """How many of the prompts are longer than the text encoder reads."""

    def with_sizes(self, conditioning: Conditioning, sizes: Int[Tensor, "B 6"]) -> Conditioning:
        """Attach each image's (height, width, crop top, crop left, target height, target width).

        Families that are not conditioned on sizes have nothing to attach and return the conditioning as it is.
        """
        return conditioning

    @abstractmethod
    def predict(
        self, module: nn.Module, x_t: Float[Tensor, "B C *F h w"], t: Int[Tensor, " B"], conditioning: Conditioning
    ) -> Float[Tensor, "B C *F h w"]:
        """The raw output of `module` (policy or reference) at table index t, run in the module's dtype."""

    def latent_shape(self, height: int, width: int, frames: int | None = None) -> tuple[int, ...]:
        """(C, h, w) of the latents of an image of that size, or (C, F, h, w) of those of a clip of `frames` frames."""
        if frames is not None:
            raise ValueError(
                f"num_frames={frames} has no effect: {self.family} draws pictures, not clips; leave it out"
            )
        factor = self.pixels_per_latent
        multiple = factor * self.patch
        if height % multiple or width % multiple:
            raise ValueError(f"height and width must be multiples of {multiple}, got {height}×{width}")
        return self.latent_channels, height // factor, width // factor

    @torch.no_grad()
    def encode_image(
        self,
        pixels: Float[Tensor, "B 3 *F H W"],
        generators: Sequence[torch.Generator] | None = None,
    ) -> Float[Tensor, "B C *F h w"]:
        """Pixels in [−1, 1] to scaled float32 latents: a posterior sample with one generator a row, else its mean."""
        vae = self.pipe.vae
        self.latent_shape(*pixels.shape[-2:], *pixels.shape[2:-2])
        with _safe_precision(vae):
            posterior = vae.encode(pixels.to(vae.device, vae.dtype)).latent_dist
        latents = posterior.mean.float()
        if generators is not None:
            if len(generators) != len(pixels):
                raise ValueError(f"{len(pixels)} images need {len(pixels)} generators, got {len(generators)}")
            # One draw a row, on the generator's device: a row's latent does not depend on its batch.
            noise = [torch.randn(latents.shape[1:], generator=g, device=g.device) for g in generators]
            latents = latents + posterior.std.float() * torch.stack(noise).to(latents)
        if not torch.isfinite(latents).all():
            raise ValueError(
                f"the VAE returned NaN or infinite latents in {vae.dtype}. Run it in float32 "
                "(pipe.vae.to(torch.float32)) or, for SDXL, use the fp16-safe VAE madebyollin/sdxl-vae-fp16-fix"
            )
        shift, scale = self._latent_affine(latents)
        return (latents - shift) * scale

    @torch.no_grad()
    def decode(self, latents: Float[Tensor, "B C *F h w"]) -> Float[Tensor, "B 3 *F H W"]:
        """Scaled latents to float32 pixels in [−1, 1] (not clamped)."""
        return self.decode_with_gradient(latents)

    def decode_with_gradient(self, latents: Float[Tensor, "B C *F h w"]) -> Float[Tensor, "B 3 *F H W"]:
        """The same with gradient to the latents."""
        vae = self.pipe.vae
        shift, scale = self._latent_affine(latents.float())
        unscaled = latents.float() / scale + shift
        with _safe_precision(vae):
            return vae.decode(unscaled.to(vae.device, vae.dtype), return_dict=False)[0].float()

    def _latent_affine(self, latents: Tensor) -> tuple[Tensor | float, Tensor | float]:
        """(shift, scale) with scaled = (raw − shift)·scale, from the VAE's config."""
        config = self.pipe.vae.config
        if config.get("latents_mean") is not None and config.get("latents_std") is not None:
            mean, std = (
                latents.new_tensor(config[key]).view(1, -1, *[1] * (latents.ndim - 2))
                for key in ("latents_mean", "latents_std")
            )
            # Wan's VAE has no further factor.
            return mean, config.get("scaling_factor", 1.0) / std
        return config.get("shift_factor") or 0.0, config["scaling_factor"]


def module_dtype(module: nn.Module) -> torch.dtype:
    """The dtype a network computes in: that of its first floating parameter (adapters come after the base weights).

    What diffusers keeps in float32 whatever the rest is in (Wan's norms and modulation) does not tell it.
    """
    kept = getattr(module, "_keep_in_fp32_modules", None) or ()
    return next(
        p.dtype
        for name, p in module.named_parameters()
        if p.is_floating_point() and not any(part in name for part in kept)
    )


def count_truncated(tokenizer: Any, prompts: Sequence[str], limit: int | None = None) -> int:
    """How many prompts have more tokens than `limit`; None is the tokenizer's maximum length."""
    limit = tokenizer.model_max_length if limit is None else limit
    lengths = [len(ids) for ids in tokenizer(list(prompts), truncation=False, padding=False, verbose=False).input_ids]
    return sum(length > limit for length in lengths)


def count_truncated_by_clip(pipe: Any, tokenizer: Any, prompts: Sequence[str]) -> int:
    """The same for a pipeline whose prompts CLIP may read in segments."""
    reader = long_prompts_of(pipe)
    return count_truncated(tokenizer, prompts) if reader is None else reader.count_truncated(prompts)


@contextmanager
def _safe_precision(vae: Any) -> Iterator[None]:
    """float32 for the duration if the VAE's config asks for it: SDXL's own VAE overflows in float16."""
    if vae.dtype != torch.float16 or not vae.config.get("force_upcast", False):
        yield
        return
    vae.to(torch.float32)
    try:
        yield
    finally:
        vae.to(torch.float16)
