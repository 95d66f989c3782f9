"""A network's adapters: which layers carry them, how strongly each acts, and others acting for a while."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

from torch import nn


def adapter_layers(module: nn.Module) -> list[Any]:
    """The layers of a network that carry adapters."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    return [layer for layer in module.modules() if isinstance(layer, (BaseTunerLayer, AuxiliaryTrainingWrapper))]


def acting_adapters(network: nn.Module) -> dict[str, float]:
    """Adapter → the weight with which it acts now (`set_adapters`); those at rest are not in it."""
    acting: dict[str, float] = {}
    for layer in adapter_layers(network):
        for name in _acting_on(layer):
            acting[name] = layer.scaling[name] / _unweighted(layer, name)
    return acting


def blend(
    network: nn.Module, negative: str, *, alpha: float, beta: float
) -> Callable[[], AbstractContextManager[None]]:
    """A context in which the adapters that act now act `alpha` times as strongly, and `negative` acts with weight `beta` beside them.

    ValueError where `negative` acts already, or an adapter is fused, so that it would act whatever is switched.
    """
    now, then = [], []
    for layer in adapter_layers(network):
        if layer.merged:
            raise ValueError(
                "a LoRA is fused into the network, which must switch between two: pipe.unfuse_lora() first"
            )
        positive = _acting_on(layer)
        if negative in positive:
            raise ValueError(
                f"the adapter {negative!r} acts on the positive branch too: name the others alone in set_adapters, or disable_lora()"
            )
        scaled = {name: alpha * layer.scaling[name] for name in positive}
        if negative in layer.scaling:
            scaled[negative] = beta * _unweighted(layer, negative)
        now.append(_as_it_is(layer))
        then.append(_Layer(layer, False, list(scaled), scaled))

    @contextmanager
    def blended() -> Iterator[None]:
        for state in then:
            state.apply()
        try:
            yield
        finally:
            for state in now:
                state.apply()

    return blended


@contextmanager
def acting_as_before(network: nn.Module) -> Iterator[None]:
    """A block that adds adapters, after which those act that acted before it."""
    before = {id(layer): _as_it_is(layer) for layer in adapter_layers(network)}
    try:
        yield
    finally:
        for layer in adapter_layers(network):
            before.get(id(layer), _Layer(layer, False, [], {})).apply()


@dataclass(frozen=True)
class _Layer:
    """A layer and what acts on it: its adapters, each with its α/rank times its weight."""

    layer: Any
    disabled: bool
    active: list[str]
    scaling: dict[str, float]

    def apply(self) -> None:
        # peft's own verbs would also switch which weights require gradients.
        self.layer._disable_adapters = self.disabled
        self.layer._active_adapter = self.active
        self.layer.scaling.update(self.scaling)


def _as_it_is(layer: Any) -> _Layer:
    return _Layer(layer, layer.disable_adapters, list(layer.active_adapters), dict(layer.scaling))


def _acting_on(layer: Any) -> list[str]:
    return [] if layer.disable_adapters else [name for name in layer.active_adapters if name in layer.scaling]


def _unweighted(layer: Any, name: str) -> float:
    """α/rank, or α/√rank where the adapter is rank-stabilised."""
    return layer.lora_alpha[name] / (layer.r[name] ** 0.5 if layer.use_rslora[name] else layer.r[name])
