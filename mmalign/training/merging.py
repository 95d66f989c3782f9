"""The plain diffusers pipeline behind one of ours, its LoRA merged."""

import copy
import inspect
from typing import Any

import torch

from mmalign.denoisers.adapters import acting_adapters
from mmalign.denoisers.parts import is_quantized, networks
from mmalign.training.loading import plain_class
from mmalign.training.weights import aligned_network, has_adapter, refuse_other_adapters


def merged(pipe: Any, dtype: torch.dtype | None = None) -> Any:
    """A plain pipeline: a copy of the network with its adapters merged, as strong as they act now, and the other parts shared.

    In another `dtype` every part is a copy; the merge is done before the change of precision. ValueError for an adapter on quantised
    weights.
    """
    refuse_other_adapters(pipe)
    name, network = aligned_network(pipe)
    components = plain_components(pipe)
    if has_adapter(network):
        if is_quantized(network):
            raise ValueError(
                f"the {name} is quantised, and merging its LoRA would round both: load the LoRA file of the run into the unquantised "
                "base (load_lora_weights) and save that"
            )
        components[name] = copy.deepcopy(network)
        if acting := acting_adapters(network):
            components[name].fuse_lora(adapter_names=list(acting))
        components[name].unload_lora()
    if dtype is not None:
        parts = {other: part for other, part in networks(pipe).items() if other != name and other in components}
        components |= {other: copy.deepcopy(part).to(dtype) for other, part in parts.items()}
        components[name] = (copy.deepcopy(network) if components[name] is network else components[name]).to(dtype)
    return plain_class(type(pipe))(**components, **flags(pipe))


def plain_components(pipe: Any) -> dict[str, Any]:
    """The parts that the plain diffusers class has too."""
    accepted = inspect.signature(plain_class(type(pipe)).__init__).parameters
    return {name: part for name, part in pipe.components.items() if name in accepted}


def flags(pipe: Any, but: dict[str, Any] | None = None) -> dict[str, Any]:
    """The constructor's arguments that are no components (`requires_safety_checker`, …), as the pipeline was made with."""
    accepted = inspect.signature(plain_class(type(pipe)).__init__).parameters
    known = {*pipe.components, *(but or {})}
    return {key: value for key, value in pipe.config.items() if key in accepted and key not in known}
