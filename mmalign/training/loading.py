"""Pipelines from folders, the Hub and single files: what is wrong with them is said in one line, with the remedy."""

import json
import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from mmalign.denoisers.parts import ALIGNED
from mmalign.training.weights import LORA_FILE

PLAYGROUND = "playground"
SCENES = "playground-scenes"
EMBEDDED = {PLAYGROUND: "stable-diffusion", SCENES: "stable-diffusion-scenes"}
EMBEDDED_ANSWERING = {"playground-vision": "lfm2-vl", "playground-video": "llava-onevision"}
_PICKLED = (".bin", ".ckpt", ".pt", ".pth")


def plain_class(kind: type) -> Any:
    """The diffusers class behind one of our pipeline classes; any other class itself."""
    return getattr(kind, "_plain_class", kind)


def load_base(name_or_path: str | os.PathLike[str], **options: Any) -> Any:
    """A diffusers pipeline from a hub id, a folder, or one of EMBEDDED. Weights must be safetensors unless asked otherwise."""
    from diffusers import DiffusionPipeline

    options.setdefault("use_safetensors", True)
    name = str(name_or_path)
    if name in EMBEDDED_ANSWERING:
        raise ValueError(f"{name!r} answers and does not draw: `mmalign train token-dpo`, rrpo and lfm2-vl take it")
    embedded = name in EMBEDDED
    folder = playground_folder(name) if embedded else Path(name).expanduser()
    local = embedded or folder.exists() or name.startswith((".", "/", "~")) or name.count("/") > 1
    if embedded and "torch_dtype" not in options:
        # Their weights are stored in half precision to keep the package small, and work in single.
        options.setdefault("dtype", torch.float32)
    if name == SCENES and "vae" not in options:
        options["vae"] = scene_vae(options.get("torch_dtype", options.get("dtype")))
    if local:
        check_folder(folder, options)
    try:
        pipe = DiffusionPipeline.from_pretrained(folder if local else name, **options)
    except (OSError, ValueError) as error:
        where = str(folder) if local else f"{name!r} is no folder here, and the Hub's model"
        raise ValueError(f"{where} could not be loaded: {' '.join(str(error).split())}") from error
    if embedded:
        pipe.register_to_config(_name_or_path=name)
    elif local and "vae" not in options and _of_scenes(folder):
        _see_cells_alone(pipe.vae)
    return pipe


def scene_vae(dtype: torch.dtype | None) -> Any:
    """The playground's autoencoder, which sees each cell of a scene alone, as it was trained: side by side its norms would mix them."""
    from diffusers import AutoencoderKL

    vae = AutoencoderKL.from_pretrained(playground_folder() / "vae", torch_dtype=dtype)
    _see_cells_alone(vae)
    return vae


def _see_cells_alone(vae: Any) -> None:
    vae.enable_tiling()
    vae.tile_overlap_factor = 0
    # diffusers stores no tiling, but this: by it a saved copy is known again.
    vae.register_to_config(_name_or_path=SCENES)


def _of_scenes(folder: Path) -> bool:
    """Whether a saved pipeline's autoencoder is `scene_vae`'s."""
    config = folder / "vae" / "config.json"
    return config.is_file() and json.loads(config.read_text(encoding="utf-8")).get("_name_or_path") == SCENES


def single_file(link_or_path: str, base: str, **options: Any) -> Any:
    """A pipeline of class `base` from one .safetensors file; a pickled one can run code when it is read, and is refused."""
    import diffusers

    name = str(link_or_path)
    if not name.endswith(".safetensors"):
        raise ValueError(
            f"{name} is no .safetensors file; pickled checkpoints can run code when they are read. Convert it to safetensors first"
        )
    kind = getattr(diffusers, base, None)
    if kind is None or not callable(getattr(kind, "from_single_file", None)):
        raise ValueError(
            f"base={base!r} names no pipeline of diffusers that reads single files; try 'StableDiffusionXLPipeline'"
        )
    if "://" not in name and not Path(name).expanduser().is_file():
        raise ValueError(f"{name}: no such file")
    return kind.from_single_file(name, **options)


def quantization(kind: str, dtype: torch.dtype) -> Any:
    """diffusers' `quantization_config` for a base whose network, and nothing else, is held by bitsandbytes as "nf4" or "int8".

    `dtype`: what the network computes in. Raises ImportError without bitsandbytes, ValueError without a GPU.
    """
    if find_spec("bitsandbytes") is None:
        raise ImportError('a quantised base needs bitsandbytes: pip install "mmalign[8bit]"')
    if not torch.accelerator.is_available():
        raise ValueError(
            "diffusers quantises by bitsandbytes on a GPU only, and there is none: load the base unquantised"
        )
    from diffusers import PipelineQuantizationConfig

    return PipelineQuantizationConfig(
        components_to_quantize=list(ALIGNED),
        **{
            "nf4": {
                "quant_backend": "bitsandbytes_4bit",
                "quant_kwargs": {
                    "load_in_4bit": True,
                    "bnb_4bit_quant_type": "nf4",
                    "bnb_4bit_compute_dtype": dtype,
                },
            },
            "int8": {"quant_backend": "bitsandbytes_8bit", "quant_kwargs": {"load_in_8bit": True}},
        }[kind],
    )


def playground_folder(name: str = PLAYGROUND) -> Path:
    """Where an embedded model lies."""
    from importlib.resources import files

    return Path(str(files("mmalign"))) / "assets" / (EMBEDDED | EMBEDDED_ANSWERING)[name]


def check_folder(folder: Path, options: dict[str, Any] | None = None) -> None:
    """ValueError, in one line with the remedy, for a folder that is no diffusers pipeline, or not a whole one.

    `options`: of from_pretrained; components that are passed in need not be there.
    """
    options = options or {}
    index = folder / "model_index.json"
    if not index.is_file():
        raise ValueError(_no_pipeline(folder))
    for name, entry in json.loads(index.read_text(encoding="utf-8")).items():
        if name.startswith("_") or not isinstance(entry, list) or not entry[-1] or options.get(name, "") != "":
            continue
        part = folder / name
        inside = [path.name for path in part.iterdir()] if part.is_dir() else []
        if not inside:
            raise ValueError(
                f"{folder} lacks the component {name}/ that its model_index.json lists: copy it there, or pass {name}=…"
            )
        pickled = [file for file in inside if file.endswith(_PICKLED)]
        if (
            pickled
            and options.get("use_safetensors") is True
            and not any(file.endswith(".safetensors") for file in inside)
        ):
            raise ValueError(
                f"{part} holds pickled weights only ({pickled[0]}), which can run code when they are read: convert them to "
                "safetensors, or pass use_safetensors=None if you trust them"
            )


def _no_pipeline(folder: Path) -> str:
    if not folder.is_dir():
        return f"{folder}: no such folder. Name one that holds model_index.json, a Hub id, or 'playground'"
    if (folder / LORA_FILE).is_file():
        return (
            f"{folder} holds a LoRA, not a pipeline: load its base model, then pipe.load_lora_weights({str(folder)!r})"
        )
    inside = ", ".join(sorted(path.name for path in folder.iterdir())[:6]) or "nothing"
    return (
        f"{folder} is no diffusers pipeline: it has no model_index.json (found: {inside}). Name the folder that holds unet/, vae/ and "
        "text_encoder/; for one .safetensors file use from_single_file"
    )
