"""The pair template that most losses fill in.

    weight · [ q · φ(z − m) + (1 − q) · φ(m − z) ],   z = β · strength · (s_w − s_l)

s is the log-ratio ρ, its f-divergence transform, or the policy's own log-probability. φ is the link. q is the
confidence in the label; it may leave [0, 1] (`robust` does). m is a margin that z must exceed. `strength` is signed and
one number per pair, inside the link: SmPO's γ(2p − 1); 0 gives φ(−m) (ln 2 for the logistic link) and no gradient, and
−1 reads the pair the other way round. `weight` ≥ 0 stays outside.
"""

from collections.abc import Callable

import torch.nn.functional as F
from jaxtyping import Float, Real
from torch import Tensor

from mmalign.losses.checks import require_nonnegative, require_positive
from mmalign.losses.records import PairLogProbs

Link = Callable[[Tensor], Tensor]
Strength = Real[Tensor, " B"] | float | None


def logistic(z: Float[Tensor, " B"]) -> Float[Tensor, " B"]:
    """φ(z) = −log σ(z)."""
    return -F.logsigmoid(z)


def pair_loss(
    z: Float[Tensor, " B"],
    *,
    link: Link = logistic,
    q: Float[Tensor, " B"] | float = 1.0,
    margin: Float[Tensor, " B"] | float = 0.0,
) -> Float[Tensor, " B"]:
    """q · φ(z − m) + (1 − q) · φ(m − z)."""
    z = z - margin
    if isinstance(q, (int, float)) and q == 1:
        return link(z)
    return q * link(z) + (1 - q) * link(-z)


def signed(gap: Float[Tensor, " B"], strength: Strength) -> Float[Tensor, " B"]:
    """strength · gap; the strength is data, so no gradient flows into it."""
    if strength is None:
        return gap
    return (strength.detach() if isinstance(strength, Tensor) else strength) * gap


def weighted(loss: Float[Tensor, " B"], weight: Real[Tensor, " B"] | float | None) -> Float[Tensor, " B"]:
    """weight · loss; the weight is data, so no gradient flows into it, and it must not be negative."""
    if weight is None:
        return loss
    require_nonnegative("weight", weight)
    return (weight.detach() if isinstance(weight, Tensor) else weight) * loss


def rewards(logps: PairLogProbs, *, beta: float) -> tuple[Float[Tensor, " B"], Float[Tensor, " B"]]:
    """Implicit rewards r_w = β·ρ_w and r_l = β·ρ_l."""
    require_positive("beta", beta)
    return beta * logps.chosen_logratio, beta * logps.rejected_logratio


def per_token(score: Float[Tensor, " B"], length: Real[Tensor, " B"]) -> Float[Tensor, " B"]:
    """score / length; an empty completion counts as one token, as in TRL."""
    return score / length.to(score.dtype).clamp(min=1)
