"""Losses with the logistic link φ(z) = −log σ(z) on the difference of the two log-ratios."""

from jaxtyping import Float
from torch import Tensor

from mmalign.losses.checks import require_positive, require_smoothing
from mmalign.losses.divergences import DEFAULT_ALPHA, score_gap
from mmalign.losses.records import PairLogProbs
from mmalign.losses.template import Strength, pair_loss


def sigmoid(
    logps: PairLogProbs,
    *,
    beta: float = 0.1,
    strength: Strength = None,
    f_divergence_type: str = "reverse_kl",
    f_alpha_divergence_coef: float = DEFAULT_ALPHA,
) -> Float[Tensor, " B"]:
    """−log σ(z), z = β·(ρ_w − ρ_l). DPO, eq. 7 of arXiv:2305.18290; Diffusion-DPO, arXiv:2311.12908.

    Shapes: B pairs in, (B,) out. At policy = reference every loss is ln 2. With `strength` = γ(2p − 1) it is SmPO.
    """
    require_positive("beta", beta)
    gap = score_gap(logps, strength, f_divergence_type, f_alpha_divergence_coef)
    return pair_loss(beta * gap)


def sigmoid_norm(
    logps: PairLogProbs,
    *,
    beta: float = 0.1,
    strength: Strength = None,
    f_divergence_type: str = "reverse_kl",
    f_alpha_divergence_coef: float = DEFAULT_ALPHA,
) -> Float[Tensor, " B"]:
    """−log σ(β·(ρ_w/|y_w| − ρ_l/|y_l|)). Length-normalised DPO, arXiv:2407.15229.

    Shapes: B pairs with their lengths in, (B,) out. Margins are per token, so β is larger than for `sigmoid`: with
    equal lengths n it is `sigmoid` at β/n.
    """
    require_positive("beta", beta)
    gap = score_gap(logps, strength, f_divergence_type, f_alpha_divergence_coef, length_normalised=True)
    return pair_loss(beta * gap)


def cdpo(
    logps: PairLogProbs,
    *,
    beta: float = 0.1,
    label_smoothing: float | Float[Tensor, " B"] = 0.1,
    strength: Strength = None,
    f_divergence_type: str = "reverse_kl",
    f_alpha_divergence_coef: float = DEFAULT_ALPHA,
) -> Float[Tensor, " B"]:
    """(1 − ε)·φ(z) + ε·φ(−z), φ = −log σ: conservative DPO, the label smoothing of arXiv:2305.18290's authors.

    ε = label_smoothing is one number, or one for each pair: visit counts in arXiv:2405.00451, uncertainty in
    arXiv:2409.11212. Shapes: B pairs in, (B,) out. Minimum at z = log((1 − ε)/ε): the margin stays finite.
    """
    require_positive("beta", beta)
    require_smoothing(label_smoothing, "[0, 1]", why="for 'cdpo', where it is the probability of a wrong label")
    gap = score_gap(logps, strength, f_divergence_type, f_alpha_divergence_coef)
    return pair_loss(beta * gap, q=1 - label_smoothing)


def robust(
    logps: PairLogProbs,
    *,
    beta: float = 0.1,
    label_smoothing: float | Float[Tensor, " B"] = 0.1,
    strength: Strength = None,
    f_divergence_type: str = "reverse_kl",
    f_alpha_divergence_coef: float = DEFAULT_ALPHA,
) -> Float[Tensor, " B"]:
    """[(1 − ε)·φ(z) − ε·φ(−z)]/(1 − 2ε), φ = −log σ. Provably robust DPO, arXiv:2403.00409.

    ε = label_smoothing is the rate of flipped labels: averaged over flips at that rate the loss is `sigmoid` exactly.
    Shapes: B pairs in, (B,) out. Unbounded below: the slope for z → ∞ is −ε/(1 − 2ε).
    """
    require_positive("beta", beta)
    require_smoothing(label_smoothing, "[0, 0.5)", why="for 'robust', where it is the rate of flipped labels")
    gap = score_gap(logps, strength, f_divergence_type, f_alpha_divergence_coef)
    return pair_loss(beta * gap, q=(1 - label_smoothing) / (1 - 2 * label_smoothing))
