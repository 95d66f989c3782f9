"""Stable Diffusion 1.x and 2.x: one CLIP text encoder, a UNet that predicts ε or v."""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from mmalign.denoisers.base import Denoiser, count_truncated_by_clip, module_dtype
from mmalign.denoisers.conditioning import Conditioning
from mmalign.denoisers.user_attention import users_told


class StableDiffusionDenoiser(Denoiser):
    """Adapter for StableDiffusionPipeline (Rombach et al., arXiv:2112.10752)."""

    family = "stable-diffusion"
    components = frozenset({"vae", "text_encoder", "tokenizer", "unet", "scheduler"})

    @property
    def module(self) -> nn.Module:
        return self.pipe.unet

    @torch.no_grad()
    def encode_prompt(self, prompts: Sequence[str]) -> Conditioning:
        """The last hidden states (B, L, D) of the text encoder, from the pipeline's own encoder."""
        embeds, _ = self.pipe.encode_prompt(
            list(prompts), self.pipe._execution_device, num_images_per_prompt=1, do_classifier_free_guidance=False
        )
        return Conditioning(embeds)

    def count_truncated(self, prompts: Sequence[str]) -> int:
        return count_truncated_by_clip(self.pipe, self.pipe.tokenizer, prompts)

    def predict(
        self, module: nn.Module, x_t: Float[Tensor, "B C h w"], t: Int[Tensor, " B"], conditioning: Conditioning
    ) -> Float[Tensor, "B C h w"]:
        dtype = module_dtype(module)
        with users_told(module, conditioning) as told:
            return module(
                x_t.to(dtype),
                self.schedule.model_timestep(t),
                encoder_hidden_states=conditioning.prompt_embeds.to(x_t.device, dtype),
                return_dict=False,
                **told,
            )[0]
