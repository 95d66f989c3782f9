"""`mmalign export`: a run's result as other tools load it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from mmalign.cli.models import ALIGNED, load_pipeline, model_options
from mmalign.cli.options import Alias, Command, Given, Option, UsageError, flag, one_of, whole

_FORMATS = ("diffusers", "peft", "kohya", "comfy", "merged")
_WHAT, _MODEL = "what is written", "the model"
_EPILOG = """Formats:
  diffusers  a folder for pipe.load_lora_weights(DIR)
  peft       a folder for peft.PeftModel.from_pretrained(pipe.unet, DIR)
  kohya      a .safetensors file with lora_unet_… keys: Stable Diffusion 1.x, 2.x, XL and FLUX
  comfy      a .safetensors file for ComfyUI
  merged     a whole pipeline with the LoRA merged, for DiffusionPipeline.from_pretrained(DIR)
"""


def _model(option: Option) -> Option:
    """The shared option as it reads here: the base is not always needed, and the precision is the result's."""
    changed: dict[str, dict[str, Any]] = {
        "lora": {
            "help": "what was aligned: a run's folder, or with --model all that generate --lora takes; may stand first without --lora",
        },
        "lora_scale": {"help": "how strongly a LoRA is merged"},
        "model": {
            "help": "its base, for --format merged and for what is no run's folder",
            "required": False,
            "nullable": True,
        },
        "dtype": {
            "help": "precision of what is written; none is float32 for merged, and that of the training for a LoRA",
            "default": None,
            "nullable": True,
        },
    }
    return replace(option, **changed.get(option.name, {}))


VERB = Command(
    prog="mmalign export",
    description="Writes a run's LoRA, or the pipeline with it, as other tools load it. Nothing is left where it fails.",
    example="mmalign export runs/smpo --format kohya --output aligned.safetensors",
    options=[
        *map(_model, model_options(group=_MODEL, lora=True)),
        Option(
            name="format",
            help="see below",
            convert=one_of(*_FORMATS),
            metavar="|".join(_FORMATS),
            required=True,
            group=_WHAT,
        ),
        Option(
            name="output",
            help="the folder, or the .safetensors file of kohya and comfy",
            metavar="PATH",
            required=True,
            group=_WHAT,
        ),
        Option(
            name="rank",
            help="make a whole network that was trained a LoRA of --model, the nearest of this rank; how near is told",
            convert=whole,
            metavar="N",
            group=_WHAT,
            nullable=True,
        ),
    ],
    aliases=[
        Alias("output_dir", "is output", lambda value: {"output": value}),
        Alias("pretrained_model_name_or_path", "is model", lambda value: {"model": value}),
        Alias("torch_dtype", "is dtype", lambda value: {"dtype": value}),
        ALIGNED,
    ],
    epilog=_EPILOG,
)


def run(argv: Sequence[str]) -> int:
    """Writes, and says where."""
    words = list(argv)
    given = VERB.read(["--lora", *words] if words and not words[0].startswith("-") else words)
    if given is None:
        return 0
    import torch

    from mmalign.training.export import export

    dtype = None if given["dtype"] is None else getattr(torch, given["dtype"])
    print(f"written: {export(_source(given), given['output'], format=given['format'], dtype=dtype)}")
    return 0


def _source(given: Given) -> Any:
    """What is exported: the base with what was aligned on it, or a folder alone where that says enough."""
    if given["lora"] is None and given["model"] is None:
        raise UsageError("nothing to export: name a run's folder, or a pipeline with --model")
    if given["lora_scale"] != 1 and given["format"] != "merged":
        raise UsageError("--lora-scale acts on --format merged; a LoRA file is scaled where it is loaded")
    of_model = [name for name in ("revision", "variant", "vae", "base_class", "allow_pickle") if name in given.explicit]
    if given["model"] is None and of_model:
        raise UsageError(f"{flag(of_model[0])} has no effect without --model")
    # A merge in half precision would round the LoRA away.
    single = Given(given.values | {"dtype": "float32"}, given.explicit)
    if given["rank"] is not None:
        return _nearest_lora(given, single)
    if given["model"] is not None:
        return load_pipeline(single, lora=given["lora"], device="cpu")
    folder = Path(given["lora"]).expanduser()
    if given["format"] != "merged":
        return folder
    if not (folder / "model_index.json").is_file():
        raise UsageError(f"--format merged needs the base of {folder}: name it with --model")
    return load_pipeline(single, model=str(folder), device="cpu")


def _nearest_lora(given: Given, single: Given) -> Any:
    """What was trained as a LoRA of its base; says how much of it is left out."""
    from mmalign.training.aligned import check_fits, read_released
    from mmalign.training.low_rank import low_rank
    from mmalign.training.weights import aligned_network

    if given["model"] is None or given["lora"] is None or given["format"] == "merged":
        raise UsageError(
            "--rank makes a LoRA: name the network with --lora, its base with --model, and a --format of LoRAs"
        )
    pipe = load_pipeline(single, device="cpu")
    component, network = aligned_network(pipe)
    released = read_released(pipe, given["lora"], allow_pickle=given["allow_pickle"])
    if released.is_lora:
        raise UsageError(f"{given['lora']} is a LoRA already, so --rank has no effect")
    check_fits(network, released)
    lora, error = low_rank(network, component, released.state, given["rank"])
    print(
        f"rank {given['rank']}: {error:.1%} of the difference from {given['model']} is left out (relative Frobenius norm)"
    )
    return lora
