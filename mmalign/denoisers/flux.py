"""FLUX.1: pooled CLIP text and T5, a transformer over 2×2 patches of the latent that predicts a straight path's velocity."""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from mmalign.denoisers.base import Denoiser, count_truncated, module_dtype
from mmalign.denoisers.conditioning import Conditioning
from mmalign.denoisers.user_attention import users_told

# Tokens that T5 reads in the pipeline.
T5_LENGTH = 512


class FluxDenoiser(Denoiser):
    """Adapter for FluxPipeline (Black Forest Labs, FLUX.1-schnell and -dev).

    guidance_scale: what a guidance-distilled network (FLUX.1-dev) is told; 3.5 is the pipeline's default. Other networks have no
    such input.
    """

    family = "flux"
    components = frozenset(
        {"vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "transformer", "scheduler"}
    )
    patch = 2

    def __init__(self, pipe: Any, guidance_scale: float = 3.5) -> None:
        super().__init__(pipe)
        self.guidance_scale = guidance_scale

    @property
    def module(self) -> nn.Module:
        return self.pipe.transformer

    @property
    def native_size(self) -> tuple[int, int]:
        size = self.pipe.default_sample_size * self.pipe.vae_scale_factor
        return size, size

    @torch.no_grad()
    def encode_prompt(self, prompts: Sequence[str]) -> Conditioning:
        """T5's last states (B, L, D) and CLIP's pooled text (B, P)."""
        embeds, pooled, _ = self.pipe.encode_prompt(list(prompts), max_sequence_length=T5_LENGTH)
        return Conditioning(embeds, pooled)

    def count_truncated(self, prompts: Sequence[str]) -> int:
        return count_truncated(self.pipe.tokenizer_2, prompts, T5_LENGTH)

    def predict(
        self, module: nn.Module, x_t: Float[Tensor, "B C h w"], t: Int[Tensor, " B"], conditioning: Conditioning
    ) -> Float[Tensor, "B C h w"]:
        assert conditioning.pooled is not None
        dtype, (rows, _, height, width) = module_dtype(module), x_t.shape
        guidance = None
        if self.pipe.transformer.config.guidance_embeds:
            guidance = torch.full((rows,), self.guidance_scale, device=x_t.device)
        with users_told(module, conditioning) as told:
            output = module(
                hidden_states=_patches(x_t.to(dtype)),
                # The network multiplies it by 1000 itself.
                timestep=self.schedule.model_timestep(t) / self.schedule.num_timesteps,
                guidance=guidance,
                encoder_hidden_states=conditioning.prompt_embeds.to(x_t.device, dtype),
                pooled_projections=conditioning.pooled.to(x_t.device, dtype),
                txt_ids=torch.zeros(conditioning.prompt_embeds.shape[1], 3, device=x_t.device, dtype=dtype),
                img_ids=_positions(height // 2, width // 2).to(x_t.device, dtype),
                return_dict=False,
                **told,
            )[0]
        return _picture(output, height, width)


def _patches(x: Float[Tensor, "B C h w"]) -> Float[Tensor, "B N D"]:
    """Every 2×2 patch as one token of 4·C numbers, row by row."""
    rows, channels, height, width = x.shape
    cut = x.reshape(rows, channels, height // 2, 2, width // 2, 2)
    return cut.permute(0, 2, 4, 1, 3, 5).reshape(rows, height * width // 4, channels * 4)


def _picture(tokens: Float[Tensor, "B N D"], height: int, width: int) -> Float[Tensor, "B C h w"]:
    """The inverse of `_patches`."""
    rows, _, numbers = tokens.shape
    cut = tokens.reshape(rows, height // 2, width // 2, numbers // 4, 2, 2)
    return cut.permute(0, 3, 1, 4, 2, 5).reshape(rows, numbers // 4, height, width)


def _positions(height: int, width: int) -> Float[Tensor, "N 3"]:
    """(0, row, column) of every token."""
    row, column = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return torch.stack([torch.zeros_like(row), row, column], dim=-1).reshape(-1, 3).float()
