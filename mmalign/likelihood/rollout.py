"""Reward fine-tuning: what a picture's reward says to the few denoising steps that are trained (DRTune, arXiv:2405.00760).

In the coordinates of denoisers/schedule.py a step is u' = u + (λ' − λ)·d, DDIM for VP and Euler for flow, with d the network's
direction on an input that is detached. The last step's λ' is 0. The picture is therefore linear in every d_k:

    ∂x̂_0/∂d_k = λ_{k+1} − λ_k    for "ode";    −λ_k · Π_{j>k} scale_j    for "renoise" (each step to x̂_0, then fresh noise, as LCM)

so that L's gradient is Σ_k ∂⟨w_k·∂L/∂x̂_0, d_k⟩: one pass with gradient through VAE and reward, then one through the network at a
time. `exact_losses` does that; `graph_losses` differentiates the whole sampler, for comparison.
Shapes: B rows, N steps, K of them trained, each row its own.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mmalign.denoisers.schedule import Schedule, precise, rows_like
from mmalign.likelihood import draws

Predict = Callable[[Tensor, Tensor, Tensor, bool], Tensor]
"""predict(x (n, …), t (n,), row (n,), conditioned) → raw model output (n, …); conditioned False: of the empty prompt."""

Score = Callable[[Tensor], Tensor]
"""score(x̂_0 (B, …)) → loss (B,), with gradient; row b's reads row b alone."""


@dataclass(frozen=True, kw_only=True)
class RolloutConfig:
    """How pictures are drawn in training, and which steps get the reward's gradient.

    num_steps        N, at equal distances over the schedule from its end
    grad_steps       K: every (N/K)th step from a random offset; K = N trains all
    guidance_scale   classifier-free guidance, inside the gradient; 1 draws without
    grad_cond_only   no gradient through the empty prompt's branch
    grad_uncond_only   none through the prompt's: another network may predict there
    solver           "ode": DDIM or Euler; "renoise": LCM, x̂_0 at every step and fresh noise
    weights          "raw": the true gradient; "normalised": every trained step of a row counts the same, in sum as the raw ones do
    """

    num_steps: int = 50
    grad_steps: int = 5
    guidance_scale: float = 7.5
    grad_cond_only: bool = False
    grad_uncond_only: bool = False
    solver: Literal["ode", "renoise"] = "ode"
    weights: Literal["raw", "normalised"] = "raw"

    def __post_init__(self) -> None:
        problems = {
            f"solver must be 'ode' or 'renoise', got {self.solver!r}": self.solver not in ("ode", "renoise"),
            f"weights must be 'raw' or 'normalised', got {self.weights!r}": self.weights not in ("raw", "normalised"),
            f"grad_steps must divide num_steps, got {self.grad_steps} and {self.num_steps}": self.num_steps < 1
            or self.grad_steps < 1
            or self.num_steps % self.grad_steps > 0,
            "guidance_scale must be at least 1": not self.guidance_scale >= 1,
            "grad_cond_only has no effect at guidance_scale 1": self.grad_cond_only and self.guidance_scale == 1,
            "grad_uncond_only needs a guidance_scale above 1: without it there is no such branch": self.grad_uncond_only
            and self.guidance_scale == 1,
            "grad_cond_only and grad_uncond_only leave nothing to train: give one of them": self.grad_cond_only
            and self.grad_uncond_only,
        }
        for message, violated in problems.items():
            if violated:
                raise ValueError(message)

    @property
    def stride(self) -> int:
        """Steps from one trained step to the next, and how many offsets there are."""
        return self.num_steps // self.grad_steps


@dataclass(frozen=True, eq=False)
class Start:
    """Where a rollout begins: x_T (B, …), the first trained step of every row, and for "renoise" the noise of every later step."""

    noise: Float[Tensor, "B ..."]
    offset: Int[Tensor, " B"]
    renoise: tuple[Tensor, ...] = ()


@dataclass(frozen=True, eq=False)
class Rollout:
    """The picture's latent, and of every trained step k its input, timestep and weight w_k, row by row."""

    x0: Float[Tensor, "B ..."]
    inputs: tuple[Float[Tensor, "B ..."], ...]
    timesteps: Int[Tensor, "K B"]
    weights: Float[Tensor, "K B"]


