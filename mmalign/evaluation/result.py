"""What an evaluation found, as frozen records."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from mmalign.evaluation.holm import Corrected
from mmalign.evaluation.win_rate import Difference, WinRate

MOVED = 0.25  # of the base's standard deviation: what a picture statistic must move by to be pointed out
NOISE = 1e-6  # a picture statistic that moves or varies by less does so by rounding


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """A score over the N pictures of one side; the standard error is clustered by prompt, NaN for a single prompt."""

    mean: float
    median: float
    standard_error: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ScorerResult:
    """What one scorer says about both sides. `seen_in_training`: its labels or rewards trained the aligned side.

    p_corrected: the win rate's p-value, corrected for looking at several scorers.
    """

    name: str
    fingerprint: str
    seen_in_training: bool
    win_rate: WinRate
    p_corrected: Corrected
    aligned: Summary
    base: Summary
    difference: Difference

    @property
    def shows_difference(self) -> bool:
        """Whether one side is said to win more often: by the corrected p-value, which the interval alone does not know of."""
        return self.p_corrected.shown <= 1 - self.win_rate.confidence


@dataclass(frozen=True, slots=True, kw_only=True)
class PictureStatistic:
    """A cheap fact about pictures on both sides; `drift` is between them, so it has none of base, aligned and spread.

    base_spread: standard deviation over the base's pictures.
    """

    name: str
    description: str
    base: float | None
    aligned: float | None
    base_spread: float | None
    difference: Difference

    @property
    def moved(self) -> bool:
        """By more than a quarter of the base's own spread, with an interval that leaves out zero."""
        return (
            self.base_spread is not None
            and self.difference.shows_difference
            and abs(self.difference.value) > max(MOVED * self.base_spread, NOISE)
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class ScalePoint:
    """The comparison with the aligned side's LoRA at `scale`; 0 is the adapter switched off. As in `EvaluationResult`."""

    scale: float
    scorers: tuple[ScorerResult, ...]
    statistics: tuple[PictureStatistic, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Retention:
    """Whether the aligned side still does, on prompts that preferences did not ask about, what the base did.

    difference: aligned − base, by one held-out scorer. tolerance: the loss of score, in the scorer's own unit, that was said
    beforehand to be bearable.
    """

    scorer: str
    fingerprint: str
    base: Summary
    aligned: Summary
    difference: Difference
    tolerance: float

    @property
    def verdict(self) -> str:
        """ "kept" if the interval of the difference lies above −tolerance, "lost" if it lies below it, else "undecided"."""
        if self.difference.low > -self.tolerance:
            return "kept"
        return "lost" if self.difference.high < -self.tolerance else "undecided"


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One prompt and seed: both pictures and what every scorer gave them. A picture that is not at hand is None."""

    prompt: str
    seed: int
    base_picture: Path | None
    aligned_picture: Path | None
    base_scores: Mapping[str, float]
    aligned_scores: Mapping[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationResult:
    """A comparison of two sides. `scorers` stands in the caller's order; `rows` holds every picture's scores.

    sweep: the same at other scales of the LoRA; empty, as retention is None, where nobody asked.
    """

    aligned_label: str
    base_label: str
    aligned_fingerprint: str
    base_fingerprint: str
    scorers: tuple[ScorerResult, ...]
    statistics: tuple[PictureStatistic, ...]
    rows: tuple[Row, ...]
    settings: Mapping[str, Any]
    versions: Mapping[str, str]
    created: str
    sweep: tuple[ScalePoint, ...] = ()
    retention: Retention | None = None

    @property
    def judge(self) -> ScorerResult:
        """The scorer that tells the headline: the first held-out one in the caller's order, whatever it says."""
        return min(self.scorers, key=lambda scorer: scorer.seen_in_training)

    @property
    def ranked_scorers(self) -> tuple[ScorerResult, ...]:
        """Held-out scorers first, each group in the caller's order."""
        return tuple(sorted(self.scorers, key=lambda scorer: scorer.seen_in_training))


def library_versions() -> dict[str, str]:
    """The versions that a picture or a number may depend on."""
    names = ("mmalign", "torch", "diffusers", "transformers", "numpy", "pillow")
    return {"python": platform.python_version(), **{name: version(name) for name in names}}
