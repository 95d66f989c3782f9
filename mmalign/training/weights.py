"""The trained weights of a network on disk: a LoRA in diffusers' file, or the whole network in its own folder."""

import os
from pathlib import Path
from typing import Any

import torch
from torch import nn

LORA_FILE = "pytorch_lora_weights.safetensors"
ADAPTER = "default"


def add_adapter(network: nn.Module, peft_config: Any) -> None:
    """Puts a LoRA on the network, its weights in float32 whatever the base's precision."""
    existing = list(getattr(network, "peft_config", {}))
    if existing:
        raise ValueError(
            f"the pipeline already carries adapter(s) {', '.join(existing)}: fuse (fuse_lora, then unload_lora_weights) or unload them "
            "before training a new one"
        )
    network.add_adapter(peft_config, adapter_name=ADAPTER)  # type: ignore[operator]
    for parameter in network.parameters():
        if parameter.requires_grad and parameter.dtype in (torch.float16, torch.bfloat16):
            parameter.data = parameter.data.float()


def has_adapter(network: nn.Module) -> bool:
    """Whether the network carries a LoRA."""
    return bool(getattr(network, "peft_config", None))


def component_name(pipe: Any, network: nn.Module) -> str:
    """Under which name the pipeline holds the network: "unet" or "transformer"."""
    return next(name for name, part in pipe.components.items() if part is network)


def save_trained(pipe: Any, network: nn.Module, folder: Path) -> None:
    """Writes what training changed: `pytorch_lora_weights.safetensors`, or the network's folder. Renamed when whole."""
    folder.mkdir(parents=True, exist_ok=True)
    name = component_name(pipe, network)
    if not has_adapter(network):
        network.save_pretrained(folder / name)  # type: ignore[operator]
        return
    from diffusers.utils import convert_state_dict_to_diffusers
    from peft.utils import get_peft_model_state_dict

    state = convert_state_dict_to_diffusers(get_peft_model_state_dict(network, adapter_name=ADAPTER))
    part = folder / f"{LORA_FILE}.part"
    type(pipe).save_lora_weights(
        folder,
        weight_name=part.name,
        **{f"{name}_lora_layers": state, f"{name}_lora_adapter_metadata": _metadata(network)},
    )
    os.replace(part, folder / LORA_FILE)


def load_trained(network: nn.Module, folder: Path) -> None:
    """Reads back what `save_trained` wrote, into a network of the same shape, exactly."""
    from safetensors.torch import load_file

    if not has_adapter(network):
        file = next(iter(sorted(folder.glob("*/diffusion_pytorch_model.safetensors"))), None)
        if file is None:
            raise ValueError(f"{folder} holds no network folder; it was saved by a run with another peft_config")
        network.load_state_dict(load_file(file))
        return
    if not (folder / LORA_FILE).is_file():
        raise ValueError(f"{folder} holds no {LORA_FILE}; it was saved by a run without a peft_config")
    from peft.utils import set_peft_model_state_dict

    state = load_file(folder / LORA_FILE)
    state = {key.partition(".")[2]: value for key, value in state.items()}
    result = set_peft_model_state_dict(network, state, adapter_name=ADAPTER)
    if result.unexpected_keys:
        raise ValueError(f"{folder / LORA_FILE} does not fit the adapter: it also holds {result.unexpected_keys[0]}")


def _metadata(network: nn.Module) -> dict[str, Any]:
    config = network.peft_config[ADAPTER].to_dict()  # type: ignore[union-attr, operator, index]
    return {key: sorted(value) if isinstance(value, set) else value for key, value in config.items()}
