"""score_pairs: a reward's opinion of both pictures of every pair, in batches, kept beside the latents."""

from __future__ import annotations

import hashlib
import logging
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from mmalign.data.ahead import in_order
from mmalign.data.clips import frames_of
from mmalign.data.pairs import PairSource
from mmalign.data.records import BadRow, InvalidRow, PairRecord, summarise
from mmalign.data.shards import read_notes, read_shard, write_shard
from mmalign.data.storage import default_cache_dir
from mmalign.rewards import Scorer

_FORMAT = 1
_SAVE_EVERY = 4096
_log = logging.getLogger(__name__)


def score_pairs(
    source: PairSource,
    scorer: Scorer,
    *,
    batch_size: int = 32,
    cache_dir: str | Path | None = None,
    workers: int = 4,
    progress: bool = True,
) -> Float[Tensor, "R 2"]:
    """Raw scores of (image_0, image_1) of each of the source's R rows; NaN where a row cannot be used.

    A clip's score is the mean over its frames. The rows that encode_pairs kept are `scores[encoded.rows]`. Kept under
    (source, scorer) fingerprints in cache_dir, and saved every 4096 rows, so that an interrupted pass goes on. batch_size:
    pairs at once (fewer of clips, by their frames).
    """
    from filelock import FileLock

    if batch_size < 1 or workers < 1:
        raise ValueError(f"batch_size and workers must be at least 1, got {batch_size} and {workers}")
    if source.sides != 2:
        raise ValueError(f"{source.name} holds single pictures: pairs of them are scored")
    root = default_cache_dir() if cache_dir is None else Path(cache_dir).expanduser()
    root.mkdir(parents=True, exist_ok=True)
    key = hashlib.sha256(f"scores/{_FORMAT}/{source.fingerprint}/{scorer.fingerprint}".encode()).hexdigest()
    path = root / f"scores-{key}.safetensors"
    scores = torch.full((len(source), 2), float("nan"))
    bad_rows: list[BadRow] = []
    done = 0
    with FileLock(root / f"scores-{key}.lock"):
        if path.is_file():
            notes = read_notes(path)
            done, bad_rows = notes["done"], [BadRow(*bad) for bad in notes["bad_rows"]]
            scores = read_shard(path)["scores"].clone()
        if done < len(source):
            _score_rows(source, scorer, scores, bad_rows, done, path, batch_size, workers, progress)
    if bad_rows:
        _log.warning("%s: %s", source.name, summarise(bad_rows, len(source)))
    return scores


def _score_rows(
    source: PairSource,
    scorer: Scorer,
    scores: Tensor,
    bad_rows: list[BadRow],
    done: int,
    path: Path,
    batch_size: int,
    workers: int,
    progress: bool,
) -> None:
    """Fill `scores` from row `done` on, saving as it goes."""
    waiting: list[PairRecord] = []
    saved, at_once = done, max(1, batch_size // (source.num_frames or 1))
    records = in_order(lambda row: _read(source, row), range(done, len(source)), workers)
    with tqdm(total=len(source), initial=done, desc=f"Scoring by {scorer.name}", disable=not progress) as bar:
        for row, record in enumerate(records, start=done):
            if isinstance(record, BadRow):
                bad_rows.append(record)
            else:
                waiting.append(record)
            due = row + 1 - saved >= _SAVE_EVERY
            if len(waiting) == at_once or due:
                _score_batch(scorer, waiting, scores)
                waiting = []
            if due:
                saved = row + 1
                _save(path, scorer, scores, bad_rows, saved)
            bar.update(1)
    _score_batch(scorer, waiting, scores)
    _save(path, scorer, scores, bad_rows, len(scores))


def _save(path: Path, scorer: Scorer, scores: Tensor, bad_rows: list[BadRow], done: int) -> None:
    notes = [[bad.row, bad.field, bad.reason] for bad in bad_rows]
    write_shard(path, {"scores": scores}, {"done": done, "bad_rows": notes, "scorer": scorer.name})


def _read(source: PairSource, row: int) -> PairRecord | BadRow:
    try:
        return source[row]
    except InvalidRow as error:
        return error.bad_row


def _score_batch(scorer: Scorer, records: list[PairRecord], scores: Tensor) -> None:
    if not records:
        return
    sides = [(record.prompt, side) for record in records for side in record.sides]
    images = [frame for _, side in sides for frame in frames_of(side)]
    prompts = [prompt for prompt, side in sides for _ in frames_of(side)]
    answer = scorer.score(images, prompts)
    if answer.shape != (len(images),) or not torch.isfinite(answer).all():
        raise ValueError(
            f"{scorer.name} must give one finite score a picture, shape ({len(images)},); got {tuple(answer.shape)} "
            f"with {int((~torch.isfinite(answer)).sum())} not finite, at rows {records[0].row} … {records[-1].row}"
        )
    scores[[record.row for record in records]] = (
        answer.detach().cpu().to(scores.dtype).reshape(len(records), 2, -1).mean(2)
    )
