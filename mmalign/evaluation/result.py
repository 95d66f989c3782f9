"""What an evaluation found, as frozen records, and its way to strictly valid JSON and back."""

from __future__ import annotations

import math
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from mmalign.evaluation.holm import Corrected
from mmalign.evaluation.win_rate import Difference, WinRate

SCHEMA_VERSION = 2
MOVED = 0.25  # of the base's standard deviation: what a picture statistic must move by to be pointed out


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
            and abs(self.difference.value) > MOVED * self.base_spread
        )


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
    """A comparison of two sides. `scorers` stands in the caller's order; `rows` holds every picture's scores."""

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


def to_json(result: EvaluationResult, folder: Path) -> dict[str, Any]:
    """A JSON object without NaN or infinity (both become null); pictures outside `folder` become null too."""
    folder = folder.resolve()

    def relative(picture: Path | None) -> str | None:
        inside = picture is not None and picture.resolve().is_relative_to(folder)
        return picture.resolve().relative_to(folder).as_posix() if picture is not None and inside else None

    rows = [
        {
            **asdict(replace(row, base_scores=dict(row.base_scores), aligned_scores=dict(row.aligned_scores))),
            "base_picture": relative(row.base_picture),
            "aligned_picture": relative(row.aligned_picture),
        }
        for row in result.rows
    ]
    head = {
        "schema_version": SCHEMA_VERSION,
        "created": result.created,
        "versions": dict(result.versions),
        "aligned_label": result.aligned_label,
        "base_label": result.base_label,
        "aligned_fingerprint": result.aligned_fingerprint,
        "base_fingerprint": result.base_fingerprint,
        "judge": result.judge.name,
        "settings": dict(result.settings),
        "scorers": [asdict(scorer) for scorer in result.scorers],
        "statistics": [{**asdict(statistic), "moved": statistic.moved} for statistic in result.statistics],
        "rows": rows,
    }
    clean: dict[str, Any] = without_nan(head)
    return clean


def from_json(data: Mapping[str, Any], folder: Path) -> EvaluationResult:
    """The result that `to_json` wrote; a picture is taken from inside `folder` only, and only if it is there."""
    if data.get("schema_version") != SCHEMA_VERSION:
        raise ValueError(
            f"This report has schema_version {data.get('schema_version')!r}; "
            f"this version of mmalign reads {SCHEMA_VERSION}."
        )
    folder = folder.resolve()

    def picture(name: str | None) -> Path | None:
        path = (folder / name).resolve() if name else None
        return path if path and path.is_relative_to(folder) and path.is_file() else None

    rows = tuple(
        Row(**{**row, "base_picture": picture(row["base_picture"]), "aligned_picture": picture(row["aligned_picture"])})
        for row in data["rows"]
    )
    return EvaluationResult(
        aligned_label=data["aligned_label"],
        base_label=data["base_label"],
        aligned_fingerprint=data["aligned_fingerprint"],
        base_fingerprint=data["base_fingerprint"],
        scorers=tuple(_scorer(scorer) for scorer in data["scorers"]),
        statistics=tuple(_statistic(statistic) for statistic in data["statistics"]),
        rows=rows,
        settings=data["settings"],
        versions=data["versions"],
        created=data["created"],
    )


def without_nan(value: Any) -> Any:
    """The same JSON value with null for every float that JSON cannot say."""
    if isinstance(value, Mapping):
        return {key: without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _scorer(data: Mapping[str, Any]) -> ScorerResult:
    return ScorerResult(
        name=data["name"],
        fingerprint=data["fingerprint"],
        seen_in_training=data["seen_in_training"],
        win_rate=WinRate(**data["win_rate"]),
        p_corrected=Corrected(**data["p_corrected"]),
        aligned=_summary(data["aligned"]),
        base=_summary(data["base"]),
        difference=_difference(data["difference"]),
    )


def _statistic(data: Mapping[str, Any]) -> PictureStatistic:
    measured = {key: value for key, value in data.items() if key != "moved"}
    return PictureStatistic(**{**measured, "difference": _difference(data["difference"])})


def _summary(data: Mapping[str, Any]) -> Summary:
    error = data["standard_error"]
    return Summary(mean=data["mean"], median=data["median"], standard_error=math.nan if error is None else error)


def _difference(data: Mapping[str, Any]) -> Difference:
    low, high = data["low"], data["high"]
    return Difference(**{**data, "low": -math.inf if low is None else low, "high": math.inf if high is None else high})
