"""`mmalign evaluate-answers`: how many of a model's answers are right, and whether that is more than of its base's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from mmalign.cli.answer_models import (
    ALIASES,
    GRADERS,
    answering_options,
    asking_of,
    asking_options,
    frames_of,
    load_answering,
    question_options,
    questions_of,
)
from mmalign.cli.options import Command, Given, Option, UsageError, number, one_of, whole

_MODELS, _WHAT, _HOW, _JUDGED = "the models", "what is asked", "how they answer", "how answers are graded"
_ALSO = "what else is asked"
VERB = Command(
    prog="mmalign evaluate-answers",
    description="Grades a model's answers to questions of which the right answers are known; with --lora or --base it is compared with "
    "its base, question by question. Writes report.html and report.json, and the answers, which are not made again.",
    example="mmalign evaluate-answers --model LiquidAI/LFM2-VL-450M --lora runs/token-dpo --data questions.jsonl",
    options=[
        *answering_options(group=_MODELS, lora=True),
        Option(
            name="base",
            help="what to compare with; none is the model without its --lora",
            metavar="MODEL",
            group=_MODELS,
            nullable=True,
        ),
        *question_options(_WHAT),
        Option(
            name="output_dir",
            help="the report and the answers go here",
            metavar="DIR",
            default="answers",
            group=_WHAT,
        ),
        *asking_options(_HOW),
        Option(
            name="grader",
            help="auto goes by what is right: yes or no (a whole word of the first sentence), an option's letter, else a short text",
            convert=one_of(*GRADERS),
            metavar="|".join(GRADERS),
            default="auto",
            group=_JUDGED,
        ),
        Option(
            name="num_resamples", help="bootstrap resamples", convert=whole, metavar="N", default=2000, group=_JUDGED
        ),
        Option(name="confidence", help="of the intervals", convert=number, metavar="X", default=0.95, group=_JUDGED),
        Option(
            name="retention_data",
            help="questions that the training was not about, which must not be answered worse; as --data",
            metavar="FILE",
            group=_ALSO,
            nullable=True,
        ),
        Option(
            name="retention_tolerance",
            help="the loss that can be borne, as a share of right answers (0.02 is two points); say it before you look",
            convert=number,
            metavar="X",
            group=_ALSO,
            nullable=True,
        ),
        Option(
            name="given_answers",
            help="held-out preference data: how the model ranks their pairs, and its KL from the base on their answers",
            metavar="FILE",
            group=_ALSO,
            nullable=True,
        ),
        Option(
            name="num_samples",
            help="questions shown in the report, picked at random before any answer is looked at",
            convert=whole,
            metavar="N",
            default=12,
            group=_ALSO,
        ),
    ],
    aliases=ALIASES,
)


@dataclass(frozen=True)
class _Base:
    """What is compared with: a pipeline, what has it be the base for a while, and its fingerprint, None where it is to be computed."""

    pipe: Any
    acting: Callable[[], AbstractContextManager[Any]]
    fingerprint: str | None


def run(argv: Sequence[str]) -> int:
    """Answers, grades, writes the report and prints its headline."""
    given = VERB.read(argv)
    if given is None:
        return 0
    _check(given)
    from mmalign.evaluation.answer_evaluation import answer_retention, evaluate_answers
    from mmalign.evaluation.answer_grades import grade, pairs
    from mmalign.evaluation.answer_report import answer_lines, picture_of, write_answer_report
    from mmalign.evaluation.answering import answer

    folder, questions = Path(given["output_dir"]), questions_of(given)
    asked = [questions[row] for row in range(len(questions))]
    others = None if given["retention_data"] is None else _others(given)
    # Told before hours of answering: what no grader can grade.
    pairs(grade(asked, [""] * len(asked), given["grader"]))
    if others is not None:
        grade([others[row] for row in range(len(others))], [""] * len(others), given["grader"])
    held_out = None if given["given_answers"] is None else _held_out(given)
    pipe = load_answering(given, lora=given["lora"])
    base = _base(given, pipe)
    if base is not None and held_out is not None:
        _check_tokens(pipe, base.pipe)
    ask: Callable[..., Any] = partial(answer, **asking_of(given))

    def both(source: Any, name: str) -> tuple[Any, Any]:
        ours = ask(pipe, source, output=folder / f"{name}-aligned.jsonl", description=f"Answering {name}, aligned")
        if base is None:
            return ours, None
        with base.acting():
            theirs = ask(
                base.pipe,
                source,
                output=folder / f"{name}-base.jsonl",
                fingerprint=base.fingerprint,
                description=f"Answering {name}, base",
            )
        return ours, theirs

    graded: dict[str, Any] = {name: given[name] for name in ("grader", "num_resamples", "confidence")}
    aligned, reference = both(questions, "answers")
    kept = None
    if others is not None:
        kept = answer_retention(
            [others[row] for row in range(len(others))],
            *both(others, "retention"),
            tolerance=given["retention_tolerance"],
            **graded,
        )
    weighed = None if base is None or held_out is None else _weighed(given, pipe, base, held_out)
    label = "the model" if base is None else "aligned"
    result = evaluate_answers(
        asked, aligned, reference, aligned_label=label, retention=kept, likelihoods=weighed, **graded
    )
    page = write_answer_report(result, folder, picture=picture_of(questions), num_samples=given["num_samples"])
    print("\n".join(answer_lines(result)))
    print(f"report: {page}")
    return 0


def _check(given: Given) -> None:
    """UsageError for half of what is needed."""
    compared = given["lora"] is not None or given["base"] is not None
    for name in ("retention_data", "given_answers"):
        if given[name] is not None and not compared:
            raise UsageError(f"--{name.replace('_', '-')} compares with a base: give --lora or --base")
    if (given["retention_data"] is None) != (given["retention_tolerance"] is None):
        raise UsageError("--retention-data and --retention-tolerance go together")
    if given["retention_tolerance"] is not None:
        from mmalign.evaluation.retention import check_tolerance

        check_tolerance(given["retention_tolerance"])
    if given["num_samples"] < 0:
        raise UsageError(f"--num-samples must be 0 or more, got {given['num_samples']}")


def _others(given: Given) -> Any:
    from mmalign.cli.answer_data import open_questions

    return open_questions(given["retention_data"], **frames_of(given))


def _base(given: Given, pipe: Any) -> _Base | None:
    """None where one model is graded."""
    if given["base"] is not None:
        base = load_answering(given, name=given["base"])
        return _Base(base, lambda: nullcontext(base.model), None)
    if given["lora"] is None:
        return None
    from mmalign.evaluation.answering import answering_fingerprint
    from mmalign.likelihood.reference import make_reference

    reference = make_reference(pipe.model, kind="adapter")
    # The same whatever LoRA it is compared with, so that its answers are made once.
    name = answering_fingerprint(pipe, reference.fingerprint())
    return _Base(pipe, lambda: reference.model(pipe.model), name)


def _held_out(given: Given) -> Any:
    from mmalign.cli.answer_data import open_answers

    return open_answers(given["given_answers"], held_out=True, **frames_of(given))


def _check_tokens(pipe: Any, base: Any) -> None:
    """ValueError where the same text is not the same tokens to both models."""
    ours, theirs = (getattr(one.processor, "tokenizer", one.processor).get_vocab() for one in (pipe, base))
    if ours != theirs:
        raise ValueError(
            "--given-answers compares what two models say of the same tokens, and these have different ones: leave it out"
        )


def _weighed(given: Given, pipe: Any, base: _Base, held_out: Any) -> Any:
    from mmalign.evaluation.answer_likelihood import compare_likelihoods

    return compare_likelihoods(
        pipe.model,
        base.acting,
        pipe.processor,
        held_out,
        batch_size=given["batch_size"],
        processor_kwargs=given["processor_kwargs"],
        num_resamples=given["num_resamples"],
        confidence=given["confidence"],
    )
