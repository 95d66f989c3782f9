"""The health panel: what a denoiser's preference training looks like from inside, and named warnings.

Every number is a mean over the pairs of a batch. "Excess" is a policy's error minus its reference's: negative where the policy
fits a picture better than the reference does.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from mmalign.denoisers import Schedule
from mmalign.likelihood.denoising import DenoisingPoint, landing_points, mean_squared_error
from mmalign.losses import PairLogProbs
from mmalign.training.findings import SATURATED, Finding, recent
from mmalign.training.measurement import Measurement, Pairs
from mmalign.training.metrics import precision_of, totals

_TIME_BINS = 4
# What is also shown for each quarter of the timesteps, and under which name.
_BY_TIME = {"rewards/accuracies": "accuracy_by_time", "target/rms": "target/rms_by_time"}


@torch.no_grad()
def panel(
    measured: Measurement, pairs: Pairs, loss: Tensor, *, beta: float, schedule: Schedule
) -> dict[str, tuple[float, float]]:
    """Metric name → (sum, weight), so that steps and processes average exactly. Reads the device once."""
    size = len(pairs.rows)
    rms = measured.point.target.flatten(1).square().mean(1).sqrt()
    values: dict[str, Tensor] = {
        "loss": loss,
        "errors/chosen": measured.policy_error[:size],
        "target/rms": rms,
        "target/path_mismatch": path_mismatch(measured.point, pairs.x0, schedule),
    }
    if measured.logps is not None:
        values |= _of_pairs(measured, measured.logps, pairs, loss)
    if measured.logps is not None and measured.reference_error is not None:
        values |= _against_reference(measured.logps, measured.reference_error, pairs, beta)
    precision = precision_of(loss)
    sums = [value.to(precision).sum() for value in values.values()]
    weights = [float(value.numel()) for value in values.values()]
    names = list(values)
    quarter = F.one_hot(measured.timestep * _TIME_BINS // schedule.num_timesteps, _TIME_BINS)
    share = quarter.to(loss.device, precision)
    for name, metric in _BY_TIME.items():
        if name in values:
            repeated = share.repeat(len(values[name]) // size, 1)
            sums += (repeated * values[name].to(precision)[:, None]).sum(0)
            weights += (quarter.sum(0) * (len(values[name]) // size)).tolist()
            names += [f"{metric}/{k + 1}_of_{_TIME_BINS}" for k in range(_TIME_BINS)]
    totals = torch.stack(sums).tolist()
    return {name: (total, weight) for name, total, weight in zip(names, totals, weights, strict=True) if weight}


@torch.no_grad()
def plain_panel(
    values: dict[str, Tensor], by_time: dict[str, Tensor], timestep: Tensor, num_timesteps: int
) -> dict[str, tuple[float, float]]:
    """Metric name → (sum, weight) of values (B,), those of `by_time` once more for each quarter of the timesteps."""
    quarter = timestep * _TIME_BINS // num_timesteps
    found = dict(values)
    for name, value in by_time.items():
        found |= {f"{name}/{k + 1}_of_{_TIME_BINS}": value[quarter == k] for k in range(_TIME_BINS)}
    return totals(found)


def _of_pairs(measured: Measurement, logps: PairLogProbs, pairs: Pairs, loss: Tensor) -> dict[str, Tensor]:
    return {
        "loss_minus_ln2": loss - math.log(2),
        "errors/rejected": measured.policy_error[len(pairs.rows) :],
        "logps/chosen": logps.policy_chosen,
        "logps/rejected": logps.policy_rejected,
        "strength/mean_abs": pairs.strength.abs(),
    }


def _against_reference(logps: PairLogProbs, reference_error: Tensor, pairs: Pairs, beta: float) -> dict[str, Tensor]:
    chosen, rejected = logps.chosen_logratio, logps.rejected_logratio
    margin = beta * (chosen - rejected)
    accuracy = (margin > 0).float() + 0.5 * (margin == 0).float()
    return {
        "excess/chosen": -2 * chosen,
        "excess/rejected": -2 * rejected,
        "excess/chosen_relative": -2 * chosen / reference_error[: len(chosen)].clamp(min=1e-8),
        "rewards/chosen": beta * chosen,
        "rewards/rejected": beta * rejected,
        "rewards/margins": margin,
        "rewards/accuracies": accuracy,
        "implicit_acc": accuracy,
        "z/mean_square": (pairs.strength * margin).square(),
        "z/saturated": ((pairs.strength * margin).abs() > SATURATED).float(),
    }


def path_mismatch(point: DenoisingPoint, x0: Tensor, schedule: Schedule) -> Tensor:
    """Root mean square of x_t − (signal·x_0 + noise·target), per side; near rounding error when landing = conditioning."""
    rebuilt = landing_points(schedule, x0, point.target, point.timestep).x_t
    return mean_squared_error(point.x_t, rebuilt).sqrt()


def findings(history: list[dict[str, float]], *, window: int = 5) -> list[Finding]:
    """Named warnings for the last `window` logged entries; an empty list when all is well."""
    last = recent(history, "rewards/accuracies", window)
    if last is None:
        return []
    found = []
    worse = last.all("excess/chosen", lambda excess: excess > 0)
    rejected_more = last.mean("excess/rejected") > last.mean("excess/chosen")
    if worse and rejected_more and last.change("excess/chosen") > 0 and last.mean("rewards/accuracies") > 0.5:
        found.append(
            Finding(
                "both-worse",
                "the policy fits the preferred pictures worse than the reference does, and ever worse, while accuracy looks good: "
                "the rejected ones only get worse faster. Raise beta, use loss_type='sdpo', or add 'sft' with a weight",
            )
        )
    if last.mean("excess/chosen_relative") > 0.2:
        found.append(
            Finding(
                "winner-lost",
                "the error on preferred pictures is over 20 % above the reference's: stop, lower the learning rate",
            )
        )
    if last.mean("z/saturated") > 0.5:
        found.append(
            Finding("saturated", "more than half of the pairs are saturated (|z| > 4) and no longer teach: lower beta")
        )
    if last.mean("target/path_mismatch") > 1e-3:
        found.append(
            Finding(
                "landing",
                "latents and regression targets do not belong to the conditioning timestep (expected with inversion_compat)",
            )
        )
    if not last.warming_up and last.all("z/mean_square", lambda square: square < 1e-6):
        found.append(
            Finding(
                "no-signal",
                "policy and reference still agree to |z| < 1e-3: raise beta or the learning rate (a loss of 0.693 = ln 2)",
            )
        )
    return found
