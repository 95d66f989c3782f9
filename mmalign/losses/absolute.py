"""Losses that hold each side to a level of its own, not only their difference.

Here r = β·ρ is the implicit reward. A signed strength has no meaning: there is no single margin for it to scale.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from mmalign.losses.checks import require_positive
from mmalign.losses.records import PairLogProbs
from mmalign.losses.template import logistic, rewards


def nca_pair(logps: PairLogProbs, *, beta: float = 0.1) -> Float[Tensor, " B"]:
    """φ(r_w) + ½·φ(−r_w) + ½·φ(−r_l), φ = −log σ. Noise-contrastive alignment, arXiv:2402.05369.

    Shapes: B pairs in, (B,) out. 2 ln 2 at policy = reference; best at r_w = ln 2: the chosen side is held up.
    """
    chosen, rejected = rewards(logps, beta=beta)
    return logistic(chosen) + 0.5 * logistic(-chosen) + 0.5 * logistic(-rejected)


def bco_pair(logps: PairLogProbs, *, beta: float = 0.1) -> Float[Tensor, " B"]:
    """φ(r_w) + φ(−r_l), φ = −log σ. Binary classifier optimisation with a zero reward shift, arXiv:2404.04656.

    Shapes: B pairs in, (B,) out. Never below `sigmoid`. The shift δ of the paper is in `bco`.
    """
    chosen, rejected = rewards(logps, beta=beta)
    return logistic(chosen) + logistic(-rejected)


def sppo_hard(logps: PairLogProbs, *, beta: float = 0.1) -> Float[Tensor, " B"]:
    """(ρ_w − 1/(2β))² + (ρ_l + 1/(2β))². SPPO, eq. 4.7 of arXiv:2405.00675 at win probabilities 1 and 0.

    Shapes: B pairs in, (B,) out. β is a temperature: it does not multiply ρ.
    """
    require_positive("beta", beta)
    return (logps.chosen_logratio - 0.5 / beta) ** 2 + (logps.rejected_logratio + 0.5 / beta) ** 2


def apo_zero(logps: PairLogProbs, *, beta: float = 0.1) -> Float[Tensor, " B"]:
    """(1 − σ(r_w)) + σ(r_l). Anchored preference optimisation, eq. 7 of arXiv:2408.06266.

    Shapes: B pairs in, (B,) out. Raises the chosen and lowers the rejected side: for pairs better than the model.
    """
    chosen, rejected = rewards(logps, beta=beta)
    return torch.sigmoid(-chosen) + torch.sigmoid(rejected)


def apo_down(logps: PairLogProbs, *, beta: float = 0.1) -> Float[Tensor, " B"]:
    """σ(r_w) + (1 − σ(r_w − r_l)). Anchored preference optimisation, eq. 8 of arXiv:2408.06266.

    Shapes: B pairs in, (B,) out. Lowers both sides, the rejected one more: for pairs worse than the model.
    """
    chosen, rejected = rewards(logps, beta=beta)
    return torch.sigmoid(chosen) + torch.sigmoid(rejected - chosen)
