"""How the evaluation asks scorers: in batches, with their answers checked."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm.auto import tqdm

from mmalign.evaluation.intervals import Array, as_scores
from mmalign.rewards.scorer import Scorer


def check_scorers(scorers: Sequence[Scorer], trained_on: Collection[str]) -> None:
    """Refuse what would mark a training scorer as held out: a misspelt name, or the same scorer under another one."""
    names = [scorer.name for scorer in scorers]
    if not names:
        raise ValueError("Give at least one scorer, best of all one that nothing was trained on.")
    if len(set(names)) < len(names):
        raise ValueError(f"Scorers must have different names, got {names}.")
    if isinstance(trained_on, str):
        raise TypeError(f"trained_on takes a set of scorer names; write {{{trained_on!r}}}.")
    unknown = sorted(set(trained_on) - set(names))
    if unknown:
        raise ValueError(f"trained_on names {unknown}, but the scorers are {names}. Add the scorer, or drop the name.")
    seen = {scorer.fingerprint: scorer.name for scorer in scorers if scorer.name in trained_on}
    for scorer in scorers:
        if scorer.name not in trained_on and scorer.fingerprint in seen:
            raise ValueError(
                f"{scorer.name!r} has the same fingerprint as {seen[scorer.fingerprint]!r}, which was used for "
                "training, so it is not held out. Name it in trained_on too."
            )


def score_files(
    scorers: Sequence[Scorer],
    files: Sequence[Path],
    prompts: Sequence[str],
    *,
    batch_size: int,
    description: str = "Scoring",
    progress: bool = True,
) -> dict[str, Array]:
    """(N,) scores of each scorer, by name; every picture is read once, `batch_size` of them are held at a time."""
    scores: dict[str, list[Array]] = {scorer.name: [] for scorer in scorers}
    with tqdm(total=len(files), desc=description, unit="picture", disable=not progress) as bar:
        for start in range(0, len(files), batch_size):
            rows = slice(start, start + batch_size)
            images = [read_picture(file) for file in files[rows]]
            for scorer in scorers:
                answer = scorer.score(images, list(prompts[rows]))
                if answer.shape != (len(images),):
                    raise ValueError(
                        f"{scorer.name} must give one score a picture, shape ({len(images)},), "
                        f"got {tuple(answer.shape)}."
                    )
                scores[scorer.name].append(answer.detach().cpu().double().numpy())
            bar.update(len(images))
    return {name: as_scores(np.concatenate(parts), f"Scorer {name!r}") for name, parts in scores.items()}


def read_picture(file: Path) -> Image.Image:
    """A stored picture, read whole, so that the file is closed again."""
    with Image.open(file) as image:
        return image.convert("RGB")
