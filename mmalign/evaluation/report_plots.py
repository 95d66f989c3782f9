"""Small inline SVG plots: an interval on the 0 to 100 % axis, and training curves."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from html import escape

from mmalign.evaluation.win_rate import WinRate
from mmalign.evaluation.wording import interval, number, percent

MAX_POINTS = 400
_WIDTH, _HEIGHT = 300.0, 96.0


def interval_plot(rate: WinRate, *, seen_in_training: bool) -> str:
    """The win rate as a dot on its interval; hollow for a scorer that was seen in training."""
    label = f"win rate {percent(rate.rate)}, interval {interval(rate)}"
    return share_plot(rate.rate, rate.low, rate.high, label, kind="seen" if seen_in_training else "held-out")


def share_plot(share: float, low: float, high: float, label: str, *, kind: str = "held-out") -> str:
    """A share as a dot on its interval, from 0 to 100 %; label: what is read out."""
    left, right, middle = (f"{100 * end:.2f}%" for end in (low, high, share))
    return (
        f'<svg class="interval {kind}" role="img" aria-label="{label}" width="100%" height="26">'
        '<line class="rail" x1="0" x2="100%" y1="13" y2="13"/>'
        '<line class="half" x1="50%" x2="50%" y1="0" y2="26"/>'
        f'<line class="span" x1="{left}" x2="{right}" y1="13" y2="13"/>'
        f'<line class="cap" x1="{left}" x2="{left}" y1="8" y2="18"/>'
        f'<line class="cap" x1="{right}" x2="{right}" y1="8" y2="18"/>'
        f'<circle cx="{middle}" cy="13" r="4.5"/></svg>'
    )


def axis() -> str:
    """The labels below the interval plots."""
    ticks = ((0, "start"), (25, "middle"), (50, "middle"), (75, "middle"), (100, "end"))
    marks = "".join(f'<text x="{at}%" y="12" text-anchor="{anchor}">{at}%</text>' for at, anchor in ticks)
    return f'<svg class="axis" aria-hidden="true" width="100%" height="16">{marks}</svg>'


def curve(key: str, points: Sequence[tuple[float, float]], x_name: str) -> str:
    """One training curve with its range, its last value, and a dashed line at the value that means "no signal"."""
    finite = [(x, y) for x, y in points if math.isfinite(y)]
    title = f'<span class="key">{escape(key)}</span>'
    lost = len(points) - len(finite)
    broken = f"{lost} of {len(points)} values are not finite. " if lost else ""
    if not finite:
        return f'<figure class="curve"><figcaption>{title}</figcaption><p class="quiet">{broken}</p></figure>'
    thinned = thin(points)
    reference = reference_line(key, finite[0][1])
    values = [y for _, y in thinned if math.isfinite(y)] + ([reference[0]] if reference else [])
    low, high = min(values), max(values)
    if low == high:
        low, high = low - 0.5, high + 0.5
    left, right = points[0][0], points[-1][0]

    def place(x: float, y: float) -> str:
        along = (x - left) / (right - left) if right > left else 0.5
        return f"{_WIDTH * along:.1f},{_HEIGHT * (high - y) / (high - low):.1f}"

    lines = "".join(f'<polyline points="{" ".join(place(*point) for point in run)}"/>' for run in _runs(thinned))
    guide, guide_text = "", ""
    if reference:
        y = _HEIGHT * (high - reference[0]) / (high - low)
        guide = f'<line class="guide" x1="0" x2="{_WIDTH:g}" y1="{y:.1f}" y2="{y:.1f}"/>'
        guide_text = f"Dashed: {reference[1]}. "
    scale = high - low
    last = number(finite[-1][1], scale / 10)
    foot = f'<p class="quiet">{guide_text}{broken}</p>' if guide_text or broken else ""
    return (
        f'<figure class="curve"><figcaption>{title}<span class="last">{last}</span></figcaption>'
        f'<div class="plot"><div class="scale"><span>{number(high, scale / 10)}</span>'
        f"<span>{number(low, scale / 10)}</span></div>"
        f'<svg role="img" aria-label="{escape(key)}, last value {last}" viewBox="0 0 {_WIDTH:g} {_HEIGHT:g}" '
        f'preserveAspectRatio="none">{guide}{lines}</svg></div>'
        f'<div class="range"><span>{x_name} {left:,g}</span><span>{right:,g}</span></div>{foot}</figure>'
    )


def scale_plot(
    key: str,
    points: Sequence[tuple[float, float, float, float]],
    *,
    null: float,
    show: Callable[[float, float], str],
    seen_in_training: bool = False,
) -> str:
    """A value with its interval against the LoRA scale: points are (scale, value, low, high); dashed at `null`.

    show: a value as text, given the height of the plot. Hollow dots for a scorer that was seen in training.
    """
    ends = [end for _, value, low, high in points for end in (value, low, high) if math.isfinite(end)] + [null]
    bottom, top = min(ends), max(ends)
    if bottom == top:
        bottom, top = bottom - 0.5, top + 0.5
    left, right = points[0][0], points[-1][0]

    def place(x: float, y: float) -> tuple[str, str]:
        along = (x - left) / (right - left) if right > left else 0.5
        up = (min(max(y, bottom), top) - bottom) / (top - bottom)
        return f"{4 + 92 * along:.2f}%", f"{4 + 92 * (1 - up):.2f}%"

    marks, ticks = [], []
    for scale, value, low, high in points:
        x, y = place(scale, value)
        marks.append(
            f'<line class="span" x1="{x}" x2="{x}" y1="{place(scale, low)[1]}" y2="{place(scale, high)[1]}"/>'
            f'<circle cx="{x}" cy="{y}" r="4"/>'
        )
        ticks.append(f'<text x="{x}" y="12" text-anchor="middle">{scale:g}</text>')
    guide = place(left, null)[1]
    told = ", ".join(f"{show(value, top - bottom)} at {scale:g}" for scale, value, _, _ in points)
    return (
        f'<figure class="curve"><figcaption><span class="key">{escape(key)}</span></figcaption>'
        f'<div class="plot"><div class="scale"><span>{show(top, top - bottom)}</span>'
        f"<span>{show(bottom, top - bottom)}</span></div>"
        f'<svg class="interval{" seen" if seen_in_training else ""}" role="img" aria-label="{escape(key)}: {told}">'
        f'<line class="half" x1="0" x2="100%" y1="{guide}" y2="{guide}"/>{"".join(marks)}</svg>'
        f'<span></span><svg class="axis" aria-hidden="true" width="100%" height="16">{"".join(ticks)}</svg></div></figure>'
    )


def thin(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """400 points at most, each the mean of as many neighbours as it takes; NaN if one of them is."""
    each = math.ceil(len(points) / MAX_POINTS)
    groups = [points[start : start + each] for start in range(0, len(points), each)]
    return [(sum(x for x, _ in g) / len(g), sum(y for _, y in g) / len(g)) for g in groups]


def reference_line(key: str, first: float) -> tuple[float, str] | None:
    """Where a curve lies that has learnt nothing: ½ for accuracies, ln 2 for a loss that starts there."""
    if "accurac" in key or key == "implicit_acc":
        return 0.5, "chance, 0.5"
    if key.rpartition("/")[2] in ("loss", "eval_loss", "train_loss") and abs(first - math.log(2)) < 0.03:
        return math.log(2), "ln 2 = 0.693, where policy and reference agree"
    return None


def _runs(points: Sequence[tuple[float, float]]) -> list[list[tuple[float, float]]]:
    """Stretches of finite points; a single point is doubled, so that its round line cap shows."""
    runs: list[list[tuple[float, float]]] = [[]]
    for point in points:
        if math.isfinite(point[1]):
            runs[-1].append(point)
        elif runs[-1]:
            runs.append([])
    return [run * 2 if len(run) == 1 else run for run in runs if run]
