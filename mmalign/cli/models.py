"""Which model a verb works with: the options every verb shares, loading, prompts, and where pictures are put."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mmalign.cli.options import Given, Option, UsageError, number, one_of, whole

BASE_CLASS = "StableDiffusionPipeline"
DTYPES = ("float32", "bfloat16", "float16")
_SAMPLING = "how pictures are drawn"


def model_options(*, group: str, lora: bool = False) -> list[Option]:
    """--model and how it is loaded."""
    adapter = [
        Option(
            name="lora",
            help="a trained LoRA on top: a run's folder, a file, or a Hub id",
            metavar="DIR",
            group=group,
            nullable=True,
        ),
        Option(name="lora_scale", help="how strongly it acts", convert=number, metavar="X", default=1.0, group=group),
    ]
    return [
        Option(
            name="model",
            help='a Hub id, a diffusers folder, one .safetensors file, or "playground"',
            required=True,
            group=group,
        ),
        *(adapter if lora else []),
        Option(name="revision", help="branch, tag or commit on the Hub", group=group, nullable=True, hidden=True),
        Option(
            name="variant", help='variant of the weight files, such as "fp16"', group=group, nullable=True, hidden=True
        ),
        Option(
            name="vae",
            help="another VAE, such as madebyollin/sdxl-vae-fp16-fix",
            group=group,
            nullable=True,
            hidden=True,
        ),
        Option(
            name="base_class",
            help="diffusers class of a .safetensors file",
            default=BASE_CLASS,
            group=group,
            hidden=True,
        ),
        Option(
            name="dtype",
            help="precision in which weights are loaded",
            convert=one_of(*DTYPES),
            metavar="|".join(DTYPES),
            default="float32",
            group=group,
        ),
    ]


def device_option(group: str) -> Option:
    """--device, for verbs in which no trainer chooses it."""
    return Option(name="device", help="cpu, cuda, cuda:1, mps; none is the best one here", group=group, nullable=True)


def sampling_options() -> list[Option]:
    """How pictures are drawn, for generate and evaluate."""
    common: dict[str, Any] = {"group": _SAMPLING}
    return [
        Option(name="num_inference_steps", help="sampling steps", convert=whole, metavar="N", default=25, **common),
        Option(
            name="guidance_scale",
            help="classifier-free guidance; none is 7.5, or the playground's own with --model playground",
            convert=number,
            metavar="X",
            nullable=True,
            **common,
        ),
        Option(
            name="seed",
            help="of the first picture; the next ones count up",
            convert=whole,
            metavar="N",
            default=0,
            **common,
        ),
        Option(
            name="height", help="pixels; none is the model's own", convert=whole, metavar="N", nullable=True, **common
        ),
        Option(
            name="width", help="pixels; none is the model's own", convert=whole, metavar="N", nullable=True, **common
        ),
        Option(
            name="batch_size",
            help="pictures drawn at once; does not change them",
            convert=whole,
            metavar="N",
            default=8,
            **common,
        ),
    ]


def prompt_options(group: str, *, default: str | None = None) -> list[Option]:
    """--prompt, --prompts and --num-prompts."""
    return [
        Option(
            name="prompt",
            help="a prompt; several may follow, or repeat the option",
            many=True,
            group=group,
            nullable=True,
        ),
        Option(
            name="prompts",
            help="prompts from a file (.txt one a line, .json, .jsonl, .csv or .tsv with a column prompt or caption), "
            'or "playground": its held-out ones',
            metavar="FILE",
            default=default,
            group=group,
            nullable=True,
        ),
        Option(
            name="num_prompts", help="only the first of them", convert=whole, metavar="N", group=group, nullable=True
        ),
    ]


def load_pipeline(
    given: Given, pipeline_class: Any = None, *, model: str | None = None, lora: str | None = None, device: Any = None
) -> Any:
    """The pipeline that was asked for, on its device. pipeline_class: one of ours; plain diffusers without it."""
    import torch

    from mmalign.training.loading import load_base, single_file

    name = model or given["model"]
    dtype = getattr(torch, given["dtype"])
    options: dict[str, Any] = {"dtype": dtype}
    if name == given["model"]:
        options |= {key: given[key] for key in ("revision", "variant") if given[key] is not None}
        if given["vae"] is not None:
            from diffusers import AutoencoderKL

            options["vae"] = AutoencoderKL.from_pretrained(given["vae"], dtype=dtype, use_safetensors=True)
    if str(name).endswith((".safetensors", ".ckpt", ".pt")):
        load, options["base"] = (
            single_file if pipeline_class is None else pipeline_class.from_single_file,
            given["base_class"],
        )
    elif given["base_class"] != BASE_CLASS:
        raise UsageError("--base-class belongs to a single .safetensors file; a folder names its own class")
    else:
        load = load_base if pipeline_class is None else pipeline_class.from_pretrained
    pipe = load(name, **options)
    if lora is not None:
        pipe.load_lora_weights(_lora_folder(lora), adapter_name="aligned")
        if given["lora_scale"] != 1:
            pipe.set_adapters(["aligned"], [given["lora_scale"]])
    return pipe.to(device if device is not None else best_device(given.values.get("device")))


def _lora_folder(lora: str) -> str:
    path = Path(lora).expanduser()
    if path.is_dir() and not any(path.glob("*.safetensors")):
        inside = ", ".join(sorted(entry.name for entry in path.iterdir())[:6]) or "nothing"
        raise ValueError(
            f"{lora} holds no LoRA (found: {inside}); name the output_dir of a run, or a .safetensors file"
        )
    return str(path) if path.exists() else lora


def best_device(asked: str | None) -> str:
    """The device that was asked for, or this machine's accelerator, or the CPU."""
    if asked is not None:
        return asked
    import torch

    found = torch.accelerator.current_accelerator(check_available=True)
    return "cpu" if found is None else str(found)


