"""The negative side of a pipeline: θ_neg = θ + α·(θ_pos − θ) + β·(θ_npo − θ), loaded, run in the negative branch, and saved.

θ is the base, θ_pos what the pipeline draws with, θ_npo a network that was trained towards what people do not want. Where both
differences are LoRAs, they are two adapters on one network, and which of them act is switched within a step. A whole θ_npo becomes a
second network of the pipeline, mixed once, when it is loaded.
"""

import copy
import inspect
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mmalign.denoisers import adapter_for
from mmalign.denoisers.adapters import acting_adapters, acting_as_before, blend
from mmalign.denoisers.branches import negative_branch
from mmalign.denoisers.parts import CONDITIONAL_FIRST, is_quantized
from mmalign.likelihood.reference import base_state
from mmalign.training.aligned import Released, add_lora, read_released, replace_weights
from mmalign.training.loading import load_base, plain_class
from mmalign.training.lora import adapter_of, weighted_sum
from mmalign.training.weights import ADAPTER, aligned_network, has_adapter, save_lora

NEGATIVE = "negative"
COMPONENTS = ("negative_unet", "negative_transformer")


@dataclass(frozen=True)
class Negative:
    """How the negative branch is mixed. positive: the adapters that a second network was mixed with, None for a LoRA."""

    alpha: float = 1.0
    beta: float = 1.0
    positive: dict[str, float] | None = None


def load_negative(
    pipe: Any,
    path: str | os.PathLike[str],
    wanted: Negative,
    *,
    base: Any = None,
    allow_pickle: bool = False,
) -> Negative:
    """Puts a negative side onto `pipe`, in any form that `load_aligned` reads, without changing what its other branch draws.

    wanted: its α and β; with those it is returned as it was mixed.
    base: for a whole network on a pipeline that is itself a whole aligned one: what both were trained from (a pipeline, folder or id).
    """
    check_branches(pipe)
    component, network = aligned_network(pipe)
    if has_negative(pipe):
        raise ValueError("the pipeline has a negative side already: unload_negative() first")
    released = read_released(pipe, path, allow_pickle=allow_pickle)
    if released.is_lora:
        if base is not None:
            raise ValueError(f"base has no effect: {released.file} is a LoRA, which says itself what it adds")
        with acting_as_before(network):
            add_lora(pipe, released, NEGATIVE)
        return wanted
    positive = acting_adapters(network)
    if base is None and not positive and wanted.alpha != 1:
        raise ValueError(
            "alpha has no effect: nothing acts on the base. Load the positive LoRA first, or name the base"
        )
    second = _mixed(network, released, None if base is None else _network_of(base), wanted)
    pipe.register_modules(**{f"negative_{component}": second})
    return replace(wanted, positive=positive)


def become_negative(pipe: Any, base: nn.Module | None) -> Negative:
    """What a run trained on `pipe` as its negative side: its LoRA, or its network, whose place `base` takes."""
    component, network = aligned_network(pipe)
    if base is not None:
        pipe.register_modules(**{component: base, f"negative_{component}": network.requires_grad_(False)})
        return Negative(positive={})
    lora = adapter_of(pipe, ADAPTER)
    network.unload_lora()  # type: ignore[operator]
    with acting_as_before(network):
        network.load_lora_adapter(lora.weights, prefix=None, adapter_name=NEGATIVE, metadata=lora.config)  # type: ignore[operator]
    return Negative()


def unload_negative(pipe: Any) -> None:
    """The pipeline without its negative side."""
    component, network = aligned_network(pipe)
    if second_network(pipe) is not None:
        pipe.register_modules(**{f"negative_{component}": None})
    if NEGATIVE in getattr(network, "peft_config", {}):
        with acting_as_before(network):
            network.delete_adapters(NEGATIVE)  # type: ignore[operator]
        if not has_adapter(network):
            network.unload_lora()  # type: ignore[operator]


def has_negative(pipe: Any) -> bool:
    """Whether the pipeline has a negative side, of whichever kind."""
    component, network = aligned_network(pipe)
    return NEGATIVE in (getattr(network, "peft_config", None) or {}) or second_network(pipe) is not None


def second_network(pipe: Any) -> nn.Module | None:
    """The negative branch's own network, where it has one."""
    return getattr(pipe, f"negative_{aligned_network(pipe)[0]}", None)


