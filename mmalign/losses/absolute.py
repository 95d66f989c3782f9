"""Losses that hold each side to a level of its own, not only their difference.

Here r = β·ρ is the implicit reward. A signed strength has no meaning: there is no single margin for it to scale.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from mmalign.losses.checks import require_nonnegative, require_positive
from mmalign.losses.records import PairLogProbs, present
from mmalign.losses.template import logistic, pair_loss, per_token, rewards


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


def ln_pref(
    logps: PairLogProbs,
    *,
    beta: float = 5.0,
    ln_pref_omega: float = 1.0,
    ln_pref_lambda: float = 0.0,
    ln_pref_margin: float = 0.0,
) -> Float[Tensor, " B"]:
    """ω·φ(r_w/|y_w| − r_l/|y_l| − m) + λ·[(1 − σ(r_w/|y_w|)) + σ(r_l/|y_l|)], φ = −log σ. LFM2-style, arXiv:2511.23404.

    ω, λ, m = ln_pref_omega, ln_pref_lambda, ln_pref_margin. The family that LFM2's report describes, as third parties
    tell it; the values used for the released models are not known. Shapes: B pairs with their lengths in, (B,) out.
    ω = 1, λ = m = 0 is `sigmoid_norm`; ω = 0, λ = 1 is `apo_zero` on rewards per token.
    """
    require_nonnegative("ln_pref_omega", ln_pref_omega)
    require_nonnegative("ln_pref_lambda", ln_pref_lambda)
    if ln_pref_omega == 0 == ln_pref_lambda:
        raise ValueError("ln_pref_omega and ln_pref_lambda are both 0, which leaves no loss: raise one")
    if ln_pref_omega == 0 != ln_pref_margin:
        raise ValueError("ln_pref_margin has no effect with ln_pref_omega=0, which drops the term it stands in")
    chosen, rejected = rewards(logps, beta=beta)
    chosen = per_token(chosen, present(logps, "chosen_length"))
    rejected = per_token(rejected, present(logps, "rejected_length"))
    relative = pair_loss(chosen - rejected, margin=ln_pref_margin)
    return ln_pref_omega * relative + ln_pref_lambda * (torch.sigmoid(-chosen) + torch.sigmoid(rejected))
