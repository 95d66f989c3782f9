"""The parts of a model that answers: the language model, the projector, the encoders of its media; and a LoRA on them, checked."""

import copy
import re
from collections.abc import Callable, Iterable
from typing import Any, Literal, cast

from torch import nn

Part = Literal["lm", "projector", "encoder"]
Trained = Literal["lm", "lm+projector", "all"]
PARTS: dict[Trained, tuple[Part, ...]] = {
    "lm": ("lm",),
    "lm+projector": ("lm", "projector"),
    "all": ("lm", "projector", "encoder"),
}
# How the families call what stands between an encoder and the language model.
_PROJECTORS = ("projector", "connector", "merger", "image_newline")


def parts_of(model: nn.Module) -> Callable[[str], Part]:
    """A function from a module's or a weight's name to the part that it belongs to."""
    every = cast(Any, model)
    ours = [every.get_decoder(), every.get_input_embeddings(), every.get_output_embeddings()]
    # Of a model that only reads the decoder is all but the head.
    prefixes = [name for name, module in model.named_modules() if name and any(module is part for part in ours)]

    def part_of(name: str) -> Part:
        if any(name == prefix or name.startswith(f"{prefix}.") for prefix in prefixes):
            return "lm"
        return "projector" if any(known in name for known in _PROJECTORS) else "encoder"

    return part_of


def sees(model: nn.Module) -> bool:
    """Whether the model has parts besides a language model."""
    part_of = parts_of(model)
    return any(part_of(name) != "lm" for name, _ in model.named_parameters())


def default_lora(model: nn.Module, trained: Trained = "lm") -> Any:
    """A LoRA of rank 16, α 32, on the linear layers of these parts, but not on embeddings, head and routers of experts."""
    from peft import LoraConfig

    head, part_of = cast(Any, model).get_output_embeddings(), parts_of(model)
    layers = [
        name
        for name, module in model.named_modules()
        if _is_linear(module)
        and module is not head
        and part_of(name) in PARTS[trained]
        and not name.endswith((".gate", ".router"))
    ]
    return LoraConfig(r=16, lora_alpha=32, target_modules=_pattern(layers))


def _pattern(layers: list[str]) -> str:
    """A regular expression that is true of these names and short: the layers' numbers stand for any."""
    return "|".join(sorted({re.sub(r"\\\.\d+", r"\\.\\d+", re.escape(name)) for name in layers}))


def check_targets(model: nn.Module, peft_config: Any, trained: Trained) -> None:
    """ValueError for a target that names no module, or one in a part that is not trained."""
    from peft.tuners.tuners_utils import check_target_module_exists

    targets, part_of = peft_config.target_modules, parts_of(model)
    names = [name for name, _ in model.named_modules()]
    if targets is None:
        raise ValueError(
            "peft_config names no target_modules: leave peft_config at 'default' for the language model's linear layers, or name them"
        )
    if not isinstance(targets, str):
        _check_names(model, names, targets)
    elif targets != "all-linear" and not any(re.fullmatch(targets, name) for name in names):
        raise ValueError(f"peft_config.target_modules={targets!r} matches no module of {type(model).__name__}")
    asked = copy.copy(peft_config)
    if targets == "all-linear":
        asked.target_modules = {name for name, module in model.named_modules() if _is_linear(module)}
    chosen = [name for name in names if check_target_module_exists(asked, name)]
    beyond = [name for name in chosen if part_of(name) not in PARTS[trained]]
    if beyond:
        raise ValueError(
            f"peft_config puts a LoRA on {beyond[0]}, in the {part_of(beyond[0])}, and trained_parts={trained!r}: name targets "
            "of the language model by a regular expression, or set trained_parts='all'"
        )


def _check_names(model: nn.Module, names: list[str], targets: Iterable[str]) -> None:
    for target in sorted(targets):
        if not any(name == target or name.endswith(f".{target}") for name in names):
            known = sorted({name.rpartition(".")[2] for name, part in model.named_modules() if _is_linear(part)})
            raise ValueError(
                f"peft_config.target_modules: no module of {type(model).__name__} is called {target!r}; its linear layers are "
                f"{', '.join(known)}"
            )


def mark_trained(model: nn.Module, trained: Trained) -> None:
    """Gradients for every weight of these parts, and for no other."""
    part_of = parts_of(model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(part_of(name) in PARTS[trained])


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear)
