"""The panel of a token model's preference training, spelled as in TRL, and named warnings."""

import torch
from torch import Tensor

from mmalign.training.findings import SATURATED, Finding, recent
from mmalign.training.metrics import totals
from mmalign.training.token_measurement import AnswerMeasurement


@torch.no_grad()
def token_panel(
    measured: AnswerMeasurement, loss: Tensor, *, beta: float, per_token: bool = False
) -> dict[str, tuple[float, float]]:
    """Metric name → (sum, weight), so that steps and processes average exactly; a mean over rows, or over tokens where it is of tokens.

    Rewards are β times the log-ratio or, without a reference, β times the log-probability; per token of the answer where the loss reads
    them so.
    """
    size = len(measured.label)
    log_probs = (measured.policy.log_prob * measured.weights).sum(1)
    ratios = measured.log_ratios
    rewards = beta * (log_probs if ratios is None else ratios)
    if per_token:
        rewards = rewards / (measured.weights != 0).sum(1).clamp(min=1)
    values = {"loss": loss}
    if measured.sides == 2:
        margin = rewards[:size] - rewards[size:]
        values |= {
            "rewards/chosen": rewards[:size],
            "rewards/rejected": rewards[size:],
            "rewards/margins": margin,
            "rewards/accuracies": (margin > 0).float() + 0.5 * (margin == 0).float(),
            "rewards/saturated": (margin.abs() > SATURATED).float(),
            "logps/chosen": log_probs[:size],
            "logps/rejected": log_probs[size:],
        }
    else:
        liked = measured.label > 0.5
        for name, rows in (("chosen", liked), ("rejected", ~liked)):
            values |= {f"rewards/{name}": rewards[rows], f"logps/{name}": log_probs[rows]}
    for name, told in (("entropy", measured.policy.entropy), ("kl", measured.policy.kl)):
        if told is not None:
            values[name] = told[measured.supervised]
    return totals(values)


def token_findings(history: list[dict[str, float]], *, window: int = 5) -> list[Finding]:
    """Named warnings for the last `window` logged entries; an empty list when all is well."""
    last = recent(history, "rewards/margins", window)
    if last is None:
        return []
    found = []
    less_likely = last.all("rewards/chosen", lambda reward: reward < 0) and last.change("rewards/chosen") < 0
    if less_likely and last.mean("rewards/accuracies") > 0.5:
        found.append(
            Finding(
                "both-less-likely",
                "preferred answers become ever less likely, while accuracy looks good: the rejected ones only fall faster. Raise beta, "
                "add 'sft' with a weight, or take apo_zero",
            )
        )
    if last.mean("rewards/saturated") > 0.5:
        found.append(
            Finding(
                "saturated",
                "more than half of the pairs are saturated (margin above 4) and hardly teach: stop, or lower the learning rate",
            )
        )
    if not last.warming_up and last.all("rewards/margins", lambda margin: abs(margin) < 1e-4):
        found.append(
            Finding("no-signal", "policy and reference still agree (margins below 0.0001): raise the learning rate")
        )
    return found
