"""Scorers: how well a picture suits its prompt.

scorer("playground").score(images, prompts)    # (N,) raw cosines
"""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

import torch

from mmalign.rewards.clip import ClipScorer
from mmalign.rewards.scorer import Scorer

__all__ = ["ClipScorer", "Scorer", "scorer"]

_PICKSCORE = "yuvalkirstain/PickScore_v1"
_PICKSCORE_PROCESSOR = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"


def scorer(
    name: str, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32, batch_size: int = 32
) -> ClipScorer:
    """A scorer by name: "playground", "pickscore", or "clip:<Hub id or folder>"."""
    options = {"device": device, "dtype": dtype, "batch_size": batch_size}
    if name == "playground":
        folder = Path(str(files("mmalign"))) / "assets" / "reward-clip"
        if not folder.is_dir():
            raise ValueError(
                f"{folder} is missing: reinstall mmalign, or build it with `python -m mmalign.playground.build reward`"
            )
        return ClipScorer.from_pretrained(folder, name=name, **options)  # type: ignore[arg-type]
    if name == "pickscore":
        return ClipScorer.from_pretrained(_PICKSCORE, _PICKSCORE_PROCESSOR, name=name, **options)  # type: ignore[arg-type]
    if name.startswith("clip:") and name != "clip:":
        return ClipScorer.from_pretrained(name.removeprefix("clip:"), name=name, **options)  # type: ignore[arg-type]
    raise ValueError(f"no scorer {name!r}; there are 'playground', 'pickscore' and 'clip:<Hub id or folder>'")
