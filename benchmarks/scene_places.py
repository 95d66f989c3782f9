"""Whether the scene base knows where what it is told belongs, after each stage of its training: held-out scenes, two sentences each.

python benchmarks/scene_places.py build/playground    # the folder of `mmalign.playground.build scene-base --work-dir`
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from mmalign.playground import base, photographs, scene_base, scene_gaze, scene_text, scenes, world
from mmalign.playground.paths import STABLE_DIFFUSION
from mmalign.training.loading import scene_vae

_STREAM = 241
_PLACE = {
    "top left": "bottom right",
    "top right": "bottom left",
    "bottom left": "top right",
    "bottom right": "top left",
}


def main() -> None:
    """Prints one line a stage and a timestep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work_dir", type=Path)
    parser.add_argument("--scenes", type=int, default=96)
    parser.add_argument("--timesteps", type=int, nargs="+", default=[500, 700, 900])
    args = parser.parse_args()
    captions, latents = drawn(args.scenes)
    unet = UNet2DConditionModel.from_pretrained(STABLE_DIFFUSION / "unet", torch_dtype=torch.float32)
    parts = nn.ModuleDict({"unet": unet, "text_encoder": scene_text.build_text_encoder()}).eval()
    for stage in range(1, len(scene_base.STAGES) + 1):
        state = torch.load(args.work_dir / f"scene-base-{stage}.pt", weights_only=True)
        # What watches comes after what it watches.
        for parameter, average in zip(parts.parameters(), state["average"], strict=False):
            parameter.data.copy_(average)
        for timestep in args.timesteps:
            error, away = drawing_error(parts, latents, captions, timestep)
            elsewhere, _ = drawing_error(parts, latents, [exchanged(text) for text in captions], timestep)
            change = 100 * float((elsewhere - error).mean() / error.mean())
            print(f"stage {stage}, t {timestep}: error with exchanged places {change:+.2f} %, looks away {away:.3f}")


def drawn(number: int) -> tuple[list[str], Tensor]:
    """Captions of two sentences, and the latents of what they tell of."""
    data, rows, vae = photographs.load("test"), torch.arange(number), scene_vae(torch.float32)
    cells = scenes.draw_scenes(data.labels, rows, seed=_STREAM)
    captions = [
        scenes.short_caption(cells, row, 2, np.random.default_rng([_STREAM, row]), scene_text.fits)
        for row in range(number)
    ]
    pixels = world.compose(data, scenes.cell_rows(rows), cells) * 2 - 1
    with torch.no_grad():
        return captions, scenes.join(vae.encode(pixels).latent_dist.mean * vae.config.scaling_factor)


def exchanged(text: str) -> str:
    """A caption with every cell named by the place across from its own."""
    parts = []
    for sentence in text.split(". "):
        place = scenes.PLACES[scenes.read_caption(sentence)[0].place]
        parts.append(sentence.lower().replace(place, _PLACE[place]))
    return ". ".join(parts)


@torch.no_grad()
def drawing_error(parts: nn.ModuleDict, latents: Tensor, captions: list[str], timestep: int) -> tuple[Tensor, float]:
    """(B,) mean squared errors, on the same noise for every call; and what places of told cells do not pay their own sentence."""
    alpha = base.noise_scheduler().alphas_cumprod[timestep]
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(timestep))
    tokens = scene_text.tokens_of(captions)
    with scene_gaze.watched(parts["unet"]) as (_, _, gazes):
        text = parts["text_encoder"](tokens).last_hidden_state
        prediction = parts["unet"](alpha.sqrt() * latents + (1 - alpha).sqrt() * noise, timestep, text).sample
    away = float(scene_gaze.looking_away(gazes, captions, tokens))
    return (prediction - noise).square().mean((1, 2, 3)), away


if __name__ == "__main__":
    main()
