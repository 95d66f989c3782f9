"""One batch of pairs through policy and reference: where the log-ratios of a denoiser come from.

Shapes: B pairs; S sides, laid out [chosen…, rejected…] (or [chosen…] alone, for supervised fine-tuning), S·B rows.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from mmalign.denoisers import Conditioning, Denoiser, Schedule
from mmalign.denoisers.parts import evaluating
from mmalign.denoisers.schedule import LossSpace
from mmalign.likelihood import draws
from mmalign.likelihood.config import InversionConfig
from mmalign.likelihood.denoising import (
    DenoisingPoint,
    forward_points,
    output_space_scale,
    pair_log_probs,
    prediction_error,
)
from mmalign.likelihood.grids import draw_timesteps
from mmalign.likelihood.inversion import Inversion, PathPoint, invert
from mmalign.likelihood.reference import Reference
from mmalign.losses import PairLogProbs


@dataclass(frozen=True, eq=False)
class Pairs:
    """A batch: latents of the sides (S·B, C, h, w), of clips (S·B, C, F, h, w), conditioning (S·B), row ids (B,) and strengths (B,)."""

    x0: Float[Tensor, "S*B C *F h w"]
    conditioning: Conditioning
    rows: list[int]
    strength: Float[Tensor, " B"]

    @property
    def sides(self) -> int:
        """2 for pairs, 1 where only the preferred side is trained on."""
        return len(self.x0) // len(self.rows)

    def take(self, places: list[int]) -> "Pairs":
        """The pairs at these places of the batch, in that order."""
        every = [side * len(self.rows) + place for side in range(self.sides) for place in places]
        return Pairs(self.x0[every], self.conditioning[every], [self.rows[i] for i in places], self.strength[places])


@dataclass(frozen=True, eq=False)
class Draws:
    """The keyed draws of a batch, on the CPU: timesteps (B,) and what generates noise for each side, preferred sides first."""

    timestep: Int[Tensor, " B"]
    noise: list[torch.Generator]
    inversion: list[torch.Generator]

    def take(self, places: list[int]) -> "Draws":
        """Those of the pairs at these places of the batch."""

        def of(generators: list[torch.Generator]) -> list[torch.Generator]:
            size = len(self.timestep)
            return [generators[side * size + i] for side in range(len(generators) // size) for i in places]

        return Draws(self.timestep[places], of(self.noise), of(self.inversion))


@dataclass(frozen=True, eq=False)
class Measurement:
    """Errors of policy (m) and reference (r) on one point a side, and for pairs the log-probabilities made of them.

    `pairs` are those that were measured, `timestep` theirs on the CPU: the batch as it was given or, where every landing of a path
    counts, each of its pairs as often as it landed.
    """

    logps: PairLogProbs | None
    policy_error: Float[Tensor, " S*B"]
    reference_error: Float[Tensor, " S*B"] | None
    point: DenoisingPoint
    pairs: Pairs
    timestep: Int[Tensor, " B"]
    rejected_scale: Float[Tensor, " B"] | None


def draw(
    rows: list[int],
    *,
    seed: int,
    epoch: int,
    schedule: Schedule,
    share_noise: bool,
    share_eta_noise: bool,
    one_timestep: bool = False,
    last_stratum_of: int | None = None,
) -> Draws:
    """Timesteps and generators keyed by (seed, epoch, row); both sides of a pair share the timestep.

    `one_timestep`: the whole batch takes that of its lowest row, for losses that sort the batch, which must not mix noise levels.
    `last_stratum_of`: the timesteps from which a strided grid of so many steps lands once in every stratum.
    """
    keyed = [min(rows)] if one_timestep else rows
    generators = draws.row_generators(seed, epoch, keyed, "timestep")
    timestep = draw_timesteps(schedule, generators, last_stratum_of=last_stratum_of)
    second = "noise" if share_noise else "noise of the rejected side"
    noise = draws.row_generators(seed, epoch, rows, "noise") + draws.row_generators(seed, epoch, rows, second)
    inversion = draws.row_generators(seed, epoch, rows, "inversion")
    if not share_eta_noise:
        inversion = inversion + draws.row_generators(seed, epoch, rows, "inversion of the rejected side")
    return Draws(timestep.expand(len(rows)), noise, inversion)


def dropped_prompts(rows: list[int], *, seed: int, epoch: int, share: float) -> Tensor:
    """Which pairs lose their prompt (B,), one decision a pair."""
    return draws.rand(draws.row_generators(seed, epoch, rows, "prompt dropout")) < share


Landings = Literal["last", "all", "in_turn"]


@dataclass(frozen=True, kw_only=True)
class Method:
    """How log-ratios are measured: latents by forward noise or an inversion (by policy or reference), the space of the error.

    landings: which ones of an inversion are training points: its last one, all of them, or one after the other.
    """

    inversion: InversionConfig | None
    inversion_by_reference: bool = False
    landings: Landings = "last"
    loss_space: LossSpace | None = None
    sdpo_mu: float | None = None


def measure(
    denoiser: Denoiser,
    policy: Callable[..., Tensor],
    network: nn.Module,
    reference: Reference,
    pairs: Pairs,
    drawn: Draws,
    method: Method,
    *,
    schedule: Schedule | None = None,
    autocast: Callable[[], AbstractContextManager] = nullcontext,
    known_point: DenoisingPoint | None = None,
    known_reference: Float[Tensor, " S*B"] | None = None,
) -> Measurement:
    """Noises or inverts every side to the drawn timesteps and compares policy and reference on the same points.

    `policy(x_t, t, conditioning)` carries gradient (and may be wrapped for several processes); `network` is the bare module behind it,
    called without gradient for inversion. Policy and reference run in the same dtype and autocast context. `schedule`: the denoiser's,
    with its tables on the device of the latents, which spares a copy at every use. `known_point`: where to measure, instead of what
    was drawn. `known_reference`: the reference's errors on these very points, from an earlier measurement; it is then not called.
    """
    schedule, timestep = schedule or denoiser.schedule, drawn.timestep
    if known_point is not None:
        point, t = known_point, known_point.timestep
        timestep = t[: len(pairs.rows)].cpu()
    elif method.inversion is None:
        t = timestep.repeat(pairs.sides).to(pairs.x0.device)
        noise = draws.randn(drawn.noise[: len(pairs.x0)], pairs.x0.shape[1:], pairs.x0.dtype, pairs.x0.device)
        point = forward_points(schedule, pairs.x0, t, noise)
    else:
        inverted = _inverted(denoiser, network, reference, pairs, drawn, method, method.inversion, autocast)
        point = DenoisingPoint(inverted.x_t, inverted.target, inverted.timestep)
        if method.landings == "all":
            point, pairs = _every_landing(inverted, pairs)
            timestep = point.timestep[: len(pairs.rows)].cpu()
        t = point.timestep

    def error(output: Tensor) -> Tensor:
        return prediction_error(output, point.x_t, point.target, t, schedule, method.loss_space)

    reference_error = known_reference
    if reference_error is None:
        reference_error = reference_errors(
            denoiser, network, reference, point, pairs.conditioning, schedule, method.loss_space, autocast
        )
    with autocast():
        prediction = policy(point.x_t, t, pairs.conditioning)
    policy_error = error(prediction)
    scale = None
    if method.sdpo_mu is not None:
        scale = output_space_scale(
            prediction, point.x_t, point.target, t, schedule, mu=method.sdpo_mu, loss_space=method.loss_space
        )
    logps = _log_probs(policy_error, reference_error) if pairs.sides == 2 else None
    return Measurement(logps, policy_error, reference_error, point, pairs, timestep, scale)


@torch.no_grad()
def reference_errors(
    denoiser: Denoiser,
    network: nn.Module,
    reference: Reference,
    point: DenoisingPoint,
    conditioning: Conditioning,
    schedule: Schedule,
    loss_space: LossSpace | None,
    autocast: Callable[[], AbstractContextManager] = nullcontext,
) -> Float[Tensor, " S*B"] | None:
    """The reference's mean squared errors on these points; None for a run without one."""
    if reference.kind == "none":
        return None
    with reference.model(network) as frozen, autocast():
        prediction = denoiser.predict(frozen, point.x_t, point.timestep, conditioning)
    return prediction_error(prediction, point.x_t, point.target, point.timestep, schedule, loss_space)


