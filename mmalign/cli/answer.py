"""`mmalign answer`: a model's answers to questions, a line each, kept as they come."""

from __future__ import annotations

from collections.abc import Sequence

from mmalign.cli.answer_models import (
    ALIASES,
    answering_options,
    asking_of,
    asking_options,
    load_answering,
    question_options,
    questions_of,
)
from mmalign.cli.options import Command, Option

_MODEL, _WHAT, _HOW = "the model", "what is asked", "how it answers"
VERB = Command(
    prog="mmalign answer",
    description="Answers the questions of a data set, greedily, and writes one line of JSON for each. Called again, it answers only "
    "what is missing; a file of another model, other data or other options is left alone.",
    example="mmalign answer --model LiquidAI/LFM2-VL-450M --lora runs/token-dpo --data questions.jsonl --output answers.jsonl",
    options=[
        *answering_options(group=_MODEL, lora=True),
        *question_options(_WHAT),
        Option(name="output", help="the file of answers", metavar="FILE", default="answers.jsonl", group=_WHAT),
        *asking_options(_HOW),
    ],
    aliases=ALIASES,
)


def run(argv: Sequence[str]) -> int:
    """Answers, and says where the answers are."""
    given = VERB.read(argv)
    if given is None:
        return 0
    from mmalign.evaluation.answering import answer

    questions = questions_of(given)
    found = answer(load_answering(given, lora=given["lora"]), questions, output=given["output"], **asking_of(given))
    cut = sum(not one.finished for one in found.answers)
    print(
        f"{len(found.answers)} answers in {given['output']}"
        + (f"; {cut} were cut after {given['max_new_tokens']} tokens (--max-new-tokens)" if cut else "")
    )
    return 0
