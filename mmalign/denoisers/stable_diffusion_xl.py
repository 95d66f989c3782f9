"""Stable Diffusion XL: two CLIP text encoders, pooled text, and the image's true size and crop as conditioning."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from mmalign.denoisers.base import Denoiser, count_truncated_by_clip, module_dtype
from mmalign.denoisers.conditioning import Conditioning
from mmalign.denoisers.user_attention import users_told

EmptyPrompt = Literal["zeros", "encode"]


class StableDiffusionXLDenoiser(Denoiser):
    """Adapter for StableDiffusionXLPipeline (Podell et al., arXiv:2307.01952).

    empty_prompt: what "" becomes. "zeros" is what the pipeline's unconditional branch uses at sampling time when its
    force_zeros_for_empty_prompt is set; "encode" is what the published preference trainers used. None follows the
    pipeline.
    """

    family = "stable-diffusion-xl"
    components = frozenset({"vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "unet", "scheduler"})

    def __init__(self, pipe: Any, empty_prompt: EmptyPrompt | None = None) -> None:
        super().__init__(pipe)
        if empty_prompt not in (None, "zeros", "encode"):
            raise ValueError(f"empty_prompt must be 'zeros', 'encode' or None, got {empty_prompt!r}")
        follow: EmptyPrompt = "zeros" if pipe.config.force_zeros_for_empty_prompt else "encode"
        self.empty_prompt: EmptyPrompt = empty_prompt or follow

    @property
    def module(self) -> nn.Module:
        return self.pipe.unet

    @torch.no_grad()
    def encode_prompt(self, prompts: Sequence[str]) -> Conditioning:
        """Penultimate hidden states of both encoders side by side (B, L, D₁+D₂); the second's pooled text (B, P)."""
        embeds, _, pooled, _ = self.pipe.encode_prompt(
            list(prompts), num_images_per_prompt=1, do_classifier_free_guidance=False
        )
        encoded = Conditioning(embeds, pooled)
        if self.empty_prompt == "encode" or all(prompts):
            return encoded
        zeros = Conditioning(torch.zeros_like(embeds), torch.zeros_like(pooled))
        return encoded.where(torch.tensor([bool(prompt) for prompt in prompts]), zeros)

    def count_truncated(self, prompts: Sequence[str]) -> int:
        return count_truncated_by_clip(self.pipe, self.pipe.tokenizer_2, prompts)

    def with_sizes(self, conditioning: Conditioning, sizes: Int[Tensor, "B 6"]) -> Conditioning:
        """Attach (height, width, crop top, crop left, target height, target width), one row an image."""
        if sizes.shape != (len(conditioning), 6):
            raise ValueError(f"sizes must be ({len(conditioning)}, 6), got {tuple(sizes.shape)}")
        return replace(conditioning, time_ids=sizes.to(conditioning.prompt_embeds.device, torch.float32))

    def predict(
        self, module: nn.Module, x_t: Float[Tensor, "B C h w"], t: Int[Tensor, " B"], conditioning: Conditioning
    ) -> Float[Tensor, "B C h w"]:
        if conditioning.pooled is None or conditioning.time_ids is None:
            raise ValueError("SDXL needs pooled text and image sizes: use denoiser.with_sizes(conditioning, sizes)")
        dtype = module_dtype(module)
        with users_told(module, conditioning) as told:
            return module(
                x_t.to(dtype),
                self.schedule.model_timestep(t),
                encoder_hidden_states=conditioning.prompt_embeds.to(x_t.device, dtype),
                added_cond_kwargs={
                    "text_embeds": conditioning.pooled.to(x_t.device, dtype),
                    "time_ids": conditioning.time_ids.to(x_t.device),
                },
                return_dict=False,
                **told,
            )[0]
