"""Inversion: from a clean latent to the noised latent from which the model itself would have drawn it.

The state is kept as u = x_0 + acc in the schedule's rescaled coordinates (denoisers/schedule.py), where a move from
level λ_a to λ_b adds (λ_b − λ_a)·e to acc, e being the predicted direction (ε for VP, v for flow). The regression
target of the loss is therefore acc/λ_t, the level-weighted average of the model's own predictions along the path: a
running sum, never a difference of two nearly equal latents. Shapes: B rows, n ≤ B rows still under way.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mmalign.denoisers.schedule import Schedule, precise, rows_like
from mmalign.likelihood import draws
from mmalign.likelihood.config import InversionConfig
from mmalign.likelihood.grids import Grid, make_grid

Predict = Callable[[Tensor, Tensor, Tensor], Tensor]
"""predict(x (n, …), t (n,), active_index (n,)) → raw model output (n, …); active_index says which rows of the batch."""


@dataclass(frozen=True, eq=False)
class PathPoint:
    """One landing on the way: a valid training point of the rows that came by."""

    x_t: Float[Tensor, "n ..."]
    target: Float[Tensor, "n ..."]
    timestep: Int[Tensor, " n"]
    rows: Int[Tensor, " n"]


@dataclass(frozen=True, eq=False)
class Inversion:
    """The noised latent, its regression target (τ for VP, v̄ for flow) and the timestep both belong to.

    landing equals timestep except under compat; moves (B,) and num_calls (network calls of the batch) tell the cost.
    path holds every landing in order when it was asked for.
    """

    x_t: Float[Tensor, "B ..."]
    target: Float[Tensor, "B ..."]
    timestep: Int[Tensor, " B"]
    landing: Int[Tensor, " B"]
    moves: Int[Tensor, " B"]
    num_calls: int
    path: tuple[PathPoint, ...] = ()


@dataclass(frozen=True, eq=False)
class RoundTrip:
    """An inversion sampled back with the same grid, and how far from the start it came: RMSE and PSNR (dB), (B,)."""

    inversion: Inversion
    reconstruction: Float[Tensor, "B ..."]
    rmse: Float[Tensor, " B"]
    psnr: Float[Tensor, " B"]


@torch.no_grad()
def invert(
    predict: Predict,
    schedule: Schedule,
    x0: Float[Tensor, "B ..."],
    t: Int[Tensor, " B"],
    config: InversionConfig,
    generators: Sequence[torch.Generator] | None = None,
    *,
    keep_path: bool = False,
) -> Inversion:
    """Walk x_0 up its grid to t: acc += (λ_b − λ_a)·e for every move, x_t = scale_t·(x_0 + acc), target = acc/λ_t.

    DDIM inversion for R = 0 (DDIM-InPO, arXiv:2503.18454), ReNoise for R ≥ 1 (SmPO, arXiv:2506.02698); flow models take
    Euler moves of dx/dσ = v. The network is told each move's target timestep. Rows that have arrived are not computed
    again. eta > 0 needs one generator a row (a pair, with share_eta_noise). Everything returned is in float32, or in
    float64 for float64 latents.
    """
    if config.eta > 0:
        _check_noise(schedule, x0, t, config, generators)
    if keep_path and config.compat is not None:
        raise ValueError("keep_path needs exact landings: a compat grid's targets belong to another timestep")
    grid = make_grid(schedule, t, config)
    start = _start(schedule, x0, config)
    acc, path, calls = torch.zeros_like(start), [], 0
    for move in _moves(grid, schedule, start):
        u = start[move.rows] + acc[move.rows]
        direction, made = _direction(predict, schedule, u, move, config)
        calls += made
        acc[move.rows] += _step(direction, move, config, generators, len(x0))
        if keep_path:
            landed = move.scale_b * (start[move.rows] + acc[move.rows])
            path.append(PathPoint(landed, acc[move.rows] / move.level_b, move.target, move.rows))
    landing = grid.landing.to(start.device)
    x_t = rows_like(schedule.scale(landing), start) * (start + acc)
    timestep = t.to(start.device)
    if config.compat is None:
        target = acc / rows_like(schedule.level(timestep), start)
    else:
        target = _official_target(schedule, precise(x0), x_t, timestep, config)
    return Inversion(x_t, target, timestep, landing, grid.moves.to(start.device), calls, tuple(path))


@torch.no_grad()
def reconstruct(
    predict: Predict,
    schedule: Schedule,
    x_t: Float[Tensor, "B ..."],
    t: Int[Tensor, " B"],
    config: InversionConfig,
) -> Float[Tensor, "B ..."]:
    """Sample back from x_t over the grid that led to it: DDIM (VP) or Euler (flow), u ← u − (λ_b − λ_a)·e(x_b, b)."""
    grid = make_grid(schedule, t, config)
    u = precise(x_t) / rows_like(schedule.scale(grid.landing), x_t)
    for move in reversed(_moves(grid, schedule, u)):
        x_b = move.scale_b * u[move.rows]
        direction = schedule.to_direction(predict(x_b, move.target, move.rows), x_b, move.target)
        u[move.rows] -= (move.level_b - move.level_a) * direction
    return u * rows_like(schedule.scale(grid.source[:, 0]), u)


def round_trip(
    predict: Predict,
    schedule: Schedule,
    x0: Float[Tensor, "B ..."],
    t: Int[Tensor, " B"],
    config: InversionConfig,
    generators: Sequence[torch.Generator] | None = None,
    *,
    data_range: float | None = None,
) -> RoundTrip:
    """Invert, sample back, compare. data_range is PSNR's peak-to-peak value; None takes each row's own."""
    inversion = invert(predict, schedule, x0, t, config, generators)
    back = reconstruct(predict, schedule, inversion.x_t, t, config)
    flat = precise(x0).flatten(1)
    rmse = (back.flatten(1) - flat).square().mean(1).sqrt()
    peak = flat.amax(1) - flat.amin(1) if data_range is None else torch.full_like(rmse, data_range)
    return RoundTrip(inversion, back, rmse, 20 * torch.log10(peak / rmse))


@dataclass(frozen=True, eq=False)
class _Move:
    """One move of the rows under way; levels and scales broadcast over their latents."""

    rows: Tensor
    target: Tensor
    first: Tensor
    later: Tensor
    level_a: Tensor
    level_b: Tensor
    scale_a: Tensor
    scale_b: Tensor


def _moves(grid: Grid, schedule: Schedule, like: Tensor) -> list[_Move]:
    """The grid move by move, on like's device: each table is sent there once, since every copy waits for the network."""
    active = torch.arange(grid.target.shape[1]) < grid.moves[:, None]
    k, rows = active.T.nonzero(as_tuple=True)
    source, target = grid.source[rows, k], grid.target[rows, k]
    indices = (rows, target, grid.first[rows, k], grid.later[rows, k])
    reals = (schedule.level(source), schedule.level(target), schedule.scale(source), schedule.scale(target))
    tables = [index.to(like.device) for index in indices] + [rows_like(real, like) for real in reals]
    counts = active.sum(0).tolist()
    return [_Move(*parts) for parts in zip(*(table.split(counts) for table in tables), strict=True)]


