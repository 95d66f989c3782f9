"""Which of two models' answers a judge prefers: asked in both orders, and with the length of answers held equal (arXiv:2404.04475)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from mmalign.data.questions import Question
from mmalign.evaluation.answering import AnswerFile, check_rows
from mmalign.evaluation.intervals import Array, as_clusters, as_scores, student_t
from mmalign.evaluation.verdicts import Verdicts, in_both_orders
from mmalign.evaluation.win_rate import win_rate

Verdict = Literal["a", "b", "same", "inconsistent", "unreadable"]
# (the question, first answer, second answer) → what the judge says: "1", "2", or something that is neither.
AnswerJudge = Callable[[Question, str, str], str]
# A ridge on the length's weight, which has no end where the longer answer always wins; small, for what it holds back counts as quality.
_RIDGE = 1e-3
_TIE = 0.5
_NEWTON_STEPS = 100


@dataclass(frozen=True, slots=True)
class AnswerWins(Verdicts):
    """verdicts: one a question; "same" answers are not judged. win_rate: of a, over those judged alike in both orders and the same
    ones, which are ties; None for none. controlled: the same at equal lengths.
    """

    verdicts: tuple[Verdict, ...]
    controlled: ControlledRate | None


@dataclass(frozen=True, slots=True)
class ControlledRate:
    """What the win rate would be at equal lengths, with its interval over prompts.

    length_weight: what a standard deviation of length adds to the log-odds of winning, about; 0 where length does not matter.
    """

    rate: float
    low: float
    high: float
    length_weight: float
    num_comparisons: int
    num_clusters: int
    confidence: float


def judge_answers(
    judge: AnswerJudge,
    questions: Sequence[Question],
    answers_a: AnswerFile,
    answers_b: AnswerFile,
    *,
    confidence: float = 0.95,
    seed: int = 0,
) -> AnswerWins:
    """Asks of every question twice, the answers swapped; what the judge raises is not caught.

    ValueError for answers to different data, or to other questions than these.
    """
    if answers_a.data != answers_b.data:
        raise ValueError("the two files answer different data: answer the same questions with both models")
    for side in (answers_a, answers_b):
        check_rows(side, questions)
    both = list(zip(answers_a.answers, answers_b.answers, strict=True))
    verdicts = [
        _verdict(judge, question, one.answer, other.answer)
        for question, (one, other) in zip(questions, both, strict=True)
    ]
    worth = {"a": 1.0, "b": 0.0, "same": 0.5}
    clear = [
        (worth[verdict], len(one.answer) - len(other.answer), question.cluster)
        for verdict, question, (one, other) in zip(verdicts, questions, both, strict=True)
        if verdict in worth
    ]
    if not clear:
        return AnswerWins(tuple(verdicts), None, None)
    wins, longer, clusters = zip(*clear, strict=True)
    rate = win_rate(wins, [1 - win for win in wins], clusters, confidence=confidence, seed=seed)
    return AnswerWins(
        tuple(verdicts), rate, length_controlled(wins, longer, clusters, confidence=confidence, seed=seed)
    )


def length_controlled(
    wins: Sequence[float],
    longer: Sequence[float],
    clusters: Sequence[str],
    *,
    confidence: float = 0.95,
    seed: int = 0,
) -> ControlledRate:
    """The win rate at equal lengths: σ(θ) of P(win) = σ(θ + φ · tanh(Δ / std Δ)); AlpacaEval 2's without how hard a question is.

    wins: (N,) 1, ½ or 0. longer: (N,) Δ, by how much a's answer is longer, in any unit. The interval is θ ± t · its standard error,
    clustered by prompt (a sandwich, or the curvature's where that is larger), on the scale of log-odds: it is wide where answers of
    about equal length are not among what was compared. Where every comparison ends the same, length explains nothing, and rate and
    interval are the plain ones.
    """
    outcomes, lengths = as_scores(wins, "wins"), as_scores(longer, "longer")
    groups = as_clusters(clusters, len(outcomes))
    # Wins and losses without a difference of lengths cannot tell what a length is worth.
    spread = lengths.std() or 1.0
    design = np.stack([np.ones_like(lengths), np.tanh(lengths / spread)], axis=1)
    if outcomes.min() == outcomes.max():
        plain = win_rate(outcomes, 1 - outcomes, clusters, confidence=confidence, seed=seed)
        return ControlledRate(plain.rate, plain.low, plain.high, 0.0, len(outcomes), groups.count, confidence)
    weights, curvature = _fit(design, outcomes)
    low, high = -math.inf, math.inf
    if groups.count > 1:
        slopes = design * (outcomes - _sigmoid(design @ weights))[:, None]
        sums = np.stack([groups.sums(column) for column in slopes.T], axis=1)
        inverse = np.linalg.inv(curvature)
        spread_out = (inverse @ (sums.T @ sums) @ inverse)[0, 0] * groups.count / (groups.count - 1)
        # Outcomes that length tells to the letter leave no residuals, and then only the curvature knows how little they say. Ties vary
        # less than wins and losses, and count for nothing there.
        untold = inverse[0, 0] * np.mean(outcomes != _TIE)
        half = student_t(0.5 + confidence / 2, groups.count - 1) * math.sqrt(max(spread_out, untold))
        low, high = weights[0] - half, weights[0] + half
    rate, low, high = (float(_sigmoid(np.array(value))) for value in (weights[0], low, high))
    return ControlledRate(rate, low, high, float(weights[1]), len(outcomes), groups.count, confidence)


def _fit(design: Array, outcomes: Array) -> tuple[Array, Array]:
    """(θ, φ) of the ridge-penalised likelihood's top, and its curvature there, by Newton's steps, halved where they overshoot."""
    ridge = np.diag([0.0, _RIDGE])

    def height(weights: Array) -> float:
        odds = design @ weights
        return float(np.sum(outcomes * odds - np.logaddexp(0, odds)) - weights @ ridge @ weights / 2)

    weights = np.zeros(2)
    curvature = np.eye(2)
    for _ in range(_NEWTON_STEPS):
        chances = _sigmoid(design @ weights)
        slope = design.T @ (outcomes - chances) - ridge @ weights
        curvature = (design * (chances * (1 - chances))[:, None]).T @ design + ridge
        step = np.linalg.solve(curvature, slope)
        while height(weights + step) < height(weights) and np.abs(step).max() > 1e-12:
            step = step / 2
        weights = weights + step
        if np.abs(step).max() < 1e-12:
            break
    return weights, curvature


def _sigmoid(values: Array) -> Array:
    return np.asarray(np.exp(-np.logaddexp(0, -values)))


def _verdict(judge: AnswerJudge, question: Question, a: str, b: str) -> Verdict:
    if a == b:
        return "same"
    found = in_both_orders(lambda first, second: judge(question, first, second), a, b)
    return "a" if found == "one" else "b" if found == "other" else found
