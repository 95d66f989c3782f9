"""A whole network as a LoRA of its base: the nearest one of a given rank, and how near it is."""

import torch
from torch import Tensor, nn

from mmalign.likelihood.reference import base_state
from mmalign.training.lora import Lora, from_weights


@torch.no_grad()
def low_rank(network: nn.Module, component: str, trained: dict[str, Tensor], rank: int) -> tuple[Lora, float]:
    """The LoRA on `network` that comes nearest to `trained`, and ‖what is left out‖ / ‖the whole difference‖, over all weights.

    trained: a state dict of the same network. Every linear layer and convolution gets the truncated singular value decomposition of its
    difference, each factor with half of the singular values; norms and biases have no place in a LoRA, and count as left out.
    ValueError where nothing differs.
    """
    if rank < 1:
        raise ValueError(f"rank must be at least 1, got {rank}")
    modules, base = dict(network.named_modules()), base_state(network)
    weights: dict[str, Tensor] = {}
    whole = left = 0.0
    for name, start in base.items():
        if not start.is_floating_point():
            continue
        difference = trained[name].to(start.device).float() - start.float()
        size = difference.square().sum().item()
        whole, left = whole + size, left + size
        module = name.removesuffix(".weight")
        if not size or not name.endswith(".weight") or not isinstance(modules[module], (nn.Linear, nn.Conv2d)):
            continue
        down, up = _factors(difference, rank)
        weights |= {f"{module}.lora_A.weight": down.cpu(), f"{module}.lora_B.weight": up.cpu()}
        left += (difference.flatten(1) - up.flatten(1) @ down.flatten(1)).square().sum().item() - size
    if not weights:
        raise ValueError(f"{type(network).__name__}: no linear layer or convolution differs from the base")
    return from_weights(component, type(network).__name__, weights), (left / whole) ** 0.5


def _factors(difference: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """(down, up) with up @ down the nearest of that rank; of a convolution its kernel goes into `down`."""
    u, s, v = torch.linalg.svd(difference.flatten(1), full_matrices=False)
    root = s[:rank].sqrt()
    down, up = (root[:, None] * v[:rank]).contiguous(), (u[:, :rank] * root).contiguous()
    if difference.ndim > 2:
        down, up = down.unflatten(1, difference.shape[1:]), up[:, :, None, None]
    return down, up
