"""Stable Diffusion 3 and 3.5: two CLIP encoders and T5, a transformer that predicts the velocity of a straight path."""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from mmalign.denoisers.base import Denoiser, count_truncated, count_truncated_by_clip, module_dtype
from mmalign.denoisers.conditioning import Conditioning
from mmalign.denoisers.user_attention import users_told

# Tokens that T5 reads in the pipeline.
T5_LENGTH = 256


class StableDiffusion3Denoiser(Denoiser):
    """Adapter for StableDiffusion3Pipeline (Esser et al., arXiv:2403.03206); T5 may be left out, as the pipeline allows."""

    family = "stable-diffusion-3"
    components = frozenset(
        {"vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "transformer", "scheduler"}
    )

    @property
    def module(self) -> nn.Module:
        return self.pipe.transformer

    @property
    def patch(self) -> int:
        return self.pipe.transformer.config.patch_size

    @torch.no_grad()
    def encode_prompt(self, prompts: Sequence[str]) -> Conditioning:
        """Both CLIPs' penultimate states, padded to T5's width, then T5's (B, L, D); both CLIPs' pooled text (B, P)."""
        embeds, _, pooled, _ = self.pipe.encode_prompt(
            list(prompts), None, None, do_classifier_free_guidance=False, max_sequence_length=T5_LENGTH
        )
        return Conditioning(embeds, pooled)

    def count_truncated(self, prompts: Sequence[str]) -> int:
        if self.pipe.text_encoder_3 is not None:
            prompts = [prompt for prompt in prompts if count_truncated(self.pipe.tokenizer_3, [prompt], T5_LENGTH)]
        return count_truncated_by_clip(self.pipe, self.pipe.tokenizer, prompts) if prompts else 0

    def predict(
        self, module: nn.Module, x_t: Float[Tensor, "B C h w"], t: Int[Tensor, " B"], conditioning: Conditioning
    ) -> Float[Tensor, "B C h w"]:
        assert conditioning.pooled is not None
        dtype = module_dtype(module)
        with users_told(module, conditioning) as told:
            return module(
                hidden_states=x_t.to(dtype),
                timestep=self.schedule.model_timestep(t),
                encoder_hidden_states=conditioning.prompt_embeds.to(x_t.device, dtype),
                pooled_projections=conditioning.pooled.to(x_t.device, dtype),
                return_dict=False,
                **told,
            )[0]
