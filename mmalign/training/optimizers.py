"""Optimisers by transformers' names: what they need, which options they read, and the state they keep for a trained weight."""

from importlib.util import find_spec
from typing import Any

from torch import Tensor

_LOW_RANK = "it needs optim_target_modules, which is refused: choose the trained part with peft_config"
_IN_BACKWARD = "it steps inside the backward pass, before batches are accumulated and gradients clipped"
_REFUSED = {"galore": _LOW_RANK, "apollo": _LOW_RANK, "lomo": _IN_BACKWARD, "adalomo": _IN_BACKWARD}
# Both packages leave tensors of fewer weights in float32, and store a float32 scale for a block of so many.
_SMALLEST, _BLOCK = 4096, 256


def check_optimizer(args: Any) -> None:
    """Raises, in one line with the remedy, what transformers would raise once everything is encoded, or not at all."""
    name = args.optim.value
    family = name.partition("_")[0]
    if family in _REFUSED:
        raise ValueError(f"optim={name!r} is refused: {_REFUSED[family]}")
    package = needed_package(name)
    if package is not None and find_spec(package) is None:
        raise ImportError(f'optim={name!r} needs {package}: pip install "mmalign[8bit]"')
    if name.startswith("paged") and args.device.type == "cpu":
        raise ValueError(f"optim={name!r} has no effect on a CPU, where nothing is paged: leave out 'paged_'")
    from transformers import Trainer

    Trainer.get_optimizer_cls_and_kwargs(args)
    options = read_options(name)
    for option in ("adam_beta1", "adam_beta2", "adam_epsilon"):
        if option not in options and getattr(args, option) != type(args).__dataclass_fields__[option].default:
            raise ValueError(f"{option} has no effect with optim={name!r}")


def needed_package(name: str) -> str | None:
    """The package of the extra "8bit" behind a name of 8, 4 or paged bits; transformers asks for others by itself."""
    if name in ("adamw_torch_8bit", "adamw_torch_4bit"):
        return "torchao"
    mine = name.startswith(("paged_", "lion_", "ademamix", "rmsprop_bnb"))
    return "bitsandbytes" if mine or name in ("adamw_bnb_8bit", "adamw_8bit") else None


def read_options(name: str) -> tuple[str, ...]:
    """Which of the options that are named after Adam an optimiser is given."""
    if "lion" in name:
        return ("adam_beta1", "adam_beta2")
    reads = ("adamw" in name and name != "grokadamw") or name == "schedule_free_radam" or "ademamix" in name
    return ("adam_beta1", "adam_beta2", "adam_epsilon") if reads else ()


def state_bytes(name: str, weight: Tensor) -> int:
    """Bytes that the optimiser keeps for one trained tensor, as it was measured; small counters are left out."""
    number, wide = weight.numel(), weight.element_size()
    if name == "adafactor":
        # A mean over rows and one over columns, of matrices only.
        return number * wide if weight.dim() < 2 else (number // weight.shape[-1] + number // weight.shape[-2]) * wide
    bits = 8 if "8bit" in name else 4 if "4bit" in name else 32
    large = number >= _SMALLEST and (needed_package(name) != "torchao" or number % _BLOCK == 0)
    if bits == 32 or not large:
        return _moments(name) * number * wide
    return _moments(name) * (number * bits // 8 + 4 * -(-number // _BLOCK))


def _moments(name: str) -> int:
    """Numbers kept for a weight: Adam's two unless it is known otherwise."""
    if "ademamix" in name:
        return 3
    if name == "sgd":
        return 0
    return 1 if "lion" in name or name in ("adagrad", "schedule_free_sgd") or "rmsprop" in name else 2
