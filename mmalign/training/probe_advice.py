"""What follows from a probe: a rule of thumb, told in words with the numbers it used.

A learning rate is sound unless the run diverged, more than a tenth of its steps doubled the first step's loss, or held-out pairs
show, beyond chance, a margin below 0, or one above 0 that is smaller than what the winners lost in log-likelihood (mean of −ρ_w over
that of ρ_w − ρ_l). Small steps move all log-ratios in proportion, so that accuracy on held-out pairs hardly tells one small learning
rate from X"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from mmalign.evaluation import paired_difference, win_rate, win_rate_difference
from mmalign.training.auto_beta import Slope, slope_of

if TYPE_CHECKING:
    from mmalign.training.probe import Cell

_SPIKE = 2.0  # times the first step's loss
_SPIKES = 0.1  # share of the steps
_LOWEST_BETA, _HIGHEST_BETA = 1e-6, 1e9
CANNOT_KNOW = (
    "This is a rule of thumb on a short run: it saw no picture, and a longer run drifts further. Whether pictures get better is for "
    "`mmalign evaluate` with a judge that nothing was trained on."
)


@dataclass(frozen=True)
class Reading:
    """A cell in numbers, over held-out pairs (saturation: over their points) but for loss_spikes and gradient_norm.

    margin: mean of strength · (ρ_w − ρ_l), not scaled by β. saturation: at the probe's β. auto_beta: the β with the stated saturation.
    chosen, rejected: mean excess error over the reference; below 0: the policy fits better. price: log-likelihood that the winner lost
    for each unit of margin; None where there was no margin to pay for. is_shown: whether its
    accuracy is above 50 % or its margin above 0 beyond chance. why_not: what makes it unsound.
    """

    learning_rate: float
    accuracy: float | None = None
    accuracy_low: float | None = None
    accuracy_high: float | None = None
    margin: float | None = None
    margin_low: float | None = None
    saturation: float | None = None
    auto_beta: float | None = None
    chosen: float | None = None
    chosen_relative: float | None = None
    rejected: float | None = None
    price: float | None = None
    gradient_norm: float | None = None
    loss_spikes: int = 0
    is_shown: bool = False
    why_not: str = ""


@dataclass(frozen=True)
class Advice:
    """The recommended settings with the reasons, a sentence each; None where no cell was sound."""

    learning_rate: float | None
    beta: float | None
    reasons: list[str]
    readings: list[Reading]


def advise(cells: "list[Cell]", args: Any, saturation: float) -> Advice:
    """The largest sound learning rate whose held-out accuracy is not below the best one's beyond chance, and a β for it."""
    slope, no_slope = _slope(args, saturation)
    readings = [read(cell, slope, args.starting_beta, saturation) for cell in cells]
    sound = [(cell, reading) for cell, reading in zip(cells, readings, strict=True) if not reading.why_not]
    if not sound:
        why = "; ".join(f"{reading.learning_rate:g} {reading.why_not}" for reading in readings)
        return Advice(None, None, [f"no learning rate of the grid is sound: {why}. Probe others"], readings)
    best, best_reading = max(sound, key=lambda pair: pair[1].accuracy or 0)
    gap, prompt = by_pair(best, best.gap), by_pair(best, best.prompt).tolist()
    level = [
        pair
        for pair in sound
        if pair[1].is_shown
        and win_rate_difference(by_pair(pair[0], pair[0].gap), gap, torch.zeros_like(gap), prompt).high >= 0
    ]
    if not level:
        return Advice(
            None,
            None,
            [
                "no learning rate is shown to tell held-out pairs apart "
                f"({len(gap)} pairs, {best.steps} steps): probe more steps, or hold out more pairs"
            ],
            readings,
        )
    cell, reading = max(level, key=lambda pair: pair[0].learning_rate)
    told = [
        f"learning rate {reading.learning_rate:g}: the largest sound one that is shown to tell {len(gap)} held-out pairs apart "
        f"(margin {reading.margin:.2g}, at least {reading.margin_low:.2g}; accuracy {_percent(reading)}) and does not rank them worse "
        f"than the best ({_percent(best_reading)} at {best_reading.learning_rate:g}) beyond chance"
    ]
    larger = next((r for r in readings if r.learning_rate > reading.learning_rate), None)
    if larger is None:
        told.append("it is also the largest that was tried: a larger one may serve, probe it")
    else:
        told.append(f"{larger.learning_rate:g} {larger.why_not or f'ranks {_percent(larger)} right'}")
    beta = reading.auto_beta
    if beta is None:
        told.append(f"no beta is advised: {no_slope or 'nothing moved'}")
    else:
        told.append(
            f"beta {beta:.2g}: there held-out points have lost {100 * saturation:.0f} % of the link's slope after {cell.steps} "
            f"steps (at the probe's beta, {args.starting_beta:g}, {100 * (reading.saturation or 0):.0f} %)"
        )
    return Advice(reading.learning_rate, None if beta is None else float(f"{beta:.2g}"), told, readings)


