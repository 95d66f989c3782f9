"""Named findings about a run, and what they are read off: its last logged entries."""

from collections.abc import Callable
from dataclasses import dataclass

# The margin beyond which a pair hardly teaches.
SATURATED = 4.0


@dataclass(frozen=True)
class Finding:
    """A named finding with what to do about it."""

    name: str
    message: str


@dataclass(frozen=True)
class Recent:
    """The last entries of a history."""

    entries: list[dict[str, float]]

    def mean(self, name: str) -> float:
        """Of a metric."""
        return sum(entry[name] for entry in self.entries) / len(self.entries)

    def all(self, name: str, holds: Callable[[float], bool]) -> bool:
        """Whether it holds of a metric in every entry."""
        return all(holds(entry[name]) for entry in self.entries)

    def change(self, name: str) -> float:
        """By how much a metric's sum is greater over the later half of the entries than over the earlier one."""
        half = len(self.entries) // 2
        early, late = self.entries[:half], self.entries[-half:]
        return sum(entry[name] for entry in late) - sum(entry[name] for entry in early)

    @property
    def warming_up(self) -> bool:
        """Whether the learning rate still rises."""
        return self.entries[-1].get("learning_rate", 0) > self.entries[0].get("learning_rate", 0)


def recent(history: list[dict[str, float]], metric: str, window: int) -> Recent | None:
    """The last `window` entries that have the metric; None where there are fewer."""
    entries = [entry for entry in history if metric in entry][-window:]
    return None if len(entries) < window else Recent(entries)
