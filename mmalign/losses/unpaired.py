"""Losses of single samples that are liked or not: KTO, unpaired APO-zero, BCO with its reward shift.

Weights for unbalanced classes are spelled as in TRL. State goes in and comes out: `bco_shift`.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from mmalign.losses.checks import require_nonnegative, require_positive
from mmalign.losses.records import UnpairedLogProbs, present
from mmalign.losses.template import logistic


def kto(
    logps: UnpairedLogProbs,
    *,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Float[Tensor, " B"]:
    """λ·(1 − σ(±β·(ρ − z0))), + if desirable, − if not. KTO, eq. 7 of arXiv:2402.01306.

    z0 = max(0, mean of `kl`), the log-ratios of mismatched prompts and completions, without gradient. For several ranks
    pass the mean over all of them. Shapes: B samples in, (B,) out. λ/2 where ρ = z0.
    """
    require_positive("beta", beta)
    baseline = kl_baseline(present(logps, "kl"))
    weight = class_weight(logps, desirable_weight, undesirable_weight)
    return weight * torch.sigmoid(-toward_label(logps, beta * (logps.logratio - baseline)))


def apo_zero_unpaired(
    logps: UnpairedLogProbs,
    *,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Float[Tensor, " B"]:
    """λ·(1 − σ(±β·ρ)), + if desirable, − if not: `kto` without baseline. APO-zero, arXiv:2408.06266, unpaired.

    Shapes: B samples in, (B,) out. Over a liked and a disliked sample the sum is `apo_zero` of the pair.
    """
    require_positive("beta", beta)
    weight = class_weight(logps, desirable_weight, undesirable_weight)
    return weight * torch.sigmoid(-toward_label(logps, beta * logps.logratio))


def bco(
    logps: UnpairedLogProbs,
    *,
    beta: float = 0.1,
    delta: float | Tensor | None = None,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Float[Tensor, " B"]:
    """λ·φ(±(r − δ)), + if desirable, − if not, r = β·ρ, φ = −log σ. BCO, arXiv:2404.04656.

    δ = `delta` is one number, or one for each sample (bins of timesteps); it gets no gradient. None takes this batch's
    own midpoint, which couples the batch; a running one comes from `bco_shift`. The paper's density ratio for disliked
    samples is a `weight`. Shapes: B samples in, (B,) out.
    """
    require_positive("beta", beta)
    if delta is None:
        delta = bco_shift(logps, beta=beta).delta
    shift = delta.detach() if isinstance(delta, Tensor) else delta
    weight = class_weight(logps, desirable_weight, undesirable_weight)
    return weight * logistic(toward_label(logps, beta * logps.logratio - shift))


@dataclass(frozen=True, slots=True, eq=False)
class BCOShift:
    """Running means of the reward r = β·ρ in each class; None until a sample of that class was seen."""

    desirable: Float[Tensor, ""] | None
    undesirable: Float[Tensor, ""] | None

    @property
    def delta(self) -> Float[Tensor, ""]:
        """½·(E[r | liked] + E[r | disliked]); the one mean there is while a class is unseen."""
        means = [mean for mean in (self.desirable, self.undesirable) if mean is not None]
        return torch.stack(means).mean()


def bco_shift(
    logps: UnpairedLogProbs, *, beta: float = 0.1, state: BCOShift | None = None, decay: float = 0.9
) -> BCOShift:
    """The reward shift after this batch, from the one before: new = decay · old + (1 − decay) · mean of the class.

    A class without samples keeps its mean; a first mean is taken as it is. arXiv:2404.04656 asks for a moving average
    of class-balanced means; its decay is ours. All without gradient.
    """
    require_positive("beta", beta)
    reward = (beta * logps.logratio).detach()

    def update(old: Tensor | None, members: Tensor) -> Tensor | None:
        if not bool(members.any()):
            return old
        mean = reward[members].mean()
        return mean if old is None else decay * old + (1 - decay) * mean

    before = state if state is not None else BCOShift(None, None)
    return BCOShift(update(before.desirable, logps.desirable), update(before.undesirable, ~logps.desirable))


def kl_baseline(kl: Tensor) -> Float[Tensor, ""]:
    """max(0, mean), without gradient."""
    return kl.mean().clamp(min=0).detach()


def toward_label(logps: UnpairedLogProbs, value: Float[Tensor, " B"]) -> Float[Tensor, " B"]:
    """+value where desirable, −value where not."""
    return torch.where(logps.desirable, value, -value)


def class_weight(logps: UnpairedLogProbs, desirable: float, undesirable: float) -> Float[Tensor, " B"]:
    """λ of each sample's class."""
    require_nonnegative("desirable_weight", desirable)
    require_nonnegative("undesirable_weight", undesirable)
    ones = torch.ones_like(logps.policy)
    return torch.where(logps.desirable, desirable * ones, undesirable * ones)