def guidance_of(given: Given) -> float:
    """The guidance scale: as given, the one the playground's base was measured at, or diffusers' usual 7.5."""
    if given["guidance_scale"] is not None:
        return float(given["guidance_scale"])
    if given["model"] == "playground":
        from mmalign.playground.paths import CURVES

        measured = CURVES / "base-measured.json"
        if measured.is_file():
            return float(json.loads(measured.read_text())["guidance_scale"])
    return 7.5


def read_prompts(given: Given) -> list[str]:
    """Every prompt that was asked for, in order."""
    prompts = list(given["prompt"] or [])
    if given["prompts"] == "playground":
        from mmalign.playground.pairs import prompts as playground_prompts

        prompts += playground_prompts().test
    elif given["prompts"] is not None:
        prompts += prompts_in(Path(given["prompts"]).expanduser())
    if not prompts:
        raise UsageError('no prompts: give --prompt "…", --prompts FILE, or --prompts playground')
    return prompts[: given["num_prompts"]]


def prompts_in(path: Path) -> list[str]:
    """The prompts of a file, by its ending."""
    if not path.is_file():
        raise ValueError(f"{path}: no such prompt file")
    content = path.read_text(encoding="utf-8")
    if path.suffix in (".csv", ".tsv"):
        rows: Sequence[Any] = list(
            csv.DictReader(content.splitlines(), delimiter="\t" if path.suffix == ".tsv" else ",")
        )
    elif path.suffix == ".jsonl":
        rows = [json.loads(line) for line in content.splitlines() if line.strip()]
    elif path.suffix == ".json":
        rows = json.loads(content)
    else:
        rows = content.splitlines()
    if not isinstance(rows, list):
        raise ValueError(f"{path} must hold a list of prompts")
    found = [_prompt_of(row, path) for row in rows]
    return [prompt for prompt in found if prompt]


def _prompt_of(row: Any, path: Path) -> str:
    if isinstance(row, dict):
        named = {str(key).lower(): value for key, value in row.items()}
        row = next((named[key] for key in ("prompt", "caption", "text") if key in named), None)
    if not isinstance(row, str):
        raise ValueError(f"{path}: a row has no column prompt, caption or text")
    return row.strip()


def slug(prompt: str, length: int = 40) -> str:
    """A prompt as a part of a file name."""
    return re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:length].rstrip("-") or "prompt"
