"""Numbers and sentences of a report, rounded sensibly and never without their interval and n."""

from __future__ import annotations

import math
from collections.abc import Sequence

from mmalign.evaluation.result import EvaluationResult, Summary
from mmalign.evaluation.win_rate import Difference, WinRate

MINUS = "\N{MINUS SIGN}"


def percent(share: float) -> str:
    """One decimal; more where rounding would print 50.0 % for something that is not."""
    for digits in (1, 2, 3):
        text = f"{100 * share:.{digits}f}"
        if float(text) != 50.0 or share == 0.5:
            return f"{text}%"
    return f"{100 * share:.3f}%"


def capital(text: str) -> str:
    """The text as it starts a sentence or a heading; what looks like a name or a path is left alone."""
    first = text.split(" ")[0]
    return text[:1].upper() + text[1:] if first.replace("-", "").isalpha() else text


def number(value: float, scale: float, *, sign: bool = False) -> str:
    """A number with as many decimals as `scale` (its standard error, or the width of its interval) gives sense to."""
    if not math.isfinite(value):
        return "∞" if value > 0 else f"{MINUS}∞" if value < 0 else "n/a"
    digits = 3 if not math.isfinite(scale) or scale <= 0 else max(0, 1 - math.floor(math.log10(scale)))
    text = f"{abs(value):,.{digits}f}" if digits <= 6 else f"{abs(value):.2e}"
    zero = not any(character in "123456789" for character in text)
    return text if zero else f"{MINUS if value < 0 else '+' if sign else ''}{text}"


def count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def level(confidence: float) -> str:
    return f"{100 * confidence:g}%"


def sample_size(rate: WinRate | Difference) -> str:
    """`1,500 comparisons on 500 prompts`"""
    return f"{count(rate.num_comparisons, 'comparison')} on {count(rate.num_clusters, 'prompt')}"


def interval(rate: WinRate) -> str:
    return f"{percent(rate.low)} to {percent(rate.high)}"


def difference_interval(difference: Difference) -> str:
    low, high = difference.low, difference.high
    return f"{number(low, high - low, sign=True)} to {number(high, high - low, sign=True)}"


def difference_value(difference: Difference) -> str:
    return number(difference.value, difference.high - difference.low, sign=True)


def p_value(p: float) -> str:
    """`p = 0.034`, or `p < 0.001`."""
    return "p < 0.001" if p < 0.001 else f"p = {p:.3f}" if p < 0.9995 else "p = 1"


def summary(side: Summary) -> str:
    """`21.34 ± 0.12`, the second number being the standard error."""
    error = side.standard_error
    return number(side.mean, error) if math.isnan(error) else f"{number(side.mean, error)} ± {number(error, error)}"


def headline(result: EvaluationResult) -> str:
    """The one sentence: who wins, how often, with interval and n, told by whom."""
    judge, aligned, base = result.judge, result.aligned_label, result.base_label
    rate = judge.win_rate
    told = f"{percent(rate.rate)} of {sample_size(rate)} ({level(rate.confidence)} interval {interval(rate)})"
    if not judge.shows_difference:
        corrected = f"but corrected {p_value(judge.p_corrected.shown)}"
        why = corrected if rate.shows_difference else "and the interval contains 50%"
        verdict = f"No difference is shown: {aligned} wins {told} against {base}, {why}"
    elif rate.rate > 0.5:
        verdict = f"{capital(aligned)} beats {base}: it wins {told}"
    else:
        verdict = f"{capital(aligned)} loses to {base}: it wins {told}"
    return f"{verdict}, {_told_by(result)}."


def notes(result: EvaluationResult) -> list[str]:
    """What a careful reader needs to know before believing the numbers, in plain sentences."""
    rate = result.judge.win_rate
    lines = [
        "A tie counts as half a win."
        + (f" Scores within {result.settings['tie_margin']:g} of each other are ties." if _margin(result) else ""),
        "One trained model was compared (a single run): the interval covers the choice of prompts and sampling "
        "seeds, not what another training run would give.",
        _interval_note(rate),
    ]
    held_out = sum(not scorer.seen_in_training for scorer in result.scorers)
    if held_out > 1:
        lines.append(
            f"{held_out} held-out scorers are shown. The sentence above is told by the first in the order they were "
            "given, not by the kindest. The intervals are each scorer's own; corrected p-values (Holm), by which every "
            "verdict goes, allow for looking at several."
        )
    if rate.num_clusters < 500:
        lines.append(f"{count(rate.num_clusters, 'prompt').capitalize()} is few: plan on 500 or more for a claim.")
    return lines


def cautions(result: EvaluationResult) -> list[str]:
    """What takes the weight from the headline, said right below it."""
    lines = []
    if result.judge.seen_in_training:
        lines.append(
            "Every scorer here was seen in training. A model learns to please the scorer it was trained on, so these "
            "win rates do not show that its pictures are better."
        )
    if result.aligned_fingerprint == result.base_fingerprint:
        lines.append("Both sides have the same model fingerprint: this compares a model with itself.")
    return lines


def sample_rule(shown: int, num_prompts: int, seed: int) -> str:
    return (
        f"{shown} of {count(num_prompts, 'prompt')}, picked at random with seed {seed} without looking at any score; "
        "each prompt's first picture."
    )


def history_keys(history: Sequence[dict[str, object]]) -> list[str]:
    """Curves in reading order: the losses, the reward measures, then the rest as logged."""
    skipped = {"step", "epoch", "total_flos"}
    keys: dict[str, None] = {}
    for entry in history:
        for key, value in entry.items():
            if key not in skipped and isinstance(value, int | float) and not isinstance(value, bool):
                keys.setdefault(key)
    first = ("loss", "eval_loss", "rewards/accuracies", "rewards/margins", "rewards/chosen", "rewards/rejected")
    return sorted(keys, key=lambda key: first.index(key) if key in first else len(first))


def _told_by(result: EvaluationResult) -> str:
    judge = result.judge
    if judge.seen_in_training:
        return f"as told by {judge.name}, which was seen in training, so this is no evidence of better pictures"
    if result.settings.get("trained_on"):
        return f"as told by {judge.name}, a scorer that was not used in training"
    return f"as told by {judge.name}; what training used was not said"


def _interval_note(rate: WinRate) -> str:
    if rate.method == "none":
        return "There is a single prompt, which says nothing about other prompts: the interval is everything possible."
    if rate.method == "wilson":
        return (
            "The interval is Wilson's at the effective number of independent comparisons, as there are too few "
            "prompts, wins or losses for bootstrap percentiles."
        )
    return "The interval holds the percentiles of a bootstrap that draws whole prompts, with all their pictures."


def _margin(result: EvaluationResult) -> bool:
    return bool(result.settings.get("tie_margin"))
