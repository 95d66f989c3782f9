"""Held-out questions about the worlds of pictures and clips, as data sets hold them: what the models that answer are measured by."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from mmalign.data.answer_media import ClipReading
from mmalign.data.questions import QuestionSource
from mmalign.data.rows import ListRows
from mmalign.playground import answer_worlds
from mmalign.playground.answer_worlds import WorldName
from mmalign.playground.photographs import Split

ROWS = range(200)
_STREAM = {"vision": 704, "video": 714}


def load(
    world: WorldName, split: Split = "test", *, rows: Sequence[int] = ROWS, max_rows: int | None = None
) -> QuestionSource:
    """Questions about pictures or clips of a split, those of `test` of photographs that no model has seen; each row shows others.

    About each a question of every kind that it allows. One that is answered by yes or no comes as a hallucination pair: its truth is
    yes, that of its twin no, and both must be answered right. max_rows: only the first questions.
    """
    asked = ListRows(_asked(world, split, rows))
    return QuestionSource(asked, f"playground-{world}[{split}]", ClipReading(), max_rows=max_rows)


def _asked(world: WorldName, split: Split, rows: Sequence[int]) -> list[dict[str, Any]]:
    questions = answer_worlds.questions_of(world)
    asked: list[dict[str, Any]] = []
    for row, seen in zip(rows, answer_worlds.see(world, split, rows, seed=_STREAM[world]), strict=True):
        rng = np.random.default_rng([_STREAM[world], row])
        medium = answer_worlds.column_of(seen.medium)
        for kind in questions.kinds_of(seen.shown):
            twins = kind in questions.YES_OR_NO
            ones = (
                questions.hallucination_pair(seen.shown, kind, rng) if twins else [questions.ask(seen.shown, kind, rng)]
            )
            pair = {"pair": f"{row} {kind}"} if twins else {}
            asked += [{"question": one.text, "answer": one.answer, "kind": kind, **pair, **medium} for one in ones]
    return asked
