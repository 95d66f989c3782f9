"""The page of `report.html`: one string, with its style, script and pictures inside and nothing to load."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mmalign.evaluation.findings import conclusion, moved_rule, moved_statistics
from mmalign.evaluation.report_parts import definitions, document, name_cell, text
from mmalign.evaluation.report_pictures import gallery, losses
from mmalign.evaluation.report_plots import MAX_POINTS, axis, curve, interval_plot
from mmalign.evaluation.report_script import SCRIPT
from mmalign.evaluation.report_sections import retention, sweep
from mmalign.evaluation.result import EvaluationResult, PictureStatistic, Row, ScorerResult, Summary
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
    p_value,
    percent,
    sample_size,
    summary,
)

SHOWN_CURVES = 6


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
        gallery(result, sample, sample_rule),
        losses(result, worst),
        _statistics(result),
        retention(result),
        sweep(result),
        _curves(history),
        _notes(result),
        _settings(result),
    )
    return document("evaluation", title, result.created, sections, script=SCRIPT)


def _hero(result: EvaluationResult) -> str:
    rate = result.judge.win_rate
    mood = "even" if not result.judge.shows_difference else "win" if rate.rate > 0.5 else "loss"
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
        f"<tr{_row_class(ranked, at)}>{name_cell(scorer.name, scorer.seen_in_training)}"
        f'<td class="plot">{interval_plot(scorer.win_rate, seen_in_training=scorer.seen_in_training)}{axis()}</td>'
        f'<td class="number" data-label="Win rate"><b>{percent(scorer.win_rate.rate)}</b></td>'
        f'<td class="number" data-label="{level(rate.confidence)} interval">{interval(scorer.win_rate)}</td>'
        f'<td class="number" data-label="Wins / ties / losses">{_tally(scorer)}</td>'
        f'<td class="number" data-label="n">{scorer.win_rate.num_comparisons:,}</td>'
        f'<td class="number" data-label="Corrected p, held out">{_p_cell(scorer.p_corrected.held_out)}</td>'
        f'<td class="number" data-label="Corrected p, all">{_p_cell(scorer.p_corrected.all)}</td></tr>'
        for at, scorer in enumerate(ranked)
    )
    return (
        "<section><h2>Win rate by scorer</h2>"
        f'<p class="quiet lead">How often {text(result.aligned_label)} scores higher than {text(result.base_label)} '
        f"for the same prompt and seed: {sample_size(rate)}. Right of the dashed line, "
        f"{text(result.aligned_label)} wins more often. {text(conclusion(result))}</p>"
        '<table><thead><tr><th>Scorer</th><th></th><th class="number">Win rate</th>'
        f'<th class="number">{level(rate.confidence)} interval</th><th class="number">Wins / ties / losses</th>'
        '<th class="number">n</th><th class="number wraps">Corrected p, held out</th>'
        f'<th class="number wraps">Corrected p, all</th></tr></thead><tbody>{body}</tbody>'
        f'<tfoot><tr><td></td><td class="plot">{axis()}</td><td colspan="6"></td></tr></tfoot></table></section>\n'
    )


def _p_cell(p: float | None) -> str:
    return "" if p is None else p_value(p).removeprefix("p ").removeprefix("= ").replace("<", "&lt;")


def _scores(result: EvaluationResult) -> str:
    ranked = result.ranked_scorers
    body = "".join(
        f"<tr{_row_class(ranked, at)}>{name_cell(scorer.name, scorer.seen_in_training)}"
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


def _statistics(result: EvaluationResult) -> str:
    if not result.statistics:
        return ""
    base_label, aligned_label = text(capital(result.base_label)), text(capital(result.aligned_label))

    def moved_tag(statistic: PictureStatistic) -> str:
        return '<span class="tag">moved</span>' if statistic.moved else ""

    def value(share: float | None, statistic: PictureStatistic) -> str:
        width = statistic.difference.high - statistic.difference.low
        return "" if share is None else number(share, width)

    body = "".join(
        f'<tr><td class="name">{text(capital(s.name))}{moved_tag(s)}<span class="unit">{text(s.description)}</span></td>'
        f'<td class="number" data-label="{base_label}">{value(s.base, s)}</td>'
        f'<td class="number" data-label="{aligned_label}">{value(s.aligned, s)}</td>'
        f'<td class="number" data-label="Difference"><b>{difference_value(s.difference)}</b></td>'
        f'<td class="number" data-label="{level(s.difference.confidence)} interval">{difference_interval(s.difference)}'
        "</td></tr>"
        for s in result.statistics
    )
    difference = result.statistics[0].difference
    moved = "".join(f'<p class="finding">{text(line)}</p>' for line in moved_statistics(result))
    return (
        '<section><h2>What changed in the pictures</h2><p class="quiet lead">A model that games its scorer often '
        f"shows it here: everything darker, flatter, busier, or the same. {capital(sample_size(difference))}. {moved_rule()}</p>{moved}"
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
    settings["Trained on"] = settings["Trained on"] or "not said"
    return (
        f"<section><h2>Settings</h2>{definitions(settings)}</section>\n"
        '<section><h2>Fingerprints and versions</h2><p class="quiet lead">Numbers may be compared only where the '
        "scorer's fingerprint is the same. Whole fingerprints stand in <code>report.json</code>.</p>"
        f"{definitions(prints, fingerprints=True)}{definitions(result.versions)}</section>\n"
    )


def _row_class(ranked: Sequence[ScorerResult], at: int) -> str:
    """A heavier line between the held-out scorers and those seen in training."""
    boundary = at + 1 < len(ranked) and ranked[at + 1].seen_in_training and not ranked[at].seen_in_training
    return ' class="last-held-out"' if boundary else ""


def _tally(scorer: ScorerResult) -> str:
    rate = scorer.win_rate
    return f"{rate.wins:,} / {rate.ties:,} / {rate.losses:,}"
