"""Names for models and settings that change whenever a drawn picture could change."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from mmalign.evaluation.generate import Pipeline
from mmalign.rewards.fingerprints import module_hash, reading_parts, text_hash, tokenizer_hash


def model_fingerprint(pipe: Pipeline) -> str:
    """SHA-256 over a pipeline's class and settings, every weight and config, its tokenizers, which adapters act at which scale, how a
    negative side is mixed, whom the names of its users mean, and how long prompts are read.

    The scheduler is left out: it belongs to the sampler settings. Reads all weights once (about a second a gigabyte).
    """
    components = pipe.components
    parts: list[Any] = [type(pipe).__name__, _public(pipe.config, components)]
    for name, component in sorted(components.items()):
        if isinstance(component, torch.nn.Module):
            parts.append([name, module_hash(component, name)])
        elif name.startswith("tokenizer") and component is not None:
            parts.append([name, tokenizer_hash(component)])
    if (negative := getattr(pipe, "negative", None)) is not None:
        parts.append(repr(negative))
    if (users := getattr(pipe, "users", None)) is not None:
        parts.append(users.fingerprint)
    if long := reading_parts(pipe):
        parts.append(long)
    return text_hash(parts)


def scheduler_fingerprint(scheduler: Any) -> str:
    """Class and public configuration of a scheduler."""
    return text_hash([type(scheduler).__name__, _public(scheduler.config)])


def _public(config: Mapping[str, Any], hidden: Mapping[str, Any] | None = None) -> dict[str, Any]:
    return {key: value for key, value in config.items() if not key.startswith("_") and key not in (hidden or {})}
