"""Tiny runs for the trainer tests: pairs, pipelines, and trainers whose options name only what a test changes."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig
from PIL import Image
from tiny import NUM_FRAMES, PICTURE_KINDS, tiny_pipeline
from torch import Tensor
from transformers import TrainerCallback

import mmalign
from mmalign.training.prepare import batch_of

METHODS = {"dpo": "DiffusionDPO", "inpo": "InPO", "smpo": "SmPO", "sft": "DiffusionSFT"}
PROMPTS = ("a red shirt", "a blue bag on white", "a green dress", "black sneaker on red background")


def pairs(number: int = 6, seed: int = 0) -> list[dict[str, Any]]:
    """Random pictures of varying size, a prompt from a few, chosen brighter than rejected."""
    rng = np.random.default_rng(seed)

    def picture(low: int, high: int) -> Image.Image:
        height, width = rng.integers(16, 28, 2)
        return Image.fromarray(rng.integers(low, high, (height, width, 3), dtype=np.uint8))

    return [
        {"prompt": PROMPTS[i % len(PROMPTS)], "chosen": picture(60, 255), "rejected": picture(0, 200)}
        for i in range(number)
    ]


def clips(number: int = 6, seed: int = 0) -> list[dict[str, Any]]:
    """`pairs` of clips: random frames, once or twice as many as are used."""
    rng = np.random.default_rng(seed)

    def clip(low: int, high: int) -> list[Image.Image]:
        frames = NUM_FRAMES * int(rng.integers(1, 3))
        height, width = rng.integers(16, 28, 2)
        return [Image.fromarray(frame) for frame in rng.integers(low, high, (frames, height, width, 3), dtype=np.uint8)]

    return [row | {"chosen": clip(60, 255), "rejected": clip(0, 200)} for row in pairs(number)]


def data_for(kind: str) -> list[dict[str, Any]]:
    """Pairs of what a family draws."""
    return pairs() if kind in PICTURE_KINDS else clips()


def pipeline(method: str = "dpo", kind: str = "sd", dtype: torch.dtype = torch.float32) -> Any:
    """One of our pipelines around tiny random components, the same for every call."""
    plain = tiny_pipeline(kind)
    return getattr(mmalign, f"{METHODS[method]}Pipeline")._adopt(plain if dtype == torch.float32 else plain.to(dtype))


def lora(**options: Any) -> LoraConfig:
    """A small LoRA that starts at the base model."""
    return LoraConfig(**({"r": 2, "target_modules": ["to_q", "to_v"], "init_lora_weights": "gaussian"} | options))


def moved_lora() -> LoraConfig:
    """A LoRA that starts away from the base model, so that policy and reference differ."""
    return lora(init_lora_weights=False)


def config(method: str, folder: Path | str, **options: Any) -> Any:
    """The method's config with the smallest run: two steps of two pairs, nothing saved."""
    given: dict[str, Any] = {
        "output_dir": str(folder),
        "max_steps": 2,
        "per_device_train_batch_size": 2,
        "logging_steps": 1,
        "save_strategy": "no",
        "use_cpu": True,
        "disable_tqdm": True,
    }
    if method == "smpo" and "comparison" not in options:
        given["comparison"] = "human"
    if options.get("latents", {"inpo": "ddim", "smpo": "renoise"}.get(method)) in ("ddim", "renoise"):
        given["inversion_steps"] = 2
    return getattr(mmalign, f"{METHODS[method]}Config")(**given | options)


def trainer(
    folder: Path | str,
    method: str = "dpo",
    *,
    kind: str = "sd",
    dtype: torch.dtype = torch.float32,
    pipe: Any = None,
    data: Any = None,
    peft_config: Any = "lora",
    eval_dataset: Any = None,
    ref_model: Any = None,
    callbacks: Any = None,
    **options: Any,
) -> Any:
    """A trainer of `method` on `pairs()` or, for a video family, `clips()`."""
    return getattr(mmalign, f"{METHODS[method]}Trainer")(
        model=pipeline(method, kind, dtype) if pipe is None else pipe,
        args=config(method, folder, **options),
        train_dataset=data_for(kind) if data is None else data,
        eval_dataset=eval_dataset,
        peft_config=lora() if peft_config == "lora" else peft_config,
        ref_model=ref_model,
        callbacks=callbacks,
    )


def batch(run: Any, items: Any = (0, 1)) -> dict[str, Any]:
    """Items of the training data as the loader would batch them."""
    return batch_of([run._train.dataset[item] for item in items])


def losses(run: Any, items: Any = (0, 1), epoch: int = 0) -> Tensor:
    """Per-pair losses of a batch before any step."""
    return run.pair_losses(run.model, batch(run, items), epoch=epoch)[0]


def gradients(run: Any) -> dict[str, Tensor]:
    """Gradients of everything that is trained."""
    return {
        name: p.grad.clone() for name, p in run.network.named_parameters() if p.requires_grad and p.grad is not None
    }


def trained(run: Any) -> dict[str, Tensor]:
    """Copies of the trained weights, as the network holds them now."""
    return {name: p.detach().clone() for name, p in run.network.named_parameters() if p.requires_grad}


def history(run: Any, name: str = "loss") -> list[float]:
    """A metric at every logged step."""
    return [entry[name] for entry in run.state.log_history if "loss" in entry]


class Watch(TrainerCallback):
    """Keeps the gradients of every optimiser step, before it is taken."""

    def __init__(self) -> None:
        self.gradients: list[dict[str, Tensor]] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        named = model.network.named_parameters()
        self.gradients.append({name: p.grad.clone() for name, p in named if p.grad is not None})


class Brightness:
    """A scorer in the range of PickScore's cosines: the mean of a picture's pixels."""

    name, fingerprint, logit_scale = "pickscore", "brightness", 100.0

    def score(self, images: Any, prompts: Any) -> Tensor:
        return torch.tensor([0.15 + 0.1 * float(np.asarray(image).mean()) / 255 for image in images])
