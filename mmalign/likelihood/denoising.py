"""A denoiser's log-ratio: excess squared errors of policy and reference on the same noised latent.

The surrogate of log π(x_0|c) is −½·m, m the MEAN over C, H, W of the squared error at one (t, noise) (Diffusion-DPO,
arXiv:2311.12908, in the convention of its code; the paper sums). Shapes: B rows, or N = 2B rows of B pairs laid out as
[chosen…, rejected…].
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mmalign.denoisers.schedule import LossSpace, Schedule, precise, rows_like
from mmalign.losses import PairLogProbs


@dataclass(frozen=True, eq=False)
class DenoisingPoint:
    """A noised latent with its regression target, a direction (ε for VP, v for flow), and its timestep."""

    x_t: Float[Tensor, "B ..."]
    target: Float[Tensor, "B ..."]
    timestep: Int[Tensor, " B"]


def forward_points(
    schedule: Schedule, x0: Float[Tensor, "B ..."], t: Int[Tensor, " B"], noise: Float[Tensor, "B ..."]
) -> DenoisingPoint:
    """Forward noising q(x_t|x_0): the target is the noise (VP) or n − x_0 (flow)."""
    return DenoisingPoint(schedule.add_noise(x0, noise, t), schedule.target(x0, noise, t), t)


def landing_points(
    schedule: Schedule, x0: Float[Tensor, "B ..."], target: Float[Tensor, "B ..."], t: Int[Tensor, " B"]
) -> DenoisingPoint:
    """The point that an exact landing's target belongs to: x_t = scale_t · (x_0 + λ_t · target), VP and flow alike."""
    level, scale = rows_like(schedule.level(t), x0), rows_like(schedule.scale(t), x0)
    return DenoisingPoint(scale * (precise(x0) + level * precise(target)), precise(target), t)


def mean_squared_error(prediction: Float[Tensor, "B ..."], target: Float[Tensor, "B ..."]) -> Float[Tensor, " B"]:
    """Mean over everything but the row of (prediction − target)², in float32 or better."""
    return (precise(prediction) - precise(target)).square().flatten(1).mean(1)


def prediction_error(
    prediction: Float[Tensor, "B ..."],
    x_t: Float[Tensor, "B ..."],
    target: Float[Tensor, "B ..."],
    t: Int[Tensor, " B"],
    schedule: Schedule,
    loss_space: LossSpace | None = None,
) -> Float[Tensor, " B"]:
    """Mean squared error of a raw model output against a direction target (τ or v̄), measured in loss_space.

    VP: ‖ε_θ − τ‖² in "epsilon", ‖v_θ − v_τ‖² = ‖ε_θ − τ‖²/ᾱ_t in "velocity", whatever the model predicts.
    Flow: ‖v_θ − v̄‖² in "velocity", (1−σ_t)²·‖v_θ − v̄‖² in "epsilon". None is the schedule's own: ε for VP, velocity
    for flow.
    """
    error = mean_squared_error(schedule.to_direction(prediction, x_t, t), target)
    loss_space = loss_space or schedule.loss_space
    if loss_space == schedule.loss_space:
        return error
    alpha_bar = rows_like(schedule.signal.to(t.device)[t] ** 2, error)
    return error / alpha_bar if loss_space == "velocity" else error * alpha_bar


def excess_errors(
    policy_pred: Float[Tensor, "B ..."],
    reference_pred: Float[Tensor, "B ..."],
    x_t: Float[Tensor, "B ..."],
    target: Float[Tensor, "B ..."],
    t: Int[Tensor, " B"],
    schedule: Schedule,
    loss_space: LossSpace | None = None,
) -> tuple[Float[Tensor, " B"], Float[Tensor, " B"]]:
    """(m, r): the errors of policy and reference on the same point; r carries no gradient."""
    m = prediction_error(policy_pred, x_t, target, t, schedule, loss_space)
    r = prediction_error(reference_pred.detach(), x_t, target, t, schedule, loss_space)
    return m, r


def pair_log_probs(m: Float[Tensor, " N"], r: Float[Tensor, " N"] | None) -> PairLogProbs:
    """Errors of [chosen…, rejected…] as log-likelihood surrogates −½·m and −½·r; r is None without a reference."""
    chosen, rejected = (-0.5 * m).chunk(2)
    if r is None:
        return PairLogProbs(chosen, rejected, None, None)
    return PairLogProbs(chosen, rejected, *(-0.5 * r).chunk(2))


@torch.no_grad()
def output_space_scale(
    policy_pred: Float[Tensor, "N ..."],
    x_t: Float[Tensor, "N ..."],
    target: Float[Tensor, "N ..."],
    t: Int[Tensor, " N"],
    schedule: Schedule,
    *,
    mu: float,
    loss_space: LossSpace | None = None,
) -> Float[Tensor, " B"]:
    """λ = min(1, (1−μ)·‖g_w‖²/⟨g_l, g_w⟩) where ⟨g_l, g_w⟩ > 0, else 1: the share of the loser's gradient to keep.

    Diffusion-SDPO's safeguard, g the gradients of the errors with respect to the network's outputs: with it a
    first-order step lowers the winner's error by at least μ of what the winner's gradient alone would. (B,).
    """
    residual = schedule.to_direction(policy_pred, x_t, t) - precise(target)
    signal, model_is_velocity = schedule.signal.to(t.device)[t], schedule.prediction_type != "epsilon"
    space = loss_space or schedule.loss_space
    # d(error)/d(output) = 2·residual times one factor a row, from the error's space and from the output's.
    factor = torch.ones_like(signal)
    if space != schedule.loss_space:
        factor = signal**-2 if space == "velocity" else signal**2
    if model_is_velocity and not schedule.is_flow:
        factor = factor * signal
    winner, loser = (residual * rows_like(factor, residual)).flatten(1).chunk(2)
    agreement = (winner * loser).sum(1)
    safe = (1 - mu) * winner.square().sum(1) / torch.where(agreement > 0, agreement, torch.ones_like(agreement))
    return torch.where(agreement > 0, safe.clamp(max=1), torch.ones_like(agreement))
