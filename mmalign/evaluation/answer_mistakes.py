"""Preference data of a model's own mistakes, as RRPO makes them (arXiv:2504.12083, section 3.1): ask, judge, rewrite, tag.

A model is asked about clips that are hard to see. Where its answer is wrong, what is known to be right is the chosen answer, and the
rejected one is the same text edited to say what the model said. The phrases that differ are tagged. Training then sees clean clips.
"""

from __future__ import annotations

import json
import logging
import os
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mmalign.data.answer_marks import differing_spans, tagged
from mmalign.data.answer_records import Part, Picture, Turn, VideoClip
from mmalign.data.answer_turns import Medium, RawTurn
from mmalign.data.fingerprints import digest_of
from mmalign.data.perturb import Shuffle, perturb
from mmalign.data.questions import Question, QuestionSource
from mmalign.evaluation.answer_grades import Grader, GraderName, grade, yes_or_no
from mmalign.evaluation.answering import answer
from mmalign.files import write_file
from mmalign.likelihood.draws import row_generators

_log = logging.getLogger("mmalign")
# Question, what is right, what the model said → what is right with the model's errors in it; None where it has none.
Rewriter = Callable[[Question, str, str], str | None]
# A text → a text: a language model, or a service.
Asked = Callable[[str], str]
_SHORT = 3
_NONE = "none"
_THOUGHT = ("<think>", "</think>")

JUDGE_PROMPT = """A question about a video was answered twice. The reference is correct.
Question: {question}
Reference: {right}
Answer: {said}
Does the answer contradict the reference, or leave out what was asked for? Say yes or no."""
DIFFER_PROMPT = """Compare two descriptions of one video.
A (correct): {right}
B: {said}
List the objects, actions and attributes that B has otherwise than A, a line each. If there are none, say none."""
REWRITE_PROMPT = """Change the text as little as possible, so that it makes the mistakes of the list instead of what is correct.
Text: {right}
Mistakes:
{differences}
Say the changed text and nothing else."""


@dataclass(frozen=True, slots=True)
class MadeAnswers:
    """How many questions became a pair, and why the others did not: "right", "unreadable", "nothing known", "no other words"."""

    path: Path
    num_pairs: int
    left_out: dict[str, int]


@dataclass(frozen=True)
class PerturbedQuestions:
    """Questions about the same clips and pictures, hidden in part and out of order; a row's look is decided by seed and row alone."""

    questions: QuestionSource
    area: tuple[float, float]
    shuffle: Shuffle
    window: int
    seed: int

    def __len__(self) -> int:
        return len(self.questions)

    def __getitem__(self, row: int) -> Question:
        return self.questions[row]

    def prompt(self, row: int) -> tuple[Turn, ...]:
        """The conversation with media that are hard to see."""
        (generator,) = row_generators(self.seed, 0, [row], "perturb")

        def hidden(part: Part) -> Part:
            if isinstance(part, str):
                return part
            frames = part.frames if isinstance(part, VideoClip) else (part.image,)
            seen = perturb(frames, area=self.area, shuffle=self.shuffle, window=self.window, generator=generator)
            return replace(part, frames=seen) if isinstance(part, VideoClip) else Picture(seen[0])

        return tuple(Turn(turn.role, tuple(map(hidden, turn.parts))) for turn in self.questions.prompt(row))

    def fingerprint(self) -> str:
        """sha256 of the questions and of how their media are perturbed."""
        return digest_of([self.questions.fingerprint(), self.area, self.shuffle, self.window, self.seed])


