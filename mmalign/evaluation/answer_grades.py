"""Whether answers are right: yes or no, a letter among options, a short text, or as a callable says; shares with their intervals."""

from __future__ import annotations

import re
import string
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from mmalign.data.questions import Question
from mmalign.evaluation.intervals import as_clusters, proportion_interval

# What an answer is worth, from 0 to 1; None where it cannot be read, which counts as 0.
Grader = Callable[[Question, str], float | None]
GraderName = Literal["auto", "yes-no", "choice", "text"]

_YES_NO = re.compile(r"\b(yes|no)\b", re.IGNORECASE)
_SENTENCE = re.compile(r"[.!?\n]")
_LETTER = re.compile(r"\W*([A-Za-z])\W*")
_MARKUP = re.compile(r"[*_`]+")
_ARTICLES = re.compile(r"\b(a|an|the)\b")
# Marks without which a number would be another one; the comma of thousands is none of them.
_OF_A_NUMBER = re.compile(r"(?<![^\W\d_])-(?=\.?\d)|(?<![\w.])\.(?=\d)|(?<=\d)([.:/]|,(?!\d{3}(?!\d)))(?=\d)")
_DASHES = str.maketrans("\N{MINUS SIGN}\N{EN DASH}", "--")
# Ways to name an option, the surest first: "the answer is C", "Option (C)"; "(C)", "[C]"; "C. …", "C) …" at the start; "… C." behind.
_NAMED = (
    re.compile(
        r"\b(?i:answer|option|choice)\b(?i:\s+is)?\s*(?P<colon>:?)\s*(?P<open>[(\[\"']*)(?P<letter>[A-Za-z])(?P<after>\s+\w|\b)(?!['’]\w)"
    ),
    re.compile(r"[(\[]\s*(?P<letter>[A-Za-z])\s*[)\]]"),
    re.compile(r"^\s*(?P<letter>[A-Z])(?:[.):]|\s*\n)"),
    re.compile(r"(?<![\w'’])(?P<letter>[A-Z])(?=\s*(?:[.,;:)!\"]|$))"),
)


@dataclass(frozen=True, slots=True)
class Graded:
    """An answer with what it is worth, 0 … 1. readable: whether the grader made anything of it."""

    question: Question
    answer: str
    score: float
    readable: bool


@dataclass(frozen=True, slots=True)
class Accuracy:
    """The mean worth of answers, with its interval over prompts. unreadable: those that the grader made nothing of, which are wrong."""

    rate: float
    low: float
    high: float
    num_questions: int
    num_clusters: int
    unreadable: int
    confidence: float
    method: str


def yes_or_no(question: Question, answer: str) -> float | None:
    """The first whole word yes or no in the first sentence."""
    said = _YES_NO.search(next(filter(str.strip, _SENTENCE.split(answer)), ""))
    right = _yes_or_no(_only(question, "yes or no"))
    if right is None:
        raise ValueError(f"row {question.row}, answer: expected yes or no, got {question.right[0]!r}")
    return None if said is None else float(said[1].lower() == right[1].lower())


def choice(question: Question, answer: str) -> float | None:
    """The option that the answer names by its letter, or by its whole text where the question has options.

    "Answer: C" is C, "The…" is nothing; an article is no option. Unreadable where two are named.
    """
    wanted = _option(_only(question, "one option"), question.options)
    if wanted is None:
        raise ValueError(
            f"row {question.row}, answer: expected the letter of an option or its text, got {question.right[0]!r}"
        )
    said = _option(answer, question.options)
    return None if said is None else float(said == wanted)


def short_text(question: Question, answer: str) -> float | None:
    """Whether the answer is one of those that are right: case, articles, spaces, and punctuation outside of numbers aside."""
    right, said = map(normalised, _right(question)), normalised(answer)
    return float(said in right) if said else None


def automatic(question: Question, answer: str) -> float | None:
    """By what is right: yes or no; the letter of an option, or one of the options' texts; else a short text.

    Where yes and no are themselves options, their letters are read too.
    """
    name = grader_of(question)
    score = _GRADERS[name](question, answer)
    return choice(question, answer) if score is None and name == "yes-no" and question.options else score


def grader_of(question: Question) -> GraderName:
    """The grader that "auto" takes for a question."""
    right = _right(question)
    if len(right) == 1 and _yes_or_no(right[0]):
        return "yes-no"
    # One small letter may be a word.
    if len(right) == 1 and (question.options or re.fullmatch(r"\(?[A-Z][.)]?", right[0].strip())):
        return "choice"
    return "text"


_GRADERS: dict[GraderName, Grader] = {
    "auto": automatic,
    "yes-no": yes_or_no,
    "choice": choice,
    "text": short_text,
}


