"""f-DPO: the regulariser's derivative in place of the log-ratio.

With u = π_θ/π_ref the optimum of a reward penalised by an f-divergence has reward β·f′(u) + const, so a loss on
ρ_w − ρ_l becomes the same loss on f′(u_w) − f′(u_l) (arXiv:2309.16240). Only losses of that difference allow it: in a
loss of each side alone the constant, which depends on the prompt, would not cancel.
"""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from mmalign.losses.records import PairLogProbs, present
from mmalign.losses.template import Strength, per_token, signed

F_DIVERGENCES = ("reverse_kl", "forward_kl", "js_divergence", "alpha_divergence")
LARGEST_EXPONENT = 80.0  # e^80 is finite in float32; beyond it the transform is flat instead of infinite
DEFAULT_ALPHA = 0.5


def f_prime(
    logratio: Float[Tensor, " B"], *, f_divergence_type: str, f_alpha_divergence_coef: float
) -> Float[Tensor, " B"]:
    """f′(e^ρ), zero at ρ = 0. arXiv:2309.16240; coefficient and spellings as in TRL.

    reverse_kl ρ; forward_kl 1 − e^{−ρ}; js_divergence ln 2 + log σ(ρ); alpha_divergence (e^{(c−1)ρ} − 1)/(c − 1), which
    is reverse_kl for c → 1 and forward_kl for c = 0. The authors' code writes 1 − c for our c.
    """
    if f_divergence_type not in F_DIVERGENCES:
        raise ValueError(f"f_divergence_type must be one of {', '.join(F_DIVERGENCES)}, got {f_divergence_type!r}")
    if f_divergence_type != "alpha_divergence" and f_alpha_divergence_coef != DEFAULT_ALPHA:
        raise ValueError(f"f_alpha_divergence_coef acts with 'alpha_divergence' only, not with {f_divergence_type!r}")
    if f_divergence_type == "js_divergence":
        return math.log(2) + F.logsigmoid(logratio)
    power = {"reverse_kl": 0.0, "forward_kl": -1.0}.get(f_divergence_type, f_alpha_divergence_coef - 1)
    if abs(power) < 1e-6:
        return logratio
    return torch.expm1((power * logratio).clamp(max=LARGEST_EXPONENT)) / power


def score_gap(
    logps: PairLogProbs,
    strength: Strength,
    f_divergence_type: str,
    f_alpha_divergence_coef: float,
    *,
    length_normalised: bool = False,
) -> Float[Tensor, " B"]:
    """strength · (f′(u_w) − f′(u_l)), each side divided by its length if asked: the argument of every margin loss."""
    chosen, rejected = (
        f_prime(rho, f_divergence_type=f_divergence_type, f_alpha_divergence_coef=f_alpha_divergence_coef)
        for rho in (logps.chosen_logratio, logps.rejected_logratio)
    )
    if length_normalised:
        chosen = per_token(chosen, present(logps, "chosen_length"))
        rejected = per_token(rejected, present(logps, "rejected_length"))
    return signed(chosen - rejected, strength)
