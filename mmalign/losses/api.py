"""`compute`, `get`, `names`: the door to the table. Every option acts or raises."""

import difflib
import inspect
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jaxtyping import Float, Real
from torch import Tensor

from mmalign.losses.info import LossFunction, LossInfo
from mmalign.losses.records import LogProbs, PairLogProbs, UnpairedLogProbs, present
from mmalign.losses.table import LOSSES
from mmalign.losses.template import weighted

LossName = str | Callable[..., Tensor]
OTHER_NAMES = {"dpo": "sigmoid", "rdpo": "robust", "slic": "hinge"}


def names() -> list[str]:
    """Every key that `compute` and `get` take, in alphabetical order."""
    return sorted(LOSSES)


def get(key: str) -> LossInfo:
    """What the loss is: paper, inputs, hyper-parameters with defaults, modalities, published β and their convention."""
    if key not in LOSSES:
        raise ValueError(f"no loss is named {key!r}{_nearest(key, LOSSES, OTHER_NAMES.get(key))}")
    return LOSSES[key].info


def compute(
    name: LossName | Sequence[LossName],
    logps: LogProbs,
    *,
    loss_weights: Sequence[float] | None = None,
    strength: Real[Tensor, " B"] | float | None = None,
    weight: Real[Tensor, " B"] | float | None = None,
    **hyper: Any,
) -> Float[Tensor, " B"]:
    """weight · Σ_k loss_weights_k · loss_k: one number per item, never reduced.

    `name` is a key, a function of a record, or a list of these (`loss_weights` default to 1 each). `strength` is a
    signed number per pair, inside the link; `weight` ≥ 0 is outside. Hyper-parameters are spelled as in TRL's configs;
    one that no member takes is an error, and in a list each goes to the members that take it.
    """
    if isinstance(name, str) or not isinstance(name, Sequence):
        if loss_weights is not None:
            raise ValueError("loss_weights go with a list of losses; for one loss use weight, one number per item")
        name = [name]
    members = [_member(one) for one in name]
    factors = [1.0] * len(members) if loss_weights is None else list(loss_weights)
    if not members or len(members) != len(factors):
        raise ValueError(f"{len(members)} losses and {len(factors)} loss_weights: give at least one, as many of each")
    _check_hyper(members, hyper)
    _check_divergence(members, hyper)
    for label, value in (("strength", strength), ("weight", weight)):
        _check_per_item(members, label, value, len(logps))
    pair = {} if strength is None else {"strength": strength}
    terms = [factor * _evaluate(member, logps, hyper | pair) for member, factor in zip(members, factors, strict=True)]
    return weighted(sum(terms[1:], terms[0]), weight)


@dataclass(frozen=True, slots=True)
class _Member:
    """A loss as `compute` sees it. `info` is None for a caller's own function."""

    label: str
    function: LossFunction
    takes: tuple[str, ...]
    takes_any: bool
    info: LossInfo | None

    def accepts(self, option: str) -> bool:
        return self.takes_any or option in self.takes


def _member(name: LossName) -> _Member:
    info = get(name) if isinstance(name, str) else None
    function = LOSSES[name].function if isinstance(name, str) else name
    _, *options = inspect.signature(function).parameters.values()  # the first is the record
    takes_any = any(option.kind is inspect.Parameter.VAR_KEYWORD for option in options)
    label = name if isinstance(name, str) else getattr(function, "__name__", type(function).__name__)
    return _Member(label, function, tuple(option.name for option in options), takes_any, info)


def _evaluate(member: _Member, logps: LogProbs, options: Mapping[str, Any]) -> Float[Tensor, " B"]:
    if member.info is not None:
        record = UnpairedLogProbs if member.info.unpaired else PairLogProbs
        if not isinstance(logps, record):
            raise ValueError(f"{member.label!r} takes {record.__name__}, got {type(logps).__name__}")
        for field in member.info.inputs:
            present(logps, field, loss=member.label)
    loss = member.function(logps, **{key: value for key, value in options.items() if member.accepts(key)})
    if loss.shape != (len(logps),):
        raise ValueError(f"{member.label!r} returned shape {tuple(loss.shape)}, expected ({len(logps)},)")
    return loss


def _check_hyper(members: Sequence[_Member], hyper: Mapping[str, Any]) -> None:
    for option in hyper:
        if any(member.accepts(option) for member in members):
            continue
        label = " + ".join(repr(member.label) for member in members)
        takers = [key for key in names() if option in LOSSES[key].info.hyper or option in LOSSES[key].info.required]
        if takers:
            raise ValueError(f"{label} takes no {option}; losses that do: {', '.join(takers)}")
        taken = sorted({name for member in members for name in member.takes if name != "strength"})
        raise ValueError(f"{label} takes no {option}{_nearest(option, taken)}")
    for member in members:
        for option in member.info.required if member.info else ():
            if option not in hyper:
                raise ValueError(f"{member.label!r} needs {option}=, one number per pair")


def _check_divergence(members: Sequence[_Member], hyper: Mapping[str, Any]) -> None:
    """A divergence replaces the log-ratio: each member that has one must take it, or half a sum would differ."""
    if hyper.get("f_divergence_type", "reverse_kl") == "reverse_kl":
        return
    for member in members:
        if member.info and not member.info.reference_free and not member.accepts("f_divergence_type"):
            takers = [key for key in names() if "f_divergence_type" in LOSSES[key].info.hyper]
            raise ValueError(
                f"f_divergence_type={hyper['f_divergence_type']!r} has no valid form for {member.label!r}; "
                f"losses that take it: {', '.join(takers)}"
            )


def _check_per_item(members: Sequence[_Member], option: str, value: Tensor | float | None, size: int) -> None:
    """`strength` and `weight`: a number or (B,), and every member must give it a meaning."""
    if value is None:
        return
    if isinstance(value, Tensor) and value.ndim > 0 and value.shape != (size,):
        raise ValueError(f"{option} has shape {tuple(value.shape)}, expected ({size},): one number per item")
    for member in members:
        reason = getattr(member.info, f"no_{option}") if member.info else ""
        if not reason and option == "strength" and not member.accepts("strength"):
            reason = "its function has no such parameter"
        if reason:
            raise ValueError(f"{member.label!r} takes no {option}: {reason}")


def _nearest(word: str, known: Collection[str], first: str | None = None) -> str:
    close = ([first] if first else []) + difflib.get_close_matches(word, known, n=3, cutoff=0.4)
    return (
        f"; did you mean {' or '.join(dict.fromkeys(close))}?" if close else f"; there are {', '.join(sorted(known))}"
    )
