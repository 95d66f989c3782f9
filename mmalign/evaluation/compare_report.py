"""`compare.html` and `compare.json`: several runs beside each other, in the style of the report."""

from __future__ import annotations

import json
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path

from mmalign.evaluation.compare_runs import Comparison, RunDifference, ScorerComparison
from mmalign.evaluation.report_parts import definitions, document, name_cell, text
from mmalign.evaluation.report_plots import axis, interval_plot
from mmalign.evaluation.result_json import SCHEMA_VERSION, without_nan
from mmalign.evaluation.wording import capital, interval, level, number, p_value, percent, sample_size
from mmalign.files import write_file


def write_comparison(comparison: Comparison, output_dir: str | Path) -> Path:
    """Write both files into `output_dir`; returns the path of the page."""
    folder = Path(output_dir)
    created = datetime.now(UTC).isoformat(timespec="seconds")
    content = {
        "schema_version": SCHEMA_VERSION,
        "created": created,
        "verdicts": verdicts(comparison),
        "warnings": warnings(comparison),
        **asdict(comparison),
    }
    write_file(folder / "compare.json", json.dumps(without_nan(content), indent=1, allow_nan=False))
    sections = [
        f'<h1 class="verdict">{"<br>".join(map(text, verdicts(comparison)))}</h1>\n',
        *(f'<p class="warn">{text(line)}</p>\n' for line in warnings(comparison)),
        *(_scorer(comparison, scorer) for scorer in comparison.scorers),
        _notes(),
        _settings(comparison),
    ]
    title = ", ".join(comparison.runs)
    return write_file(folder / "compare.html", document("comparison", title, created, sections))


def verdicts(comparison: Comparison) -> list[str]:
    """What each judge says of the pairs of runs, a plain line each."""
    return [line for judge in comparison.scorers if judge.name in comparison.judges for line in _verdicts(judge)]


def _verdicts(judge: ScorerComparison) -> list[str]:
    alpha = 1 - judge.win_rates[0].confidence
    seen = f", which {_names(judge.seen_by)} trained on, so this is no evidence" if judge.seen_by else ""
    return [
        f"{_ahead(pair)}, as told by {judge.name}{seen}."
        for pair in judge.differences
        if pair.p_corrected.shown <= alpha
    ] or [f"No difference between the runs is shown, as told by {judge.name}{seen}."]


def warnings(comparison: Comparison) -> list[str]:
    """What a reader must know before believing the verdicts, a plain line each."""
    lines = []
    if "base" in comparison.settings["allow_different"]:
        lines.append("The runs may start from different bases; each win rate is over its own, so a weak base flatters.")
    twins = {a for a in comparison.aligned_fingerprints if comparison.aligned_fingerprints.count(a) > 1}
    if twins:
        lines.append("Some runs have the same model fingerprint: they are the same model.")
    if len(comparison.judges) > 1:
        lines.append(
            f"The runs list their scorers in different orders, so each run's first tells: {', '.join(comparison.judges)}."
        )
    if comparison.left_out:
        lines.append(f"Left out, as they did not judge every run: {', '.join(comparison.left_out)}.")
    return lines


def comparison_lines(comparison: Comparison) -> list[str]:
    """For the terminal: every win rate and every difference, a line each, then the verdicts and the warnings."""
    width = max(map(len, comparison.runs))
    lines = []
    for scorer in comparison.scorers:
        use = f"trained on by {_names(scorer.seen_by)}" if scorer.seen_by else "held out"
        lines.append(f"{scorer.name} ({use}), {sample_size(scorer.win_rates[0])}")
        lines += [
            f"  {run:<{width}}  {percent(rate.rate):>6}  ({interval(rate)})"
            for run, rate in zip(comparison.runs, scorer.win_rates, strict=True)
        ]
        lines += [
            f"  {pair.first} \N{MINUS SIGN} {pair.second}: {_points(pair)} points ({_ends(pair)}), "
            f"corrected {p_value(pair.p_corrected.shown)}"
            for pair in scorer.differences
        ]
    return [*lines, *verdicts(comparison), *warnings(comparison)]


