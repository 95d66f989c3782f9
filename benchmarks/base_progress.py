"""How well an unfinished base draws: judge A on training prompts, from a checkpoint of `mmalign.playground.build base`.

python benchmarks/base_progress.py build/playground/base.pt --guidance 2 3 4 --prompts 128
"""

import argparse
from pathlib import Path

import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline
from torch import nn

from mmalign.playground import base, measure, pairs, tokenizer
from mmalign.playground.paths import STABLE_DIFFUSION


def main() -> None:
    """Prints one line a guidance scale."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--guidance", type=float, nargs="+", default=[2.0, 3.0, 4.0])
    parser.add_argument("--prompts", type=int, default=128)
    args = parser.parse_args()
    vocabulary = tokenizer.build()
    unet, text_encoder = base.build_parts(vocabulary)
    state = torch.load(args.checkpoint, weights_only=True)
    parts = nn.ModuleDict({"unet": unet, "text_encoder": text_encoder})
    for parameter, average in zip(parts.parameters(), state["average"], strict=True):
        parameter.data.copy_(average)
    pipe = StableDiffusionPipeline(
        vae=AutoencoderKL.from_pretrained(STABLE_DIFFUSION / "vae", torch_dtype=torch.float32),
        text_encoder=text_encoder.eval(),
        tokenizer=vocabulary,
        unet=unet.eval(),
        scheduler=base.noise_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    prompts = pairs.prompts().train[5::13][: args.prompts]
    for guidance in args.guidance:
        print(f"step {state['step']}, guidance {guidance:g}:", measure.base_accuracy(pipe, prompts, guidance, 0, "A"))


if __name__ == "__main__":
    main()