def _start(schedule: Schedule, x0: Tensor, config: InversionConfig) -> Tensor:
    """u at the data: x_0 itself, or x_0/√ᾱ_0 where the released scripts take the data for a sample at t = 0."""
    return precise(x0) if config.compat is None else precise(x0) / float(schedule.signal[0])


def _direction(
    predict: Predict, schedule: Schedule, u: Tensor, move: _Move, config: InversionConfig
) -> tuple[Tensor, int]:
    """e of one move: predict at the source state, correct R times at the estimated target, combine."""

    def call(x: Tensor, time: Tensor) -> Tensor:
        return schedule.to_direction(predict(x, time, move.rows), x, time)

    estimates = [call(move.scale_a * u, move.first)]
    for _ in range(1 if config.solver == "heun" else config.renoise_steps):
        estimates.append(call(move.scale_b * (u + (move.level_b - move.level_a) * estimates[-1]), move.later))
    if config.combine == "last":
        return estimates[-1], len(estimates)
    used = estimates[1:] if config.combine == "mean_refined" else estimates
    return torch.stack(used).mean(0), len(estimates)


def _step(
    direction: Tensor,
    move: _Move,
    config: InversionConfig,
    generators: Sequence[torch.Generator] | None,
    batch: int,
) -> Tensor:
    """What a move adds to acc. With η: (λ_b·√(1−r²) − λ_a)·e + r·λ_b·n, or (λ_b − λ_a)·e + η·√(V/ᾱ_b)·n as released.

    r = η·√((1 − ᾱ_b/ᾱ_a)/(1−ᾱ_b)) makes the move the Bayes inverse of DDIM-η; V = (1−ᾱ_a)/(1−ᾱ_b)·(1 − ᾱ_b/ᾱ_a).
    """
    if config.eta == 0 or generators is None:
        return (move.level_b - move.level_a) * direction
    noise = _noise(direction, move.rows, config, generators, batch)
    alpha_a, alpha_b = move.scale_a**2, move.scale_b**2
    # λ_b² − λ_a² = (1 − ᾱ_b/ᾱ_a)/ᾱ_b, without the cancellation of 1 − ᾱ_b/ᾱ_a.
    gained = (move.level_b - move.level_a) * (move.level_b + move.level_a)
    if config.eta_form == "published":
        variance = (1 - alpha_a) / (1 - alpha_b) * gained
        return (move.level_b - move.level_a) * direction + config.eta * variance.sqrt() * noise
    share = config.eta**2 * gained / move.level_b**2
    return (move.level_b * (1 - share).clamp(min=0).sqrt() - move.level_a) * direction + (
        share.sqrt() * move.level_b * noise
    )


