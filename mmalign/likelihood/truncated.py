"""Truncated diffusion fine-tuning (Self-NPO, arXiv:2505.11777): a model's own predictions as its training data.

A solver takes a few steps with the reference, to x_t. The reference's estimate of the data there is the target x̂_0; noise is then
added to x_t, which is no mean and so as noisy as it should be, up to a later time s, from where the student must find x̂_0:

    x_s = (α_s/α_t)·x_t + √(σ_s² − σ_t²·α_s²/α_t²)·ξ,    L = ρ(f_θ(x_s, s, c) − x̂_0)

with x = α·x_0 + σ·n, f the estimate of the data, ρ a norm. Shapes: B rows, K moves.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mmalign.denoisers.schedule import Schedule, precise, rows_like
from mmalign.likelihood import draws

Source = Literal["noise", "images"]
# (x, t, rows of the batch, with the prompt or without it) → the reference's raw output.
GuidedPredict = Callable[[Tensor, Tensor, Tensor, bool], Tensor]
# Where the pseudo-Huber loss turns from a square to an absolute value, in the released scripts.
HUBER_WIDTH = 1e-3


@dataclass(frozen=True, kw_only=True)
class TruncatedConfig:
    """How targets are made.

    solver_steps    K, moves of the solver; a row that comes to the end of its grid makes fewer
    grid_points     times at which a path may start (images) or end (noise), evenly over the schedule
    guidance_scale  g of the targets, unconditional + g·(conditional − unconditional): 1 is conditional, 0 unconditional. The released
                    scripts' w is g − 1
    source          "noise": from pure noise in K even moves to a drawn time of the grid, so that prompts are all that is needed;
                    "images": from an image noised to a drawn time, K moves of the grid down, as released
    """

    solver_steps: int = 5
    grid_points: int = 25
    guidance_scale: float = 1.0
    source: Source = "noise"

    def __post_init__(self) -> None:
        if self.source not in ("noise", "images"):
            raise ValueError(f"source must be 'noise' or 'images', got {self.source!r}")
        if self.solver_steps < 1:
            raise ValueError(f"solver_steps must be at least 1, got {self.solver_steps}")
        if self.grid_points < 2:
            raise ValueError(f"grid_points must be at least 2, got {self.grid_points}")


@dataclass(frozen=True, eq=False)
class TruncatedPoint:
    """What the student is fed (x_s at timestep), what it must find there (target, in data space), and where the solver stopped."""

    x_s: Float[Tensor, "B ..."]
    timestep: Int[Tensor, " B"]
    target: Float[Tensor, "B ..."]
    landing: Int[Tensor, " B"]


def time_grid(schedule: Schedule, points: int) -> Int[Tensor, " N"]:
    """round(T·(i+1)/N) − 1, i = 0 … N−1, T being the drawable timesteps: 39, 79, …, 999 for 25 of 1000."""
    top = schedule.max_timestep + 1
    if points > top:
        raise ValueError(f"grid_points must lie in 2 … {top}, got {points}")
    return (2 * top * torch.arange(1, points + 1) + points) // (2 * points) - 1


def draw_stops(
    schedule: Schedule, config: TruncatedConfig, generators: Sequence[torch.Generator]
) -> Int[Tensor, "B K+1"]:
    """The timesteps of every row's path, its start first; one that is repeated is no move. On the CPU."""
    grid, moves = time_grid(schedule, config.grid_points), config.solver_steps
    if config.source == "images":
        first = draws.randint(generators, 0, len(grid))
        place = first[:, None] - torch.arange(moves + 1)
        return torch.where(place < 0, 0, grid[place.clamp(min=0)])
    last = grid[draws.randint(generators, 0, len(grid) - 1)][:, None]
    k = torch.arange(moves + 1)
    # Whole numbers, rounded half up.
    return (2 * (grid[-1] * (moves - k) + last * k) + moves) // (2 * moves)


@torch.no_grad()
def truncated_point(
    predict: GuidedPredict,
    schedule: Schedule,
    x: Float[Tensor, "B ..."],
    stops: Int[Tensor, "B K+1"],
    config: TruncatedConfig,
    *,
    time: Sequence[torch.Generator],
    noise: Sequence[torch.Generator],
) -> TruncatedPoint:
    """DDIM (VP) or Euler (flow) from x at the first stop to the last, the target there, and the noised point that is trained on.

    time, noise: what draws s, uniform over the timesteps after the last stop, and ξ.
    """
    x, stops = precise(x).clone(), stops.to(x.device)
    for here, there in zip(stops.T[:-1], stops.T[1:], strict=True):
        rows = (here != there).nonzero()[:, 0]
        if len(rows):
            direction = _direction(predict, schedule, x[rows], here[rows], rows, config.guidance_scale)
            x[rows] = _move(schedule, x[rows], direction, here[rows], there[rows])
    landing = stops[:, -1]
    every = torch.arange(len(x), device=x.device)
    direction = _direction(predict, schedule, x, landing, every, config.guidance_scale)
    target = x / rows_like(schedule.scale(landing), x) - rows_like(schedule.level(landing), x) * direction
    later = schedule.max_timestep - landing
    s = landing + 1 + (draws.rand(time).to(x.device) * later).long().clamp(max=later - 1)
    xi = draws.randn(noise, x.shape[1:], x.dtype, x.device)
    return TruncatedPoint(renoised(schedule, x, landing, s, xi), s, target, landing)


def renoised(
    schedule: Schedule,
    x_t: Float[Tensor, "B ..."],
    t: Int[Tensor, " B"],
    s: Int[Tensor, " B"],
    noise: Float[Tensor, "B ..."],
) -> Float[Tensor, "B ..."]:
    """x_t with the forward process's noise from t to s > t: (α_s/α_t)·x_t + √(σ_s² − σ_t²·α_s²/α_t²)·ξ, for VP and flow."""
    signal, sigma = schedule.signal.to(t.device), schedule.noise.to(t.device)
    kept = signal[s] / signal[t]
    spread = (sigma[s] ** 2 - (sigma[t] * kept) ** 2).clamp(min=0).sqrt()
    return rows_like(kept, x_t) * precise(x_t) + rows_like(spread, x_t) * precise(noise)


def data_error(
    prediction: Float[Tensor, "B ..."], target: Float[Tensor, "B ..."], norm: Literal["huber", "l2"] = "huber"
) -> Float[Tensor, " B"]:
    """Mean over everything but the row of √(d² + c²) − c, c = 1e-3, or of d², d being the difference in data space."""
    square = (precise(prediction) - precise(target)).square()
    if norm == "huber":
        # d²/(√(d² + c²) + c) is the same, without the cancellation.
        square = square / ((square + HUBER_WIDTH**2).sqrt() + HUBER_WIDTH)
    return square.flatten(1).mean(1)


def _direction(predict: GuidedPredict, schedule: Schedule, x: Tensor, t: Tensor, rows: Tensor, scale: float) -> Tensor:
    """The guided direction; a branch that does not count is not run."""

    def branch(prompted: bool) -> Tensor:
        return schedule.to_direction(predict(x, t, rows, prompted), x, t)

    if scale in (0, 1):
        return branch(bool(scale))
    unconditional = branch(False)
    return unconditional + scale * (branch(True) - unconditional)


def _move(schedule: Schedule, x: Tensor, direction: Tensor, here: Tensor, there: Tensor) -> Tensor:
    """u ← u + (λ' − λ)·direction, u = x/scale."""
    u = x / rows_like(schedule.scale(here), x)
    u = u + rows_like(schedule.level(there) - schedule.level(here), x) * direction
    return rows_like(schedule.scale(there), x) * u
