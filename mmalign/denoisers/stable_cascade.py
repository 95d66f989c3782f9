"""Stable Cascade's prior (Stage C): CLIP's text, an ε-model of features of a picture that a second model makes into pixels."""

from collections.abc import Sequence
from functools import cached_property

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from mmalign.denoisers.base import Denoiser, count_truncated, module_dtype
from mmalign.denoisers.conditioning import Conditioning
from mmalign.denoisers.effnet_encoder import CHANNELS, PIXELS, EffNetEncoder, find_encoder, load_encoder
from mmalign.denoisers.user_attention import users_told


class StableCascadeDenoiser(Denoiser):
    """Adapter for StableCascadePriorPipeline (Pernias et al., arXiv:2306.00637).

    Latents are what the encoder sees in a picture of 768 pixels; the pipeline draws the same 24×24 for one of 1024.
    """

    family = "stable-cascade"
    components = frozenset({"text_encoder", "tokenizer", "prior", "scheduler"})
    # No config names it: what the prior was trained on.
    native_size = (768, 768)
    pixels_per_latent = PIXELS
    latent_channels = CHANNELS
    has_own_dropout = True

    @property
    def module(self) -> nn.Module:
        return self.pipe.prior

    @cached_property
    def latent_encoder(self) -> EffNetEncoder:
        """No part of the pipeline: read from where the prior was loaded."""
        return load_encoder(find_encoder(str(self.pipe.config.get("_name_or_path") or "")))

    @torch.no_grad()
    def encode_prompt(self, prompts: Sequence[str]) -> Conditioning:
        """CLIP's last hidden states (B, L, D) and its projected text (B, P)."""
        embeds, pooled, _, _ = self.pipe.encode_prompt(
            self.pipe._execution_device, len(prompts), 1, False, prompt=list(prompts)
        )
        return Conditioning(embeds, pooled[:, 0])

    def count_truncated(self, prompts: Sequence[str]) -> int:
        return count_truncated(self.pipe.tokenizer, prompts)

    @torch.no_grad()
    def encode_image(
        self, pixels: Float[Tensor, "B 3 H W"], generators: Sequence[torch.Generator] | None = None
    ) -> Float[Tensor, "B C h w"]:
        """Pixels in [−1, 1] to float32 latents; there is no posterior to draw from, and no generator is used."""
        self.latent_shape(*pixels.shape[-2:], *pixels.shape[2:-2])
        encoder = self.latent_encoder.to(next(self.module.parameters()).device)
        return encoder(pixels.to(next(encoder.parameters()).device, torch.float32))

    def decode_with_gradient(self, latents: Float[Tensor, "B C h w"]) -> Float[Tensor, "B 3 H W"]:
        raise ValueError(
            "latents of Stable Cascade's prior are features that no VAE decodes: a second diffusion model draws the picture "
            "(StableCascadeDecoderPipeline)"
        )

    def predict(
        self, module: nn.Module, x_t: Float[Tensor, "B C h w"], t: Int[Tensor, " B"], conditioning: Conditioning
    ) -> Float[Tensor, "B C h w"]:
        assert conditioning.pooled is not None
        dtype = module_dtype(module)
        with users_told(module, conditioning):
            return module(
                sample=x_t.to(dtype),
                # The network's own precision, as the pipeline does it: its embedding is made in that.
                timestep_ratio=((t + 1) / self.schedule.num_timesteps).to(x_t.device, dtype),
                clip_text_pooled=conditioning.pooled[:, None].to(x_t.device, dtype),
                clip_text=conditioning.prompt_embeds.to(x_t.device, dtype),
                # Without pictures' embeddings the network would pass over the text's tokens; zeros stand for none.
                clip_img=x_t.new_zeros(len(x_t), 1, self.pipe.prior.config.clip_image_in_channels, dtype=dtype),
                return_dict=False,
            )[0]
