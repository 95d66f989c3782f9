"""Small scorers, a hand-made evaluation, and tiny pipelines for the evaluation tests."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mmalign.evaluation import SamplerSettings, Side, compare_sides

sys.path.insert(0, str(Path(__file__).parents[1]))


class ChannelScorer:
    """Scores a picture by the mean of one colour channel, 0 to 1."""

    def __init__(self, name: str, channel: int = 0, fingerprint: str | None = None) -> None:
        self.name, self.channel = name, channel
        self.fingerprint = fingerprint or f"channel-{channel}"
        self.batches: list[int] = []

    def score(self, images, prompts):
        assert len(images) == len(prompts)
        self.batches.append(len(images))
        return torch.tensor([np.asarray(image)[..., self.channel].mean() / 255 for image in images])


@pytest.fixture
def channel_scorer():
    return ChannelScorer


@pytest.fixture
def hostile():
    """Prompts that try to break a page, or that only careful text handling survives."""
    return (
        "a <script>alert('x')</script> & \"quoted\" sneaker",
        "حذاء أحمر على خلفية زرقاء",
        "a 👟 on a 🟦 background",
        "</style></script><img src=https://example.com/x.png onerror=alert(1)>",
        "half a pair \ud83d and a control \x07 character",
    )


@pytest.fixture
def make_result(tmp_path):
    """A comparison of coloured squares: `reds` (N, 2) are the red levels of base and aligned, a row a prompt."""

    def make(reds, *, prompts=None, trained_on=("green",), size=32, **options):
        prompts = tuple(prompts or (f"prompt {row}" for row in range(len(reds))))
        settings = SamplerSettings(
            num_inference_steps=4,
            guidance_scale=5.0,
            height=None,
            width=None,
            scheduler="DDIMScheduler",
            scheduler_fingerprint="5" * 64,
        )

        def side(label: str, column: int) -> Side:
            folder = tmp_path / "pictures" / label
            folder.mkdir(parents=True, exist_ok=True)
            files = []
            for row, levels in enumerate(reds):
                files.append(folder / f"{row}.png")
                Image.new("RGB", (size, size), (levels[column], 255 - levels[column], 80)).save(files[-1])
            return Side(
                label=label,
                model_fingerprint=label * 4,
                settings=settings,
                seed=0,
                prompts=prompts,
                seeds=tuple(range(len(prompts))),
                pictures=tuple(files),
            )

        scorers = [ChannelScorer("green", 1), ChannelScorer("red", 0), ChannelScorer("blue", 2)]
        return compare_sides(
            side("aligned", 1), side("base", 0), scorers=scorers, trained_on=trained_on, progress=False, **options
        )

    return make
