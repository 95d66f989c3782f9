"""Trains the playground's Stable Diffusion: a UNet and its text encoder, on latents of composed pictures."""

from dataclasses import replace
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from mmalign.playground import photographs, tokenizer, world
from mmalign.playground.fit import FitConfig, fit

FIT = FitConfig(
    steps=1_450, batch_size=64, learning_rate=8e-4, warmup=200, weight_decay=1e-3, ema=0.999, constant=True, seed=12
)
STREAM = 201
NUM_ROWS = 128_000
PROMPT_DROPOUT = 0.1
_BLOCK = 2_000


def build_parts(vocabulary: CLIPTokenizer, seed: int = 0) -> tuple[UNet2DConditionModel, CLIPTextModel]:
    """An untrained UNet of 4.2 M parameters for 4×8×8 latents, and a text encoder of 0.3 M."""
    torch.manual_seed(seed)
    unet = UNet2DConditionModel(
        sample_size=world.SIZE // 4,
        block_out_channels=(64, 128),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=96,
        attention_head_dim=4,
        norm_num_groups=16,
    )
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(vocabulary),
            hidden_size=96,
            intermediate_size=192,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=tokenizer.MAX_LENGTH,
            projection_dim=96,
            bos_token_id=vocabulary.bos_token_id,
            eos_token_id=vocabulary.eos_token_id,
            pad_token_id=vocabulary.pad_token_id,
        )
    )
    return unet, text_encoder


def noise_scheduler() -> DDIMScheduler:
    """Stable Diffusion 1.5's noise schedule."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )


class TrainingLatents:
    """Latents and captions of the training stream's rows, encoded in blocks when first asked for and kept."""

    def __init__(self, vae: AutoencoderKL, data: photographs.Photographs) -> None:
        self.vae, self.data = vae, data
        self._blocks: dict[int, tuple[Tensor, list[str]]] = {}

    @torch.no_grad()
    def _block(self, index: int) -> tuple[Tensor, list[str]]:
        if index not in self._blocks:
            rows = torch.arange(index * _BLOCK, (index + 1) * _BLOCK)
            scenes = world.draw_scenes(self.data.labels, rows, seed=STREAM)
            pixels = world.compose(self.data, rows, scenes) * 2 - 1
            latents = torch.cat([self.vae.encode(part).latent_dist.mean for part in pixels.split(250)])
            self._blocks[index] = latents * self.vae.config.scaling_factor, scenes.captions()
        return self._blocks[index]

    def __call__(self, rows: Tensor) -> tuple[Tensor, list[str]]:
        """(B, 4, 8, 8) latents and B captions."""
        latents, captions = zip(*(self._row(int(row) % NUM_ROWS) for row in rows), strict=True)
        return torch.stack(latents), list(captions)

    def _row(self, row: int) -> tuple[Tensor, str]:
        latents, captions = self._block(row // _BLOCK)
        return latents[row % _BLOCK], captions[row % _BLOCK]


def train(
    vae: AutoencoderKL, checkpoint: Path | None = None, *, stop_after: int | None = None, steps: int | None = None
) -> tuple[StableDiffusionPipeline, list[dict[str, float]]]:
    """Trains UNet and text encoder by noise prediction; returns the assembled pipeline and the loss curve."""
    vocabulary = tokenizer.build()
    unet, text_encoder = build_parts(vocabulary)
    parts = nn.ModuleDict({"unet": unet.to(memory_format=torch.channels_last), "text_encoder": text_encoder})
    scheduler = noise_scheduler()
    signal, noise_level = scheduler.alphas_cumprod.sqrt(), (1 - scheduler.alphas_cumprod).sqrt()
    batches = TrainingLatents(vae, photographs.load("train"))
    config = replace(FIT, steps=steps) if steps else FIT

    def loss_of(step: int, generator: torch.Generator) -> Tensor:
        latents, captions = batches(torch.arange(step * config.batch_size, (step + 1) * config.batch_size))
        dropped = torch.rand(len(captions), generator=generator) < PROMPT_DROPOUT
        captions = ["" if d else c for c, d in zip(captions, dropped, strict=True)]
        tokens = vocabulary(
            captions, padding="max_length", max_length=tokenizer.MAX_LENGTH, return_tensors="pt"
        ).input_ids
        noise = torch.randn(latents.shape, generator=generator)
        timestep = torch.randint(0, len(signal), (len(latents),), generator=generator)
        noised = signal[timestep][:, None, None, None] * latents + noise_level[timestep][:, None, None, None] * noise
        prediction = unet(noised, timestep, text_encoder(tokens).last_hidden_state).sample
        return (prediction - noise).square().mean()

    curve = fit(parts, loss_of, config, checkpoint=checkpoint, stop_after=stop_after, name="base")
    pipe = StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=vocabulary,
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    return pipe, curve