def _log_probs(policy_error: Tensor, reference_error: Tensor | None) -> PairLogProbs:
    """With lengths of one: an error that is a mean over the latent is per element already, as losses per token want it."""
    logps = pair_log_probs(policy_error, reference_error)
    one = torch.ones_like(logps.policy_chosen, requires_grad=False)
    return replace(logps, chosen_length=one, rejected_length=one)


@torch.no_grad()
def _inverted(
    denoiser: Denoiser,
    network: nn.Module,
    reference: Reference,
    pairs: Pairs,
    drawn: Draws,
    method: Method,
    config: InversionConfig,
    autocast: Callable[[], AbstractContextManager],
) -> Inversion:
    generators = drawn.inversion[: len(pairs.x0)] if config.eta > 0 else None
    # Grids are made on the CPU, so timesteps and tables stay there: nothing is read back from the device.
    t = drawn.timestep.repeat(pairs.sides)
    inverting = reference.model(network) if method.inversion_by_reference else nullcontext(network)
    with inverting as inverter, evaluating([inverter]), autocast():

        def predict(x: Tensor, time: Tensor, active: Tensor) -> Tensor:
            return denoiser.predict(inverter, x, time, pairs.conditioning[active])

        return invert(predict, denoiser.schedule, pairs.x0, t, config, generators, keep_path=method.landings != "last")


def inversion_paths(
    denoiser: Denoiser,
    network: nn.Module,
    reference: Reference,
    pairs: Pairs,
    drawn: Draws,
    method: Method,
    autocast: Callable[[], AbstractContextManager] = nullcontext,
) -> tuple[PathPoint, ...]:
    """Every landing of every side's inversion, each with all S·B rows: from the last stratum, all make the same moves."""
    assert method.inversion is not None
    return _inverted(denoiser, network, reference, pairs, drawn, method, method.inversion, autocast).path


def _every_landing(inverted: Inversion, pairs: Pairs) -> tuple[DenoisingPoint, Pairs]:
    """Every landing as a training point, and the batch with each pair once a landing: [chosen at 1 … K, rejected at 1 … K]."""
    path, sides, size = inverted.path, pairs.sides, len(pairs.rows)

    def by_side(parts: list[Tensor]) -> Tensor:
        stacked = torch.stack([part.unflatten(0, (sides, size)) for part in parts], dim=1)
        return stacked.flatten(0, 2)

    point = DenoisingPoint(
        by_side([landing.x_t for landing in path]),
        by_side([landing.target for landing in path]),
        by_side([landing.timestep for landing in path]),
    )
    again = by_side([torch.arange(sides * size)] * len(path))
    return point, Pairs(
        x0=pairs.x0[again.to(pairs.x0.device)],
        conditioning=pairs.conditioning[again],
        rows=pairs.rows * len(path),
        strength=pairs.strength.repeat(len(path)),
    )
