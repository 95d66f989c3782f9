"""The pictures of a report: base and aligned beside each other, under a slider, or judged blind."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from mmalign.evaluation.intervals import student_t
from mmalign.evaluation.report_parts import SMALL, data_uri, text
from mmalign.evaluation.result import EvaluationResult, Row
from mmalign.evaluation.scorers import read_picture
from mmalign.evaluation.wording import capital, count, number
from mmalign.rewards.fingerprints import text_hash

SHUFFLE_SEED = 0

_VOTES = (
    '<div class="votes" role="group" aria-label="Which picture do you prefer?" hidden>'
    '<button type="button" data-vote="left" aria-pressed="false">Left</button>'
    '<button type="button" data-vote="tie" aria-pressed="false">Tie</button>'
    '<button type="button" data-vote="right" aria-pressed="false">Right</button></div>'
)


def gallery(result: EvaluationResult, sample: Sequence[Row], rule: str) -> str:
    if not sample and any(row.base_picture for row in result.rows):
        return ""
    if not sample:
        missing = "The pictures are not stored with this report."
        return f'<section><h2>Pictures</h2><p class="quiet lead">{missing}</p></section>\n'
    cards = "".join(_pair(result, row, left) for row, left in zip(sample, left_sides(result, sample), strict=True))
    return (
        f'<section id="sample" data-about="{text(json.dumps(_about(result, len(sample))))}">'
        '<div class="toolbar"><h2>Pictures</h2><button id="slide" type="button" aria-pressed="false" hidden>Slider</button>'
        '<button id="blind" type="button" hidden>Judge blind</button>'
        f'<button id="save" type="button" hidden>Save the votes</button></div><p class="quiet lead">{text(rule)}'
        f'<span class="open-only"> Scores are those of {text(result.judge.name)}.</span></p>'
        f'<p id="tally" role="status"></p><div class="gallery">{cards}</div></section>\n'
    )


def left_sides(result: EvaluationResult, rows: Sequence[Row]) -> list[str]:
    """Which side stands left in each pair while they are judged blind: each side in half of them, shuffled.

    The order follows from `SHUFFLE_SEED`, both models and the prompts, and from no score: the same page always has the same one,
    another model's has another, so that nobody learns it.
    """
    drawn_from = [SHUFFLE_SEED, result.aligned_fingerprint, result.base_fingerprint, [row.prompt for row in rows]]
    order = np.random.default_rng(int(text_hash(drawn_from)[:16], 16)).permutation(len(rows))
    return [("base", "aligned")[place % 2] for place in order]


def _about(result: EvaluationResult, num_pairs: int) -> dict[str, Any]:
    """What the script needs and the saved votes tell: quantiles of Student's t by the number of votes; null for one."""
    return {
        "aligned_label": result.aligned_label,
        "base_label": result.base_label,
        "aligned_fingerprint": result.aligned_fingerprint,
        "base_fingerprint": result.base_fingerprint,
        "shuffle_seed": SHUFFLE_SEED,
        "quantiles": [None, *(student_t(0.975, votes - 1) for votes in range(2, num_pairs + 1))],
    }


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


def _pair(result: EvaluationResult, row: Row, left: str | None = None) -> str:
    """One pair; with `left` it can be judged blind, that side standing left."""
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
            f'<div class="side" data-side="{key}"><span class="label">'
            f"<span>{text(capital(label))}</span><b>{number(score, spread)}</b></span>"
            f'<img{small} src="{data_uri(image)}" width="{image.width}" height="{image.height}" loading="lazy" '
            f'alt="{text(label)}: {text(row.prompt)}"></div>'
        )

    votable = f' data-seed="{row.seed}" data-left="{left}"' if left else ""
    return (
        f'<figure class="pair"{votable}><div class="pictures">'
        f"{side('base', result.base_label, base)}{side('aligned', result.aligned_label, aligned)}"
        f'<input class="slider" type="range" hidden aria-label="how much of {text(result.base_label)} is shown, in percent"></div>'
        f"{_VOTES if left else ''}"
        f'<figcaption><p class="prompt" dir="auto">{text(row.prompt)}</p>'
        f'<p class="outcome"><span class="{mood}">{word}</span> {number(gap, spread, sign=True)}, seed {row.seed}</p>'
        "</figcaption></figure>"
    )
