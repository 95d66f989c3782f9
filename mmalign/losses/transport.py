"""Alignment by optimal transport: compare sorted batches instead of pairs.

These losses couple the batch. Item i belongs to the i-th order statistic, not to the i-th pair, so per-pair weights and
strengths have no meaning; gather the batch over ranks before. For denoisers sort at equal timesteps only.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from mmalign.losses.checks import require_positive, require_smoothing
from mmalign.losses.records import PairLogProbs, present
from mmalign.losses.template import pair_loss


def aot(logps: PairLogProbs, *, beta: float = 0.1, label_smoothing: float = 0.0) -> Float[Tensor, " B"]:
    """(1 − ε)·φ(β·d_i) + ε·φ(−β·d_i), d_i = u_(i) − u_ref(i), φ = −log σ. AOT on pairs, arXiv:2406.05882.

    u = log π(y_w) − log π(y_l); policy and reference are sorted over the batch, each by itself. Shapes: B pairs in,
    (B,) out, in sorted order. A batch of one is `cdpo` (ε = 0: `sigmoid`).
    """
    reference = present(logps, "reference_chosen") - present(logps, "reference_rejected")
    return _transport(logps.policy_margin, reference, beta=beta, label_smoothing=label_smoothing)


def aot_unpaired(logps: PairLogProbs, *, beta: float = 0.1, label_smoothing: float = 0.0) -> Float[Tensor, " B"]:
    """(1 − ε)·φ(β·d_i) + ε·φ(−β·d_i), d_i = ρ_w(i) − ρ_l(i), φ = −log σ. AOT without pairs, arXiv:2406.05882.

    The log-ratios of the chosen and of the rejected samples are sorted over the batch, each by itself. Shapes: B of
    each in, (B,) out, in sorted order. A batch of one is `cdpo` (ε = 0: `sigmoid`).
    """
    return _transport(logps.chosen_logratio, logps.rejected_logratio, beta=beta, label_smoothing=label_smoothing)


def _transport(
    upper: Float[Tensor, " B"], lower: Float[Tensor, " B"], *, beta: float, label_smoothing: float
) -> Float[Tensor, " B"]:
    require_positive("beta", beta)
    if isinstance(label_smoothing, Tensor) and label_smoothing.ndim > 0:
        raise ValueError("label_smoothing must be one number here: sorting the batch separates it from its pair")
    require_smoothing(label_smoothing, "[0, 1]", why="here, where it is the probability of a wrong label")
    delta = torch.sort(upper).values - torch.sort(lower).values
    return pair_loss(beta * delta, q=1 - label_smoothing)
