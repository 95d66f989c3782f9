"""Preference sets made by the models' own mistakes: the truth is chosen, what the model said instead is rejected.

A model is asked about pictures and clips behind a block and out of order, as RRPO has it, and as they are. Kept is what it answers
wrong in words that could be true of some other picture or clip, so that the rejected answer is the truth but for the model's errors,
which are marked. Training sees the clean picture or clip. Stored are rows of a stream: they are composed again from the photographs.

Which mistakes make a set decides what it teaches. What a model gets wrong seeing clearly are just the questions where its first thought
is false: it learns to distrust it. So questions are chosen by the perturbed view, which hardly depends on what it knows; and as such
pairs tell mostly what it knows anyway, rejected is what it says wrong seeing clearly, where it does. (docs/playground.md has numbers.)
"""

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import zip_longest
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from mmalign.data.answer_media import ClipReading
from mmalign.data.answers import AnswerSource
from mmalign.data.rows import ListRows
from mmalign.files import written_aside
from mmalign.playground import answer_worlds
from mmalign.playground.answer_worlds import WorldName
from mmalign.playground.answering import answer, by_kind
from mmalign.playground.moving import WAYS
from mmalign.playground.paths import PAIRS
from mmalign.playground.photographs import GARMENTS, Split
from mmalign.playground.questions import NO, WORD, YES, is_right, words
from mmalign.playground.world import COLOURS

NUMBER: dict[Split, int] = {"train": 600, "test": 200}
DESCRIBE_SHARE = 0.5
# Each row asks for a description and for so many other kinds.
KINDS_A_ROW = 3
Which = Literal["any", "perturbed", "clear"]
_STREAM = {"vision": 703, "video": 713}
_AT_ONCE = 64
_MOST_ROWS: dict[Split, int] = {"train": 12_000, "test": 4_000}


@dataclass(frozen=True)
class Mistake:
    """row: of the world's stream. answer: the truth. pred: what the model said; perturbed: whether it saw the row so.

    clear: of a perturbed row, what it says seeing clearly, where that is wrong too.
    """

    row: int
    kind: str
    question: str
    answer: str
    pred: str
    perturbed: bool
    clear: str | None = None


@dataclass(frozen=True)
class Answered:
    """One answer of a model, and whether it is right."""

    mistake: Mistake
    right: bool


def load(
    world: WorldName,
    split: Split = "train",
    *,
    mistakes: Which = "any",
    kinds: Collection[str] | None = None,
    max_rows: int | None = None,
) -> AnswerSource:
    """The pairs that ship with the package; kinds: only those of these questions. max_rows: only the first ones.

    mistakes: "any", of questions that are answered wrong where the view is perturbed, what is said wrong seeing clearly, else in that
    view; "perturbed", always in that view; "clear", of questions that are answered wrong seeing clearly.
    """
    found = load_mistakes(world, split, mistakes)
    kept = [mistake for mistake in found if kinds is None or mistake.kind in kinds]
    rows = ListRows(as_rows(world, split, kept))
    return AnswerSource(rows, f"playground-{world}[{split}]", ClipReading(), max_rows=max_rows)


def load_mistakes(world: WorldName, split: Split, mistakes: Which = "any") -> list[Mistake]:
    """The mistakes behind them."""
    path = path_of(world, split)
    if not path.is_file():
        raise ValueError(
            f"{path} is missing: reinstall mmalign, or build it with `python -m mmalign.playground.build mistakes`"
        )
    stored = [Mistake(**row) for row in pq.read_table(path).to_pylist()]
    kept = [mistake for mistake in stored if mistake.perturbed == (mistakes != "clear")]
    if mistakes != "any":
        return kept
    return [replace(one, pred=one.clear, perturbed=False) if one.clear is not None else one for one in kept]


def save(world: WorldName, split: Split, mistakes: Sequence[Mistake]) -> None:
    """Keeps mistakes where `load_mistakes` finds them."""
    with written_aside(path_of(world, split)) as part:
        pq.write_table(pa.Table.from_pylist([asdict(mistake) for mistake in mistakes]), part, compression="zstd")


def as_rows(world: WorldName, split: Split, mistakes: Sequence[Mistake]) -> list[dict[str, Any]]:
    """Mistakes with their clean pictures or clips, composed again, in the columns of RRPO's release."""
    shown = answer_worlds.see(world, split, [mistake.row for mistake in mistakes], seed=_STREAM[world])
    rows = []
    for mistake, seen in zip(mistakes, shown, strict=True):
        answer_masked, pred_masked = tagged(mistake.answer, mistake.pred)
        rows.append(
            {
                "question": mistake.question,
                "answer": mistake.answer,
                "pred": mistake.pred,
                "answer_masked": answer_masked,
                "pred_masked": pred_masked,
                "src": mistake.kind,
                "sample_id": f"{world}-{split}-{mistake.row}",
                **answer_worlds.column_of(seen.medium),
            }
        )
    return rows


def path_of(world: WorldName, split: Split) -> Path:
    """Where they lie."""
    return PAIRS / f"{world}-{split}.parquet"