def make_answer_pairs(
    pipe: Any,
    questions: QuestionSource,
    output: str | Path,
    *,
    judge: GraderName | Grader = "auto",
    rewrite: Rewriter | None = None,
    area: tuple[float, float] = (0.25, 0.5),
    shuffle: Shuffle = "local",
    window: int = 2,
    seed: int = 0,
    **asking: Any,
) -> MadeAnswers:
    """Asks a `TokenPipeline`, and writes `output`, a .jsonl that `load_answers` reads, with phrases tagged <MASK>…</MASK>.

    judge: as in `grade`; an answer below 1 is wrong, one that it cannot read makes no pair. rewrite: makes the rejected answer;
    without it that is the model's own answer, as it should be for answers of a few words. area, shuffle, window: see `perturb`.
    asking: options of `answer`. The answers are kept beside the output, so that a run that was stopped goes on.

    ValueError, before anything is asked, for media that the file could not name: they must be files, in or below its folder.
    """
    path = Path(output)
    if path.suffix != ".jsonl":
        raise ValueError(f"{path} would hold a line of JSON for each pair: let its name end in .jsonl")
    prompts = [
        [_message(turn, row, questions, path.parent) for turn in questions.turns(row)] for row in range(len(questions))
    ]
    seen = PerturbedQuestions(questions, area, shuffle, window, seed)
    answered = answer(pipe, seen, output=path.with_suffix(".answers.jsonl"), **asking)
    left_out: Counter[str] = Counter()
    rows, long = [], 0
    for one in answered.answers:
        question = questions[one.row]
        made = _rejected(question, one.answer, judge, rewrite)
        if made.why is not None:
            left_out[made.why] += 1
            continue
        right = question.right[0]
        long += rewrite is None and len(right.split()) > _SHORT
        marks = differing_spans(right, made.text)
        rows.append(
            {
                "prompt": prompts[one.row],
                "chosen": tagged(right, marks[0]),
                "rejected": tagged(made.text, marks[1]),
            }
        )
    if long:
        _log.warning(
            "%d of %d rejected answers are longer texts in the model's own words: with a rewriter they would be the right ones but for "
            "the model's errors",
            long,
            len(rows),
        )
    write_file(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return MadeAnswers(path, len(rows), dict(left_out))


def model_judge(ask: Asked) -> Grader:
    """A judge that asks a language model whether an answer contradicts what is right; for texts that are right in other words too."""

    def judge(question: Question, said: str) -> float | None:
        told = _thought_out(ask(JUDGE_PROMPT.format(question=question.text, right=question.right[0], said=said)))
        return yes_or_no(replace(question, right=("no",)), told)

    return judge


def model_rewriter(ask: Asked) -> Rewriter:
    """A rewriter that asks a language model in two turns: what differs, then the right text with these errors in it."""

    def rewrite(question: Question, right: str, said: str) -> str | None:
        differences = _thought_out(ask(DIFFER_PROMPT.format(right=right, said=said)))
        if not differences or differences.lower().strip(".") == _NONE:
            return None
        return _thought_out(ask(REWRITE_PROMPT.format(right=right, differences=differences))) or None

    return rewrite


def _thought_out(told: str) -> str:
    """What a language model says after it has thought aloud, if it does; nothing where it was cut before it came to that."""
    return told.rsplit(_THOUGHT[1], 1)[-1].strip() if _THOUGHT[1] in told or _THOUGHT[0] not in told else ""


@dataclass(frozen=True, slots=True)
class _Rejected:
    """The rejected answer, or why there is none."""

    text: str = ""
    why: str | None = None


def _rejected(question: Question, said: str, judge: GraderName | Grader, rewrite: Rewriter | None) -> _Rejected:
    if not question.right:
        return _Rejected(why="nothing known")
    (graded,) = grade([question], [said], judge)
    if not graded.readable:
        return _Rejected(why="unreadable")
    if graded.score >= 1:
        return _Rejected(why="right")
    text = said.strip() if rewrite is None else rewrite(question, question.right[0], said)
    marks = differing_spans(question.right[0], text or "")
    return _Rejected(text) if text and all(marks) else _Rejected(why="no other words")


def _message(turn: RawTurn, row: int, questions: QuestionSource, folder: Path) -> dict[str, Any]:
    parts = [
        {"type": "text", "text": part}
        if isinstance(part, str)
        else {"type": part.kind, part.kind: _named(part, row, questions, folder)}
        for part in turn.parts
    ]
    return {"role": turn.role, "content": parts}


def _named(medium: Medium, row: int, questions: QuestionSource, folder: Path) -> Any:
    """A medium's value with its paths as seen from `folder`."""
    value = medium.value
    if isinstance(value, Mapping):
        if value.get("bytes") is not None:
            raise _no_files(row, folder)
        return {
            key: _paths(item, row, questions, folder) if key in ("frames", "path") else item
            for key, item in value.items()
        }
    return _paths(value, row, questions, folder)


def _paths(value: Any, row: int, questions: QuestionSource, folder: Path) -> Any:
    if isinstance(value, list | tuple):
        return [_paths(one, row, questions, folder) for one in value]
    if not isinstance(value, str | Path):
        raise _no_files(row, folder)
    found = next((root / value for root in questions.roots if (root / value).exists()), None)
    if found is None:
        # Asking will say so, and why.
        return str(value)
    seen = os.path.relpath(found.resolve(), folder.resolve())
    if seen.startswith(".."):
        raise ValueError(f"row {row}: {value} lies outside of {folder}: write the pairs into the folder of the media")
    return seen


def _no_files(row: int, folder: Path) -> ValueError:
    return ValueError(f"row {row}: its media are no files, so that pairs cannot name them: save them in {folder}")
