"""What a run left behind, and what to type next."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mmalign.cli import launch
from mmalign.cli.options import Given
from mmalign.cli.terminal import command, without_options


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints of a run, oldest step first."""
    found = [path for path in folder.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdigit()]
    return sorted(found, key=lambda path: int(path.name.removeprefix("checkpoint-")))


def how_to_go_on(method: str, words: list[str], folder: Path) -> str:
    """What to type after an interruption."""
    found = checkpoints(folder)
    if not found:
        return f"stopped before the first checkpoint in {folder} (--save-steps says how often one is written)"
    kept = without_options(launch.typed([method, *words]), ["resume_from_checkpoint", "overwrite", "hub_token"])
    again = command("mmalign", "train", *kept, "--resume-from-checkpoint", "latest")
    return f"stopped; {found[-1]} is whole. Go on with:\n  {again}"


def farewell(given: Given, folder: Path, config: Any, *, judged: bool) -> str:
    """Where everything was saved, and what to type next; `judged`: whether scorers read what the model draws."""
    lines = ["", f"saved in {folder}:"]
    wanted = {
        "pytorch_lora_weights.safetensors": f'the LoRA; any diffusers pipeline takes it: pipe.load_lora_weights("{folder}")',
        "user_attention": f'what was learned of users; PPDPipeline takes it: pipe.load_aligned("{folder}")',
        "pipeline": f'the whole pipeline: DiffusionPipeline.from_pretrained("{folder / "pipeline"}")',
        "smoothing.json": "the normaliser of the scorer's values",
        "history.json": "everything that was logged",
        "samples": "sample pictures",
        "README.md": "the model card",
    }
    if config.trains_negative:
        wanted["pytorch_lora_weights.safetensors"] = (
            f'the negative side: SelfNPOPipeline.from_pretrained("{given["model"]}").load_negative("{folder}")'
        )
    lines += [f"  {name:<34}{what}" for name, what in wanted.items() if (folder / name).exists()]
    lines += [f"  {path.name}" for path in checkpoints(folder)[-1:]]
    if (folder / "user_attention").exists():
        return "\n".join([*lines, *_next_for_users(given, folder, config)])
    held = [] if config.trained_on is None else ["--trained-on", config.trained_on]
    if config.trains_negative:
        return "\n".join([*lines, *_next_with_negative(given, folder, held)])
    long = [] if config.long_prompts is None else ["--long-prompts", config.long_prompts]
    model = (
        ["--model", str(folder / "pipeline")] if given["full"] else ["--model", given["model"], "--lora", str(folder)]
    )
    base = ["--base", given["model"]]
    prompts = ["--prompts", "playground" if given["data"] == "playground" else "prompts.txt"]
    lines += ["", "next:", "  " + command("mmalign", "generate", *model, *prompts, *long, "--num-prompts", "4")]
    if judged:
        lines.append("  " + command("mmalign", "evaluate", *model, *base, *prompts, *held, *long))
    return "\n".join(lines)


def _next_for_users(given: Given, folder: Path, config: Any) -> list[str]:
    """Drawing for somebody: of the file that was trained with, of the scorers, or of users who were read when training started."""
    from mmalign.data.users import SCORERS_FILE

    lines = ["", "next (NAME is one of the users):"]
    users = config.users or str(folder / SCORERS_FILE)
    if not users.endswith(".safetensors"):
        read = ["--data", given["data"], "--encoder", users, "--shots", str(config.user_shots)]
        if given["root"] is not None:
            read += ["--root", given["root"]]
        lines.append("  " + command("mmalign", "embed-users", *read))
        users = "users.safetensors"
    prompts = ["--prompts", "playground" if given["data"] == "playground" else "prompts.txt"]
    model = ["--model", given["model"], "--lora", str(folder), "--users", users, "--user", "NAME"]
    lines.append("  " + command("mmalign", "generate", *model, *prompts, "--num-prompts", "4"))
    lines.append("  " + command("mmalign", "evaluate", *model, *prompts))
    return lines


def _next_with_negative(given: Given, folder: Path, held: list[str]) -> list[str]:
    model = ["--model", given["model"], "--negative", str(folder)]
    prompts = ["--prompts", "playground" if given["data"] == "playground" else "prompts.txt"]
    return [
        "",
        "next (--lora adds what aligned the positive side):",
        "  " + command("mmalign", "generate", *model, *prompts, "--num-prompts", "4"),
        "  " + command("mmalign", "evaluate", *model, *prompts, *held),
    ]
