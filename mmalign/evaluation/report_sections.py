"""The parts of a report that are only there when asked for: the sweep over LoRA scales, and retention."""

from __future__ import annotations

from collections.abc import Sequence

from mmalign.evaluation.findings import retention_line
from mmalign.evaluation.report_parts import text
from mmalign.evaluation.report_plots import scale_plot
from mmalign.evaluation.result import EvaluationResult, ScorerResult
from mmalign.evaluation.wording import (
    capital,
    difference_interval,
    difference_value,
    interval,
    level,
    number,
    percent,
    sample_size,
    summary,
)


def sweep(result: EvaluationResult) -> str:
    """Plots and a table of every win rate and every picture statistic against the LoRA scale."""
    if not result.sweep:
        return ""
    first = result.sweep[0]
    plots = [
        scale_plot(
            f"win rate by {_marked(scorer)}",
            [
                (point.scale, rate.rate, rate.low, rate.high)
                for point in result.sweep
                for rate in [point.scorers[at].win_rate]
            ],
            null=0.5,
            show=lambda value, _: percent(value),
            seen_in_training=scorer.seen_in_training,
        )
        for at, scorer in enumerate(first.scorers)
    ]
    changes = [
        scale_plot(
            f"change of {statistic.name}",
            [
                (point.scale, change.value, change.low, change.high)
                for point in result.sweep
                for change in [point.statistics[at].difference]
            ],
            null=0.0,
            show=lambda value, height: number(value, height / 10, sign=True),
        )
        for at, statistic in enumerate(first.statistics)
    ]
    rows = [
        (
            f"Win rate by {_marked(scorer)}",
            [(percent(rate.rate), interval(rate)) for point in result.sweep for rate in [point.scorers[at].win_rate]],
        )
        for at, scorer in enumerate(first.scorers)
    ]
    rows += [
        (
            f"Change of {statistic.name}",
            [
                (difference_value(change), difference_interval(change))
                for point in result.sweep
                for change in [point.statistics[at].difference]
            ],
        )
        for at, statistic in enumerate(first.statistics)
    ]
    scales = [f"{point.scale:g}" for point in result.sweep]
    head = "".join(f'<th class="number">{scale}</th>' for scale in scales)
    body = "".join(_row(name, scales, cells) for name, cells in rows)
    rate = first.scorers[0].win_rate
    return (
        '<section><h2>LoRA scale</h2><p class="quiet lead">'
        f"{text(capital(result.aligned_label))} against {text(result.base_label)} with the LoRA at other scales, the same "
        f"prompts and seeds: {sample_size(rate)} each, {level(rate.confidence)} intervals. At 0 it is switched off. Nothing here is "
        "corrected for looking at several scales: settle on one here, and prove it on other prompts.</p>"
        f'<div class="curves">{"".join(plots)}{"".join(changes)}</div>'
        f'<details><summary>All numbers</summary><div class="wide"><table><thead><tr><th>LoRA scale</th>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div></details></section>\n"
    )


def _marked(scorer: ScorerResult) -> str:
    return scorer.name + (", seen in training" if scorer.seen_in_training else "")


def _row(name: str, scales: Sequence[str], cells: Sequence[tuple[str, str]]) -> str:
    shown = "".join(
        f'<td class="number" data-label="{scale}"><b>{value}</b><span class="unit">{ends}</span></td>'
        for scale, (value, ends) in zip(scales, cells, strict=True)
    )
    return f'<tr><td class="name">{text(name)}</td>{shown}</tr>'


def retention(result: EvaluationResult) -> str:
    """The verdict, and the means it rests on."""
    found = result.retention
    if found is None:
        return ""
    return (
        f'<section><h2>Retention</h2><p class="quiet lead">What {text(result.aligned_label)} does on prompts that the '
        "preferences did not ask about. Kept: the whole interval lies above the loss that was said beforehand to be bearable; "
        f'lost: it lies below; else undecided.</p><p class="finding">{text(retention_line(found))}</p>'
        f'<p class="quiet">Mean score ± standard error: {text(result.base_label)} {summary(found.base)}, '
        f"{text(result.aligned_label)} {summary(found.aligned)}.</p></section>\n"
    )
