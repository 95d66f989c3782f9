"""Hashes of networks, tokenizers and settings: the parts of which cache keys and reports are made."""

from __future__ import annotations

import hashlib
import json
import sys
from typing import Any

import torch
from torch import nn

from mmalign.denoisers.long_prompts import long_prompts_of
from mmalign.denoisers.parts import stored


def text_hash(value: Any) -> str:
    """sha256 of a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def module_hash(module: nn.Module, name: str = "module") -> str:
    """sha256 over every weight with its name, dtype and shape, the public config, and which adapters act.

    Reads all weights once, about a second a gigabyte.
    """
    sha = hashlib.sha256(text_hash(_public_config(module)).encode())
    for key, tensor in sorted(module.state_dict().items()):
        if not isinstance(tensor, torch.Tensor):
            continue
        if tensor.is_meta:
            raise ValueError(
                f"{name}.{key} is offloaded and cannot be read: switch sequential offload off for this step"
            )
        sha.update(f"|{key}:{tensor.dtype}:{tuple(tensor.shape)}:".encode())
        for part in stored(tensor):
            sha.update(part.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    sha.update(text_hash(_adapter_state(module)).encode())
    return sha.hexdigest()


def reading_parts(pipe: Any) -> dict[str, Any]:
    """How a pipeline reads prompts beyond CLIP's 77 positions, with hashes of what it reads them by; empty where it cuts them."""
    reader = long_prompts_of(pipe)
    if reader is None:
        return {}
    return {"long_prompts": reader.settings} | {name: module_hash(part, name) for name, part in reader.networks.items()}


def tokenizer_hash(tokenizer: Any) -> str:
    """sha256 over vocabulary, merges, special tokens and maximum length; not over what the last call left behind."""
    state: dict[str, Any] = {
        "class": type(tokenizer).__name__,
        "vocab": tokenizer.get_vocab(),
        "special": dict(tokenizer.special_tokens_map),
        "length": tokenizer.model_max_length,
        "side": [tokenizer.padding_side, tokenizer.truncation_side],
    }
    if tokenizer.is_fast:
        backend = json.loads(tokenizer.backend_tokenizer.to_str())
        state["backend"] = {key: value for key, value in backend.items() if key not in ("padding", "truncation")}
    return text_hash(state)


def _public_config(module: nn.Module) -> dict[str, Any]:
    """The config of a diffusers or transformers model, less what only says where it came from."""
    config = getattr(module, "config", {})
    # diffusers has a dict, transformers an object; `getattr` because a plain nn.Module has neither.
    values = dict(config) if isinstance(config, dict) else config.to_dict()
    hidden = ("dtype", "torch_dtype", "transformers_version")
    return {key: value for key, value in values.items() if not key.startswith("_") and key not in hidden}


def _adapter_state(module: nn.Module) -> list[Any]:
    if "peft" not in sys.modules:
        return []
    from peft.tuners.tuners_utils import BaseTunerLayer

    state: list[Any] = []
    for key, layer in module.named_modules():
        if isinstance(layer, BaseTunerLayer):
            # LoRA layers have a scale each, other kinds have none.
            scaling = sorted(vars(layer).get("scaling", {}).items())
            state.append([key, layer.active_adapters, layer.disable_adapters, layer.merged_adapters, scaling])
    return state
