"""Write an evaluation down: `report.json` for machines, `report.html` for people, `side_by_side.png` for a card."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mmalign.evaluation.findings import conclusion, moved_statistics
from mmalign.evaluation.grid import side_by_side
from mmalign.evaluation.report_html import page
from mmalign.evaluation.result import EvaluationResult, Row
from mmalign.evaluation.result_json import from_json, to_json, without_nan
from mmalign.evaluation.scorers import read_picture
from mmalign.evaluation.wording import cautions, headline, notes, sample_rule
from mmalign.files import write_file

_PICTURE_ROWS = 6


@dataclass(frozen=True, slots=True)
class ReportFiles:
    """Where a report was written; `picture` is None where the result's pictures are not at hand."""

    html: Path
    json: Path
    picture: Path | None


def write_report(
    result: EvaluationResult,
    output_dir: str | Path,
    *,
    history: Sequence[dict[str, Any]] = (),
    num_samples: int = 12,
    num_worst: int = 6,
    sample_seed: int = 0,
) -> ReportFiles:
    """Write the report into `output_dir`, normally the folder that the pictures were drawn into.

    history: training logs, one dict an entry, as in `trainer.state.log_history`; every number in them gets a curve.
    num_samples: prompts to show, picked with `sample_seed` before any score is looked at. num_worst: worst losses.
    """
    if num_samples < 0:
        raise ValueError(f"num_samples must be zero or more, got {num_samples}.")
    folder = Path(output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    history = [dict(entry) for entry in history]
    sample = sample_rows(result, num_samples, sample_seed)
    rule = sample_rule(len(sample), len({row.prompt for row in result.rows}), sample_seed)
    content = {
        **to_json(result, folder),
        "headline": headline(result),
        "conclusion": conclusion(result),
        "moved": moved_statistics(result),
        "notes": [*cautions(result), *notes(result)],
        "history": without_nan(history),
    }
    html = page(result, sample=sample, sample_rule=rule, worst=worst_losses(result, num_worst), history=history)
    text = json.dumps(content, indent=1, allow_nan=False)
    return ReportFiles(
        html=write_file(folder / "report.html", html),
        json=write_file(folder / "report.json", text),
        picture=_write_picture(result, sample[:_PICTURE_ROWS], folder),
    )


def read_report(path: str | Path) -> EvaluationResult:
    """The result that `write_report` wrote, from its folder or its `report.json`."""
    file = Path(path)
    file = file / "report.json" if file.is_dir() else file
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is not a whole report: {error}") from error
    if not isinstance(data, dict) or "rows" not in data:
        raise ValueError(f"{file} is no report of an evaluation; name its folder, or the report.json in it")
    return from_json(data, file.parent)


def sample_rows(result: EvaluationResult, number: int, seed: int) -> list[Row]:
    """The first row of prompts picked at random: the pick knows the prompts' order and the seed, and no score."""
    first: dict[str, Row] = {}
    for row in result.rows:
        first.setdefault(row.prompt, row)
    rows = list(first.values())
    order = np.random.default_rng(seed).permutation(len(rows))[:number]
    return [row for row in (rows[at] for at in sorted(order)) if _has_pictures(row)]


def worst_losses(result: EvaluationResult, number: int) -> list[Row]:
    """The rows that the headline's scorer puts furthest below the base; wins and ties are never among them."""
    name, margin = result.judge.name, result.settings["tie_margin"]
    lost = [
        row for row in result.rows if row.base_scores[name] - row.aligned_scores[name] > margin and _has_pictures(row)
    ]
    return sorted(lost, key=lambda row: row.aligned_scores[name] - row.base_scores[name])[:number]


def _has_pictures(row: Row) -> bool:
    return row.base_picture is not None and row.aligned_picture is not None


def _write_picture(result: EvaluationResult, rows: Sequence[Row], folder: Path) -> Path | None:
    pairs = [(row, row.base_picture, row.aligned_picture) for row in rows]
    images = [[read_picture(base), read_picture(aligned)] for _, base, aligned in pairs if base and aligned]
    if not images:
        (folder / "side_by_side.png").unlink(missing_ok=True)
        return None
    sheet = side_by_side(
        images, [row.prompt for row in rows], [result.base_label, result.aligned_label], rows_per_line=3
    )
    buffer = io.BytesIO()
    sheet.save(buffer, "PNG")
    return write_file(folder / "side_by_side.png", buffer.getvalue())
