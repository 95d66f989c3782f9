"""`mmalign make-answer-pairs`: preference data of a model's own mistakes, for RRPO."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, partial
from typing import Any

from mmalign.cli.answer_models import (
    ALIASES,
    GRADERS,
    answering_options,
    asking_of,
    asking_options,
    load_answering,
    question_options,
    questions_of,
)
from mmalign.cli.options import Command, Option, number, one_of, whole

_MODEL, _WHAT, _HOW, _HARD = "the model", "what is asked", "how it answers", "how hard clips are to see"
# Tokens that a language model that judges or rewrites may say.
_WRITTEN = 1024
VERB = Command(
    prog="mmalign make-answer-pairs",
    description="Asks a model about clips that are hidden in part and out of order, and makes a pair of every wrong answer: what is "
    "right against the same text with the model's errors, the phrases that differ tagged. Questions are a data set with answers. "
    "The file goes into the folder of the media. Called again, only what is missing is asked.",
    example="mmalign make-answer-pairs --model llava-hf/llava-onevision-qwen2-7b-ov-hf --data videos/questions.jsonl --num-frames 16 "
    "--rewriter Qwen/Qwen3-4B-Instruct-2507 --output videos/pairs.jsonl",
    options=[
        *answering_options(group=_MODEL, lora=True),
        *question_options(_WHAT),
        Option(name="output", help="the file of pairs", metavar="FILE", required=True, group=_WHAT),
        Option(
            name="judge",
            help="auto, yes-no, choice or text: how an answer is compared with what is right; or a language model that is asked, a Hub "
            "id or a folder",
            metavar="NAME",
            default="auto",
            group=_WHAT,
        ),
        Option(
            name="rewriter",
            help="a language model that writes the rejected answers, a Hub id or a folder; without it they are the model's own words",
            metavar="NAME",
            nullable=True,
            group=_WHAT,
        ),
        Option(
            name="area",
            help="the largest share of a frame that a light block hides; the smallest is half of it; 0 for none",
            convert=number,
            metavar="X",
            default=0.5,
            group=_HARD,
        ),
        Option(
            name="shuffle", help="of frames", convert=one_of("none", "local", "global"), default="local", group=_HARD
        ),
        Option(
            name="window",
            help="places that a frame moves at most, shuffled locally",
            convert=whole,
            metavar="N",
            default=2,
            group=_HARD,
        ),
        Option(name="seed", help="of blocks and orders", convert=whole, metavar="N", default=0, group=_HARD),
        *asking_options(_HOW),
    ],
    aliases=ALIASES,
)


def run(argv: Sequence[str]) -> int:
    """Asks, pairs, and says how many."""
    given = VERB.read(argv)
    if given is None:
        return 0
    from mmalign.evaluation.answer_mistakes import make_answer_pairs, model_judge, model_rewriter

    questions = questions_of(given)

    @cache
    def asked(name: str) -> Any:
        return partial(load_answering(given, name=name), max_new_tokens=_WRITTEN)

    judge: Any = given["judge"] if given["judge"] in GRADERS else model_judge(asked(given["judge"]))
    made = make_answer_pairs(
        load_answering(given, lora=given["lora"]),
        questions,
        given["output"],
        judge=judge,
        rewrite=None if given["rewriter"] is None else model_rewriter(asked(given["rewriter"])),
        area=(given["area"] / 2, given["area"]),
        shuffle=given["shuffle"],
        window=given["window"],
        seed=given["seed"],
        **asking_of(given),
    )
    why = ", ".join(f"{number} {reason}" for reason, number in made.left_out.items())
    print(f"{made.num_pairs} pairs in {made.path}" + (f"; no pair of {why}" if why else ""))
    if made.num_pairs:
        print(f"train on them: mmalign train rrpo --model {given['model']} --data {made.path}")
    return 0
