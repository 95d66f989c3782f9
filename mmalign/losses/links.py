"""Losses of the same difference of log-ratios under other links: hinge, square, reverse KL, exponential blend."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from mmalign.losses.checks import require_positive, require_smoothing
from mmalign.losses.divergences import DEFAULT_ALPHA, score_gap
from mmalign.losses.records import PairLogProbs
from mmalign.losses.template import Strength, logistic, pair_loss


def hinge(
    logps: PairLogProbs,
    *,
    beta: float = 0.1,
    strength: Strength = None,
    f_divergence_type: str = "reverse_kl",
    f_alpha_divergence_coef: float = DEFAULT_ALPHA,
) -> Float[Tensor, " B"]:
    """max(0, 1 − z), z = β·(ρ_w − ρ_l). The normalised hinge of RSO, arXiv:2309.06657; SLiC is arXiv:2305.10425.

    Shapes: B pairs in, (B,) out. 1 at policy = reference; 0 with no gradient once z ≥ 1.
    """
    require_positive("beta", beta)
    gap = score_gap(logps, strength, f_divergence_type, f_alpha_divergence_coef)
    return pair_loss(beta * gap, link=lambda z: torch.relu(1 - z))


def ipo(
    logps: PairLogProbs,
    *,
    beta: float = 0.1,
    strength: Strength = None,
    f_divergence_type: str = "reverse_kl",
    f_alpha_divergence_coef: float = DEFAULT_ALPHA,
) -> Float[Tensor, " B"]:
    """(D − 1/(2β))², D = ρ_w − ρ_l. IPO, eq. 17 of arXiv:2310.12036, whose τ is β; β does not multiply D.

    With lengths in the record each ρ is divided by its length first, as in TRL; without them D is the paper's, and a
    denoiser's. Shapes: B pairs in, (B,) out. 0 at D = 1/(2β), and it grows on both sides.
    """
    require_positive("beta", beta)
    has_lengths = logps.chosen_length is not None or logps.rejected_length is not None
    gap = score_gap(logps, strength, f_divergence_type, f_alpha_divergence_coef, length_normalised=has_lengths)
    return (gap - 1 / (2 * beta)) ** 2


def exo_pair(
    logps: PairLogProbs,
    *,
    beta: float = 0.1,
    label_smoothing: float | Float[Tensor, " B"] = 1e-3,
    strength: Strength = None,
    f_divergence_type: str = "reverse_kl",
    f_alpha_divergence_coef: float = DEFAULT_ALPHA,
) -> Float[Tensor, " B"]:
    """σ(z)·log(σ(z)/(1 − ε)) + σ(−z)·log(σ(−z)/ε), z = β·(ρ_w − ρ_l). EXO, eq. 16 of arXiv:2402.00856.

    The reverse KL from the policy's choice to a label smoothed by ε = label_smoothing > 0. Shapes: B pairs in, (B,)
    out. 0 at z = log((1 − ε)/ε) only; its gradient vanishes for z → −∞: badly ranked pairs learn slowly.
    """
    require_positive("beta", beta)
    require_smoothing(label_smoothing, "(0, 1)", why="for 'exo_pair' (the paper: 1e-3)")
    z = beta * score_gap(logps, strength, f_divergence_type, f_alpha_divergence_coef)
    epsilon = torch.as_tensor(label_smoothing, dtype=z.dtype, device=z.device)
    return torch.sigmoid(z) * (F.logsigmoid(z) - torch.log1p(-epsilon)) + torch.sigmoid(-z) * (
        F.logsigmoid(-z) - torch.log(epsilon)
    )


def discopop(
    logps: PairLogProbs,
    *,
    beta: float = 0.1,
    discopop_tau: float = 0.05,
    strength: Strength = None,
    f_divergence_type: str = "reverse_kl",
    f_alpha_divergence_coef: float = DEFAULT_ALPHA,
) -> Float[Tensor, " B"]:
    """(1 − s)·φ(z) + s·e^{−z}, s = σ(z/τ), φ = −log σ. DiscoPOP, eq. 5 of arXiv:2406.08414.

    Shapes: B pairs in, (B,) out. (1 + ln 2)/2 at z = 0; logistic far below, exponential far above, and not monotone in
    between (at τ = .05: minimum near z = −.119, maximum near .072).
    """
    require_positive("beta", beta)
    require_positive("discopop_tau", discopop_tau)
    z = beta * score_gap(logps, strength, f_divergence_type, f_alpha_divergence_coef)
    # One exponential of a sum: σ(z/τ)·e^{−z} would be 0·∞ for very negative z.
    exponential = torch.exp(F.logsigmoid(z / discopop_tau) - z)
    return torch.sigmoid(-z / discopop_tau) * logistic(z) + exponential
