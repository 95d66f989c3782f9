"""What stands out in a result, a plain line each, for the report and the terminal."""

from __future__ import annotations

from mmalign.evaluation.image_statistics import STATISTICS
from mmalign.evaluation.result import MOVED, EvaluationResult, PictureStatistic, Retention, ScorerResult
from mmalign.evaluation.wording import (
    cautions,
    count,
    difference_interval,
    difference_value,
    headline,
    interval,
    level,
    p_value,
    percent,
)


def scorer_line(result: EvaluationResult, scorer: ScorerResult) -> str:
    """`red (held out): 63.2% (95% interval 58.1% to 68.0%), corrected p = 0.004: aligned wins more often`"""
    rate, p = scorer.win_rate, scorer.p_corrected
    use = "seen in training" if scorer.seen_in_training else "held out"
    verdict = "no difference is shown"
    if scorer.shows_difference:
        winner = result.aligned_label if rate.rate > 0.5 else result.base_label
        verdict = f"{winner} wins more often"
    return (
        f"{scorer.name} ({use}): {percent(rate.rate)} ({level(rate.confidence)} interval {interval(rate)}), "
        f"corrected {p_value(p.shown)}: {verdict}"
    )


def conclusion(result: EvaluationResult) -> str:
    """Which held-out scorers show a difference once it is allowed for that several were looked at."""
    held_out = [scorer for scorer in result.scorers if not scorer.seen_in_training]
    alpha = 1 - result.judge.win_rate.confidence
    if len(held_out) < 2:
        return ""
    ahead: list[str] = []
    behind: list[str] = []
    for scorer in held_out:
        if scorer.shows_difference:
            (ahead if scorer.win_rate.rate > 0.5 else behind).append(scorer.name)
    told = [
        f"{label} wins more often by {', '.join(names)}"
        for label, names in ((result.aligned_label, ahead), (result.base_label, behind))
        if names
    ]
    return (
        f"Corrected for looking at {count(len(held_out), 'held-out scorer')} (Holm, {level(alpha)} for any error): "
        f"{'; '.join(told) or 'no difference is shown'}."
    )


def moved_statistics(result: EvaluationResult) -> list[str]:
    """`Pictures became brighter: +0.12 (95% interval +0.10 to +0.14), 0.8 times the base's standard deviation.`"""
    return [_moved(statistic) for statistic in result.statistics if statistic.moved]


def retention_line(found: Retention) -> str:
    """`Retention kept: by red the mean score changed by −0.01 (95% interval −0.02 to +0.01) on 40 prompts; tolerated loss 0.05.`"""
    difference = found.difference
    return (
        f"Retention {found.verdict}: by {found.scorer} the mean score changed by {difference_value(difference)} "
        f"({level(difference.confidence)} interval {difference_interval(difference)}) on "
        f"{count(difference.num_clusters, 'prompt')}; tolerated loss {found.tolerance:g}."
    )


def moved_rule() -> str:
    return (
        f"Pointed out is what moved by more than {MOVED:g} of the standard deviation over the base's pictures, with an "
        "interval that leaves out zero."
    )


def _moved(statistic: PictureStatistic) -> str:
    difference, words = statistic.difference, STATISTICS[statistic.name]
    spread = statistic.base_spread
    size = f", {abs(difference.value) / spread:.2g} times the base's standard deviation" if spread else ""
    return (
        f"Pictures became {words.rose if difference.value > 0 else words.fell}: {difference_value(difference)} "
        f"({level(difference.confidence)} interval {difference_interval(difference)}){size}."
    )


def result_lines(result: EvaluationResult) -> list[str]:
    """For the terminal: the headline and what takes weight from it, a line a scorer, and what else stands out."""
    lines = [headline(result), *cautions(result)]
    lines += [f"  {scorer_line(result, scorer)}" for scorer in result.ranked_scorers]
    lines += [conclusion(result)] if conclusion(result) else []
    lines += moved_statistics(result)
    if result.retention is not None:
        lines.append(retention_line(result.retention))
    seen = ", seen in training" if result.judge.seen_in_training else ""
    for point in result.sweep:
        name = result.judge.name
        rate = next(scorer.win_rate for scorer in point.scorers if scorer.name == name)
        lines.append(f"  LoRA scale {point.scale:g}: {percent(rate.rate)} ({interval(rate)}) by {name}{seen}")
    return lines
