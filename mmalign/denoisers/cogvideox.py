"""CogVideoX: T5 text, a causal VAE over space and time, a transformer over patches of the whole clip that predicts v."""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from mmalign.denoisers.base import Denoiser, count_truncated, module_dtype
from mmalign.denoisers.conditioning import Conditioning

# Tokens that T5 reads in the pipeline.
T5_LENGTH = 226


class CogVideoXDenoiser(Denoiser):
    """Adapter for CogVideoXPipeline (Yang et al., arXiv:2408.06072), 1.0 and 1.5, text to video.

    Where the network reads two latent frames as one (1.5), a clip's first latent frame stands there twice: its frames are odd in
    number, and the pipeline likewise draws one in front and drops it.
    """

    family = "cogvideox"
    components = frozenset({"vae", "text_encoder", "tokenizer", "transformer", "scheduler"})

    @property
    def module(self) -> nn.Module:
        return self.pipe.transformer

    @property
    def patch(self) -> int:
        return self.pipe.transformer.config.patch_size

    @property
    def pixels_per_latent(self) -> int:
        return self.pipe.vae_scale_factor_spatial

    @property
    def native_frames(self) -> int:
        return self.pipe.transformer.config.sample_frames

    @property
    def native_size(self) -> tuple[int, int]:
        config, factor = self.pipe.transformer.config, self.pixels_per_latent
        return config.sample_height * factor, config.sample_width * factor

    @property
    def _repeated(self) -> int:
        """Latent frames in front that only fill up the first patch."""
        return (self.pipe.transformer.config.patch_size_t or 1) - 1

    @torch.no_grad()
    def encode_prompt(self, prompts: Sequence[str]) -> Conditioning:
        """T5's last states (B, L, D)."""
        embeds, _ = self.pipe.encode_prompt(
            list(prompts), do_classifier_free_guidance=False, max_sequence_length=T5_LENGTH
        )
        return Conditioning(embeds)

    def count_truncated(self, prompts: Sequence[str]) -> int:
        return count_truncated(self.pipe.tokenizer, prompts, T5_LENGTH)

    def latent_shape(self, height: int, width: int, frames: int | None = None) -> tuple[int, ...]:
        """(C, F, h, w) of the latents of a clip: the first frame by itself, then one latent frame for every four."""
        ratio = self.pipe.vae_scale_factor_temporal
        # Of an even number of latent frames the VAE decodes another number of frames than it was given.
        if frames is None or frames < 1 or (frames - 1) % (2 * ratio):
            raise ValueError(
                f"{self.family} reads clips: num_frames must be 1 more than a multiple of {2 * ratio}, got {frames}"
            )
        most = self.native_size
        if self.pipe.transformer.config.patch_size_t is not None and (height > most[0] or width > most[1]):
            raise ValueError(f"CogVideoX 1.5 has positions up to {most[0]}×{most[1]} pixels, got {height}×{width}")
        channels, *size = super().latent_shape(height, width)
        return channels, (frames - 1) // ratio + 1 + self._repeated, *size

    def encode_image(
        self, pixels: Float[Tensor, "B 3 F H W"], generators: Sequence[torch.Generator] | None = None
    ) -> Float[Tensor, "B C f h w"]:
        latents = super().encode_image(pixels, generators)
        return torch.cat([latents[:, :, :1].repeat_interleave(self._repeated, dim=2), latents], dim=2)

    def decode_with_gradient(self, latents: Float[Tensor, "B C f h w"]) -> Float[Tensor, "B 3 F H W"]:
        return super().decode_with_gradient(latents[:, :, self._repeated :])

    def predict(
        self, module: nn.Module, x_t: Float[Tensor, "B C F h w"], t: Int[Tensor, " B"], conditioning: Conditioning
    ) -> Float[Tensor, "B C F h w"]:
        dtype, (frames, *size) = module_dtype(module), x_t.shape[2:]
        positions = None
        if self.pipe.transformer.config.use_rotary_positional_embeddings:
            height, width = (side * self.pixels_per_latent for side in size)
            positions = self.pipe._prepare_rotary_positional_embeddings(height, width, frames, x_t.device)
        # The network has frames first.
        output = module(
            hidden_states=x_t.to(dtype).transpose(1, 2),
            encoder_hidden_states=conditioning.prompt_embeds.to(x_t.device, dtype),
            timestep=self.schedule.model_timestep(t),
            image_rotary_emb=positions,
            return_dict=False,
        )[0]
        return output.transpose(1, 2)
