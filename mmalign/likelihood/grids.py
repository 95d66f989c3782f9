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
    target, moves = (_strided if config.grid == "strided" else _per_sample)(schedule, t, config)
    source = torch.cat([torch.full_like(target[:, :1], -1), target[:, :-1]], dim=1)
    # The data have no timestep of their own; 0 is the nearest one a network knows.
    first = source.clamp(min=0) if config.solver == "heun" else target
    return Grid(source, target, first, target, moves)


def draw_timesteps(
    schedule: Schedule, generators: Sequence[torch.Generator], *, last_stratum_of: int | None = None
) -> Int[Tensor, " B"]:
    """Uniform over the drawable timesteps; with last_stratum_of = N over the last ⌈T/N⌉ of them, (B,).

    A strided grid of N steps from there lands in each of N strata once. The landings of all rows are then uniform over all timesteps,
    to within one timestep a stratum, and need no weights (those of per-sample grids crowd at small timesteps).
    """
    top = schedule.max_timestep + 1
    low = 0 if last_stratum_of is None else top + (-top // last_stratum_of)
    return draws.randint(generators, low, top)


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
    t = torch.arange(schedule.max_timestep + 1)
    landing = make_grid(schedule, t, config).landing
    leak = (schedule.signal[landing] - schedule.signal[t]) / schedule.noise[t]
    return LandingTable(t, landing, leak, schedule.noise[landing] / schedule.noise[t])


def _per_sample(schedule: Schedule, t: Tensor, config: InversionConfig) -> tuple[Tensor, Tensor]:
    """K = ⌈N(t+1)/T⌉ moves to b_k = round((t+1)k/K) − 1, the last of which is t itself."""
    length = t + 1
    # No more moves than there are timesteps to land on, or two landings would coincide.
    moves = torch.minimum(-(-config.num_steps * length // schedule.num_timesteps), length)
    k = torch.arange(1, int(moves.max()) + 1)
    target = _round_half_up(length[:, None] * k, moves[:, None]) - 1
    return torch.minimum(target, t[:, None]), moves


def _strided(schedule: Schedule, t: Tensor, config: InversionConfig) -> tuple[Tensor, Tensor]:
    """Landings t − ⌊jT/N⌋, j = N−1 … 0, those below 0 left out: the same stride from the row's own timestep down."""
    top = schedule.max_timestep + 1
    if config.num_steps > top:
        raise ValueError(f"num_steps must lie in 1 … {top}, got {config.num_steps}")
    landing = t[:, None] - top * torch.arange(config.num_steps) // config.num_steps
    moves = (landing >= 0).sum(1)
    k = torch.arange(int(moves.max()))
    return landing.gather(1, (moves[:, None] - 1 - k).clamp(min=0)), moves


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