def normalised(text: str) -> str:
    """A short text as it is compared."""
    plain = unicodedata.normalize("NFKC", text).casefold().translate(_DASHES)
    kept = {match.start() for match in _OF_A_NUMBER.finditer(plain)}
    plain = "".join(letter for at, letter in enumerate(plain) if at in kept or not _is_punctuation(letter))
    # An article alone is no article.
    return " ".join(_ARTICLES.sub(" ", plain).split()) or plain.strip()


def grade(questions: Sequence[Question], answers: Sequence[str], grader: GraderName | Grader = "auto") -> list[Graded]:
    """Every answer with what it is worth; ValueError for a question of which nobody knows what is right, unless a callable grades."""
    ask = _GRADERS[grader] if isinstance(grader, str) else grader
    graded = []
    for question, answer in zip(questions, answers, strict=True):
        score = ask(question, answer)
        if score is not None and not 0 <= score <= 1:
            raise ValueError(f"the grader gave {score} for row {question.row}; it must say 0 … 1, or None")
        graded.append(Graded(question, answer, float(score or 0.0), score is not None))
    return graded


def accuracy(
    graded: Sequence[Graded], *, num_resamples: int = 2000, confidence: float = 0.95, seed: int = 0
) -> Accuracy:
    """The mean worth, with an interval that treats questions about the same media as one draw."""
    scores = np.array([one.score for one in graded])
    clusters = as_clusters([one.question.cluster for one in graded], len(scores))
    found = proportion_interval(scores, clusters, num_resamples=num_resamples, confidence=confidence, seed=seed)
    return Accuracy(
        rate=float(scores.mean()),
        low=found.low,
        high=found.high,
        num_questions=len(scores),
        num_clusters=clusters.count,
        unreadable=sum(not one.readable for one in graded),
        confidence=confidence,
        method=found.method,
    )


def by_kind(graded: Sequence[Graded]) -> dict[str, list[Graded]]:
    """The answers of each kind of question, kinds in the order in which they come; empty where no question has one."""
    found: dict[str, list[Graded]] = {}
    for one in graded:
        if one.question.kind:
            found.setdefault(one.question.kind, []).append(one)
    return found


def pairs(graded: Sequence[Graded]) -> list[Graded]:
    """A pair of questions as one that is worth its worst answer, of the cluster and kind of its first; VideoHallucer counts so.

    ValueError for an id that a single question has.
    """
    found: dict[str, list[Graded]] = {}
    for one in graded:
        if one.question.pair is not None:
            found.setdefault(one.question.pair, []).append(one)
    if alone := next((ones[0].question for ones in found.values() if len(ones) < 2), None):
        raise ValueError(
            f"row {alone.row}, pair: no other question has {alone.pair!r}; where max_rows cuts it off, raise it"
        )
    return [
        Graded(
            ones[0].question,
            "\n".join(one.answer for one in ones),
            min(one.score for one in ones),
            all(one.readable for one in ones),
        )
        for ones in found.values()
    ]


def _right(question: Question) -> tuple[str, ...]:
    if not question.right:
        raise ValueError(f"row {question.row}, answer: nothing tells what is right, so no grader can: add it")
    return question.right


def _only(question: Question, what: str) -> str:
    right = _right(question)
    if len(right) > 1:
        raise ValueError(f"row {question.row}, answer: expected {what}, got {len(right)} right answers")
    return right[0]


def _yes_or_no(right: str) -> re.Match[str] | None:
    return _YES_NO.fullmatch(right.strip(string.whitespace + "."))


def _is_punctuation(letter: str) -> bool:
    return letter in string.punctuation or unicodedata.category(letter)[0] == "P"


def _option(text: str, options: Sequence[str]) -> int | None:
    """The number of the option that a text names; None for none or several."""
    text = _MARKUP.sub("", text).strip()
    for told in (str.strip, normalised):
        if same := [at for at, option in enumerate(options) if told(option) == told(text)]:
            return same[0] if len(same) == 1 else None
    known = string.ascii_uppercase[: len(options) or None]
    if alone := _LETTER.fullmatch(text):
        named = {alone[1].upper()}
    else:
        matches = ([match for match in pattern.finditer(text) if not _is_word(match)] for pattern in _NAMED)
        letters = ({match["letter"].upper() for match in found} & {*known} for found in matches)
        named = next(filter(None, letters), set())
    return known.index(min(named)) if len(named) == 1 and named <= {*known} else None


def _is_word(match: re.Match[str]) -> bool:
    """Whether behind "answer" or "option" the letter is the article or "I", as in "Answer: A red bag"."""
    groups = match.groupdict()
    if groups.get("open") or not (groups.get("after") or "").strip() or match["letter"] not in "aAiI":
        return False
    return match["letter"].islower() or bool(groups["colon"])
