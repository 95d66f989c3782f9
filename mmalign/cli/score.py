"""`mmalign score`: what scorers say of pictures that are already there."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mmalign.cli.evaluate import scorer_named
from mmalign.cli.models import best_device, device_option
from mmalign.cli.options import Command, Option, UsageError
from mmalign.scorer_names import SCORERS

_WHAT, _JUDGED = "the pictures", "who judges"
_AT_ONCE = 256
_ENDINGS = (".png", ".jpg", ".jpeg", ".webp")
_SHEETS = ("grid.png", "side_by_side.png")  # of `mmalign generate` and `evaluate`: many pictures in one
_SCORES = "scores.json"
_SAME = ("file_name", "prompt", "picture")  # what a score is of
VERB = Command(
    prog="mmalign score",
    description="Scores the pictures of a folder, each with its prompt, and writes every score to scores.json there, beside those "
    "of earlier calls.",
    example="mmalign score --pictures pictures/ --scorers hpsv2.1 aesthetic",
    options=[
        Option(
            name="pictures",
            help="a folder with metadata.jsonl (file_name, prompt), as `mmalign generate` writes it; any folder with --prompt",
            metavar="DIR",
            required=True,
            group=_WHAT,
        ),
        Option(
            name="prompt", help="one prompt for all of them, whatever metadata.jsonl says", group=_WHAT, nullable=True
        ),
        device_option(_WHAT),
        Option(
            name="scorers",
            help=f"{', '.join(SCORERS)}; for the playground's pictures also judge-A, judge-B",
            metavar="NAME",
            many=True,
            required=True,
            group=_JUDGED,
        ),
    ],
)


def run(argv: Sequence[str]) -> int:
    """Scores, prints a line a scorer, and says where every score is."""
    given = VERB.read(argv)
    if given is None:
        return 0
    import numpy as np

    from mmalign.evaluation.scorers import score_files
    from mmalign.files import write_json

    folder = Path(given["pictures"]).expanduser()
    rows = listed(folder, given["prompt"])
    _keep(folder, rows)
    files, prompts = [folder / row["file_name"] for row in rows], [row["prompt"] for row in rows]
    device = best_device(given["device"])
    for name in given["scorers"]:
        scorer = scorer_named(name, device)
        found = score_files([scorer], files, prompts, batch_size=_AT_ONCE, description=f"Scoring by {name}")
        scores = found[scorer.name]
        for row, value in zip(rows, scores.tolist(), strict=True):
            row["scores"][name] = value
            row["fingerprints"][name] = scorer.fingerprint
        print(
            f"{name:<16} mean {scores.mean():.4f}   median {np.median(scores):.4f}   standard deviation {scores.std():.4f}"
        )
    path = write_json(folder / _SCORES, rows)
    print(f"{len(rows)} pictures; every score: {path}")
    return 0


def _keep(folder: Path, rows: list[dict[str, Any]]) -> None:
    """Gives each row its picture's hash, and what an earlier call scored of the same picture and prompt."""
    path = folder / _SCORES
    stored = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []
    if not isinstance(stored, list) or not all(isinstance(row, dict) for row in stored):
        raise ValueError(f"{path} was not written by mmalign score: move it away")
    earlier = {tuple(row.get(key) for key in _SAME): row for row in stored}
    for row in rows:
        row["picture"] = hashlib.sha256((folder / row["file_name"]).read_bytes()).hexdigest()
        same = earlier.get(tuple(row[key] for key in _SAME), {})
        row |= {key: dict(same.get(key, {})) for key in ("scores", "fingerprints")}


def listed(folder: Path, prompt: str | None) -> list[dict[str, Any]]:
    """File name and prompt of every picture, in order; ValueError names the line or file that cannot be used."""
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder")
    table = folder / "metadata.jsonl"
    if table.is_file():
        # Not splitlines: a prompt may hold line breaks of Unicode's, which JSON leaves as they are.
        lines = table.read_text(encoding="utf-8").split("\n")
        rows = [_row(line, f"{table}, line {number}", prompt) for number, line in enumerate(lines, 1) if line.strip()]
    elif prompt is None:
        raise UsageError(
            f"{folder} has no metadata.jsonl that tells each picture's prompt: give --prompt for all of them"
        )
    else:
        files = (path for path in folder.iterdir() if path.suffix.lower() in _ENDINGS and path.is_file())
        rows = [{"file_name": path.name, "prompt": prompt} for path in sorted(files) if path.name not in _SHEETS]
    if not rows:
        raise ValueError(f"{folder} holds no pictures ({', '.join(_ENDINGS)})")
    for row in rows:
        if not (folder / row["file_name"]).is_file():
            raise ValueError(f"{folder} lacks {row['file_name']}, which its metadata.jsonl names")
    return rows


def _row(line: str, where: str, prompt: str | None) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where} is no JSON: {error.msg}") from error
    if prompt is not None and isinstance(row, dict):
        row["prompt"] = prompt
    for key in ("file_name", "prompt"):
        if not isinstance(row, dict) or not isinstance(row.get(key), str):
            raise ValueError(f"{where} has no {key}")
    return {"file_name": row["file_name"], "prompt": row["prompt"]}
