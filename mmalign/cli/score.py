"""`mmalign score`: what scorers say of pictures that are already there."""

from __future__ import annotations

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
VERB = Command(
    prog="mmalign score",
    description="Scores the pictures of a folder, each with its prompt, and writes every score to scores.json there.",
    example="mmalign score --pictures pictures/ --scorers hpsv2.1 aesthetic",
    options=[
        Option(
            name="pictures",
            help="a folder with metadata.jsonl (file_name, prompt), as `mmalign generate` writes it; any folder with --prompt",
            metavar="DIR",
            required=True,
            group=_WHAT,
        ),
        Option(name="prompt", help="one prompt for all of them, instead of metadata.jsonl", group=_WHAT, nullable=True),
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
    from mmalign.files import write_json

    folder = Path(given["pictures"]).expanduser()
    rows = listed(folder, given["prompt"])
    device = best_device(given["device"])
    for name in given["scorers"]:
        scores = scored(folder, rows, name, scorer_named(name, device))
        for row, value in zip(rows, scores.tolist(), strict=True):
            row.setdefault("scores", {})[name] = value
        spread = scores.std(correction=0).item()
        print(
            f"{name:<16} mean {scores.mean().item():.4f}   median {scores.median().item():.4f}   standard deviation {spread:.4f}"
        )
    path = write_json(folder / "scores.json", rows)
    print(f"{len(rows)} pictures; every score: {path}")
    return 0


def scored(folder: Path, rows: list[dict[str, Any]], name: str, scorer: Any) -> Any:
    """The scores (N,) of all pictures, a few of them in memory at a time."""
    import torch
    from PIL import Image
    from tqdm.auto import tqdm

    parts = []
    with tqdm(total=len(rows), desc=f"Scoring by {name}", unit="picture") as bar:
        for start in range(0, len(rows), _AT_ONCE):
            some = rows[start : start + _AT_ONCE]
            images = [Image.open(folder / row["file_name"]).convert("RGB") for row in some]
            parts.append(scorer.score(images, [row["prompt"] for row in some]))
            bar.update(len(some))
    return torch.cat(parts)


def listed(folder: Path, prompt: str | None) -> list[dict[str, Any]]:
    """File name and prompt of every picture, in order; ValueError names the line or file that cannot be used."""
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder")
    if prompt is not None:
        names = sorted(path.name for path in folder.iterdir() if path.suffix.lower() in _ENDINGS)
        rows: list[dict[str, Any]] = [{"file_name": name, "prompt": prompt} for name in names]
    else:
        table = folder / "metadata.jsonl"
        if not table.is_file():
            raise UsageError(
                f"{folder} has no metadata.jsonl that tells each picture's prompt: give --prompt for all of them"
            )
        lines = table.read_text(encoding="utf-8").splitlines()
        rows = [_row(line, f"{table}, line {number}") for number, line in enumerate(lines, 1) if line.strip()]
    if not rows:
        raise ValueError(f"{folder} holds no pictures ({', '.join(_ENDINGS)})")
    for row in rows:
        if not (folder / row["file_name"]).is_file():
            raise ValueError(f"{folder} lacks {row['file_name']}, which its metadata.jsonl names")
    return rows


def _row(line: str, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where} is no JSON: {error.msg}") from error
    for key in ("file_name", "prompt"):
        if not isinstance(row, dict) or not isinstance(row.get(key), str):
            raise ValueError(f"{where} has no {key}")
    return {"file_name": row["file_name"], "prompt": row["prompt"]}
