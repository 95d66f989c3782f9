"""Looking at several scorers, or several runs: p-values corrected by Holm's method (Scand. J. Statist. 6, 1979)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Corrected:
    """A p-value corrected among the held-out ones (None for a scorer that was seen in training), and among all."""

    held_out: float | None
    all: float

    @property
    def shown(self) -> float:
        """The one to go by: among the held-out ones where it is one of them."""
        return self.all if self.held_out is None else self.held_out


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjusted p-values, in order. Calling a difference where one is ≤ α errs in any of them with probability ≤ α.

    The k-th smallest of m is multiplied by m − k + 1, and none is below a smaller one; however they depend on each other.
    """
    adjusted, largest = [0.0] * len(p_values), 0.0
    order = sorted(range(len(p_values)), key=lambda at: p_values[at])
    for place, at in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - place) * p_values[at]))
        adjusted[at] = largest
    return adjusted


def corrected(p_values: Sequence[float], seen_in_training: Sequence[bool]) -> list[Corrected]:
    """Both corrections of each p-value; `seen_in_training` tells which of them no conclusion should rest on."""
    held_out = iter(holm([p for p, seen in zip(p_values, seen_in_training, strict=True) if not seen]))
    return [
        Corrected(None if seen else next(held_out), among_all)
        for seen, among_all in zip(seen_in_training, holm(p_values), strict=True)
    ]
