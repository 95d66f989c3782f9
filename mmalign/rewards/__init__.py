"""Scorers: how well a picture suits its prompt.

scorer("playground").score(images, prompts)            # (N,) raw cosines
scorer("hpsv2.1").score_pixels(pixels, prompts)        # the same with gradient to the pixels
Ensemble([standardised(scorer("imagereward"), images, prompts), standardised(scorer("hpsv2.1"), images, prompts)])
"""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from typing import Any

import torch

from mmalign.rewards import aesthetic, hpsv2, imagereward
from mmalign.rewards.aesthetic import AestheticScorer
from mmalign.rewards.base import NetworkScorer
from mmalign.rewards.checkpoints import hub_file
from mmalign.rewards.clip import ClipScorer
from mmalign.rewards.ensemble import Ensemble, Member, standardised
from mmalign.rewards.hpsv2 import HPSv2Scorer
from mmalign.rewards.imagereward import ImageRewardScorer
from mmalign.rewards.scorer import PixelScorer, Scorer

__all__ = [
    "AestheticScorer",
    "ClipScorer",
    "Ensemble",
    "HPSv2Scorer",
    "ImageRewardScorer",
    "Member",
    "NetworkScorer",
    "PixelScorer",
    "Scorer",
    "scorer",
    "standardised",
]

_PICKSCORE = "yuvalkirstain/PickScore_v1"
_PICKSCORE_PROCESSOR = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"


def scorer(
    name: str, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32, batch_size: int = 32
) -> NetworkScorer:
    """A scorer by name.

    "playground", "pickscore", "hpsv2", "hpsv2.1", "aesthetic", "imagereward", or "clip:<Hub id or folder>". Published weights come
    from the Hub; "hpsv2:<file>" and so on read a file of your own, for the last four.
    """
    options: dict[str, Any] = {"device": device, "dtype": dtype, "batch_size": batch_size}
    kind, _, source = name.partition(":")
    if name == "playground":
        folder = Path(str(files("mmalign"))) / "assets" / "reward-clip"
        if not folder.is_dir():
            raise ValueError(
                f"{folder} is missing: reinstall mmalign, or build it with `python -m mmalign.playground.build reward`"
            )
        return ClipScorer.from_pretrained(folder, name=name, **options)
    if name == "pickscore":
        return ClipScorer.from_pretrained(_PICKSCORE, _PICKSCORE_PROCESSOR, name=name, **options)
    if kind == "clip" and source:
        return ClipScorer.from_pretrained(source, name=name, **options)
    if name == kind or source:
        if kind in hpsv2.FILES:
            return HPSv2Scorer.from_file(source or hub_file(hpsv2.REPO, hpsv2.FILES[kind], kind), name=kind, **options)
        if kind == "aesthetic":
            return AestheticScorer.from_file(source or hub_file(aesthetic.REPO, aesthetic.FILE, kind), **options)
        if kind == "imagereward":
            return ImageRewardScorer.from_file(source or hub_file(imagereward.REPO, imagereward.FILE, kind), **options)
    raise ValueError(
        f"no scorer {name!r}; there are 'playground', 'pickscore' and 'clip:<Hub id or folder>', and 'hpsv2', 'hpsv2.1', "
        "'aesthetic' and 'imagereward', each also with ':<file>'"
    )
