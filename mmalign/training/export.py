"""An aligned model as other tools load it: diffusers, peft, kohya's scripts, ComfyUI, or a whole pipeline with the LoRA merged."""

import os
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from mmalign.files import staged, written_aside
from mmalign.training.kohya import to_kohya
from mmalign.training.lora import Lora, lora_in, lora_of
from mmalign.training.merging import merged
from mmalign.training.weights import save_lora

ExportFormat = Literal["diffusers", "peft", "kohya", "comfy", "merged"]
_SUFFIX = ".safetensors"
# Of these one file is written, of the others a folder.
_FILES = ("kohya", "comfy")


def export(
    source: Any, path: str | os.PathLike[str], *, format: ExportFormat = "diffusers", dtype: torch.dtype | None = None
) -> Path:
    """Writes an aligned model whole or not at all, and returns `path`.

    source: a pipeline, a LoRA, or a folder with the LoRA of a run (from neither of which `merged` can start: it needs the base).
    dtype: precision of what is written; None leaves it. A LoRA is written at full strength, whatever `set_adapters` says.

    diffusers  a folder for `pipe.load_lora_weights`
    peft       a folder for `peft.PeftModel.from_pretrained(pipe.unet, folder)`
    kohya      a .safetensors file with `lora_unet_…` keys: Stable Diffusion 1.x, 2.x, XL and FLUX
    comfy      a .safetensors file for ComfyUI: of a UNet the kohya file, else diffusers' names with α / rank in the weights
    merged     the whole pipeline for `DiffusionPipeline.from_pretrained`, its LoRA merged as strong as it acts now
    """
    if format not in get_args(ExportFormat):
        raise ValueError(f"format must be one of {', '.join(get_args(ExportFormat))}, got {format!r}")
    path = Path(path).expanduser()
    if (format in _FILES) != (path.suffix == _SUFFIX):
        wanted = (
            f"one file: give a path that ends in {_SUFFIX}" if format in _FILES else f"a folder, not a {_SUFFIX} file"
        )
        raise ValueError(f"{format} is written as {wanted} (got {path})")
    folder = Path(source).expanduser() if isinstance(source, str | os.PathLike) else None
    if format == "merged":
        if isinstance(source, Lora):
            raise ValueError("merging a LoRA needs its base: put it onto that pipeline, and export the pipeline")
        if folder is not None:
            raise ValueError(f"merging {folder} needs its base: load that pipeline, then load_aligned({str(folder)!r})")
        with staged(path) as part:
            merged(source, dtype).save_pretrained(part)
        return path
    lora = source if isinstance(source, Lora) else lora_of(source) if folder is None else lora_in(folder)
    lora = lora.to(dtype)
    if format in _FILES:
        _write_file(path, *(to_kohya(lora) if format == "kohya" else to_comfy(lora)))
        return path
    with staged(path) as part:
        if format == "diffusers":
            save_lora(lora.component, lora.weights, lora.config, part)
        else:
            _save_peft(lora, part)
    return path


def to_comfy(lora: Lora) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and the metadata of a file that ComfyUI loads.

    It reads kohya's keys of UNets, and diffusers' of SD 3 and FLUX transformers. There α stands in no metadata it would read, and a
    key for it would stop diffusers from loading the same file: so it goes into the weights.
    """
    if lora.component == "unet":
        return to_kohya(lora)
    tensors = {}
    for module, layer in lora.layers().items():
        tensors[f"{lora.component}.{module}.lora_A.weight"] = layer.down
        tensors[f"{lora.component}.{module}.lora_B.weight"] = layer.up * layer.scale
    return tensors, {}


def _save_peft(lora: Lora, folder: Path) -> None:
    from peft import LoraConfig
    from peft.utils import SAFETENSORS_WEIGHTS_NAME
    from safetensors.torch import save_file

    LoraConfig(**{**lora.config, "inference_mode": True}).save_pretrained(str(folder))
    weights = {f"base_model.model.{key}": value for key, value in lora.weights.items()}
    save_file(weights, folder / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})


def _write_file(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    from safetensors.torch import save_file

    with written_aside(path) as part:
        save_file(tensors, part, metadata={"format": "pt", **metadata})