def read(cell: "Cell", slope: Slope | None, beta: float, aim: float) -> Reading:
    """The numbers of a cell that ran at `beta`; `slope` None: of an objective without a saturation."""
    spikes = sum(loss > _SPIKE * cell.loss[0] for loss in cell.loss) if cell.loss else 0
    norm = float(torch.tensor(cell.gradient_norm).median()) if cell.gradient_norm else None
    if cell.diverged:
        return Reading(cell.learning_rate, gradient_norm=norm, loss_spikes=spikes, why_not="diverged")
    gap, chosen, rejected = (by_pair(cell, column) for column in (cell.gap, cell.chosen, cell.rejected))
    prompt, zero = by_pair(cell, cell.prompt).tolist(), torch.zeros_like(gap)
    accuracy, margin = win_rate(gap, zero, prompt), paired_difference(gap, zero, prompt)
    gained = float((rejected - chosen).mean())
    is_shown = accuracy.low > 0.5 or margin.low > 0
    why_not = ""
    if spikes > _SPIKES * cell.steps:
        why_not = f"doubled the first step's loss in {spikes} of {cell.steps} steps"
    elif margin.high < 0:
        why_not = "is shown to rank held-out pairs the wrong way round"
    elif is_shown and paired_difference(chosen, rejected - chosen, prompt).low > 0:
        why_not = "is shown to cost the winner more log-likelihood than the margin gained"
    points, reference = torch.tensor(cell.gap, dtype=torch.float64), by_pair(cell, cell.reference)
    return Reading(
        learning_rate=cell.learning_rate,
        accuracy=accuracy.rate,
        accuracy_low=accuracy.low,
        accuracy_high=accuracy.high,
        margin=margin.value,
        margin_low=margin.low,
        is_shown=is_shown,
        saturation=slope.saturation(points, beta) if slope else None,
        auto_beta=slope.solve(points, aim, _LOWEST_BETA, _HIGHEST_BETA) if slope and points.any() else None,
        chosen=float(chosen.mean()),
        chosen_relative=float((chosen / reference.clamp(min=1e-8)).mean()),
        rejected=float(rejected.mean()),
        price=float(chosen.mean()) / gained if gained > 0 else None,
        gradient_norm=norm,
        loss_spikes=spikes,
        why_not=why_not,
    )


def by_pair(cell: "Cell", column: list[Any]) -> Float[Tensor, " P"]:
    """The mean of a column over the points of each of the P held-out pairs, pairs in the order of their rows."""
    _, pair, count = torch.tensor(cell.row).unique(return_inverse=True, return_counts=True)
    values = torch.tensor(column, dtype=torch.float64)
    return torch.zeros(len(count), dtype=torch.float64).index_add(0, pair, values) / count


def _slope(args: Any, saturation: float) -> tuple[Slope | None, str]:
    """What tells the saturation, or None and why the objective has none to aim at."""
    try:
        return slope_of(args, saturation), ""
    except ValueError as error:
        return None, str(error)


def table(readings: list[Reading]) -> str:
    """The readings as aligned text, a line a learning rate."""
    head = [
        "learning rate",
        "accuracy",
        "margin",
        "saturation",
        "beta",
        "winner's error",
        "price",
        "gradient",
        "spikes",
        "",
    ]
    rows = [head] + [
        [
            f"{r.learning_rate:g}",
            _percent(r),
            _number(r.margin, ".2g"),
            _number(r.saturation, ".0%"),
            _number(r.auto_beta, ".2g"),
            _number(r.chosen_relative, "+.2%"),
            _number(r.price, "+.2g"),
            _number(r.gradient_norm, ".2g"),
            str(r.loss_spikes),
            r.why_not,
        ]
        for r in readings
    ]
    return aligned(rows)


def aligned(rows: list[list[str]]) -> str:
    """Rows as lines, every column but the last set flush right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(f"{text:>{width}}" for text, width in zip(row[:-1], widths, strict=False)) for row in rows]
    return "\n".join(f"{line}  {row[-1]}".rstrip() for line, row in zip(lines, rows, strict=True))


def _percent(reading: Reading) -> str:
    if reading.accuracy is None or reading.accuracy_low is None or reading.accuracy_high is None:
        return "–"
    return f"{100 * reading.accuracy:.1f} % ({100 * reading.accuracy_low:.0f}–{100 * reading.accuracy_high:.0f})"


def _number(value: float | None, form: str) -> str:
    return "–" if value is None else f"{value:{form}}"