def _ahead(pair: RunDifference) -> str:
    better, worse = (pair.first, pair.second) if pair.difference.value > 0 else (pair.second, pair.first)
    return (
        f"{better} wins more often than {worse}: {pair.first} \N{MINUS SIGN} {pair.second} is {_points(pair)} points "
        f"({level(pair.difference.confidence)} interval {_ends(pair)}, corrected {p_value(pair.p_corrected.shown)})"
    )


def _points(pair: RunDifference) -> str:
    return number(100 * pair.difference.value, 1.0, sign=True)


def _ends(pair: RunDifference) -> str:
    return (
        f"{number(100 * pair.difference.low, 1.0, sign=True)} to {number(100 * pair.difference.high, 1.0, sign=True)}"
    )


def _names(names: tuple[str, ...]) -> str:
    return " and ".join(names)


def _scorer(comparison: Comparison, scorer: ScorerComparison) -> str:
    confidence = level(scorer.win_rates[0].confidence)
    body = "".join(
        f'<tr>{name_cell(run, run in scorer.seen_by)}<td class="plot">'
        f"{interval_plot(rate, seen_in_training=run in scorer.seen_by)}{axis()}</td>"
        f'<td class="number" data-label="Win rate"><b>{percent(rate.rate)}</b></td>'
        f'<td class="number" data-label="{confidence} interval">{interval(rate)}</td>'
        f'<td class="number" data-label="Wins / ties / losses">{rate.wins:,} / {rate.ties:,} / {rate.losses:,}</td></tr>'
        for run, rate in zip(comparison.runs, scorer.win_rates, strict=True)
    )
    differences = "".join(
        f'<tr><td class="name">{text(pair.first)} \N{MINUS SIGN} {text(pair.second)}</td>'
        f'<td class="number" data-label="Difference, points"><b>{_points(pair)}</b></td>'
        f'<td class="number" data-label="{confidence} interval">{_ends(pair)}</td>'
        f'<td class="number" data-label="Corrected p">{text(p_value(pair.p_corrected.shown))}</td></tr>'
        for pair in scorer.differences
    )
    return (
        f'<section><h2>As told by {text(scorer.name)}</h2><p class="quiet lead">How often each run beats the base for the '
        f"same prompt and seed: {sample_size(scorer.win_rates[0])}.</p>"
        '<table><thead><tr><th>Run</th><th></th><th class="number">Win rate</th>'
        f'<th class="number">{confidence} interval</th><th class="number">Wins / ties / losses</th></tr></thead>'
        f'<tbody>{body}</tbody><tfoot><tr><td></td><td class="plot">{axis()}</td><td colspan="3"></td></tr></tfoot></table>'
        '<table><thead><tr><th>Difference of win rates</th><th class="number">Points</th>'
        f'<th class="number">{confidence} interval</th><th class="number">Corrected p</th></tr></thead>'
        f"<tbody>{differences}</tbody></table></section>\n"
    )


def _notes() -> str:
    rules = [
        "The difference of two runs has an interval of its own, from prompts drawn for both together: whether the intervals of "
        "two win rates overlap says less.",
        "Corrected p-values are Holm's over all pairs of runs and all held-out scorers; for a scorer that a run trained on, over "
        "everything shown here.",
    ]
    lines = "".join(f"<li>{text(line)}</li>" for line in rules)
    return f'<section><h2>How to read this</h2><ul class="notes">{lines}</ul></section>\n'


def _settings(comparison: Comparison) -> str:
    settings = {
        capital(key.removeprefix("num_").replace("_", " ")): value for key, value in comparison.settings.items()
    }
    prints: dict[str, str] = {}
    for run, ours, theirs in zip(
        comparison.runs, comparison.aligned_fingerprints, comparison.base_fingerprints, strict=True
    ):
        prints |= {f"{run}, model": ours, f"{run}, base": theirs}
    prints |= {f"Scorer {scorer.name}": scorer.fingerprint for scorer in comparison.scorers}
    return (
        f"<section><h2>Settings</h2>{definitions(settings)}</section>\n"
        f"<section><h2>Fingerprints</h2>{definitions(prints, fingerprints=True)}</section>\n"
    )
