"""Names for models and settings that change whenever a drawn picture could change."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import torch

from mmalign.denoisers.parts import stored
from mmalign.evaluation.generate import Pipeline


def digest(value: Any) -> str:
    """SHA-256, in hexadecimal, of a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def model_fingerprint(pipe: Pipeline) -> str:
    """SHA-256 over every weight of a pipeline, its vocabulary, which adapters act at which scale, and how a negative side is mixed.

    The scheduler is left out: it belongs to the sampler settings. Reads all weights once (about a second a gigabyte).
    """
    sha = hashlib.sha256()
    for name, component in sorted(pipe.components.items()):
        if isinstance(component, torch.nn.Module):
            _add_weights(sha, name, component)
            _add_adapters(sha, component)
        elif callable(getattr(component, "get_vocab", None)):
            sha.update(digest([name, component.get_vocab()]).encode())
    if (negative := getattr(pipe, "negative", None)) is not None:
        sha.update(repr(negative).encode())
    return sha.hexdigest()


def scheduler_fingerprint(scheduler: Any) -> str:
    """Class and public configuration of a scheduler."""
    config: Mapping[str, Any] = dict(scheduler.config)
    public = {key: value for key, value in config.items() if not key.startswith("_")}
    return digest([type(scheduler).__name__, public])


def _add_weights(sha: Any, name: str, module: torch.nn.Module) -> None:
    for key, tensor in sorted(module.state_dict().items()):
        if not isinstance(tensor, torch.Tensor):
            continue
        if tensor.is_meta:
            raise ValueError(
                f"{name}.{key} is offloaded, so its weights cannot be read. Pass the model's fingerprint yourself "
                "(any text that changes when the model does), or draw without sequential offload."
            )
        sha.update(f"{name}.{key}:{tensor.dtype}:{tuple(tensor.shape)}".encode())
        for part in stored(tensor):
            sha.update(part.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())


def _add_adapters(sha: Any, module: torch.nn.Module) -> None:
    from peft.tuners.tuners_utils import BaseTunerLayer

    for key, layer in module.named_modules():
        if isinstance(layer, BaseTunerLayer):
            scaling = sorted(vars(layer).get("scaling", {}).items())
            state = [key, layer.active_adapters, layer.disable_adapters, layer.merged_adapters, scaling]
            sha.update(digest(state).encode())
