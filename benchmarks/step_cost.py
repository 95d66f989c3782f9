"""What a training step costs: our trainer against two hand-written loops, in one run, on the playground's Stable Diffusion.

    python benchmarks/step_cost.py [--steps 20] [--batch 16]

bare      the same arithmetic as our DPO step (cached latents and text, reference by adapter off), written as a plain loop
diffusers the arithmetic of diffusers' train_diffusion_dpo.py: autoencoder and text encoder run every step, nothing is cached
ours      DiffusionDPOTrainer, everything included: draws keyed by row, health panel, logging every 10 steps

Prints seconds a step (median over rounds) and the ratio to `bare`; rounds alternate, so that a noisy machine hits all alike.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from peft import LoraConfig

from mmalign import DiffusionDPOConfig, DiffusionDPOPipeline, DiffusionDPOTrainer
from mmalign.data import load_pairs
from mmalign.data.images import to_pixels
from mmalign.files import write_json

BETA = 2000.0
LORA = {
    "r": 16,
    "lora_alpha": 16,
    "init_lora_weights": "gaussian",
    "target_modules": ["to_q", "to_k", "to_v", "to_out.0"],
}
Step = Callable[[int], None]


def dpo_loss(
    unet: torch.nn.Module, noised: torch.Tensor, t: torch.Tensor, text: torch.Tensor, noise: torch.Tensor
) -> torch.Tensor:
    """The loss of one batch laid out [chosen…, rejected…], as in the paper's code."""

    def error() -> torch.Tensor:
        return (unet(noised, t, text, return_dict=False)[0] - noise).square().mean((1, 2, 3))

    unet.disable_adapters()
    with torch.no_grad():
        reference = error()
    unet.enable_adapters()
    chosen, rejected = (error() - reference).chunk(2)
    return -F.logsigmoid(-0.5 * BETA * (chosen - rejected)).mean()


def bare_loop(batch: int, *, cached: bool) -> Step:
    """A loop without any framework; with `cached` latents and text are encoded before the first step."""
    pipe = DiffusionDPOPipeline.from_pretrained("playground")
    unet = pipe.unet.requires_grad_(False)
    unet.add_adapter(LoraConfig(**LORA))
    parameters = [p for p in unet.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, weight_decay=1e-2)
    signal = pipe.scheduler.alphas_cumprod.sqrt()
    sigma = (1 - pipe.scheduler.alphas_cumprod).sqrt()
    records = [record for record in map(load_pairs("playground").__getitem__, range(8 * batch)) if record.label != 0.5]
    chosen = torch.stack([to_pixels(r.image_0 if r.label > 0.5 else r.image_1) for r in records])
    rejected = torch.stack([to_pixels(r.image_1 if r.label > 0.5 else r.image_0) for r in records])
    prompts = [record.prompt for record in records]

    @torch.no_grad()
    def encode(rows: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        pixels = torch.cat([chosen[rows], rejected[rows]])
        latents = pipe.vae.encode(pixels).latent_dist.sample() * pipe.vae.config.scaling_factor
        text, _ = pipe.encode_prompt([prompts[i] for i in rows], "cpu", 1, False)
        return latents, torch.cat([text, text])

    batches = [[(k * batch + i) % len(records) for i in range(batch)] for k in range(8)]
    stored = [encode(rows) for rows in batches] if cached else []

    def step(number: int) -> None:
        latents, text = stored[number % 8] if cached else encode(batches[number % 8])
        noise = torch.randn(batch, *latents.shape[1:]).repeat(2, 1, 1, 1)
        t = torch.randint(0, len(signal), (batch,)).repeat(2)
        noised = signal[t].view(-1, 1, 1, 1) * latents + sigma[t].view(-1, 1, 1, 1) * noise
        loss = dpo_loss(unet, noised, t, text, noise)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def seconds_of_trainer(batch: int, steps: int, folder: str) -> float:
    """Seconds a step of our trainer, over one `train()` without its set-up."""
    pipe = DiffusionDPOPipeline.from_pretrained("playground")
    args = DiffusionDPOConfig(
        output_dir=folder,
        max_steps=steps,
        per_device_train_batch_size=batch,
        beta=BETA,
        learning_rate=1e-4,
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
    )
    trainer = DiffusionDPOTrainer(model=pipe, args=args, train_dataset="playground", peft_config=LoraConfig(**LORA))
    return trainer.train().metrics["train_runtime"] / steps


def seconds_of_loop(step: Step, steps: int) -> float:
    """Seconds a step of a plain loop."""
    start = time.perf_counter()
    for number in range(steps):
        step(number)
    return (time.perf_counter() - start) / steps


def main() -> None:
    """Times all three in alternating rounds and prints ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "step_cost.json")
    args = parser.parse_args()
    bare, encoding = bare_loop(args.batch, cached=True), bare_loop(args.batch, cached=False)
    seconds: dict[str, list[float]] = {"bare": [], "diffusers": [], "ours": []}
    with tempfile.TemporaryDirectory() as folder:
        seconds_of_trainer(args.batch, 2, folder)
        for _ in range(args.rounds):
            seconds["bare"].append(seconds_of_loop(bare, args.steps))
            seconds["diffusers"].append(seconds_of_loop(encoding, args.steps))
            seconds["ours"].append(seconds_of_trainer(args.batch, args.steps, folder))
    median = {name: statistics.median(values) for name, values in seconds.items()}
    result = {
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "steps": args.steps,
        "batch": args.batch,
        "seconds_a_step": {name: round(value, 4) for name, value in median.items()},
        "ratio_to_bare": {name: round(value / median["bare"], 3) for name, value in median.items()},
        "rounds": {name: [round(v, 4) for v in values] for name, values in seconds.items()},
    }
    write_json(args.output, result)
    for name in seconds:
        print(f"{name:10s} {median[name]:.3f} s a step   {median[name] / median['bare']:.2f} × bare")


if __name__ == "__main__":
    main()
