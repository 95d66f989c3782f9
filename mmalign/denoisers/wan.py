"""Wan 2.1: UMT5 text, a causal VAE over space and time, a transformer that predicts the velocity of a straight path."""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from mmalign.denoisers.base import Denoiser, count_truncated, module_dtype
from mmalign.denoisers.conditioning import Conditioning

# Tokens that UMT5 reads when the pipeline draws; its encode_prompt alone reads fewer.
UMT5_LENGTH = 512


class WanDenoiser(Denoiser):
    """Adapter for WanPipeline (Wan Team, arXiv:2503.20314), 2.1, text to video.

    The network is told σ·T as it is. The published sampler, UniPC, rounds that down to a whole number.
    """

    family = "wan"
    components = frozenset({"vae", "text_encoder", "tokenizer", "transformer", "scheduler"})
    # No config names them: what the pipeline draws unless told otherwise.
    native_frames = 81
    native_size = (480, 832)

    @property
    def module(self) -> nn.Module:
        return self.pipe.transformer

    @property
    def patch(self) -> int:
        return self.pipe.transformer.config.patch_size[-1]

    @property
    def pixels_per_latent(self) -> int:
        return self.pipe.vae_scale_factor_spatial

    @torch.no_grad()
    def encode_prompt(self, prompts: Sequence[str]) -> Conditioning:
        """UMT5's last states (B, L, D), zero after a prompt's end."""
        embeds, _ = self.pipe.encode_prompt(
            list(prompts), do_classifier_free_guidance=False, max_sequence_length=UMT5_LENGTH
        )
        return Conditioning(embeds)

    def count_truncated(self, prompts: Sequence[str]) -> int:
        from diffusers.pipelines.wan.pipeline_wan import prompt_clean

        return count_truncated(self.pipe.tokenizer, [prompt_clean(prompt) for prompt in prompts], UMT5_LENGTH)

    def latent_shape(self, height: int, width: int, frames: int | None = None) -> tuple[int, ...]:
        """(C, F, h, w) of the latents of a clip: the first frame by itself, then one latent frame for every four."""
        ratio = self.pipe.vae_scale_factor_temporal
        # The VAE would drop the frames after the last whole four.
        if frames is None or frames < 1 or (frames - 1) % ratio:
            raise ValueError(
                f"{self.family} reads clips: num_frames must be 1 more than a multiple of {ratio}, got {frames}"
            )
        channels, *size = super().latent_shape(height, width)
        return channels, (frames - 1) // ratio + 1, *size

    def predict(
        self, module: nn.Module, x_t: Float[Tensor, "B C F h w"], t: Int[Tensor, " B"], conditioning: Conditioning
    ) -> Float[Tensor, "B C F h w"]:
        dtype = module_dtype(module)
        return module(
            hidden_states=x_t.to(dtype),
            timestep=self.schedule.model_timestep(t),
            encoder_hidden_states=conditioning.prompt_embeds.to(x_t.device, dtype),
            return_dict=False,
        )[0]
