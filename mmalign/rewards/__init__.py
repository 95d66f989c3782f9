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

from mmalign.rewards import aesthetic, hpsv2, hpsv3, imagereward
from mmalign.rewards.aesthetic import AestheticScorer
from mmalign.rewards.base import NetworkScorer
from mmalign.rewards.checkpoints import hub_file
from mmalign.rewards.clip import ClipScorer
from mmalign.rewards.decomposed import CommonDirection, ReweightedScorer
from mmalign.rewards.embedding import EmbeddingScorer
from mmalign.rewards.ensemble import Ensemble, Member, standardised
from mmalign.rewards.hpsv2 import HPSv2Scorer
from mmalign.rewards.hpsv3 import HPSv3Scorer
from mmalign.rewards.imagereward import ImageRewardScorer
from mmalign.rewards.maxsim import MaxSimScorer
from mmalign.rewards.scorer import PixelScorer, Scorer
from mmalign.scorer_names import FROM_FILES, SCORERS

__all__ = [
    "AestheticScorer",
    "ClipScorer",
    "CommonDirection",
    "EmbeddingScorer",
    "Ensemble",
    "HPSv2Scorer",
    "HPSv3Scorer",
    "ImageRewardScorer",
    "MaxSimScorer",
    "Member",
    "NetworkScorer",
    "PixelScorer",
    "ReweightedScorer",
    "Scorer",
    "scorer",
    "standardised",
]

_PICKSCORE, _DENSCORE = "yuvalkirstain/PickScore_v1", "luping-liu/Denscore"
# Both were trained from this CLIP; Denscore's own repository holds its weights alone.
_VIT_H = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"

# Who reads them, and where they are published.
_FILES: dict[str, tuple[Any, str, str]] = {
    **{version: (HPSv2Scorer, hpsv2.REPO, file) for version, file in hpsv2.FILES.items()},
    "hpsv3": (HPSv3Scorer, hpsv3.REPO, hpsv3.FILE),
    "aesthetic": (AestheticScorer, aesthetic.REPO, aesthetic.FILE),
    "imagereward": (ImageRewardScorer, imagereward.REPO, imagereward.FILE),
}


def scorer(
    name: str, *, device: torch.device | str = "cpu", dtype: torch.dtype | None = None, batch_size: int = 32
) -> NetworkScorer:
    """A scorer by name, one of mmalign.scorer_names.SCORERS.

    Published weights come from the Hub; "hpsv2:<file>" and so on, for FROM_FILES, read a file of your own. dtype: None is the
    scorer's own, which is float32, and for HPSv3 on a GPU bfloat16.
    """
    options: dict[str, Any] = {"device": device, "batch_size": batch_size} | ({} if dtype is None else {"dtype": dtype})
    kind, _, source = name.partition(":")
    if name == "playground":
        folder = Path(str(files("mmalign"))) / "assets" / "reward-clip"
        if not folder.is_dir():
            raise ValueError(
                f"{folder} is missing: reinstall mmalign, or build it with `python -m mmalign.playground.build reward`"
            )
        return ClipScorer.from_pretrained(folder, name=name, **options)
    if name == "pickscore":
        return ClipScorer.from_pretrained(_PICKSCORE, _VIT_H, name=name, **options)
    if name == "denscore":
        return ClipScorer.from_pretrained(_DENSCORE, _VIT_H, name=name, segmented=True, **options)
    if kind == "denscore" and source:
        return ClipScorer.from_pretrained(source, name=name, segmented=True, **options)
    if kind == "clip" and source:
        return ClipScorer.from_pretrained(source, name=name, **options)
    if kind in _FILES and (name == kind or source):
        reader, repo, file = _FILES[kind]
        return reader.from_file(source or hub_file(repo, file, kind), name=kind, **options)
    raise ValueError(
        f"no scorer {name!r}; there are {', '.join(SCORERS)}, and {', '.join(FROM_FILES)} also each with ':<file>'"
    )
