"""The loss that makes a CLIP a Denscore: which of two pictures suits a long prompt better, its segments scored one by one.

No segment has a label of its own, so that the pair's logit is the mean of its segments' logits (LongAlign, arXiv:2410.11817), in the
loss of PickScore (arXiv:2305.01569). Shapes: N pairs, S segments of all their prompts together, in order.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor


def segment_logits(logits: Float[Tensor, "2*N S"], lengths: Sequence[int]) -> Float[Tensor, "N 2"]:
    """Of a CLIP's logits between pictures (all first sides, then all second ones) and segments: each side's mean over its prompt's.

    lengths: how many segments each of the N prompts has.
    """
    of_prompt = torch.stack([part.mean(1) for part in logits.split(list(lengths), dim=1)], dim=1)
    first, second = of_prompt.chunk(2)
    return torch.stack([first.diagonal(), second.diagonal()], dim=1)


def pair_losses(logits: Float[Tensor, "N 2"], label: Float[Tensor, " N"]) -> Float[Tensor, " N"]:
    """KL of the softmax over a pair's pictures from (label, 1 − label): the cross-entropy less its least value, 0 for a tied tie."""
    wanted = torch.stack([label, 1 - label], dim=1)
    return (torch.special.xlogy(wanted, wanted) - wanted * logits.log_softmax(1)).sum(1)
