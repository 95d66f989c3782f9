"""A LoRA as kohya's scripts write it: `lora_unet_….lora_down/.lora_up/.alpha`, blocks of FLUX named and fused as in its own code."""

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mmalign.training.lora import Layer, Lora

# Our layer of a block → its layers in diffusers, whose outputs lie one after the other.
_DOUBLE = {
    "img_attn_qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "img_attn_proj": ("attn.to_out.0",),
    "img_mlp_0": ("ff.net.0.proj",),
    "img_mlp_2": ("ff.net.2",),
    "img_mod_lin": ("norm1.linear",),
    "txt_attn_qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "txt_attn_proj": ("attn.to_add_out",),
    "txt_mlp_0": ("ff_context.net.0.proj",),
    "txt_mlp_2": ("ff_context.net.2",),
    "txt_mod_lin": ("norm1_context.linear",),
}
_SINGLE = {
    "linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
    "linear2": ("proj_out",),
    "modulation_lin": ("norm.linear",),
}
_BLOCK = re.compile(r"(single_)?transformer_blocks\.(\d+)\.(.+)")
# The MLP of a single block is four times as wide as the block.
_WIDTHS = {"proj_mlp": 4}


def to_kohya(lora: Lora) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and the metadata of a kohya file; ValueError for a family that has no such file diffusers could read."""
    layers = lora.layers()
    tensors = {}
    for name, layer in (_unet(layers) if lora.component == "unet" else _flux(lora, layers)).items():
        tensors[f"lora_unet_{name}.lora_down.weight"] = layer.down
        tensors[f"lora_unet_{name}.lora_up.weight"] = layer.up
        tensors[f"lora_unet_{name}.alpha"] = torch.tensor(float(layer.alpha))
    return tensors, {
        "ss_network_module": "networks.lora" if lora.component == "unet" else "networks.lora_flux",
        "ss_network_dim": _shared({len(layer.down) for layer in layers.values()}),
        "ss_network_alpha": _shared({float(layer.alpha) for layer in layers.values()}),
    }


def _shared(values: set[Any]) -> str:
    """The one value of all layers; where they differ, the word that kohya's scripts have for it."""
    return str(*values) if len(values) == 1 else "Dynamic"


def _unet(layers: dict[str, Layer]) -> dict[str, Layer]:
    """The layers of a UNet under kohya's names, all with the first one's α: of several, diffusers would lose those of attention."""
    alpha = next(iter(layers.values())).alpha
    return {
        module.replace(".", "_"): Layer(layer.down, layer.up * (layer.alpha / alpha), alpha)
        for module, layer in layers.items()
    }


def _flux(lora: Lora, layers: dict[str, Layer]) -> dict[str, Layer]:
    """The layers of a FLUX LoRA under kohya's names, those of one fused layer brought together."""
    single = any(module.startswith("single_") for module in layers)
    if lora.network is None and not single:
        raise ValueError("the file alone does not tell Stable Diffusion 3 from FLUX: name the base model too (--model)")
    if lora.network not in (None, "FluxTransformer2DModel"):
        raise ValueError(f"diffusers reads no kohya file for a {lora.network}: export it as diffusers, comfy or merged")
    grouped: dict[tuple[str, str], dict[str, Layer]] = {}
    for module, layer in layers.items():
        block = _BLOCK.fullmatch(module)
        table = _SINGLE if block and block[1] else _DOUBLE
        target = next((name for name, parts in table.items() if block and block[3] in parts), None)
        if block is None or target is None:
            raise ValueError(f"{module} has no place in a kohya file of FLUX: export it as diffusers, comfy or merged")
        kind = "single" if block[1] else "double"
        grouped.setdefault((f"{kind}_blocks_{block[2]}_{target}", target), {})[block[3]] = layer
    return {name: _fused((_SINGLE | _DOUBLE)[target], parts) for (name, target), parts in grouped.items()}


def _fused(order: Sequence[str], parts: dict[str, Layer]) -> Layer:
    """One layer that adds to each part of a fused output what that part's own layer added; nothing to parts without one.

    `down` holds the parts' one below the other, `up` is block-diagonal, each block padded to the largest rank.
    """
    some, first = next(iter(parts.items()))
    width, rank = len(first.up) // _WIDTHS.get(some, 1), max(len(part.down) for part in parts.values())
    downs, ups = [], []
    for name in order:
        down = first.down.new_zeros(rank, first.down.shape[1])
        up = first.up.new_zeros(width * _WIDTHS.get(name, 1), rank)
        if name in parts:
            part = parts[name]
            down[: len(part.down)] = part.down
            up[:, : len(part.down)] = part.up * (part.scale / first.scale)
        downs.append(down)
        ups.append(up)
    return Layer(torch.cat(downs), torch.block_diag(*ups), first.scale * rank * len(order))