def find(
    model: Any, processor: Any, world: WorldName, split: Split, number: int, *, perturbed: bool
) -> tuple[list[Mistake], dict[str, Any]]:
    """`number` mistakes in rows 0, 1, … of `split`, half of them descriptions, all other kinds alike as far as there are any.

    Of a kind that is answered by yes or no, half of the truths are yes: else one of the two words would be what is learnt.
    Also what was asked for that: how many wrong answers are usable, and shares of right ones by kind. RuntimeError where thousands of
    rows hold too few.
    """
    answered: list[Answered] = []
    usable: defaultdict[str, list[Mistake]] = defaultdict(list)
    described = round(DESCRIBE_SHARE * number)
    for start in range(0, _MOST_ROWS[split], _AT_ONCE):
        rows = range(start, start + _AT_ONCE)
        clear = ask(model, processor, world, split, rows, perturbed=False)
        part = ask(model, processor, world, split, rows, perturbed=True) if perturbed else clear
        answered += part
        for one, seeing in zip(part, clear, strict=True):
            if not one.right and could_be_true(world, one.mistake):
                also = perturbed and not seeing.right and could_be_true(world, seeing.mistake)
                usable[one.mistake.kind].append(replace(one.mistake, clear=seeing.mistake.pred if also else None))
        others = _in_turn(usable)
        if len(usable["describe"]) >= described and len(others) >= number - described:
            chosen = sorted([*usable["describe"][:described], *others[: number - described]], key=lambda one: one.row)
            return chosen, _told(answered, sum(map(len, usable.values())))
    found = {kind: len(mistakes) for kind, mistakes in usable.items()}
    raise RuntimeError(f"the {split} rows of {world} hold fewer than {number} mistakes of this model: {found}")


def ask(
    model: Any, processor: Any, world: WorldName, split: Split, rows: Sequence[int], *, perturbed: bool
) -> list[Answered]:
    """Asks for a description of each row, and about other kinds."""
    questions = answer_worlds.questions_of(world)
    seen = answer_worlds.see(world, split, rows, seed=_STREAM[world])
    media, posed = [], []
    for row, one in zip(rows, seen, strict=True):
        rng = np.random.default_rng([_STREAM[world], row])
        kinds = [kind for kind in questions.kinds_of(one.shown) if kind != "describe"]
        medium = answer_worlds.perturbed(one.medium, torch.Generator().manual_seed(row)) if perturbed else one.medium
        for kind in ("describe", *rng.permutation(kinds)[:KINDS_A_ROW].tolist()):
            media.append(medium)
            posed.append((row, questions.ask(one.shown, kind, rng, true=bool(rng.integers(2)))))
    said = answer(model, processor, media, [question.text for _, question in posed])
    return [
        Answered(Mistake(row, q.kind, q.text, q.answer, text.strip(), perturbed), is_right(q, text))
        for (row, q), text in zip(posed, said, strict=True)
    ]


def could_be_true(world: WorldName, mistake: Mistake) -> bool:
    """Whether a wrong answer is one that the question can have, and as many words long as the truth."""
    if len(words(mistake.pred)) != len(words(mistake.answer)):
        return False
    if mistake.kind == "describe":
        return bool(answer_worlds.questions_of(world).is_description(mistake.pred))
    return all(
        _sort(said) == _sort(true) for said, true in zip(words(mistake.pred), words(mistake.answer), strict=True)
    )


def tagged(chosen: str, rejected: str) -> tuple[str, str]:
    """Two texts of equally many words, each with <MASK>…</MASK> around the words in which they differ."""
    sides = [list(WORD.finditer(text)) for text in (chosen, rejected)]
    apart = [(a.span(), b.span()) for a, b in zip(*sides, strict=True) if a.group() != b.group()]
    spans = [[pair[side] for pair in apart] for side in (0, 1)]
    return _with_tags(chosen, spans[0]), _with_tags(rejected, spans[1])


def _with_tags(text: str, spans: Sequence[tuple[int, int]]) -> str:
    for start, stop in reversed(spans):
        text = f"{text[:start]}<MASK>{text[start:stop]}</MASK>{text[stop:]}"
    return text


def _sort(word: str) -> int:
    """Which words can stand for each other."""
    sorts = ((YES, NO), COLOURS, GARMENTS, WAYS)
    return next((number for number, sort in enumerate(sorts) if word in sort), -1)


def _in_turn(usable: Mapping[str, list[Mistake]]) -> list[Mistake]:
    """All but descriptions: the first of each kind, the second of each, …; of yes and no as many as there are of the rarer truth."""
    kinds = []
    for kind in sorted(set(usable) - {"describe"}):
        truths = [[one for one in usable[kind] if one.answer == truth] for truth in (YES, NO)]
        kinds.append([one for both in zip(*truths, strict=False) for one in both] if any(truths) else usable[kind])
    return [one for turn in zip_longest(*kinds) for one in turn if one is not None]


def _told(answered: Sequence[Answered], usable: int) -> dict[str, Any]:
    right = [one.right for one in answered]
    shares = by_kind([one.mistake.kind for one in answered], right)
    return {"answers": len(answered), "wrong": right.count(False), "usable": usable, "right": shares}
