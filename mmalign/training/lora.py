"""A LoRA apart from its network: read from a pipeline or from a run's file, and what every layer of it adds."""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mmalign.training.weights import LORA_FILE, adapter_config, aligned_network, has_adapter, refuse_other_adapters


class Layer(NamedTuple):
    """What one layer adds to its weight: (alpha / rank) · up @ down, the rank being the first size of `down`."""

    down: Tensor
    up: Tensor
    alpha: float

    @property
    def scale(self) -> float:
        """alpha / rank."""
        return self.alpha / len(self.down)


@dataclass(frozen=True)
class Lora:
    """component: the part of the pipeline it belongs to. network: that part's class, None if only a file is known.

    config: peft's, as JSON values. weights: by peft's names without a prefix (`….to_q.lora_A.weight`), on the CPU.
    """

    component: str
    network: str | None
    config: dict[str, Any]
    weights: dict[str, Tensor]

    def to(self, dtype: torch.dtype | None) -> "Lora":
        """The same in another precision; None leaves it."""
        return replace(self, weights={key: value.to(dtype) for key, value in self.weights.items()}) if dtype else self

    def layers(self) -> dict[str, Layer]:
        """Module → its layer, rank and α by peft's rules; ValueError where there is more than low-rank pairs."""
        from peft.utils.other import get_pattern_key

        pairs = (".lora_A.weight", ".lora_B.weight")
        if odd := next((key for key in self.weights if not key.endswith(pairs)), None):
            raise ValueError(
                f"{odd} is more than a low-rank pair (DoRA, a bias): export it as diffusers, peft or merged"
            )
        patterns = self.config.get("alpha_pattern") or {}
        found = {}
        for key, down in self.weights.items():
            if not key.endswith(pairs[0]):
                continue
            module, rank = key.removesuffix(pairs[0]), len(down)
            alpha = patterns.get(get_pattern_key(list(patterns), module), self.config.get("lora_alpha", rank))
            # Rank-stabilised: scaled by alpha / √rank.
            alpha *= rank**0.5 if self.config.get("use_rslora") else 1
            found[module] = Layer(down, self.weights[module + pairs[1]], alpha)
        return found


def lora_of(pipe: Any) -> Lora:
    """The one LoRA on a pipeline's network, at full strength; ValueError where there is none, or several."""
    refuse_other_adapters(pipe)
    component, network = aligned_network(pipe)
    if not has_adapter(network):
        raise ValueError(f"the pipeline's {component} carries no LoRA (were all weights trained?): export it as merged")
    names = list(network.peft_config)  # type: ignore[arg-type]
    if len(names) > 1:
        raise ValueError(
            f"the pipeline carries the LoRAs {', '.join(names)}: delete all but one, or export them as merged"
        )
    return adapter_of(pipe, names[0])


def adapter_of(pipe: Any, name: str) -> Lora:
    """The LoRA of that name on a pipeline's network, at full strength."""
    from peft.utils import get_peft_model_state_dict

    component, network = aligned_network(pipe)
    state = get_peft_model_state_dict(network, adapter_name=name)
    weights = {key: value.detach().cpu().contiguous() for key, value in state.items()}
    return Lora(component, type(network).__name__, adapter_config(network, name), weights)


def weighted_sum(parts: list[tuple[Lora, float]]) -> Lora:
    """One LoRA that adds what each of the parts adds times its weight, exactly: its ranks are the sums of theirs, its α its rank."""
    downs: dict[str, list[Tensor]] = {}
    ups: dict[str, list[Tensor]] = {}
    for lora, weight in parts:
        for module, layer in lora.layers().items():
            downs.setdefault(module, []).append(layer.down.float())
            ups.setdefault(module, []).append(layer.up.float() * (weight * layer.scale))
    weights = {f"{module}.lora_A.weight": torch.cat(down) for module, down in downs.items()}
    weights |= {f"{module}.lora_B.weight": torch.cat(up, dim=1) for module, up in ups.items()}
    return from_weights(parts[0][0].component, parts[0][0].network, weights)


def from_weights(component: str, network: str | None, weights: dict[str, Tensor]) -> Lora:
    """A LoRA of these weights, by peft's names, α being the rank."""
    return Lora(component, network, _plain_config(weights), weights)


def lora_in(folder: Path) -> Lora:
    """The LoRA that a run or a saved pipeline left in its folder."""
    from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
    from diffusers.utils import convert_unet_state_dict_to_peft
    from safetensors import safe_open

    if not (folder / LORA_FILE).is_file():
        inside = ", ".join(sorted(path.name for path in folder.iterdir())[:6]) if folder.is_dir() else "no such folder"
        raise ValueError(f"{folder} holds no {LORA_FILE} (found: {inside}); all weights of a run export as merged only")
    with safe_open(folder / LORA_FILE, framework="pt") as file:
        state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        metadata = json.loads((file.metadata() or {}).get(LORA_ADAPTER_METADATA_KEY, "{}"))
    components = {key.partition(".")[0] for key in state}
    if len(components) > 1 or not components <= {"unet", "transformer"}:
        raise ValueError(
            f"{folder / LORA_FILE} is for {', '.join(sorted(components))}; only a unet or a transformer is exported"
        )
    component = components.pop()
    config = {key.removeprefix(f"{component}."): value for key, value in metadata.items()}
    bare = {key.partition(".")[2]: value for key, value in state.items()}
    weights = convert_unet_state_dict_to_peft(bare)
    return Lora(component, None, config or _plain_config(weights), weights)


def _plain_config(weights: dict[str, Tensor]) -> dict[str, Any]:
    """The configuration of a file that states none: α is the rank, as diffusers reads it."""
    ranks = {key.removesuffix(".lora_A.weight"): len(value) for key, value in weights.items() if ".lora_A." in key}
    rank = max(ranks.values())
    others = {f"^{module}": value for module, value in ranks.items() if value != rank}
    config = {"r": rank, "lora_alpha": rank, "target_modules": sorted(ranks)}
    return config | {"rank_pattern": others, "alpha_pattern": dict(others)}
