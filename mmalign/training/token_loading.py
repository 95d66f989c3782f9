"""Models that answer and their processors, from folders and the Hub; what is wrong with them is said in one line, with the remedy."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mmalign.denoisers.parts import is_quantized
from mmalign.likelihood.token_head import head_of
from mmalign.training.loading import EMBEDDED, EMBEDDED_ANSWERING, playground_folder

# Where transformers' attention and feed-forward layers keep a dropout that is no module.
_DROPOUTS = ("attention_dropout", "activation_dropout", "hidden_dropout", "dropout", "resid_dropout")


def load_answering_model(name_or_path: str | os.PathLike[str], **options: Any) -> tuple[nn.Module, Any]:
    """A model and its processor (a tokenizer, if it only reads): a Hub id, a folder, or one of EMBEDDED_ANSWERING.

    `options` are transformers' keywords. Weights must be safetensors unless asked otherwise; no remote code unless asked.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

    name = str(name_or_path)
    if name in EMBEDDED:
        raise ValueError(f"{name!r} draws and does not answer: take one of {', '.join(EMBEDDED_ANSWERING)}")
    options = {"use_safetensors": True, "trust_remote_code": False, **options}
    if name in EMBEDDED_ANSWERING:
        # Their weights are stored in 8 and 16 bits to keep the package small, and work in 32.
        options.setdefault("dtype", torch.float32)
    shared = shared_options(options)
    with loading(playground_folder(name) if name in EMBEDDED_ANSWERING else name) as where:
        config = options.pop("config", None) or AutoConfig.from_pretrained(where, **shared)
        kind: Any = (
            AutoModelForImageTextToText
            if config.model_type in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
            else AutoModelForCausalLM
        )
        model = kind.from_pretrained(where, config=config, **options)
        processor = AutoProcessor.from_pretrained(where, **shared)
    if name in EMBEDDED_ANSWERING:
        model.name_or_path = model.config._name_or_path = name
    return model.eval(), processor


@contextmanager
def loading(name_or_path: str | os.PathLike[str]) -> Iterator[str]:
    """A block that loads a model, and from where: a folder that holds one, or a Hub id; ValueError says in one line what is wrong."""
    from safetensors import SafetensorError

    name, local = str(name_or_path), is_a_path(name_or_path)
    folder = Path(name).expanduser()
    if local:
        _check_folder(folder)
    where = str(folder) if local else name
    try:
        yield where
    except (OSError, ValueError, SafetensorError) as error:
        named = where if local else f"{name!r} is no folder here, and the Hub's model"
        raise ValueError(f"{named} could not be loaded: {' '.join(str(error).split())}") from error


def is_a_path(name_or_path: str | os.PathLike[str]) -> bool:
    """Whether a folder is meant, be it there or not, and no Hub id."""
    name = str(name_or_path)
    return Path(name).expanduser().exists() or name.startswith((".", "/", "~")) or name.count("/") > 1


def shared_options(options: dict[str, Any]) -> dict[str, Any]:
    """Those of `from_pretrained` that a model's config and processor take too: where it is found, and whether its code may run."""
    names = ("revision", "token", "cache_dir", "local_files_only", "force_download", "subfolder", "trust_remote_code")
    return {name: options[name] for name in names if name in options}


def check_model(model: nn.Module) -> None:
    """ValueError for a model that cannot be trained here: without a head, spread over devices, or with dropout of its own."""
    head_of(model)
    places = set(map(str, (getattr(model, "hf_device_map", None) or {}).values()))
    if len(places) > 1 and not is_quantized(model):
        raise ValueError(
            f"the model is spread over {', '.join(sorted(places))}: load it without device_map, and the trainer places it"
        )
    for name, module in model.named_modules():
        for kind in _DROPOUTS:
            rate = getattr(module, kind, None)
            if isinstance(rate, float) and rate > 0:
                raise ValueError(
                    f"{name}.{kind} is {rate:g}: policy and reference would differ by its noise; load the model with {kind}=0.0"
                )


def _check_folder(folder: Path) -> None:
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder. Name one that holds config.json, or a Hub id")
    if (folder / "config.json").is_file():
        return
    if (folder / "adapter_config.json").is_file():
        raise ValueError(
            f"{folder} holds a LoRA, not a model: load its base model, then model.load_adapter({str(folder)!r})"
        )
    inside = ", ".join(sorted(path.name for path in folder.iterdir())[:6]) or "nothing"
    raise ValueError(f"{folder} is no transformers model: it has no config.json (found: {inside})")