@contextmanager
def drawing(pipe: Any, negative: Negative, call: inspect.BoundArguments) -> Iterator[None]:
    """A block around one call of the pipeline, in which the negative branch runs with the negative side.

    ValueError where there is no such branch (FLUX without true guidance), or the mixture is not what α and β say.
    """
    asked = call.arguments
    prompted = asked.get("negative_prompt") is not None or asked.get("negative_prompt_embeds") is not None
    if "true_cfg_scale" in asked and not (asked["true_cfg_scale"] > 1 and prompted):
        raise ValueError(
            f"{plain_class(type(pipe)).__name__} has a negative branch only with true_cfg_scale above 1 and a negative_prompt (which "
            "may be ''): give both, or unload_negative()"
        )
    network, second = aligned_network(pipe)[1], second_network(pipe)
    acting = acting_adapters(network)
    if second is not None and acting != negative.positive:
        raise ValueError(
            f"the negative network was mixed beside {_told(negative.positive or {})}, and now {_told(acting)} acts: load_negative again"
        )
    if second is None and not acting and negative.alpha != 1:
        raise ValueError(f"alpha={negative.alpha:g} has no effect: no adapter acts on the positive branch")
    with negative_branch(
        pipe, network, _switched(network, negative) if second is None else lambda _: nullcontext(second)
    ):
        yield


@contextmanager
def acting_as_negative(pipe: Any, negative: Negative) -> Iterator[nn.Module]:
    """A block with the network of the negative branch: the pipeline's own, other weights acting on it, or its second."""
    network, second = aligned_network(pipe)[1], second_network(pipe)
    if second is not None:
        yield second
        return
    with blend(network, NEGATIVE, alpha=negative.alpha, beta=negative.beta)():
        yield network


def _switched(
    network: nn.Module, negative: Negative
) -> Callable[[Callable[..., Any]], AbstractContextManager[Callable[..., Any]]]:
    blended = blend(network, NEGATIVE, alpha=negative.alpha, beta=negative.beta)

    @contextmanager
    def own(forward: Callable[..., Any]) -> Iterator[Callable[..., Any]]:
        with blended():
            yield forward

    return own


def check_branches(pipe: Any) -> None:
    """ValueError for a pipeline that is no family of ours, or draws without a negative branch."""
    network = adapter_for(pipe).module
    if type(network).__name__ in CONDITIONAL_FIRST:
        raise ValueError(
            f"a negative side is not supported for {type(network).__name__}, which runs the prompt's half first"
        )
    if is_quantized(network) and second_network(pipe) is not None:
        raise ValueError("a quantised network cannot be mixed with another: use a negative LoRA")
    if network.config.get("time_cond_proj_dim") is not None:  # type: ignore[union-attr, operator]
        raise ValueError(
            f"{type(network).__name__} is guidance-distilled (it is told its guidance, as LCM's): no negative branch is run at all"
        )


def save_negative(pipe: Any, negative: Negative, folder: Path) -> None:
    """Writes the negative side as it acts beside the pipeline's own adapters merged: to be loaded onto that with α = β = 1."""
    component, network = aligned_network(pipe)
    second = second_network(pipe)
    if second is not None:
        second.save_pretrained(folder / component)  # type: ignore[operator]
        return
    # θ + α·η + β·δ = (θ + η) + (α − 1)·η + β·δ
    parts = [(adapter_of(pipe, NEGATIVE), negative.beta)]
    if negative.alpha != 1:
        parts += [(adapter_of(pipe, name), (negative.alpha - 1) * w) for name, w in acting_adapters(network).items()]
    lora = weighted_sum(parts)
    save_lora(lora.component, lora.weights, lora.config, folder)


def _network_of(base: Any) -> nn.Module:
    pipe = load_base(base) if isinstance(base, (str, os.PathLike)) else base
    return pipe if isinstance(pipe, nn.Module) else aligned_network(pipe)[1]


@torch.no_grad()
def _mixed(network: nn.Module, released: Released, base: nn.Module | None, wanted: Negative) -> nn.Module:
    """A network with θ + α·(θ_pos − θ) + β·(θ_npo − θ), each weight mixed in float32 or better and kept in the network's precision."""
    if is_quantized(network):
        raise ValueError("a quantised network cannot be mixed with another: use a negative LoRA")
    second = copy.deepcopy(network)
    start = base_state(network if base is None else base)
    if has_adapter(second):
        if acting := acting_adapters(network):
            second.fuse_lora(adapter_names=list(acting))  # type: ignore[operator]
        second.unload_lora()  # type: ignore[operator]
    aligned = {name: value.clone() for name, value in second.state_dict().items()}
    replace_weights(second, released)
    if (
        (wanted.alpha, wanted.beta) == (1, 1)
        and base is None
        and all(torch.equal(aligned[name], start[name]) for name in aligned)
    ):
        return second.eval().requires_grad_(False)
    for name, value in second.state_dict().items():
        if value.is_floating_point():
            value.copy_(_sum(start[name].to(value.device), aligned[name], value, wanted))
    return second.eval().requires_grad_(False)


def _sum(base: Tensor, positive: Tensor, negative: Tensor, wanted: Negative) -> Tensor:
    precision = torch.promote_types(torch.float32, negative.dtype)
    base, positive, negative = (part.to(precision) for part in (base, positive, negative))
    return base + wanted.alpha * (positive - base) + wanted.beta * (negative - base)


def _told(adapters: dict[str, float]) -> str:
    return " and ".join(f"{name} × {weight:g}" for name, weight in adapters.items()) or "no adapter"
