"""What the package says about a loss."""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from torch import Tensor

LossFunction = Callable[..., Tensor]


@dataclass(frozen=True, slots=True)
class PublishedBeta:
    """A β from the literature: the number printed there, the same β in this package's convention, and where."""

    printed: float
    here: float
    where: str


@dataclass(frozen=True, slots=True)
class LossInfo:
    """A loss in words: where it comes from, what it reads, what it accepts.

    `inputs` are record fields that must be there, `optional` ones that are used if there, `required` keyword tensors
    of `compute` without a default, `hyper` its other hyper-parameters with their defaults. `no_strength` and
    `no_weight` say why a per-pair strength or weight has no meaning; empty: it is accepted. `batch_coupled`: one
    item's loss depends on the other items, so gather over ranks first.
    """

    key: str
    meaning: str
    arxiv: str
    inputs: tuple[str, ...]
    optional: tuple[str, ...]
    required: tuple[str, ...]
    hyper: Mapping[str, Any]
    modalities: tuple[str, ...]
    reference_free: bool
    batch_coupled: bool
    unpaired: bool
    betas: tuple[PublishedBeta, ...]
    no_strength: str
    no_weight: str
    alias_of: str


def keywords(function: LossFunction) -> dict[str, inspect.Parameter]:
    """The keyword-only parameters of a loss, by name."""
    parameters = inspect.signature(function).parameters
    return {name: p for name, p in parameters.items() if p.kind is inspect.Parameter.KEYWORD_ONLY}


def hyper_parameters(function: LossFunction) -> tuple[tuple[str, ...], Mapping[str, Any]]:
    """Names without a default, and names with theirs; the pair strength is not a hyper-parameter."""
    own = {name: p for name, p in keywords(function).items() if name != "strength"}
    required = tuple(name for name, p in own.items() if p.default is inspect.Parameter.empty)
    return required, MappingProxyType({name: p.default for name, p in own.items() if name not in required})
