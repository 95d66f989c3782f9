"""An evaluation of answers as `report.json` for machines and `report.html` for people, in the style of the report on pictures."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mmalign.data.answer_records import Picture, VideoClip
from mmalign.data.clips import glimpses
from mmalign.data.questions import QuestionSource
from mmalign.evaluation.answer_evaluation import AnswerEvaluation, AnswerGroup, AnswerRow
from mmalign.evaluation.answer_grades import Accuracy
from mmalign.evaluation.findings import retention_line
from mmalign.evaluation.report_parts import SMALL, data_uri, definitions, document, text
from mmalign.evaluation.report_plots import axis, share_plot
from mmalign.evaluation.result_json import without_nan
from mmalign.evaluation.win_rate import Difference
from mmalign.evaluation.wording import capital, count, level, number, p_value, percent
from mmalign.files import write_file

SCHEMA_VERSION = 1
_SAMPLE_SEED = 0
_FEW = 500
# A share of answers above which a note is due.
_MANY_UNREADABLE, _MANY_CUT = 0.02, 0.02
# A row → what it is about, each picture with what it is.
Shown = Callable[[int], Sequence[tuple[str, Image.Image]]]
_FRAME = "frame"
_NOTHING = "(nothing)"


def picture_of(questions: QuestionSource) -> Shown:
    """The pictures of a question, and three frames of each of its clips."""

    def looks(medium: Picture | VideoClip) -> list[tuple[str, Image.Image]]:
        if isinstance(medium, Picture):
            return [("picture", medium.image)]
        number = len(medium.frames)
        return [(f"{_FRAME} {at + 1} of {number}", medium.frames[at]) for at in glimpses(medium.frames)]

    def show(row: int) -> list[tuple[str, Image.Image]]:
        return [look for turn in questions.prompt(row) for medium in turn.media for look in looks(medium)]

    return show


def write_answer_report(
    result: AnswerEvaluation,
    output_dir: str | Path,
    *,
    picture: Shown = lambda row: (),
    num_samples: int = 12,
    num_lost: int = 12,
) -> Path:
    """Writes both files; returns the path of the page. picture: what to show of a question's media.

    num_samples: questions to show, picked at random before any answer is looked at. num_lost: as many that the base answered better.
    """
    if num_samples < 0 or num_lost < 0:
        raise ValueError(f"num_samples and num_lost must be zero or more, got {num_samples} and {num_lost}")
    folder = Path(output_dir)
    content = {
        "schema_version": SCHEMA_VERSION,
        "headline": headline(result),
        "notes": notes(result),
        **asdict(result),
        "retention": result.retention and {**asdict(result.retention), "verdict": result.retention.verdict},
    }
    write_file(folder / "report.json", json.dumps(without_nan(content), indent=1, allow_nan=False))
    order = np.random.default_rng(_SAMPLE_SEED).permutation(len(result.rows))[:num_samples]
    lost = [row for row in result.rows if row.base_score is not None and row.base_score > row.aligned_score]
    sections = (
        _hero(result),
        _table(result),
        _likelihoods(result),
        _retention(result),
        _gallery(
            "Answers",
            f"{count(len(order), 'question')} of {len(result.rows)}, picked at random with seed {_SAMPLE_SEED} without looking at "
            "any answer.",
            [result.rows[at] for at in sorted(order)],
            result,
            picture,
        ),
        _gallery(
            "Unlearnt",
            f"The first {count(min(num_lost, len(lost)), 'question')} of {len(lost)} that {text(result.base_label)} answers better "
            f"than {text(result.aligned_label)}.",
            lost[:num_lost],
            result,
            picture,
        ),
        _notes(result),
        _settings(result),
    )
    title = result.aligned_label if result.base_label is None else f"{result.aligned_label} against {result.base_label}"
    return write_file(folder / "report.html", document("answers", title, result.created, sections))


def headline(result: AnswerEvaluation) -> str:
    """The one sentence: how many answers are right, with interval and n, and whether that is more than before."""
    overall, aligned = result.overall, capital(result.aligned_label)
    told = f"{_share(overall.aligned)} of {_size(overall.aligned)} right"
    if overall.base is None or overall.difference is None:
        return f"{aligned} answers {told}."
    versus = f"{result.base_label} {percent(overall.base.rate)}; the difference is {_points(overall.difference)}"
    if not overall.shows_difference:
        return f"No difference is shown: {result.aligned_label} answers {told}, {versus}."
    word = "better" if overall.difference.value > 0 else "worse"
    return f"{aligned} answers {word} than {result.base_label}: {told}, {versus}."


def answer_lines(result: AnswerEvaluation) -> list[str]:
    """For the terminal: the headline, what takes weight from it, a line a kind, and what else was asked for."""
    lines = [headline(result), *cautions(result)]
    _, *groups = _groups(result)
    width = max((len(group.name) for group in groups), default=0)
    for group in groups:
        line = f"  {group.name:<{width}}  {_share(group.aligned)}, n = {group.aligned.num_questions}"
        if group.base is not None and group.difference is not None and group.p_corrected is not None:
            corrected = "corrected " if len(result.kinds) > 1 and group is not result.pairs else ""
            told = f"{_points(group.difference)}, {corrected}{p_value(group.p_corrected)}"
            line += f"; {result.base_label} {percent(group.base.rate)}; {told}"
        lines.append(line)
    lines += likelihood_lines(result)
    return [*lines, *([retention_line(result.retention)] if result.retention else [])]


def likelihood_lines(result: AnswerEvaluation) -> list[str]:
    """What the models say of given answers, a line each."""
    found = result.likelihoods
    if found is None:
        return []
    ends = f"{level(found.kl.confidence)} interval"
    lines = []
    if found.ranking is not None:
        ranking = found.ranking
        lines.append(
            f"Held-out pairs ranked as people do: {percent(ranking.value)} of {ranking.number:,} ({ends} {percent(ranking.low)} to "
            f"{percent(ranking.high)}); the base has 50% by definition."
        )
    kl, width = found.kl, found.kl.high - found.kl.low
    lines.append(
        f"KL from the base on given answers, per token: {number(kl.value, width)} ({ends} {number(kl.low, width)} to "
        f"{number(kl.high, width)}, {count(kl.number, 'answer')})."
    )
    return lines


def cautions(result: AnswerEvaluation) -> list[str]:
    """What takes weight from the headline."""
    lines = []
    if result.aligned_fingerprint == result.base_fingerprint:
        lines.append("Both sides have the same model fingerprint: this compares a model with itself.")
    sides = [(result.aligned_label, result.overall.aligned, [row.finished for row in result.rows])]
    if result.overall.base is not None:
        sides.append((str(result.base_label), result.overall.base, [bool(row.base_finished) for row in result.rows]))
    for label, found, finished in sides:
        if found.unreadable > _MANY_UNREADABLE * found.num_questions:
            share = percent(found.unreadable / found.num_questions)
            lines.append(f"{share} of {label}'s answers could not be read by the grader; they count as wrong.")
        if (cut := finished.count(False) / len(finished)) > _MANY_CUT:
            longest = result.settings.get("max_new_tokens")
            after = "" if longest is None else f" after {longest} tokens"
            lines.append(f"{percent(cut)} of {label}'s answers were cut{after}.")
    return lines


def notes(result: AnswerEvaluation) -> list[str]:
    """What a careful reader needs to know before believing the numbers."""
    found = result.overall.aligned
    lines = [
        *cautions(result),
        "Questions about the same picture or clip stand or fall together: intervals draw them as one.",
        "One model was graded (a single run): the intervals cover the choice of questions, not what another training run would give.",
    ]
    if result.kinds and result.base_label is not None:
        others = (
            "that of all questions is not" if result.pairs is None else "those of all questions and of pairs are not"
        )
        lines.append(f"p-values of kinds of questions are corrected (Holm) for their number; {others}.")
    if found.num_clusters == 1:
        lines.append(
            "There is a single prompt, which says nothing about others: the intervals are everything possible."
        )
    if any(group.aligned.method == "wilson" for group in _groups(result)):
        lines.append(
            "Intervals are Wilson's at the effective number of independent questions, where there are too few prompts, right "
            "or wrong answers for bootstrap percentiles."
        )
    if found.num_clusters < _FEW:
        lines.append(f"{count(found.num_clusters, 'prompt')} is few: plan on {_FEW} or more for a claim.")
    return lines


def _groups(result: AnswerEvaluation) -> list[AnswerGroup]:
    """What is told together: all questions, each kind, pairs."""
    return [result.overall, *result.kinds, *([result.pairs] if result.pairs else [])]


def _share(found: Accuracy) -> str:
    return f"{percent(found.rate)} ({level(found.confidence)} interval {percent(found.low)} to {percent(found.high)})"


def _size(found: Accuracy) -> str:
    return f"{count(found.num_questions, 'question')} on {count(found.num_clusters, 'prompt')}"


def _points(difference: Difference) -> str:
    """`+8.2 points (+3.1 to +13.0)`"""
    value, low, high = (
        number(100 * end, 1.0, sign=True) for end in (difference.value, difference.low, difference.high)
    )
    return f"{value} points ({low} to {high})"


def _hero(result: AnswerEvaluation) -> str:
    overall = result.overall
    better = overall.difference is not None and overall.difference.value > 0
    mood = "even" if not overall.shows_difference else "win" if better else "loss"
    found = overall.aligned
    warnings = "".join(f'<p class="warn">{text(line)}</p>' for line in cautions(result))
    return (
        f'<div class="hero"><div><div class="rate {mood}">{percent(found.rate)[:-1]}<small>%</small></div>'
        f'<p class="rate-interval">{percent(found.low)} to {percent(found.high)}, {level(found.confidence)} interval</p></div>'
        f"<div><h1>{text(headline(result))}</h1>{warnings}</div></div>\n"
    )


def _table(result: AnswerEvaluation) -> str:
    compared = result.base_label is not None
    labels = [capital(result.aligned_label), *([capital(str(result.base_label))] if compared else [])]
    names = [*(["Difference, points", "p"] if compared else []), "Not read", "n"]
    head = "".join(f'<th class="number side-name">{text(label)}</th>' for label in labels)
    head += "".join(f'<th class="number">{name}</th>' for name in names)
    body = "".join(_row(group, result) for group in _groups(result))
    about = "Pairs count as right where every question of them is answered right." if result.pairs else ""
    return (
        '<section><h2>Right answers</h2><p class="quiet lead">Share of questions that are answered right, with '
        f"{level(result.overall.aligned.confidence)} intervals. {about}</p>"
        f"<table><thead><tr><th>Questions</th><th></th>{head}</tr></thead><tbody>{body}</tbody>"
        f'<tfoot><tr><td></td><td class="plot">{axis()}</td><td colspan="{6 if compared else 3}"></td></tr></tfoot></table></section>\n'
    )


def _row(group: AnswerGroup, result: AnswerEvaluation) -> str:
    found = group.aligned
    cells = [(capital(result.aligned_label), f"<b>{percent(found.rate)}</b>{_ends(found)}")]
    if group.base is not None and group.difference is not None and group.p_corrected is not None:
        value, _, ends = _points(group.difference).partition(" points ")
        cells += [
            (capital(str(result.base_label)), f"{percent(group.base.rate)}{_ends(group.base)}"),
            ("Difference, points", f'<b>{value}</b><span class="unit">{ends.strip("()")}</span>'),
            ("p", text(p_value(group.p_corrected).removeprefix("p ").removeprefix("= "))),
        ]
    unread = f"{found.unreadable:,}"
    if group.base is not None:
        unread += f'<span class="unit">{text(result.base_label)} {group.base.unreadable:,}</span>'
    cells += [("Not read", unread), ("n", f"{found.num_questions:,}")]
    shown = "".join(f'<td class="number" data-label="{text(name)}">{value}</td>' for name, value in cells)
    label = f"{percent(found.rate)} right, interval {percent(found.low)} to {percent(found.high)}"
    return (
        f'<tr><td class="name">{text(capital(group.name))}</td><td class="plot">'
        f"{share_plot(found.rate, found.low, found.high, label)}{axis()}</td>{shown}</tr>"
    )


def _ends(found: Accuracy) -> str:
    return f'<span class="unit">{percent(found.low)} to {percent(found.high)}</span>'


def _likelihoods(result: AnswerEvaluation) -> str:
    lines = "".join(f'<p class="finding">{text(line)}</p>' for line in likelihood_lines(result))
    if not lines:
        return ""
    return (
        '<section><h2>Given answers</h2><p class="quiet lead">What the models say of answers that stand in the data, without '
        "generating any: a pair is ranked right where its preferred answer gained more log-probability over the base.</p>"
        f"{lines}</section>\n"
    )


def _retention(result: AnswerEvaluation) -> str:
    if result.retention is None:
        return ""
    return (
        '<section><h2>Retention</h2><p class="quiet lead">Right answers to questions that the training was not about, as a share. '
        "Kept: the whole interval lies above the loss that was said beforehand to be bearable; lost: it lies below; else "
        f'undecided.</p><p class="finding">{text(retention_line(result.retention))}</p></section>\n'
    )


def _gallery(title: str, rule: str, rows: Sequence[AnswerRow], result: AnswerEvaluation, picture: Shown) -> str:
    if not rows:
        return ""
    looks = [picture(row.question.row) for row in rows]
    if any(what.startswith(_FRAME) for shown in looks for what, _ in shown):
        rule += " Of a clip the first, the middle and the last frame are shown."
    cards = "".join(_card(row, result, shown) for row, shown in zip(rows, looks, strict=True))
    return f'<section><h2>{title}</h2><p class="quiet lead">{rule}</p><div class="gallery">{cards}</div></section>\n'


def _card(row: AnswerRow, result: AnswerEvaluation, looks: Sequence[tuple[str, Image.Image]]) -> str:
    pictures = "".join(
        f'<img src="{data_uri(image)}"{" class=small" if max(image.size) <= SMALL else ""} loading="lazy" '
        f'alt="{text(what)} that question {row.question.row} is about" title="{text(what)}">'
        for what, image in looks
    )
    shown = f'<div class="side media">{pictures}</div>' if pictures else ""
    right = f'<p class="outcome said">right: {text(", or ".join(row.question.right))}</p>' if row.question.right else ""
    said = _said(result.aligned_label, row.aligned, row.aligned_score)
    if row.base is not None and row.base_score is not None:
        said += _said(str(result.base_label), row.base, row.base_score)
    asked = f'<p class="prompt said" dir="auto">{text(row.question.text)}</p>'
    return f'<figure class="pair">{shown}<figcaption>{asked}{right}{said}</figcaption></figure>'


def _said(label: str, answer: str, score: float) -> str:
    mood = "win" if score == 1 else "loss" if score == 0 else "even"
    mark = {"win": "\N{CHECK MARK}", "loss": "\N{MULTIPLICATION SIGN}"}.get(mood, percent(score))
    return f'<p class="outcome said" dir="auto"><span class="{mood}">{mark}</span> {text(label)}: {text(answer or _NOTHING)}</p>'


def _notes(result: AnswerEvaluation) -> str:
    lines = "".join(f"<li>{text(line)}</li>" for line in notes(result))
    return f'<section><h2>How to read this</h2><ul class="notes">{lines}</ul></section>\n'


def _settings(result: AnswerEvaluation) -> str:
    settings: dict[str, Any] = {
        capital(key.removeprefix("num_").replace("_", " ")): value for key, value in result.settings.items()
    }
    prints = {f"{capital(result.aligned_label)} model": result.aligned_fingerprint}
    if result.base_fingerprint is not None:
        prints[f"{capital(str(result.base_label))} model"] = result.base_fingerprint
    return (
        f"<section><h2>Settings</h2>{definitions(settings)}</section>\n"
        f"<section><h2>Fingerprints and versions</h2>{definitions(prints, fingerprints=True)}"
        f"{definitions(result.versions)}</section>\n"
    )
