"""Rows of answers for training: checked once before it starts, then encoded anew whenever one is needed.

Media are too large to keep in memory, and quick to read beside a step of a model that sees.
"""

import hashlib
import json
import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from torch.utils.data import DataLoader, Dataset

from mmalign.data.answer_tokens import EncodedAnswers, encode_answers, media_sizes
from mmalign.data.answers import AnswerSource, load_answers, untied
from mmalign.data.fingerprints import processor_fingerprint
from mmalign.data.records import BadRow, InvalidRow, summarise
from mmalign.data.storage import default_cache_dir
from mmalign.training.token_config import TokenConfig

logger = logging.getLogger("mmalign")


@dataclass(frozen=True)
class Encoder:
    """How a row becomes tokens: the source's row, as the method takes it, read by the model's own processor."""

    source: AnswerSource
    args: TokenConfig
    processor: Any
    config: Any

    def __call__(self, row: int) -> EncodedAnswers:
        """The row's tokens and media; raises InvalidRow."""
        pair, args = self.args.taken(untied(self.source[row])), self.args
        encoded = encode_answers(
            pair,
            self.processor,
            self.config,
            max_length=args.max_length,
            truncate=args.truncate,
            processor_kwargs=args.processor_kwargs,
        )
        args.check_encoded(pair, encoded)
        return encoded

    def fingerprint(self) -> str:
        """sha256 of everything that decides about a row's tokens and media."""
        parts = {
            "source": self.source.fingerprint(),
            "method": self.args.taking(),
            "processor": processor_fingerprint(self.processor),
            "max_length": self.args.max_length,
            "truncate": self.args.truncate,
            "processor_kwargs": self.args.processor_kwargs,
        }
        return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


class EncodedRows(Dataset[dict[str, Any]]):
    """The rows that are used, each encoded when it is asked for."""

    # All rows may stand in one batch.
    buckets = None

    def __init__(self, encoder: Encoder, rows: list[int]) -> None:
        self.encoder, self.rows = encoder, rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = self.rows[index]
        return {"row": row, "encoded": self.encoder(row)}


@dataclass(frozen=True)
class Answers:
    """Checked rows. bad_rows: those that are left out. sides: answers a row, 1 or 2. longest: tokens of the longest answered prompt.

    fingerprint: sha256 of all that decides about the rows' tokens, and of which are used.
    """

    name: str
    encoder: Encoder
    dataset: EncodedRows
    bad_rows: list[BadRow]
    sides: int
    longest: int

    @cached_property
    def fingerprint(self) -> str:
        """Of the tokens of all rows that are used."""
        return hashlib.sha256(f"{self.encoder.fingerprint()}/{self.dataset.rows}".encode()).hexdigest()

    @property
    def prompts(self) -> set[str | None]:
        """What tells the prompts of the rows that are used from others."""
        told = self.encoder.source.prompts()
        return {told[row] for row in self.dataset.rows}

    @property
    def left_out(self) -> str:
        """Which rows are left out and why, in one line; empty where none is."""
        total = len(self.bad_rows) + len(self.dataset)
        return summarise(self.bad_rows, total) if self.bad_rows else ""


@dataclass(frozen=True)
class _Good:
    row: int
    sides: int
    length: int
    sizes: dict[str, tuple[int, ...]]


