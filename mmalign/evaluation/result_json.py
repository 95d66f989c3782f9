"""A result as strictly valid JSON, and back."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from mmalign.evaluation.holm import Corrected
from mmalign.evaluation.result import (
    EvaluationResult,
    PictureStatistic,
    Retention,
    Row,
    ScalePoint,
    ScorerResult,
    Summary,
)
from mmalign.evaluation.win_rate import Difference, WinRate

SCHEMA_VERSION = 2


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
        "statistics": [_statistic_to_json(statistic) for statistic in result.statistics],
        "sweep": [
            {**asdict(point), "statistics": [_statistic_to_json(statistic) for statistic in point.statistics]}
            for point in result.sweep
        ],
        "retention": result.retention and {**asdict(result.retention), "verdict": result.retention.verdict},
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
        sweep=tuple(
            ScalePoint(
                scale=point["scale"],
                scorers=tuple(_scorer(scorer) for scorer in point["scorers"]),
                statistics=tuple(_statistic(statistic) for statistic in point["statistics"]),
            )
            for point in data["sweep"]
        ),
        retention=data["retention"] and _retention(data["retention"]),
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


def _statistic_to_json(statistic: PictureStatistic) -> dict[str, Any]:
    return {**asdict(statistic), "moved": statistic.moved}


def _statistic(data: Mapping[str, Any]) -> PictureStatistic:
    measured = {key: value for key, value in data.items() if key != "moved"}
    return PictureStatistic(**{**measured, "difference": _difference(data["difference"])})


def _retention(data: Mapping[str, Any]) -> Retention:
    said = {key: value for key, value in data.items() if key != "verdict"}
    summaries = {side: _summary(data[side]) for side in ("base", "aligned")}
    return Retention(**{**said, **summaries, "difference": _difference(data["difference"])})


def _summary(data: Mapping[str, Any]) -> Summary:
    error = data["standard_error"]
    return Summary(mean=data["mean"], median=data["median"], standard_error=math.nan if error is None else error)


def _difference(data: Mapping[str, Any]) -> Difference:
    low, high = data["low"], data["high"]
    return Difference(**{**data, "low": -math.inf if low is None else low, "high": math.inf if high is None else high})
