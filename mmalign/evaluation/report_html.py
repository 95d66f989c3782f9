"""The page of `report.html`: one string, with its style, script and pictures inside and nothing to load."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from PIL import Image

from mmalign.evaluation.report_assets import SCRIPT, STYLE
from mmalign.evaluation.report_plots import MAX_POINTS, axis, curve, interval_plot
from mmalign.evaluation.result import EvaluationResult, PictureStatistic, Row, ScorerResult, Summary
from mmalign.evaluation.scorers import read_picture
from mmalign.evaluation.wording import (
    capital,
    cautions,
    count,
    difference_interval,
    difference_value,
    headline,
    history_keys,
    interval,
    level,
    notes,
    number,
    percent,
    sample_size,
    summary,
)

SMALL = 128  # pictures up to this size are enlarged without smoothing
LARGEST = 512  # and above this one they are embedded smaller
SHOWN_CURVES = 6

# Nothing may be fetched, whatever a prompt or a label contains.
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"


def page(
    result: EvaluationResult,
    *,
    sample: Sequence[Row],
    sample_rule: str,
    worst: Sequence[Row],
    history: Sequence[dict[str, Any]],
) -> str:
    """The whole document."""
    title = f"{result.aligned_label} against {result.base_label}"
    sections = (
        _hero(result),
        _scorers(result),
        _scores(result),
        _gallery(result, sample, sample_rule),
        _losses(result, worst),
        _statistics(result),
        _curves(history),
        _notes(result),
        _settings(result),
    )
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n<link rel="icon" href="data:,">\n'
        f"<title>{text(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        f'<header class="eyebrow"><span><b>mmalign evaluation</b> &nbsp;{text(title)}</span>'
        f"<span>{text(result.created.replace('T', ' ').removesuffix('+00:00'))} UTC</span></header>\n"
        f"<main>\n{''.join(sections)}</main>\n<script>{SCRIPT}</script>\n</body>\n</html>\n"
    )


def text(value: object) -> str:
    """Escaped for HTML; control characters and half surrogate pairs are replaced by a mark."""
    clean = re.sub("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff]", "\N{REPLACEMENT CHARACTER}", str(value))
    return escape(clean, quote=True)


def data_uri(image: Image.Image) -> str:
    """PNG for small pictures, JPEG for larger ones, never more than 512 pixels on the longer edge."""
    image = image.copy()
    image.thumbnail((LARGEST, LARGEST), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    small = max(image.size) <= SMALL
    image.save(buffer, "PNG" if small else "JPEG", **({} if small else {"quality": 88}))
    return f"data:image/{'png' if small else 'jpeg'};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _hero(result: EvaluationResult) -> str:
    rate = result.judge.win_rate
    mood = "even" if not rate.shows_difference else "win" if rate.rate > 0.5 else "loss"
    warnings = "".join(f'<p class="warn">{text(line)}</p>' for line in cautions(result))
    return (
        '<div class="hero"><div>'
        f'<div class="rate {mood}">{percent(rate.rate)[:-1]}<small>%</small></div>'
        f'<p class="rate-interval">{interval(rate)}, {level(rate.confidence)} interval</p></div>'
        f"<div><h1>{text(headline(result))}</h1>"
        f"{warnings}</div></div>\n"
    )


def _scorers(result: EvaluationResult) -> str:
    rate = result.judge.win_rate
    ranked = result.ranked_scorers
    body = "".join(
        f"<tr{_row_class(ranked, at)}>{_name_cell(scorer)}"
        f'<td class="plot">{interval_plot(scorer.win_rate, seen_in_training=scorer.seen_in_training)}{axis()}</td>'
        f'<td class="number" data-label="Win rate"><b>{percent(scorer.win_rate.rate)}</b></td>'
        f'<td class="number" data-label="{level(rate.confidence)} interval">{interval(scorer.win_rate)}</td>'
        f'<td class="number" data-label="Wins / ties / losses">{_tally(scorer)}</td>'
        f'<td class="number" data-label="n">{scorer.win_rate.num_comparisons:,}</td></tr>'
        for at, scorer in enumerate(ranked)
    )
    return (
        "<section><h2>Win rate by scorer</h2>"
        f'<p class="quiet lead">How often {text(result.aligned_label)} scores higher than {text(result.base_label)} '
        f"for the same prompt and seed: {sample_size(rate)}. Right of the dashed line, "
        f"{text(result.aligned_label)} wins more often.</p>"
        '<table><thead><tr><th>Scorer</th><th></th><th class="number">Win rate</th>'
        f'<th class="number">{level(rate.confidence)} interval</th><th class="number">Wins / ties / losses</th>'
        f'<th class="number">n</th></tr></thead><tbody>{body}</tbody>'
        f'<tfoot><tr><td></td><td class="plot">{axis()}</td><td colspan="4"></td></tr></tfoot></table></section>\n'
    )


def _scores(result: EvaluationResult) -> str:
    ranked = result.ranked_scorers
    body = "".join(
        f"<tr{_row_class(ranked, at)}>{_name_cell(scorer)}"
        + _summary_cells(result.base_label, scorer.base)
        + _summary_cells(result.aligned_label, scorer.aligned)
        + f'<td class="number" data-label="Difference"><b>{difference_value(scorer.difference)}</b></td>'
        f'<td class="number" data-label="{level(scorer.difference.confidence)} interval">'
        f"{difference_interval(scorer.difference)}</td></tr>"
        for at, scorer in enumerate(ranked)
    )
    heads = "".join(
        f'<th class="number side-name">{text(capital(label))}, mean</th><th class="number">median</th>'
        for label in (result.base_label, result.aligned_label)
    )
    rate = result.judge.win_rate
    return (
        f'<section><h2>Scores</h2><p class="quiet lead">Mean ± standard error and median over '
        f"{sample_size(rate)}; the difference is the mean over pairs.</p><table><thead><tr><th>Scorer</th>{heads}"
        f'<th class="number">Difference</th><th class="number">{level(rate.confidence)} interval</th></tr></thead>'
        f"<tbody>{body}</tbody></table></section>\n"
    )


def _summary_cells(label: str, side: Summary) -> str:
    name = text(capital(label))
    return (
        f'<td class="number" data-label="{name}, mean">{summary(side)}</td>'
        f'<td class="number" data-label="{name}, median">{number(side.median, side.standard_error)}</td>'
    )


def _gallery(result: EvaluationResult, sample: Sequence[Row], rule: str) -> str:
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


def _losses(result: EvaluationResult, worst: Sequence[Row]) -> str:
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


def _statistics(result: EvaluationResult) -> str:
    if not result.statistics:
        return ""
    base_label, aligned_label = text(capital(result.base_label)), text(capital(result.aligned_label))

    def value(share: float | None, statistic: PictureStatistic) -> str:
        width = statistic.difference.high - statistic.difference.low
        return "" if share is None else number(share, width)

    body = "".join(
        f'<tr><td class="name">{text(capital(s.name))}<span class="unit">{text(s.description)}</span></td>'
        f'<td class="number" data-label="{base_label}">{value(s.base, s)}</td>'
        f'<td class="number" data-label="{aligned_label}">{value(s.aligned, s)}</td>'
        f'<td class="number" data-label="Difference"><b>{difference_value(s.difference)}</b></td>'
        f'<td class="number" data-label="{level(s.difference.confidence)} interval">{difference_interval(s.difference)}'
        "</td></tr>"
        for s in result.statistics
    )
    difference = result.statistics[0].difference
    return (
        '<section><h2>What changed in the pictures</h2><p class="quiet lead">A model that games its scorer often '
        f"shows it here: everything darker, flatter, busier, or the same. {capital(sample_size(difference))}.</p>"
        f'<table><thead><tr><th>Measure</th><th class="number side-name">{base_label}</th>'
        f'<th class="number side-name">{aligned_label}</th>'
        f'<th class="number">Difference</th><th class="number">{level(difference.confidence)} interval</th></tr>'
        f"</thead><tbody>{body}</tbody></table></section>\n"
    )


def _curves(history: Sequence[dict[str, Any]]) -> str:
    plots = [_curve(history, key) for key in history_keys(history)]
    averaged = f"Curves of more than {MAX_POINTS} values are drawn as means of neighbouring ones."
    lead = f'<p class="quiet lead">{averaged}</p>' if len(history) > MAX_POINTS else ""
    if not plots:
        return ""
    shown, rest = "".join(plots[:SHOWN_CURVES]), plots[SHOWN_CURVES:]
    more = ""
    if rest:
        title = count(len(rest), "more curve")
        more = f'<details><summary>{title}</summary><div class="curves">{"".join(rest)}</div></details>'
    return f'<section><h2>Training</h2>{lead}<div class="curves">{shown}</div>{more}</section>\n'


def _curve(history: Sequence[dict[str, Any]], key: str) -> str:
    stepped = all("step" in entry for entry in history)
    points = [
        (float(entry["step"] if stepped else at), float(entry[key]))
        for at, entry in enumerate(history)
        if isinstance(entry.get(key), int | float)
    ]
    return curve(key, points, "step" if stepped else "entry")


def _notes(result: EvaluationResult) -> str:
    lines = "".join(f"<li>{text(line)}</li>" for line in notes(result))
    return f'<section><h2>How to read this</h2><ul class="notes">{lines}</ul></section>\n'


def _settings(result: EvaluationResult) -> str:
    prints = {
        f"{capital(result.aligned_label)} model": result.aligned_fingerprint,
        f"{capital(result.base_label)} model": result.base_fingerprint,
        **{f"Scorer {scorer.name}": scorer.fingerprint for scorer in result.ranked_scorers},
    }
    settings = {capital(key.removeprefix("num_").replace("_", " ")): value for key, value in result.settings.items()}
    return (
        f"<section><h2>Settings</h2>{_definitions(settings)}</section>\n"
        '<section><h2>Fingerprints and versions</h2><p class="quiet lead">Numbers may be compared only where the '
        "scorer's fingerprint is the same. Whole fingerprints stand in <code>report.json</code>.</p>"
        f"{_definitions(prints, fingerprints=True)}{_definitions(result.versions)}</section>\n"
    )


def _definitions(table: Mapping[str, Any], *, fingerprints: bool = False) -> str:
    def show(value: Any) -> str:
        if isinstance(value, list | tuple):
            value = ", ".join(map(str, value)) or "nothing"
        if value is None:
            return "the model's own"
        if isinstance(value, int | float):
            return f"{value:,g}" if isinstance(value, float) else f"{value:,}"
        if fingerprints or re.fullmatch(r"[0-9a-f]{64}", str(value)):
            return f"<code>{text(str(value)[:16])}</code>"
        return text(value)

    rows = "".join(f"<div><dt>{text(key)}</dt><dd>{show(value)}</dd></div>" for key, value in table.items())
    return f'<dl class="settings">{rows}</dl>'


def _name_cell(scorer: ScorerResult) -> str:
    tag = '<span class="tag">seen in training</span>' if scorer.seen_in_training else ""
    return f'<td class="name">{text(scorer.name)}{tag}</td>'


def _row_class(ranked: Sequence[ScorerResult], at: int) -> str:
    """A heavier line between the held-out scorers and those seen in training."""
    boundary = at + 1 < len(ranked) and ranked[at + 1].seen_in_training and not ranked[at].seen_in_training
    return ' class="last-held-out"' if boundary else ""


def _tally(scorer: ScorerResult) -> str:
    rate = scorer.win_rate
    return f"{rate.wins:,} / {rate.ties:,} / {rate.losses:,}"
