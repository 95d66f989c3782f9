"""Short runs of tiny models that answer, for the tests of their trainer."""

import copy
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from tiny_vlm import VIDEO_KINDS, clip, picture, tiny_vlm

from mmalign.training.token_config import TokenConfig
from mmalign.training.token_parts import default_lora
from mmalign.training.token_pipeline import TokenPipeline
from mmalign.training.token_trainer import TokenTrainer

_WORDS = ("red", "green", "blue", "black", "white")


def rows(kind: str = "lfm2", number: int = 6, seed: int = 0) -> list[dict[str, Any]]:
    """Questions with a preferred answer that is always the same word, about pictures or clips where the model sees."""
    made = []
    for row in range(number):
        word = _WORDS[(row + seed) % len(_WORDS)]
        one: dict[str, Any] = {
            "prompt": f"Which colour, {word}{row + 100 * seed}?",
            "chosen": "A bag.",
            "rejected": f"The {word} dress!",
        }
        if kind in VIDEO_KINDS:
            frames = clip(4, seed=row + 100 * seed).frames
            one["video"] = {"frames": list(frames), "fps": 2.0}
        elif kind == "lfm2_vl":
            one["image"] = picture(40, 24, seed=row + 100 * seed).image
        made.append(one)
    return made


def pipeline(kind: str = "lfm2") -> TokenPipeline:
    """A tiny model of its own, not the shared one."""
    model, processor = tiny_vlm(kind)
    return TokenPipeline.from_parts(copy.deepcopy(model), processor)


def config(folder: Path, **options: Any) -> TokenConfig:
    """Four steps of two rows on the CPU, every one logged."""
    usual: dict[str, Any] = dict(
        output_dir=str(folder),
        max_steps=4,
        learning_rate=1e-2,
        per_device_train_batch_size=2,
        per_device_eval_batch_size=2,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        gradient_checkpointing=False,
    )
    return TokenConfig(**usual | options)


def moved_lora(pipe: TokenPipeline, seed: int = 1) -> LoraConfig:
    """A LoRA whose start is not the base, so that policy and reference differ at once; drawn by peft from the run's seed."""
    lora = default_lora(pipe.model)
    lora.init_lora_weights = False
    return lora


def trainer(folder: Path, kind: str = "lfm2", pipe: TokenPipeline | None = None, **options: Any) -> TokenTrainer:
    """A run of `kind` on its rows; peft_config "default" is the pipeline's, "moved" one that starts elsewhere."""
    pipe = pipe or pipeline(kind)
    peft = options.pop("peft_config", "default")
    if isinstance(peft, str):
        peft = default_lora(pipe.model) if peft == "default" else moved_lora(pipe)
    data = {name: options.pop(name) for name in ("train_dataset", "eval_dataset", "ref_model") if name in options}
    data.setdefault("train_dataset", rows(kind))
    return TokenTrainer(model=pipe, args=config(folder, **options), peft_config=peft, **data)


def losses_of(run: TokenTrainer) -> list[float]:
    """What was logged at every step."""
    return [entry["loss"] for entry in run.state.log_history if "loss" in entry]


def batch(run: TokenTrainer, number: int = 2) -> dict[str, Any]:
    """The first rows as a batch."""
    return run.collate([run._train.dataset[index] for index in range(number)])


def plain_log_probs(
    model: torch.nn.Module,
    run: TokenTrainer,
    number: int = 2,
    whole: bool = False,
    items: list[dict[str, Any]] | None = None,
) -> list[list[torch.Tensor]]:
    """Of each row and side the log-probabilities of its supervised tokens, from a plain pass over all logits.

    whole: of the whole vocabulary there. items: other rows than the first ones of the training data.
    """
    told = []
    for item in items or [run._train.dataset[index] for index in range(number)]:
        encoded = item["encoded"]
        sides = []
        for answer in encoded.answers:
            ids = torch.cat([encoded.prompt, answer.ids])
            with torch.no_grad():
                logits = model(input_ids=ids[None]).logits[0].log_softmax(-1)
            own = torch.cat([torch.zeros(len(encoded.prompt), dtype=torch.bool), answer.supervised])
            places = own.nonzero()[:, 0]
            sides.append(logits[places - 1] if whole else logits[places - 1, ids[places]])
        told.append(sides)
    return told
