"""Losses that need no reference model: supervised, SimPO, CPO, ORPO."""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from mmalign.losses.checks import require_nonnegative, require_positive, require_smoothing
from mmalign.losses.records import PairLogProbs, present
from mmalign.losses.template import Strength, pair_loss, per_token, signed


def sft(logps: PairLogProbs) -> Float[Tensor, " B"]:
    """−log π(y_w|x)/|y_w|: supervised learning on the chosen side, the regulariser of arXiv:2405.16436.

    Shapes: B pairs in, (B,) out. Without lengths it is the sum over tokens, or a denoiser's ½ · mean squared error.
    TRL's `sft` is one mean over all tokens of the batch: these items averaged with weights |y_w|.
    """
    return _negative_log_likelihood(logps)


def simpo(
    logps: PairLogProbs,
    *,
    beta: float = 2.0,
    simpo_gamma: float = 1.0,
    label_smoothing: float | Float[Tensor, " B"] = 0.0,
    strength: Strength = None,
) -> Float[Tensor, " B"]:
    """φ(z − γ), z = β·(log π(y_w)/|y_w| − log π(y_l)/|y_l|), φ = −log σ. SimPO, arXiv:2405.14734.

    γ = simpo_gamma is a margin in units of z, about β/2 in the paper. With ε = label_smoothing it is
    (1 − ε)·φ(z − γ) + ε·φ(γ − z), as in TRL. Shapes: B pairs with their lengths in, (B,) out.
    """
    require_positive("beta", beta)
    require_smoothing(label_smoothing, "[0, 1]", why="for 'simpo', where it is the probability of a wrong label")
    chosen = per_token(logps.policy_chosen, present(logps, "chosen_length"))
    rejected = per_token(logps.policy_rejected, present(logps, "rejected_length"))
    return pair_loss(beta * signed(chosen - rejected, strength), q=1 - label_smoothing, margin=simpo_gamma)


def cpo(
    logps: PairLogProbs,
    *,
    beta: float = 0.1,
    cpo_alpha: float = 1.0,
    label_smoothing: float | Float[Tensor, " B"] = 0.0,
) -> Float[Tensor, " B"]:
    """φ(β·(log π(y_w) − log π(y_l))) + α·NLL(y_w), φ = −log σ. CPO, arXiv:2401.08417.

    α = cpo_alpha; NLL is `sft`: per token if the record has lengths. With ε = label_smoothing the first term is
    (1 − ε)·φ(z) + ε·φ(−z), as in TRL. Shapes: B pairs in, (B,) out.
    """
    require_positive("beta", beta)
    require_nonnegative("cpo_alpha", cpo_alpha)
    require_smoothing(label_smoothing, "[0, 1]", why="for 'cpo', where it is the probability of a wrong label")
    preference = pair_loss(beta * logps.policy_margin, q=1 - label_smoothing)
    return preference if cpo_alpha == 0 else preference + cpo_alpha * _negative_log_likelihood(logps)


def orpo(logps: PairLogProbs, *, beta: float = 0.1) -> Float[Tensor, " B"]:
    """NLL(y_w) + β·φ(logit p_w − logit p_l), p = exp(log π(y)/|y|), φ = −log σ. ORPO, arXiv:2403.07691.

    Token models only: p must be a probability. β is the weight λ of the paper. Shapes: B pairs with their lengths in,
    (B,) out. At p_w = p_l the second term is β·ln 2; at p = 1 the odds are cut at the precision of the dtype.
    """
    require_nonnegative("beta", beta)
    chosen = per_token(logps.policy_chosen, present(logps, "chosen_length"))
    rejected = per_token(logps.policy_rejected, present(logps, "rejected_length"))
    return -chosen + beta * pair_loss(_logit_of_log(chosen) - _logit_of_log(rejected))


def _negative_log_likelihood(logps: PairLogProbs) -> Float[Tensor, " B"]:
    if logps.chosen_length is None:
        return -logps.policy_chosen
    return -per_token(logps.policy_chosen, logps.chosen_length)


def _logit_of_log(log_p: Float[Tensor, " B"]) -> Float[Tensor, " B"]:
    """log(p/(1 − p)) from log p ≤ 0; NaN above 0, where there is no probability.

    The two forms of log(1 − p) each lose digits where the other is exact; they meet at p = ½. Within rounding of p = 1
    the value is that of the smallest 1 − p which the dtype resolves, with that point's slope, so nothing is infinite.
    """
    smallest = 8 * torch.finfo(log_p.dtype).eps
    saturated = (log_p > -smallest) & (log_p <= 0)
    log_p = torch.where(saturated, log_p + (-smallest - log_p).detach(), log_p)
    small_p = log_p < -math.log(2)
    log_1mp_small = torch.log1p(-torch.exp(torch.where(small_p, log_p, -1.0)))
    log_1mp_large = torch.log(-torch.expm1(torch.where(small_p, -0.5, log_p)))
    return log_p - torch.where(small_p, log_1mp_small, log_1mp_large)
