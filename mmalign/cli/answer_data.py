"""Preference data and questions by name, as verbs take them: load_answers and load_questions, and the playground's own."""

from __future__ import annotations

from typing import Any, Literal

from mmalign.data.answers import AnswerSource, load_answers
from mmalign.data.questions import QuestionSource, load_questions
from mmalign.data.sources import refuse
from mmalign.training.loading import EMBEDDED_ANSWERING

Split = Literal["train", "test"]


def is_playground(name: str | None) -> bool:
    """Whether these are the data of an embedded model that answers."""
    return name in EMBEDDED_ANSWERING


def open_answers(
    name: str, *, split: str | None = None, max_rows: int | None = None, held_out: bool = False, **options: Any
) -> AnswerSource:
    """`load_answers`, or the mistakes of an embedded model. held_out: those of `test` where no split is named."""
    if not is_playground(name):
        return load_answers(name, split=split, max_rows=max_rows, **options)
    from mmalign.playground import answer_pairs

    return answer_pairs.load(**_embedded(name, split or ("test" if held_out else "train"), max_rows, options))


def open_questions(
    name: str, *, split: str | None = None, max_rows: int | None = None, **options: Any
) -> QuestionSource:
    """`load_questions`, or held-out questions about an embedded world."""
    if not is_playground(name):
        return load_questions(name, split=split, max_rows=max_rows, **options)
    from mmalign.playground import answer_questions

    return answer_questions.load(**_embedded(name, split or "test", max_rows, options))


def _embedded(name: str, split: str, max_rows: int | None, options: dict[str, Any]) -> dict[str, Any]:
    # Nothing is decoded that could be kept.
    refuse(name, **{key: value for key, value in options.items() if key != "frame_cache"})
    if split not in ("train", "test"):
        raise ValueError(f"{name} has the splits 'train' and 'test', not {split!r}")
    return {"world": name.removeprefix("playground-"), "split": split, "max_rows": max_rows}
