"""Trains the playground's image autoencoder: 32×32 pixels to 4×8×8 latents, in diffusers' `AutoencoderKL` layout."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from torch import Tensor

from mmalign.playground import photographs, world
from mmalign.playground.fit import FitConfig, fit


@dataclass(frozen=True)
class Stage:
    """One stage of training: its loop, its weight on the KL term (a sum over latents, mean over pictures), its data stream."""

    fit: FitConfig
    kl_weight: float
    stream: int


# The first stage finds smooth latents; the second, under a tenth of the pressure, sharpens what is decoded from them.
STAGES = (
    Stage(FitConfig(steps=3000, batch_size=64, learning_rate=2e-3, ema=0.995, seed=11), kl_weight=1e-5, stream=101),
    Stage(FitConfig(steps=3500, batch_size=64, learning_rate=1.5e-3, ema=0.995, seed=15), kl_weight=1e-6, stream=103),
)
_CENTRE_STREAM = 102
EDGE_WEIGHT = 0.5


def build(seed: int = 0) -> AutoencoderKL:
    """An untrained autoencoder of 0.65 M parameters that shrinks each side by four."""
    torch.manual_seed(seed)
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        latent_channels=4,
        block_out_channels=(16, 32, 64),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        norm_num_groups=8,
        mid_block_add_attention=False,
        sample_size=world.SIZE,
    )


def train(work_dir: Path | None = None) -> tuple[AutoencoderKL, list[dict[str, float]]]:
    """Trains on composed pictures, stage after stage, and centres the latents; returns the autoencoder and its loss curve."""
    data = photographs.load("train")
    model = build().to(memory_format=torch.channels_last)
    curve: list[dict[str, float]] = []
    for number, stage in enumerate(STAGES, start=1):
        name = f"autoencoder-{number}"
        checkpoint = None if work_dir is None else work_dir / f"{name}.pt"
        loss_of = partial(_loss, model, data, stage)
        curve += [
            {"stage": number, **entry} for entry in fit(model, loss_of, stage.fit, checkpoint=checkpoint, name=name)
        ]
    centre(model, picture_batch(data, 0, 2048, stream=_CENTRE_STREAM) * 2 - 1)
    return model, curve


def _loss(
    model: AutoencoderKL, data: photographs.Photographs, stage: Stage, step: int, generator: torch.Generator
) -> Tensor:
    pixels = picture_batch(data, step, stage.fit.batch_size, stream=stage.stream) * 2 - 1
    posterior = model.encode(pixels).latent_dist
    noise = torch.randn(posterior.mean.shape, generator=generator)
    decoded = model.decode(posterior.mean + posterior.std * noise).sample
    return reconstruction_loss(decoded, pixels) + stage.kl_weight * posterior.kl().mean()


def picture_batch(data: photographs.Photographs, step: int, batch_size: int, *, stream: int) -> Tensor:
    """Rows step·batch_size … of a stream of composed pictures, (B, 3, 32, 32) in [0, 1]."""
    rows = torch.arange(step * batch_size, (step + 1) * batch_size)
    pictures = world.compose(data, rows, world.draw_scenes(data.labels, rows, seed=stream))
    return pictures.contiguous(memory_format=torch.channels_last)


def reconstruction_loss(decoded: Tensor, pixels: Tensor) -> Tensor:
    """Mean absolute error of pixels, and of differences between neighbours, which keeps edges sharp."""
    error = decoded - pixels
    edges = error.diff(dim=2).abs().mean() + error.diff(dim=3).abs().mean()
    return error.abs().mean() + EDGE_WEIGHT * edges


@torch.no_grad()
def centre(model: AutoencoderKL, pixels: Tensor) -> None:
    """Moves the latents to mean zero and states their scale, without changing what is decoded.

    Stable Diffusion's pipeline multiplies latents by `scaling_factor` and has no shift, so the mean goes into the two 1×1
    convolutions between encoder, latent and decoder.
    """
    latents = torch.cat([model.encode(part).latent_dist.mean for part in pixels.split(256)])
    mean = latents.mean((0, 2, 3))
    model.quant_conv.bias[: len(mean)] -= mean
    model.post_quant_conv.bias += model.post_quant_conv.weight[:, :, 0, 0] @ mean
    scale = 1 / (latents - mean[:, None, None]).square().mean().sqrt()
    model.register_to_config(scaling_factor=round(float(scale), 5))
