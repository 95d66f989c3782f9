"""Grade a model's answers, or compare two models' answers to the same questions: overall, by kind of question, and by pairs of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any

import numpy as np

from mmalign.data.questions import Question
from mmalign.evaluation.answer_grades import Accuracy, Graded, Grader, GraderName, accuracy, by_kind, grade, pairs
from mmalign.evaluation.answer_likelihood import AnswerLikelihoods
from mmalign.evaluation.answering import AnswerFile, check_rows
from mmalign.evaluation.holm import holm
from mmalign.evaluation.result import Retention, library_versions
from mmalign.evaluation.retention import check_tolerance, retained
from mmalign.evaluation.win_rate import Difference, share_difference


@dataclass(frozen=True, slots=True, kw_only=True)
class AnswerGroup:
    """Questions that are told together. difference: aligned − base; p_corrected: its p-value, corrected for the number of kinds
    where it is one of them.

    base, difference and p_corrected are None where one model is graded.
    """

    name: str
    aligned: Accuracy
    base: Accuracy | None
    difference: Difference | None
    p_corrected: float | None

    @property
    def shows_difference(self) -> bool:
        """Whether one model is said to answer better."""
        return self.p_corrected is not None and self.p_corrected <= 1 - self.aligned.confidence


@dataclass(frozen=True, slots=True, kw_only=True)
class AnswerRow:
    """A question, and what was answered and what it is worth; None of a base that there is not. finished: as in Answered."""

    question: Question
    aligned: str
    aligned_score: float
    finished: bool
    base: str | None
    base_score: float | None
    base_finished: bool | None


@dataclass(frozen=True, slots=True, kw_only=True)
class AnswerEvaluation:
    """What grading found. kinds: () where questions have none; pairs, retention, likelihoods: None where there are none."""

    aligned_label: str
    base_label: str | None
    aligned_fingerprint: str
    base_fingerprint: str | None
    overall: AnswerGroup
    kinds: tuple[AnswerGroup, ...]
    pairs: AnswerGroup | None
    rows: tuple[AnswerRow, ...]
    settings: dict[str, Any]
    versions: dict[str, str]
    created: str
    retention: Retention | None = None
    likelihoods: AnswerLikelihoods | None = None


def evaluate_answers(
    questions: Sequence[Question],
    aligned: AnswerFile,
    base: AnswerFile | None = None,
    *,
    grader: GraderName | Grader = "auto",
    aligned_label: str = "aligned",
    base_label: str = "base",
    num_resamples: int = 2000,
    confidence: float = 0.95,
    likelihoods: AnswerLikelihoods | None = None,
    retention: Retention | None = None,
) -> AnswerEvaluation:
    """Grades answers as `answering.answer` gives them, a question a row; with `base` differences are paired by question.

    The intervals draw whole prompts: questions about the same picture or clip stand or fall together. ValueError where answers do not
    belong to the questions, or the two files were made with different data or options.
    """
    _check(questions, aligned, base)
    interval: dict[str, Any] = {"num_resamples": num_resamples, "confidence": confidence}
    ours = grade(questions, [one.answer for one in aligned.answers], grader)
    theirs = None if base is None else grade(questions, [one.answer for one in base.answers], grader)
    kinds = by_kind(ours)
    their_kinds = {} if theirs is None else by_kind(theirs)
    groups = _corrected([_group(kind, kinds[kind], their_kinds.get(kind), interval) for kind in kinds])
    paired = pairs(ours)
    together = _group("pairs", paired, None if theirs is None else pairs(theirs), interval) if paired else None
    of_base = [None] * len(ours) if base is None else base.answers
    worth_of_base = [None] * len(ours) if theirs is None else [one.score for one in theirs]
    return AnswerEvaluation(
        aligned_label=aligned_label,
        base_label=None if base is None else base_label,
        aligned_fingerprint=aligned.model,
        base_fingerprint=None if base is None else base.model,
        overall=_group("all questions", ours, theirs, interval),
        kinds=tuple(groups),
        pairs=together,
        rows=tuple(
            AnswerRow(
                question=one.question,
                aligned=one.answer,
                aligned_score=one.score,
                finished=told.finished,
                base=None if other is None else other.answer,
                base_score=worth,
                base_finished=None if other is None else other.finished,
            )
            for one, told, other, worth in zip(ours, aligned.answers, of_base, worth_of_base, strict=True)
        ),
        settings={
            "num_questions": len(questions),
            "data": aligned.data,
            "grader": grader if isinstance(grader, str) else getattr(grader, "__name__", type(grader).__name__),
            "num_resamples": num_resamples,
            "confidence": confidence,
            **aligned.options,
        },
        versions=library_versions(),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        retention=retention,
        likelihoods=likelihoods,
    )


def answer_retention(
    questions: Sequence[Question],
    aligned: AnswerFile,
    base: AnswerFile,
    *,
    tolerance: float,
    grader: GraderName | Grader = "auto",
    num_resamples: int = 2000,
    confidence: float = 0.95,
) -> Retention:
    """Whether the aligned model still answers what its training was not about: the share of right answers may fall by `tolerance`."""
    check_tolerance(tolerance)
    _check(questions, aligned, base)
    ours, theirs = (
        np.array([one.score for one in grade(questions, [told.answer for told in side.answers], grader)])
        for side in (aligned, base)
    )
    clusters = [question.cluster for question in questions]
    difference = share_difference(ours, theirs, clusters, num_resamples=num_resamples, confidence=confidence)
    return retained(ours, theirs, clusters, "accuracy", aligned.data, tolerance, difference)


def _corrected(groups: list[AnswerGroup]) -> list[AnswerGroup]:
    """The groups with their p-values corrected for each other."""
    p_values = [group.difference.p_value for group in groups if group.difference is not None]
    return (
        [replace(group, p_corrected=p) for group, p in zip(groups, holm(p_values), strict=True)] if p_values else groups
    )


def _check(questions: Sequence[Question], aligned: AnswerFile, base: AnswerFile | None) -> None:
    for side in (aligned, *([] if base is None else [base])):
        check_rows(side, questions)
    if base is not None and (aligned.data, aligned.options) != (base.data, base.options):
        differing = "data" if aligned.data != base.data else "options"
        raise ValueError(f"the two models answered with different {differing}: answer anew with the same")


def _group(
    name: str, ours: Sequence[Graded], theirs: Sequence[Graded] | None, interval: Mapping[str, Any]
) -> AnswerGroup:
    difference = None
    if theirs is not None:
        aligned, base = ([one.score for one in side] for side in (ours, theirs))
        difference = share_difference(aligned, base, [one.question.cluster for one in ours], **interval)
    return AnswerGroup(
        name=name,
        aligned=accuracy(ours, **interval),
        base=None if theirs is None else accuracy(theirs, **interval),
        difference=difference,
        p_corrected=None if difference is None else difference.p_value,
    )
