"""The pictures of a report: base and aligned beside each other, under a slider, or judged blind."""

from __future__ import annotations

from collections.abc import Sequence

from mmalign.evaluation.report_parts import SMALL, data_uri, text
from mmalign.evaluation.result import EvaluationResult, Row
from mmalign.evaluation.scorers import read_picture
from mmalign.evaluation.wording import capital, count, number


def gallery(result: EvaluationResult, sample: Sequence[Row], rule: str) -> str:
    if not sample and any(row.base_picture for row in result.rows):
        return ""
    if not sample:
        missing = "The pictures are not stored with this report."
        return f'<section><h2>Pictures</h2><p class="quiet lead">{missing}</p></section>\n'
    cards = "".join(_pair(result, row) for row in sample)
    return (
        '<section id="sample"><div class="toolbar"><h2>Pictures</h2>'
        f'<button id="blind" type="button" hidden data-aligned="{text(result.aligned_label)}">Judge blind</button>'
        f'</div><p class="quiet lead">{text(rule)}'
        f'<span class="open-only"> Scores are those of {text(result.judge.name)}.</span></p>'
        f'<p id="tally" role="status"></p><div class="gallery">{cards}</div></section>\n'
    )


def losses(result: EvaluationResult, worst: Sequence[Row]) -> str:
    if not worst:
        return ""
    cards = "".join(_pair(result, row) for row in worst)
    return (
        '<section class="open-only"><h2>Worst losses</h2><p class="quiet lead">'
        f"The {count(len(worst), 'pair')} where {text(result.aligned_label)} falls furthest below "
        f"{text(result.base_label)}, chosen by {text(result.judge.name)} to show how it fails.</p>"
        f'<div class="gallery">{cards}</div></section>\n'
    )


def _pair(result: EvaluationResult, row: Row) -> str:
    judge = result.judge
    base, aligned = row.base_scores[judge.name], row.aligned_scores[judge.name]
    spread = abs(judge.difference.value) + 4 * judge.base.standard_error
    gap = aligned - base
    tie = abs(gap) <= result.settings["tie_margin"]
    word, mood = ("Tie", "even") if tie else ("Win", "win") if gap > 0 else ("Loss", "loss")

    def side(key: str, label: str, score: float) -> str:
        picture = row.base_picture if key == "base" else row.aligned_picture
        assert picture is not None  # the caller shows rows whose pictures are at hand
        image = read_picture(picture)
        small = ' class="small"' if max(image.size) <= SMALL else ""
        return (
            f'<button class="side" type="button" disabled data-side="{key}"><span class="label">'
            f"<span>{text(capital(label))}</span><b>{number(score, spread)}</b></span>"
            f'<img{small} src="{data_uri(image)}" width="{image.width}" height="{image.height}" loading="lazy" '
            f'alt="{text(label)}: {text(row.prompt)}"></button>'
        )

    return (
        '<figure class="pair"><div class="pictures">'
        f"{side('base', result.base_label, base)}{side('aligned', result.aligned_label, aligned)}</div>"
        f'<figcaption><p class="prompt" dir="auto">{text(row.prompt)}</p>'
        f'<p class="outcome"><span class="{mood}">{word}</span> {number(gap, spread, sign=True)}, seed {row.seed}</p>'
        "</figcaption></figure>"
    )