def _noise(
    like: Tensor, rows: Tensor, config: InversionConfig, generators: Sequence[torch.Generator], batch: int
) -> Tensor:
    """Each active row draws from its own generator only: its stream does not depend on who else is under way."""
    shape, active = like.shape[1:], rows.tolist()
    if not config.share_eta_noise:
        return draws.randn([generators[row] for row in active], shape, like.dtype, like.device)
    # Both sides have the same timestep and so the same moves: the active rows are mirrored.
    chosen = draws.randn([generators[row] for row in active if row < batch // 2], shape, like.dtype, like.device)
    return torch.cat([chosen, chosen])


def _check_noise(
    schedule: Schedule,
    x0: Tensor,
    t: Tensor,
    config: InversionConfig,
    generators: Sequence[torch.Generator] | None,
) -> None:
    if schedule.is_flow:
        raise ValueError("eta is defined for variance-preserving models; set eta=0 for a flow model")
    needed = len(x0) // 2 if config.share_eta_noise else len(x0)
    if generators is None or len(generators) != needed:
        given = "none" if generators is None else len(generators)
        raise ValueError(f"eta > 0 needs {needed} generators for {len(x0)} latents, got {given}")
    if config.share_eta_noise and (len(x0) % 2 or not torch.equal(*t.chunk(2))):
        raise ValueError("share_eta_noise needs [chosen…, rejected…] with the same timestep on both sides of a pair")


def _official_target(schedule: Schedule, x0: Tensor, x_t: Tensor, t: Tensor, config: InversionConfig) -> Tensor:
    """τ = (x_L − √ᾱ_t·x_0)/√(1−ᾱ_t), taken at the conditioning timestep although x stands at L."""
    alpha_bar = schedule.signal.to(t.device)[t] ** 2
    if config.fp16_alphas:
        alpha_bar = alpha_bar.half()
    signal, noise = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
    return (x_t - rows_like(signal, x_t) * x0) / rows_like(noise, x_t)