def draw_start(
    seed: int,
    epoch: int,
    rows: Sequence[int],
    shape: Sequence[int],
    config: RolloutConfig,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Start:
    """Keyed by (seed, epoch, row): a row's picture and its trained steps do not depend on its batch."""
    offset = draws.randint(draws.row_generators(seed, epoch, rows, "offset"), 0, config.stride)
    generators = draws.row_generators(seed, epoch, rows, "rollout")
    number = config.num_steps if config.solver == "renoise" else 1
    noise, *renoise = (draws.randn(generators, shape, dtype, device) for _ in range(number))
    return Start(noise, offset, tuple(renoise))


def timesteps(schedule: Schedule, config: RolloutConfig) -> Int[Tensor, " N"]:
    """From the schedule's last timestep down, 999, 979, … 19 for 50 of 1000."""
    top = schedule.max_timestep + 1
    if config.num_steps > top:
        raise ValueError(f"num_steps must lie in 1 … {top}, got {config.num_steps}")
    return top - 1 - torch.arange(config.num_steps) * top // config.num_steps


def step_weights(schedule: Schedule, config: RolloutConfig) -> Float[Tensor, " N"]:
    """∂x̂_0/∂d_k of every step, in float64."""
    t = timesteps(schedule, config)
    level = schedule.level(t).cpu()
    if config.solver == "ode":
        return torch.cat([level[1:], level.new_zeros(1)]) - level
    # What becomes of x̂_0 in the steps after it: multiplied by the signal of a flow, kept in VP's coordinates.
    kept = schedule.signal.cpu()[t] if schedule.is_flow else torch.ones_like(level)
    later = torch.cat([kept[1:].flip(0).cumprod(0).flip(0), kept.new_ones(1)])
    return -level * later


def rollout(predict: Predict, schedule: Schedule, start: Start, config: RolloutConfig) -> Rollout:
    """Draws without gradient and keeps the K inputs of every row: memory of one network call and K latents."""
    inputs = tuple(torch.empty_like(precise(start.noise)) for _ in range(config.grad_steps))

    def keep(x: Tensor, t: Tensor, k: int) -> None:
        mine = (start.offset == k % config.stride).to(x.device)
        inputs[k // config.stride][mine] = x[mine]

    with torch.no_grad():
        x0 = _drawn(predict, schedule, start, config, keep)
    steps = torch.arange(config.grad_steps)[:, None] * config.stride + start.offset.cpu()
    weights = step_weights(schedule, config)[steps]
    if config.weights == "normalised":
        weights = weights.mean(0, keepdim=True).expand_as(weights)
    return Rollout(x0, inputs, timesteps(schedule, config)[steps], weights)


def exact_losses(
    predict: Predict,
    schedule: Schedule,
    start: Start,
    config: RolloutConfig,
    score: Score,
    parameters: Sequence[nn.Parameter],
) -> Float[Tensor, " B"]:
    """The losses of the drawn pictures, whose gradient reaches `parameters` step by step: memory of one network call.

    The network's random state must be the same in both passes: no dropout. Nothing but `parameters` gets a gradient.
    """
    drawn = rollout(predict, schedule, start, config)
    if not torch.is_grad_enabled():
        return score(drawn.x0)
    leaf = drawn.x0.requires_grad_(True)
    losses = score(leaf)
    (towards,) = torch.autograd.grad(losses.sum(), leaf)
    trained = [parameter for parameter in parameters if parameter.requires_grad]

    # Guidance is linear too, so that its branches need not stand in memory together.
    branches = [(k, *branch) for k in range(config.grad_steps) for branch in trained_branches(config)]

    def replay(place: int, outer: Tensor) -> Tensor:
        k, conditioned, share = branches[place]
        x, t = drawn.inputs[k], drawn.timesteps[k].to(outer.device)
        direction = schedule.to_direction(predict(x, t, torch.arange(len(x), device=x.device), conditioned), x, t)
        weight = rows_like(share * drawn.weights[k].to(outer.device) * outer, direction)
        return (weight * towards.to(direction) * direction).sum()

    return _StepByStep.apply(losses.detach(), replay, len(branches), *trained)


def trained_branches(config: RolloutConfig) -> list[tuple[bool, float]]:
    """(conditioned, its share of the guided direction) of every branch with a gradient."""
    bound, free = (True, config.guidance_scale), (False, 1 - config.guidance_scale)
    if config.grad_uncond_only:
        return [free]
    return [bound] if config.guidance_scale == 1 or config.grad_cond_only else [bound, free]


class _StepByStep(torch.autograd.Function):
    """The identity on losses; backward makes, uses and frees one step's graph after the other."""

    @staticmethod
    def forward(ctx: Any, losses: Tensor, replay: Any, steps: int, *parameters: nn.Parameter) -> Tensor:
        ctx.replay, ctx.steps, ctx.parameters = replay, steps, parameters
        return losses.clone()

    @staticmethod
    def backward(ctx: Any, outer: Tensor) -> tuple[Any, ...]:
        sums: list[Tensor | None] = [None] * len(ctx.parameters)
        for k in range(ctx.steps):
            with torch.enable_grad():
                surrogate = ctx.replay(k, outer)
            for place, gradient in enumerate(torch.autograd.grad(surrogate, ctx.parameters, allow_unused=True)):
                if gradient is not None:
                    before = sums[place]
                    sums[place] = gradient if before is None else before + gradient
        return None, None, None, *sums


def graph_losses(
    predict: Predict,
    schedule: Schedule,
    start: Start,
    config: RolloutConfig,
    score: Score,
    *,
    checkpointed: bool = True,
) -> Float[Tensor, " B"]:
    """The same losses with the graph of the whole sampler, as published: K network calls in memory, or K checkpoints.

    ValueError for weights other than "raw", which are no gradient of a sampler.
    """
    if config.weights != "raw":
        raise ValueError(f"weights={config.weights!r} is no gradient of a sampler: use exact_losses")

    def trained(x: Tensor, t: Tensor, k: int) -> Tensor | None:
        mine = start.offset.to(x.device) == k % config.stride
        if not mine.any():
            return None

        def direction(x: Tensor) -> Tensor:
            return _guided(predict, schedule, x, t, config)

        moved = checkpoint(direction, x, use_reentrant=False) if checkpointed else direction(x)
        return torch.where(rows_like(mine, moved).bool(), moved, moved.detach())

    return score(_drawn(predict, schedule, start, config, trained))


def _drawn(
    predict: Predict,
    schedule: Schedule,
    start: Start,
    config: RolloutConfig,
    seen: Callable[[Tensor, Tensor, int], Tensor | None],
) -> Tensor:
    """x̂_0. `seen` gets every step's detached input, and may give the direction, with gradient."""
    u = precise(start.noise)
    rows, levels = len(u), schedule.level(timesteps(schedule, config)).tolist()
    for k, t in enumerate(timesteps(schedule, config).tolist()):
        step = torch.full((rows,), t, device=u.device)
        scale = rows_like(schedule.scale(step), u)
        if k == 0:
            # x_T is noise alone, which is how samplers begin.
            u = u / scale
        x = (u * scale).detach()
        direction = seen(x, step, k)
        if direction is None:
            with torch.no_grad():
                direction = _guided(predict, schedule, x, step, config)
        last = k == config.num_steps - 1
        if config.solver == "ode":
            u = u + ((0.0 if last else levels[k + 1]) - levels[k]) * direction
            continue
        u = u - levels[k] * direction
        if not last:
            kept = 1 - levels[k + 1] if schedule.is_flow else 1.0
            u = kept * u + levels[k + 1] * start.renoise[k].to(u)
    return u


def _guided(predict: Predict, schedule: Schedule, x: Tensor, t: Tensor, config: RolloutConfig) -> Tensor:
    """The direction at (x, t) under guidance."""
    rows, scale = torch.arange(len(x), device=x.device), config.guidance_scale
    trained = {conditioned for conditioned, _ in trained_branches(config)}

    def branch(conditioned: bool) -> Tensor:
        with torch.set_grad_enabled(torch.is_grad_enabled() and conditioned in trained):
            return schedule.to_direction(predict(x, t, rows, conditioned), x, t)

    if scale == 1:
        return branch(True)
    free = branch(False)
    return free + scale * (branch(True) - free)
