"""What a judge says of two sides, asked in both orders: one that answers by place and not by what it is shown contradicts itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeVar

from mmalign.evaluation.win_rate import WinRate

_Side = TypeVar("_Side")


@dataclass(frozen=True, slots=True)
class Verdicts:
    """verdicts: one a question; one that is "same" was not asked. win_rate: over those that were answered alike in both orders."""

    verdicts: tuple[str, ...]
    win_rate: WinRate | None

    @property
    def inconsistent(self) -> float:
        """Share of the questions that were asked whose verdict changed with the order."""
        return self._share("inconsistent")

    @property
    def unreadable(self) -> float:
        """Share of the questions that were asked with a verdict that is neither 1 nor 2."""
        return self._share("unreadable")

    def _share(self, verdict: str) -> float:
        return self.verdicts.count(verdict) / max(1, len(self.verdicts) - self.verdicts.count("same"))


def in_both_orders(
    ask: Callable[[_Side, _Side], object], one: _Side, other: _Side
) -> Literal["one", "other", "inconsistent", "unreadable"]:
    """Which of two sides `ask` says is the better, by its place: 1 or "1", 2 or "2"."""
    said = str(ask(one, other)).strip(), str(ask(other, one)).strip()
    if not {*said} <= {"1", "2"}:
        return "unreadable"
    if said[0] == said[1]:
        return "inconsistent"
    return "one" if said[0] == "1" else "other"
