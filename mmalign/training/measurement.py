"""One batch of pairs through policy and reference: where the log-ratios of a denoiser come from.

Shapes: B pairs; S sides, laid out [chosen…, rejected…] (or [chosen…] alone, for supervised fine-tuning), S·B rows.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from mmalign.denoisers import Conditioning, Denoiser
from mmalign.likelihood import draws
from mmalign.likelihood.config import InversionConfig
from mmalign.likelihood.denoising import (
    DenoisingPoint,
    forward_points,
    output_space_scale,
    pair_log_probs,
    prediction_error,
)
from mmalign.likelihood.inversion import invert
from mmalign.likelihood.reference import Reference
from mmalign.losses import PairLogProbs


@dataclass(frozen=True, eq=False)
class Pairs:
    """A batch: latents of the sides (S·B, C, h, w), conditioning (S·B), row ids (B,) and strengths (B,)."""

    x0: Float[Tensor, "S*B C h w"]
    conditioning: Conditioning
    rows: Int[Tensor, "B"]
    strength: Float[Tensor, "B"]

    @property
    def sides(self) -> int:
        """2 for pairs, 1 where only the preferred side is trained on."""
        return len(self.x0) // len(self.rows)


@dataclass(frozen=True, eq=False)
class Draws:
    """The keyed draws of a batch: timesteps (B,) and what generates noise for each side, preferred sides first."""

    timestep: Int[Tensor, "B"]
    noise: list[torch.Generator]
    inversion: list[torch.Generator]


@dataclass(frozen=True, eq=False)
class Measurement:
    """Errors of policy (m) and reference (r) on one point a side, and for pairs the log-probabilities made of them."""

    logps: PairLogProbs | None
    policy_error: Float[Tensor, "S*B"]
    reference_error: Float[Tensor, "S*B"] | None
    point: DenoisingPoint
    rejected_scale: Float[Tensor, "B"] | None


def draw(
    rows: Int[Tensor, "B"], *, seed: int, epoch: int, max_timestep: int, share_noise: bool, share_eta_noise: bool
) -> Draws:
    """Timesteps and generators keyed by (seed, epoch, row); both sides of a pair share the timestep."""
    ids = rows.tolist()
    timestep = draws.randint(draws.row_generators(seed, epoch, ids, "timestep"), 0, max_timestep + 1)
    second = "noise" if share_noise else "noise of the rejected side"
    noise = draws.row_generators(seed, epoch, ids, "noise") + draws.row_generators(seed, epoch, ids, second)
    inversion = draws.row_generators(seed, epoch, ids, "inversion")
    if not share_eta_noise:
        inversion = inversion + draws.row_generators(seed, epoch, ids, "inversion of the rejected side")
    return Draws(timestep, noise, inversion)


def dropped_prompts(rows: Int[Tensor, "B"], *, seed: int, epoch: int, share: float) -> Tensor:
    """Which pairs lose their prompt (B,), one decision a pair."""
    return draws.rand(draws.row_generators(seed, epoch, rows.tolist(), "prompt dropout")) < share


def measure(
    denoiser: Denoiser,
    policy: Callable[..., Tensor],
    network: nn.Module,
    reference: Reference,
    pairs: Pairs,
    drawn: Draws,
    *,
    inversion: InversionConfig | None,
    inversion_by_reference: bool = False,
    loss_space: Any = None,
    sdpo_mu: float | None = None,
    autocast: Callable[[], AbstractContextManager] = nullcontext,
) -> Measurement:
    """Noises or inverts every side to the drawn timesteps and compares policy and reference on the same points.

    `policy(x_t, t, conditioning)` carries gradient (and may be wrapped for several processes); `network` is the bare module
    behind it, called without gradient for inversion. Policy and reference run in the same dtype and autocast context.
    """
    t = drawn.timestep.repeat(pairs.sides).to(pairs.x0.device)
    point = _points(denoiser, network, reference, pairs, t, drawn, inversion, inversion_by_reference, autocast)
    reference_prediction = None
    if reference.kind != "none":
        with reference.model(network) as frozen, autocast():
            reference_prediction = denoiser.predict(frozen, point.x_t, t, pairs.conditioning)
    with autocast():
        prediction = policy(point.x_t, t, pairs.conditioning)

    def error(output: Tensor) -> Tensor:
        return prediction_error(output, point.x_t, point.target, t, denoiser.schedule, loss_space)

    policy_error = error(prediction)
    reference_error = None if reference_prediction is None else error(reference_prediction)
    scale = None
    if sdpo_mu is not None:
        scale = output_space_scale(
            prediction, point.x_t, point.target, t, denoiser.schedule, mu=sdpo_mu, loss_space=loss_space
        )
    logps = pair_log_probs(policy_error, reference_error) if pairs.sides == 2 else None
    return Measurement(logps, policy_error, reference_error, point, scale)


@torch.no_grad()
def _points(
    denoiser: Denoiser,
    network: nn.Module,
    reference: Reference,
    pairs: Pairs,
    t: Tensor,
    drawn: Draws,
    inversion: InversionConfig | None,
    by_reference: bool,
    autocast: Callable[[], AbstractContextManager],
) -> DenoisingPoint:
    if inversion is None:
        noise = draws.randn(drawn.noise[: len(pairs.x0)], pairs.x0.shape[1:], pairs.x0.dtype, pairs.x0.device)
        return forward_points(denoiser.schedule, pairs.x0, t, noise)
    with reference.model(network) if by_reference else nullcontext(network) as inverter, autocast():

        def predict(x: Tensor, time: Tensor, active: Tensor) -> Tensor:
            return denoiser.predict(inverter, x, time, pairs.conditioning[active])

        generators: Sequence[torch.Generator] | None = drawn.inversion[: len(pairs.x0)] if inversion.eta > 0 else None
        inverted = invert(predict, denoiser.schedule, pairs.x0, t, inversion, generators)
    return DenoisingPoint(inverted.x_t, inverted.target, t)
