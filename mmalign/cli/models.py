"""Which model a verb works with: the options every verb shares, loading, prompts, and where pictures are put."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mmalign.cli.options import Alias, Given, Option, UsageError, flag, number, one_of, switch, whole

BASE_CLASS = "StableDiffusionPipeline"
DTYPES = ("float32", "bfloat16", "float16")
_SAMPLING = "how pictures are drawn"
# For verbs with `model_options(lora=True)`: not everything that was released is a LoRA.
ALIGNED = Alias("aligned", "is lora", lambda value: {"lora": value})
# And for those with `sampling_options()` too.
ALIASES = [
    Alias("steps", "is num_inference_steps", lambda value: {"num_inference_steps": value}),
    Alias("pretrained_model_name_or_path", "is model", lambda value: {"model": value}),
    Alias("torch_dtype", "is dtype", lambda value: {"dtype": value}),
    ALIGNED,
]
_SEED = "with the prompt's text it decides each picture's own seed"


def model_options(*, group: str, lora: bool = False) -> list[Option]:
    """--model and how it is loaded."""
    adapter = [
        Option(
            name="lora",
            help="what alignment made of it (also --aligned): a LoRA of diffusers, peft or kohya (a run's folder, a file, a Hub id), a "
            "pipeline or folder with unet/, a network's own folder",
            metavar="DIR",
            group=group,
            nullable=True,
        ),
        Option(
            name="lora_scale", help="how strongly a LoRA acts", convert=number, metavar="X", default=1.0, group=group
        ),
        Option(
            name="allow_pickle",
            help="let --lora be a state dict in .bin, .pth or .pt, of which tensors only are read",
            convert=switch,
            default=False,
            group=group,
            hidden=True,
        ),
    ]
    return [
        Option(
            name="model",
            help='a Hub id, a diffusers folder, one .safetensors file, "playground" or "playground-scenes"',
            required=True,
            group=group,
        ),
        *(adapter if lora else []),
        revision_option(group),
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
        dtype_option(group),
    ]


def revision_option(group: str) -> Option:
    """--revision of --model."""
    return Option(name="revision", help="branch, tag or commit on the Hub", group=group, nullable=True, hidden=True)


def dtype_option(group: str) -> Option:
    """--dtype."""
    return Option(
        name="dtype",
        help="precision in which weights are loaded",
        convert=one_of(*DTYPES),
        metavar="|".join(DTYPES),
        default="float32",
        group=group,
    )


def negative_options(*, group: str) -> list[Option]:
    """--negative and how strongly it acts, for generate and evaluate."""
    weight: dict[str, Any] = {"convert": number, "metavar": "X", "default": 1.0, "group": group}
    return [
        Option(
            name="negative",
            help="what runs in the negative branch, from self-npo, diffusion-npo or DPO on swapped pairs; forms as of --lora",
            metavar="DIR",
            group=group,
            nullable=True,
        ),
        Option(name="negative_alpha", help="how much of --lora the negative branch keeps", **weight),
        Option(name="negative_beta", help="how strongly --negative acts; 0 is plain guidance", **weight),
    ]


def long_prompt_option(*, group: str) -> Option:
    """--long-prompts, for generate and evaluate."""
    return Option(
        name="long_prompts",
        help="read prompts beyond CLIP's 77 tokens sentence by sentence, or naively one after the other; none cuts them",
        convert=one_of("segments", "concatenate"),
        metavar="segments|concatenate",
        group=group,
        nullable=True,
    )


def device_option(group: str) -> Option:
    """--device, for verbs in which no trainer chooses it."""
    return Option(name="device", help="cpu, cuda, cuda:1, mps; none is the best one here", group=group, nullable=True)


def sampling_options(*, seed: str = _SEED) -> list[Option]:
    """How pictures are drawn. seed: what --seed is."""
    common: dict[str, Any] = {"group": _SAMPLING}
    return [
        Option(name="num_inference_steps", help="sampling steps", convert=whole, metavar="N", default=25, **common),
        Option(
            name="guidance_scale",
            help="classifier-free guidance; none is 7.5, or its own with --model playground or playground-scenes",
            convert=number,
            metavar="X",
            nullable=True,
            **common,
        ),
        Option(
            name="true_cfg_scale",
            help="FLUX, which is told --guidance-scale: guidance by a negative branch, of the empty prompt; there --negative needs it",
            convert=number,
            metavar="X",
            nullable=True,
            **common,
        ),
        Option(
            name="seed",
            help=seed,
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
        Option(
            name="safety_checker",
            help="let Stable Diffusion's checker, where the model has one, stop at a picture; --no-safety-checker draws it",
            convert=switch,
            default=True,
            hidden=True,
            **common,
        ),
    ]


def prompt_options(group: str, *, default: str | None = None) -> list[Option]:
    """--prompt, --prompts, --prompts-split and --num-prompts."""
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
            help="prompts from a file (.txt one a line, .json, .jsonl, .csv, .tsv or .parquet with a column prompt or caption; each "
            'once), a folder of such, "playground" or "playground-scenes": their held-out ones',
            metavar="FILE",
            default=default,
            group=group,
            nullable=True,
        ),
        Option(
            name="prompts_split",
            help="of a folder of files named after splits, such as validation_unique",
            metavar="NAME",
            group=group,
            nullable=True,
            hidden=True,
        ),
        Option(
            name="num_prompts", help="only the first of them", convert=whole, metavar="N", group=group, nullable=True
        ),
    ]


def load_pipeline(
    given: Given,
    pipeline_class: Any = None,
    *,
    model: str | None = None,
    lora: str | None = None,
    negative: str | None = None,
    device: Any = None,
    quantization: str | None = None,
) -> Any:
    """The pipeline that was asked for, on its device. pipeline_class: one of ours; plain diffusers without it.

    lora, negative: what is put onto it, and what its negative branch gets.
    quantization: "nf4" or "int8" puts the network on the GPU in that form, and leaves the other parts on the CPU.
    """
    import torch

    from mmalign.denoisers.long_prompts import SETTINGS, LongPrompts, long_prompts_of, read_long_prompts
    from mmalign.training.aligned import load_aligned
    from mmalign.training.loading import load_base, single_file
    from mmalign.training.loading import quantization as quantized

    name = model or given["model"]
    dtype = getattr(torch, given["dtype"])
    options: dict[str, Any] = {"dtype": dtype}
    if name == given["model"]:
        options |= {key: given[key] for key in ("revision", "variant") if given[key] is not None}
        if given["vae"] is not None:
            from diffusers import AutoencoderKL

            options["vae"] = AutoencoderKL.from_pretrained(given["vae"], dtype=dtype, use_safetensors=True)
    is_file = _is_file(name)
    if quantization is not None:
        if is_file:
            raise UsageError("--base-quantization needs a diffusers folder or a Hub id, not a single file")
        options["quantization_config"] = quantized(quantization, dtype)
    if is_file:
        load, options["base"] = (
            single_file if pipeline_class is None else pipeline_class.from_single_file,
            given["base_class"],
        )
    elif given["base_class"] != BASE_CLASS and not any(map(_is_file, (given["model"], given.values.get("base")))):
        raise UsageError("--base-class belongs to a single .safetensors file; a folder names its own class")
    else:
        load = load_base if pipeline_class is None else pipeline_class.from_pretrained
    if pipeline_class is None and load is load_base and (Path(str(name)).expanduser() / SETTINGS).is_file():
        # It was saved with how it reads prompts, and maybe with T5 behind CLIP.
        from mmalign import LongAlignPipeline

        load = LongAlignPipeline.from_pretrained
    pipe = load(name, **options)
    if given.values.get("safety_checker") is False and "safety_checker" in pipe.components:
        pipe.register_modules(safety_checker=None)
    if negative is not None:
        from mmalign import SelfNPOPipeline

        pipe = SelfNPOPipeline.from_pipe(pipe)
    if lora is not None:
        adapter = load_aligned(pipe, lora, allow_pickle=given["allow_pickle"])
        if adapter is None and given["lora_scale"] != 1:
            raise UsageError(f"--lora-scale acts on a LoRA, and {lora} is a whole network")
        if adapter is not None and given["lora_scale"] != 1:
            pipe.set_adapters([adapter], [given["lora_scale"]])
    if negative is not None:
        weights = {"alpha": given["negative_alpha"], "beta": given["negative_beta"]}
        pipe.load_negative(negative, **weights, allow_pickle=given["allow_pickle"])
    if pipeline_class is None and given.values.get("long_prompts") is not None:
        tail = None if (reader := long_prompts_of(pipe)) is None else reader.tail
        read_long_prompts(pipe, LongPrompts(layout=given["long_prompts"]), tail)
    if quantization is not None:
        return pipe
    return pipe.to(device if device is not None else best_device(given.values.get("device")))


def _is_file(name: str | None) -> bool:
    return str(name).endswith((".safetensors", ".ckpt", ".pt"))


def check_negative(given: Given) -> None:
    """UsageError for weights of a negative side that is not there."""
    for name in ("negative_alpha", "negative_beta"):
        if given["negative"] is None and given[name] != 1:
            raise UsageError(f"{flag(name)} acts on --negative, and there is none")


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
    if given["model"] in ("playground", "playground-scenes"):
        from mmalign.playground.paths import CURVES

        measured = CURVES / ("base-measured.json" if given["model"] == "playground" else "scene-base-measured.json")
        if measured.is_file():
            return float(json.loads(measured.read_text())["guidance_scale"])
    return 7.5


def sampling_of(given: Given) -> dict[str, Any]:
    """What `sampling_options` gave, as the keywords of everything in `mmalign.evaluation` that draws; the seed apart."""
    same = {name: given[name] for name in ("num_inference_steps", "true_cfg_scale", "batch_size", "height", "width")}
    return same | {"guidance_scale": guidance_of(given)}


def read_prompts(given: Given) -> list[str]:
    """Every prompt that was asked for, in order."""
    if given["num_prompts"] is not None and given["num_prompts"] < 1:
        raise UsageError(f"--num-prompts must be at least 1, got {given['num_prompts']}")
    prompts = list(given["prompt"] or [])
    if given["prompts"] is not None:
        prompts += prompts_of(given["prompts"], given["prompts_split"])
    elif given["prompts_split"] is not None:
        raise UsageError("--prompts-split belongs to --prompts")
    if not prompts:
        raise UsageError('no prompts: give --prompt "…", --prompts FILE, or --prompts playground')
    return prompts[: given["num_prompts"]]


def prompts_of(name: str, split: str | None = None) -> list[str]:
    """The prompts of a file or folder, or the playground's held-out ones."""
    if name not in ("playground", "playground-scenes"):
        from mmalign.data.prompts import read_prompts as read_file

        return read_file(Path(name).expanduser(), split=split)
    if split is not None:
        raise UsageError("--prompts-split belongs to a folder of prompt files, not to the playground")
    from mmalign.playground import pairs, scene_prompts

    return (pairs if name == "playground" else scene_prompts).prompts().test
