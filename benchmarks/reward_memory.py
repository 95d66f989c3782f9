"""What reward fine-tuning holds in memory: step by step, and through the graph of the sampler.

    python benchmarks/reward_memory.py [--batch 1] [--grad-steps 5 10 25 50]

Pictures of the playground's Stable Diffusion, drawn in as many DDIM steps as are trained, under guidance; a LoRA on the attention, the
playground's reward behind the VAE, float32. Counted are the bytes of all tensors made in forward and backward that live at one moment,
each storage once, at their highest; weights are there before and do not count.

exact        one trained step and one branch of guidance at a time (`mmalign.likelihood.rollout.exact_losses`)
checkpoints  the whole sampler, each trained step checkpointed, as LongAlign's released code has it
graph        the whole sampler

Prints MiB, and each form's ratio to `exact`. The gradients are compared too.
"""

import argparse
import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from live_bytes import Live
from torch import Tensor

from mmalign import LongAlignPipeline
from mmalign.denoisers import adapter_for
from mmalign.files import write_json
from mmalign.likelihood.rollout import RolloutConfig, draw_start, exact_losses, graph_losses
from mmalign.playground.pairs import prompts as split_prompts
from mmalign.rewards import scorer
from mmalign.training.pipeline import default_lora
from mmalign.training.weights import add_adapter

RESULTS = Path(__file__).with_name("results") / "reward_memory.json"
FORMS = ("exact", "checkpoints", "graph")


def measured(losses: Callable[[], Tensor], parameters: list[Tensor]) -> tuple[int, list[Tensor]]:
    """Most bytes alive in forward and backward, and the gradients."""
    for parameter in parameters:
        parameter.grad = None
    gc.collect()
    with Live() as live:
        losses().mean().backward()
    return live.most, [parameter.grad.clone() for parameter in parameters if parameter.grad is not None]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--grad-steps", type=int, nargs="+", default=[5, 10, 25, 50])
    parser.add_argument("--forms", nargs="+", default=FORMS)
    args = parser.parse_args()
    pipe = LongAlignPipeline.from_pretrained("playground")
    denoiser, reward = adapter_for(pipe), scorer("playground")
    pipe.unet.requires_grad_(False)
    pipe.vae.requires_grad_(False)
    add_adapter(pipe.unet, default_lora())
    # Away from its start, where half of a LoRA gets no gradient.
    parameters = [parameter for parameter in pipe.unet.parameters() if parameter.requires_grad]
    torch.manual_seed(0)
    for parameter in parameters:
        torch.nn.init.normal_(parameter, std=0.02)
    texts = split_prompts().train[: args.batch]
    text, empty = denoiser.encode_prompt(texts), denoiser.encode_prompt([""] * args.batch)

    def predict(x: Tensor, t: Tensor, row: Tensor, conditioned: bool) -> Tensor:
        return denoiser.predict(pipe.unet, x, t, (text if conditioned else empty)[row])

    def score(x0: Tensor) -> Tensor:
        pixels = (denoiser.decode_with_gradient(x0) / 2 + 0.5).clamp(0, 1)
        return (1 - reward.score_pixels(pixels, texts)) / 2

    rows: list[dict[str, float]] = []
    for steps in args.grad_steps:
        config = RolloutConfig(num_steps=steps, grad_steps=steps)
        start = draw_start(0, 0, range(args.batch), denoiser.latent_shape(*denoiser.native_size), config)
        common: tuple[Any, ...] = (predict, denoiser.schedule, start, config, score)
        calls: dict[str, Callable[[], Tensor]] = {
            "exact": lambda common=common: exact_losses(*common, parameters),
            "checkpoints": lambda common=common: graph_losses(*common),
            "graph": lambda common=common: graph_losses(*common, checkpointed=False),
        }
        found = {form: measured(calls[form], parameters) for form in args.forms}
        exact = found["exact"]
        row: dict[str, float] = {"grad_steps": steps}
        for form, (most, gradients) in found.items():
            scale = max(float(gradient.abs().max()) for gradient in exact[1])
            off = max(float((a - b).abs().max()) for a, b in zip(gradients, exact[1], strict=True)) / scale
            row |= {
                f"{form}_mib": round(most / 2**20, 2),
                f"{form}_ratio": round(most / exact[0], 2),
                f"{form}_off": off,
            }
            print(
                f"{steps:3d} trained steps  {form:<12} {most / 2**20:8.1f} MiB  ×{most / exact[0]:6.2f}  gradient off by {off:.1e}",
                flush=True,
            )
        rows.append(row)
        write_json(RESULTS, {"torch": torch.__version__, "batch": args.batch, "rows": rows})
    print(RESULTS)


if __name__ == "__main__":
    main()
