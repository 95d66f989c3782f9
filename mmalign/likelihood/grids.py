"""The timesteps an inversion walks through, as plain tables; no network is called here.

Exact grids start at the data and end at the conditioning timestep t (spec: landing == conditioning). The grid of the
published InPO and SmPO scripts (diffusers ≤ 0.21) starts at a negative timestep and lands near t; it is kept for
compat="official-0.20" only. Shapes: B rows, K moves of the longest row.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mmalign.denoisers.schedule import Schedule
from mmalign.likelihood import draws
from mmalign.likelihood.config import InversionConfig

# SD's steps_offset: the published grids are 1 + Δ·i, rolled back by one step.
_OFFICIAL_OFFSET = 1


@dataclass(frozen=True, eq=False)
class Grid:
    """Row b makes moves[b] moves source → target; entries beyond are padding. source −1 is the data itself.

    first and later are the timesteps the network is told at a move's first and at its further calls.
    """

    source: Int[Tensor, "B K"]
    target: Int[Tensor, "B K"]
    first: Int[Tensor, "B K"]
    later: Int[Tensor, "B K"]
    moves: Int[Tensor, " B"]

    @property
    def landing(self) -> Int[Tensor, " B"]:
        """Where each row stands after its last move."""
        return self.target.gather(1, self.moves[:, None] - 1)[:, 0]


def make_grid(schedule: Schedule, t: Int[Tensor, " B"], config: InversionConfig) -> Grid:
    """The grid of every row for conditioning timesteps t, on the CPU."""
    t = t.detach().cpu().long()
    if t.ndim != 1 or not len(t):
        raise ValueError(f"t must be a non-empty (B,) tensor of timesteps, got shape {tuple(t.shape)}")
    if t.min() < 0 or t.max() > schedule.max_timestep:
        raise ValueError(
            f"timesteps must lie in 0 … {schedule.max_timestep}, got {int(t.min())} … {int(t.max())}"
            " (beyond max_timestep this schedule keeps no trace of the picture)"
        )
    if config.compat is not None:
        return _official_grid(schedule, t, config)
    target, moves = _per_sample(schedule, t, config) if config.grid == "per_sample" else _fixed(schedule, t, config)
    source = torch.cat([torch.full_like(target[:, :1], -1), target[:, :-1]], dim=1)
    # The data have no timestep of their own; 0 is the nearest one a network knows.
    first = source.clamp(min=0) if config.solver == "heun" else target
    return Grid(source, target, first, target, moves)


def fixed_grid(schedule: Schedule, num_steps: int) -> Int[Tensor, " N"]:
    """The N timesteps round((t_max+1)·k/N) − 1, k = 1 … N, ending at the schedule's largest drawable one."""
    top = schedule.max_timestep + 1
    if not 1 <= num_steps <= top:
        raise ValueError(f"num_steps must lie in 1 … {top}, got {num_steps}")
    return _round_half_up(top * torch.arange(1, num_steps + 1), torch.tensor(num_steps)) - 1


def draw_timesteps(
    schedule: Schedule, generators: Sequence[torch.Generator], config: InversionConfig | None = None
) -> Int[Tensor, " B"]:
    """Uniform over the drawable timesteps, or over the fixed grid's if the config has one; (B,)."""
    if config is not None and config.grid == "fixed":
        return fixed_grid(schedule, config.num_steps)[draws.randint(generators, 0, config.num_steps)]
    return draws.randint(generators, 0, schedule.max_timestep + 1)


def path_weights(schedule: Schedule, config: InversionConfig) -> Float[Tensor, " T"]:
    """w_s = P(t = s) / E[number of landings at s], for training on every landing of a path (keep_path=True).

    With t drawn uniformly (draw_timesteps), small timesteps are landed on more often than drawn. Weighted by w, the sum
    over a path's landings has the expectation of the single landing at t; timesteps never landed on have weight 0.
    """
    drawn = _drawable(schedule, config)
    grid = make_grid(schedule, drawn, config)
    used = torch.arange(grid.target.shape[1]) < grid.moves[:, None]
    landings = torch.bincount(grid.target[used], minlength=schedule.num_timesteps).double()
    chosen = torch.bincount(drawn, minlength=schedule.num_timesteps).double()
    return torch.where(landings > 0, chosen / landings.clamp(min=1), torch.zeros_like(landings))


@dataclass(frozen=True, eq=False)
class LandingTable:
    """Where inversion lands for every conditioning timestep, and what that does to a target taken at t.

    τ_measured = leak·x_0 + spread·τ_true, leak = (√ᾱ_L − √ᾱ_t)/√(1−ᾱ_t), spread = √(1−ᾱ_L)/√(1−ᾱ_t).
    """

    timestep: Int[Tensor, " T"]
    landing: Int[Tensor, " T"]
    leak: Float[Tensor, " T"]
    spread: Float[Tensor, " T"]


def landing_table(schedule: Schedule, config: InversionConfig) -> LandingTable:
    """The landing of every drawable timestep under a config: exact grids give leak 0 and spread 1."""
    t = _drawable(schedule, config)
    landing = make_grid(schedule, t, config).landing
    leak = (schedule.signal[landing] - schedule.signal[t]) / schedule.noise[t]
    return LandingTable(t, landing, leak, schedule.noise[landing] / schedule.noise[t])


def _drawable(schedule: Schedule, config: InversionConfig) -> Tensor:
    fixed = config.grid == "fixed"
    return fixed_grid(schedule, config.num_steps) if fixed else torch.arange(schedule.max_timestep + 1)


def _per_sample(schedule: Schedule, t: Tensor, config: InversionConfig) -> tuple[Tensor, Tensor]:
    """K = ⌈N(t+1)/T⌉ moves to b_k = round((t+1)k/K) − 1, the last of which is t itself."""
    length = t + 1
    # No more moves than there are timesteps to land on, or two landings would coincide.
    moves = torch.minimum(-(-config.num_steps * length // schedule.num_timesteps), length)
    k = torch.arange(1, int(moves.max()) + 1)
    target = _round_half_up(length[:, None] * k, moves[:, None]) - 1
    return torch.minimum(target, t[:, None]), moves


def _fixed(schedule: Schedule, t: Tensor, config: InversionConfig) -> tuple[Tensor, Tensor]:
    grid = fixed_grid(schedule, config.num_steps)
    if not torch.isin(t, grid).all():
        raise ValueError(
            f"with grid='fixed' timesteps must come from {grid.tolist()}; draw them with draw_timesteps(…, config)"
        )
    moves = torch.searchsorted(grid, t) + 1
    return grid[: int(moves.max())].expand(len(t), -1), moves


def _official_grid(schedule: Schedule, t: Tensor, config: InversionConfig) -> Grid:
    """1 + Δ·(k−2) → 1 + Δ·(k−1) for every source below t, the network told the source, level ᾱ_0 for negative ones."""
    if schedule.prediction_type != "epsilon":
        raise ValueError(
            f"the published scripts handle ε models only, not {schedule.prediction_type!r}; use compat=None"
        )
    stride = schedule.num_timesteps // config.num_steps
    source = _OFFICIAL_OFFSET + stride * (torch.arange(config.num_steps) - 1)
    moves = (source < t[:, None]).sum(1)
    source = source[: int(moves.max())].expand(len(t), -1)
    return Grid(source.clamp(min=0), source + stride, source, source, moves)


def _round_half_up(numerator: Tensor, denominator: Tensor) -> Tensor:
    """round(numerator/denominator) for non-negative integers, exactly."""
    return (2 * numerator + denominator) // (2 * denominator)
