"""The preference core: losses as pure functions of log-probabilities, one number per item.

    logps = losses.PairLogProbs(policy_chosen=…, policy_rejected=…, reference_chosen=…, reference_rejected=…)
    losses.compute("sigmoid", logps, beta=0.1).mean()

It knows no model, no modality and no device, and draws nothing. `names()` lists the losses, `get(key)` describes one.
"""

from mmalign.losses.api import compute, get, names
from mmalign.losses.info import LossInfo
from mmalign.losses.records import PairLogProbs, UnpairedLogProbs

__all__ = ["LossInfo", "PairLogProbs", "UnpairedLogProbs", "compute", "get", "names"]
