"""Losses written for denoisers, on log π := −½ · mean squared error of the prediction.

A published β that multiplies the error without the ½ doubles here: diffusion_kto's 1000 is 2000.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from mmalign.losses.checks import require_nonnegative, require_positive
from mmalign.losses.records import PairLogProbs, UnpairedLogProbs
from mmalign.losses.template import Strength, logistic, pair_loss, signed
from mmalign.losses.unpaired import class_weight, kl_baseline, toward_label

UTILITIES = ("sigmoid", "loss_averse")


def diffusion_kto(
    logps: UnpairedLogProbs,
    *,
    beta: float = 2000.0,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
    utility: str = "sigmoid",
) -> Float[Tensor, " B"]:
    """λ·(1 − U(±β·(ρ − z0))), + if liked, − if not; U is σ or log σ. Diffusion-KTO, arXiv:2404.04465.

    z0 is max(0, mean of `kl`) if the record has it (pass the mean over all ranks), else max(0, mean of ρ) over this
    batch, which couples it; no gradient through z0. utility = 'sigmoid' | 'loss_averse' (log σ). The published β,
    1000, multiplies the error itself: 2000 here. Shapes: B samples in, (B,) out.
    """
    require_positive("beta", beta)
    if utility not in UTILITIES:
        raise ValueError(f"utility must be one of {', '.join(UTILITIES)}, got {utility!r}")
    baseline = kl_baseline(logps.logratio if logps.kl is None else torch.as_tensor(logps.kl))
    gain = toward_label(logps, beta * (logps.logratio - baseline))
    shortfall = torch.sigmoid(-gain) if utility == "sigmoid" else 1 + logistic(gain)
    return class_weight(logps, desirable_weight, undesirable_weight) * shortfall


def mapo(
    logps: PairLogProbs, *, beta: float = 0.1, snr_value: float = 0.5, num_train_timesteps: int = 1000
) -> Float[Tensor, " B"]:
    """m_w − β·log σ(T·(g(m_w) − g(m_l))), g(m) = s·m/(e^{s·m} − 1), m = −2·log π. MaPO, arXiv:2406.06424.

    Reference-free. s = snr_value, T = num_train_timesteps, as the release spells them; β weighs the margin term. A
    perfect prediction has g(0) = 1. Shapes: B pairs in, (B,) out.
    """
    require_nonnegative("beta", beta)
    require_positive("snr_value", snr_value)
    require_positive("num_train_timesteps", num_train_timesteps)
    chosen_error, rejected_error = -2 * logps.policy_chosen, -2 * logps.policy_rejected
    gap = _bose(snr_value * chosen_error) - _bose(snr_value * rejected_error)
    return chosen_error + beta * pair_loss(num_train_timesteps * gap)


def sdpo(
    logps: PairLogProbs, *, rejected_scale: Float[Tensor, " B"], beta: float = 0.1, strength: Strength = None
) -> Float[Tensor, " B"]:
    """−log σ(β·(ρ_w − ρ_l)) with the gradient through ρ_l scaled by λ. Diffusion-SDPO, arXiv:2511.03317.

    λ = `rejected_scale` in [0, 1], (B,), keeps the rejected side from harming the chosen one; it is computed from
    output-space gradients elsewhere. The value is that of `sigmoid`; λ = 1 is `sigmoid`. Shapes: B pairs in, (B,) out.
    The rejected side is the one so named: order pairs by preference, a negative strength is an error.
    """
    require_positive("beta", beta)
    require_nonnegative("rejected_scale", rejected_scale)
    require_nonnegative("1 - rejected_scale", 1 - rejected_scale)
    if rejected_scale.shape != logps.policy_rejected.shape:
        raise ValueError(f"rejected_scale has shape {tuple(rejected_scale.shape)}, expected ({len(logps)},)")
    if strength is not None:
        require_nonnegative("strength of 'sdpo'", strength)
    rejected = logps.rejected_logratio
    constant = rejected.detach()
    rejected = constant + rejected_scale.detach() * (rejected - constant)
    return pair_loss(beta * signed(logps.chosen_logratio - rejected, strength))


def _bose(x: Float[Tensor, " B"]) -> Float[Tensor, " B"]:
    """x/(e^x − 1), 1 at x = 0, without overflow on either side and with a gradient everywhere.

    Near 0 its series 1 − x/2 + x²/12 − x⁴/720; elsewhere a·e^{−a}/(1 − e^{−a}) at a = |x|, plus a where x < 0.
    """
    near = x.abs() < 0.02
    a = torch.where(near, 1.0, x.abs())
    exact = a * torch.exp(-a) / -torch.expm1(-a) + torch.relu(-x)
    small = torch.where(near, x, 0.0)
    series = 1 - small / 2 + small**2 / 12 - small**4 / 720
    return torch.where(near, series, exact)