def prepare_answers(data: Any, processor: Any, config: Any, args: TokenConfig, *, evaluated: bool = False) -> Answers:
    """Opens `data` and reads every row once, so that what is wrong with one is told before training; `config`: the model's.

    ValueError where rows cannot be read and `args.on_bad_row` is "raise", and where none is left. Answers stay as they are.
    """
    if isinstance(data, Answers):
        return data
    split = args.eval_split if evaluated else args.train_split
    opened = isinstance(data, AnswerSource)
    # Frames of a video are taken out of its file once.
    frames = None if opened else Path(args.cache_dir or default_cache_dir()) / "frames"
    source = load_answers(data, split=split, num_frames=args.num_frames, frame_cache=frames)
    encoder = Encoder(source, args, processor, config)
    checked = _checked(encoder, len(source), args)
    bad = [one for one in checked if isinstance(one, BadRow)]
    good = [one for one in checked if isinstance(one, _Good)]
    if bad and args.on_bad_row == "raise":
        told = summarise(bad, len(source), what="cannot be used")
        raise ValueError(f"{source.name}: {told}; on_bad_row='skip' trains without them")
    sides = {one.sides for one in good}
    if not good:
        raise ValueError(f"no usable rows in {source.name}: {summarise(bad, len(source), what='cannot be used')}")
    if len(sides) > 1:
        raise ValueError(f"{source.name} holds pairs and single answers: split it")
    _check_sizes(good, args.per_device_eval_batch_size if evaluated else args.per_device_train_batch_size)
    rows = EncodedRows(encoder, [one.row for one in good])
    answers = Answers(source.name, encoder, rows, bad, sides.pop(), max(one.length for one in good))
    if bad:
        logger.warning("%s: %s", source.name, answers.left_out)
    logger.info("%s: %d rows of up to %d tokens", source.name, len(good), answers.longest)
    return answers


def _check_sizes(good: list[_Good], batch_size: int) -> None:
    """ValueError where two rows cannot share a batch, as they may at any step."""
    first: dict[str, _Good] = {}
    for one in good if batch_size > 1 else ():
        for name, size in one.sizes.items():
            other = first.setdefault(name, one)
            if other.sizes[name] != size:
                raise ValueError(
                    f"rows {other.row} and {one.row} cannot share a batch: {name} of {other.sizes[name]} and {size}; give clips the "
                    "same number of frames (num_frames), or take batches of one row"
                )


def check_answers(answers: Answers, args: TokenConfig, train: Answers | None) -> None:
    """ValueError where the loss reads something else than the rows are, or the training data, if these are others."""
    if answers.sides == 1 and not args.is_unpaired:
        raise ValueError(
            f"{answers.name} holds single answers, and loss_type={'+'.join(args.loss_type)!r} compares pairs: take kto, bco or "
            "apo_zero_unpaired"
        )
    if train is not None and answers.sides != train.sides:
        raise ValueError(f"{train.name} and {answers.name} differ: one holds pairs, the other single answers")


def check_held_out(train: Answers, evaluated: Answers) -> None:
    """ValueError if the evaluation data are the training data; a warning if they share prompts."""
    if evaluated.fingerprint == train.fingerprint:
        raise ValueError("eval_dataset is the training data: name another one, or another eval_split")
    known, asked = train.prompts, evaluated.prompts
    if shared := known & asked:
        logger.warning(
            "%d of %d evaluation prompts also occur in training: accuracy on them may be memory, not preference",
            len(shared),
            len(asked),
        )


class _Probe(Dataset[Any]):
    """What becomes of each row: a `_Good`, or a `BadRow`."""

    def __init__(self, read: Callable[[int], EncodedAnswers], length: int) -> None:
        self._read, self._length = read, length

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, row: int) -> _Good | BadRow:
        try:
            encoded = self._read(row)
        except InvalidRow as error:
            return error.bad_row
        longest = max(len(answer.ids) for answer in encoded.answers)
        return _Good(row, len(encoded.answers), len(encoded.prompt) + longest, media_sizes(encoded))


def _checked(encoder: Encoder, length: int, args: TokenConfig) -> list[_Good | BadRow]:
    from tqdm import tqdm

    loader = DataLoader(
        _Probe(encoder, length), batch_size=8, num_workers=args.dataloader_num_workers, collate_fn=_as_they_are
    )
    checked: list[_Good | BadRow] = []
    with tqdm(total=length, desc="reading rows", disable=args.disable_tqdm) as bar:
        for rows in loader:
            checked += rows
            bar.update(len(rows))
    return checked


def _as_they_are(items: list[Any]) -> list[Any]:
    return items
