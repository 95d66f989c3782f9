"""LoRAs released as a list without names, [up_0, down_0, up_1, down_1, …], in the order of a UNet's modules (LongAlign's .pt files).

The order is that of the linear and convolution layers inside the modules of three classes, as `named_modules` walks them, which has
been the same since diffusers 0.28. Every shape is checked. α is the rank.
"""

import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mmalign.training.weights import has_adapter

_INSIDE = ("ResnetBlock2D", "Attention", "GEGLU")


def read_lora_list(path: Path) -> list[Tensor] | None:
    """The tensors of a pickled list, read without running what is in it; None where the file holds something else."""
    if path.suffix == ".safetensors":
        return None
    try:
        content: Any = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        # Whoever reads it as a state dict says what is wrong with it.
        return None
    if not isinstance(content, list) or not all(isinstance(part, Tensor) for part in content):
        return None
    return content


def named_weights(network: nn.Module, tensors: Sequence[Tensor]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The list's weights by peft's names, and peft's configuration as JSON values; ValueError for a list of another network."""
    layers = _layers(network)
    if len(tensors) != 2 * len(layers):
        raise ValueError(
            f"the list holds {len(tensors)} tensors, and {type(network).__name__} has {len(layers)} layers of two each: it was "
            "trained on another network"
        )
    weights: dict[str, Tensor] = {}
    for (name, layer), up, down in zip(layers, tensors[::2], tensors[1::2], strict=True):
        here, rank = tuple(layer.weight.shape), len(down)
        inner, outer = (rank, *here[1:]), (here[0], rank, *([1] * (len(here) - 2)))
        if tuple(down.shape) != inner or tuple(up.shape) != outer:
            raise ValueError(
                f"the list's tensors for {name} have shapes {tuple(up.shape)} and {tuple(down.shape)}, and a LoRA of its rank there "
                f"has {outer} and {inner}: it was trained on another network"
            )
        weights |= {f"{name}.lora_A.weight": down.contiguous(), f"{name}.lora_B.weight": up.contiguous()}
    ranks = {len(down) for down in tensors[1::2]}
    if len(ranks) > 1:
        raise ValueError(f"the list mixes the ranks {', '.join(map(str, sorted(ranks)))}, of which α is not known")
    rank = ranks.pop()
    return weights, {"r": rank, "lora_alpha": rank, "target_modules": sorted(name for name, _ in layers)}


def listed_weights(network: nn.Module, weights: dict[str, Tensor]) -> list[Tensor]:
    """The inverse of `named_weights`: for tools that read such lists."""
    return [weights[f"{name}.lora_{side}.weight"] for name, _ in _layers(network) for side in ("B", "A")]


def _layers(network: nn.Module) -> list[tuple[str, Any]]:
    if has_adapter(network):
        raise ValueError("the network carries an adapter already, which hides its layers: fuse or unload it first")
    return [
        (f"{prefix}.{name}", layer)
        for prefix, parent in network.named_modules()
        if type(parent).__name__ in _INSIDE
        for name, layer in parent.named_modules()
        if isinstance(layer, nn.Linear | nn.Conv2d)
    ]
