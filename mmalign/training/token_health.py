"""The panel of a token model's preference training, spelled as in TRL, and named warnings."""

import torch
from torch import Tensor

from mmalign.training.health import SATURATED, Finding
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
    found = {name: (float(value.double().sum()), float(value.numel())) for name, value in values.items()}
    tokens = float(measured.supervised.sum())
    for name, value in (("entropy", measured.policy.entropy), ("kl", measured.policy.kl)):
        if value is not None:
            found[name] = (float(value.double().sum()), tokens)
    return {name: (total, weight) for name, (total, weight) in found.items() if weight}


def token_findings(history: list[dict[str, float]], *, window: int = 5) -> list[Finding]:
    """Named warnings for the last `window` logged entries; an empty list when all is well."""
    recent = [entry for entry in history if "rewards/margins" in entry][-window:]
    if len(recent) < window:
        return []

    def mean(name: str) -> float:
        return sum(entry[name] for entry in recent) / len(recent)

    found = []
    early, late = recent[: window // 2], recent[-(window // 2) :]
    falling = sum(entry["rewards/chosen"] for entry in late) < sum(entry["rewards/chosen"] for entry in early)
    if all(entry["rewards/chosen"] < 0 for entry in recent) and falling and mean("rewards/accuracies") > 0.5:
        found.append(
            Finding(
                "both-less-likely",
                "preferred answers become ever less likely, while accuracy looks good: the rejected ones only fall faster. Raise beta, "
                "add 'sft' with a weight, or take apo_zero",
            )
        )
    if mean("rewards/saturated") > 0.5:
        found.append(
            Finding(
                "saturated",
                "more than half of the pairs are saturated (margin above 4) and hardly teach: stop, or lower the learning rate",
            )
        )
    warming_up = recent[-1].get("learning_rate", 0) > recent[0].get("learning_rate", 0)
    if not warming_up and all(abs(entry["rewards/margins"]) < 1e-4 for entry in recent):
        found.append(
            Finding("no-signal", "policy and reference still agree (margins below 0.0001): raise the learning rate")
        )
    return found
