"""Predicted image tokens against the real processor of LFM2-VL, and what a budget warns of."""

import logging
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image
from tiny_vlm import tiny_vlm

from mmalign.pipelines.vision.image_budget import (
    PRESETS,
    ImageBudget,
    Tiling,
    budget_of,
    predicted_tokens,
    read_budget,
    tiling_of,
)

DEFAULT, FAST = ImageBudget(), ImageBudget(min_tokens=32, max_tokens=64)
# Height, width, budget, tokens: measured with transformers 5.23 when the formula was written down.
MEASURED = [
    (256, 384, DEFAULT, 96),
    (256, 384, ImageBudget(min_tokens=128), 140),
    (256, 384, FAST, 54),
    (512, 512, DEFAULT, 256),
    (512, 512, ImageBudget(max_tokens=128), 121),
    (512, 512, FAST, 1088),
    (512, 512, ImageBudget(min_tokens=32, max_tokens=64, split=False), 64),
    (1024, 1024, DEFAULT, 1280),
    (1024, 1024, ImageBudget(max_tokens=128), 1145),
    (1024, 1024, ImageBudget(split=False), 256),
    (1000, 3000, DEFAULT, 1011),
    (1000, 3000, ImageBudget(max_tokens=128), 882),
    (1000, 3000, FAST, 820),
    (1000, 3000, ImageBudget(split=False), 243),
    (1000, 3000, ImageBudget(min_tokens=32, max_tokens=64, split=False), 52),
    (2000, 1500, DEFAULT, 1770),
]


@pytest.mark.parametrize(("height", "width", "budget", "tokens"), MEASURED)
def test_the_measured_counts(height: int, width: int, budget: ImageBudget, tokens: int) -> None:
    assert predicted_tokens(height, width, budget) == tokens


def real_tokens(height: int, width: int, budget: ImageBudget, tiling: Tiling) -> int | None:
    """Image tokens in the real processor's text; None where its pixels, its mask and its text do not agree."""
    from transformers import Lfm2VlImageProcessor, Lfm2VlProcessor

    images = Lfm2VlImageProcessor(
        encoder_patch_size=tiling.patch,
        downsample_factor=tiling.factor,
        tile_size=tiling.tile_size,
        min_tiles=tiling.min_tiles,
        max_tiles=tiling.max_tiles,
        max_pixels_tolerance=tiling.tolerance,
        use_thumbnail=tiling.thumbnail,
        min_image_tokens=budget.min_tokens,
        max_image_tokens=budget.max_tokens,
        do_image_splitting=budget.split,
    )
    processor = Lfm2VlProcessor(images, tiny_vlm("lfm2_vl")[1].tokenizer)
    picture = Image.fromarray(np.zeros((height, width, 3), np.uint8))
    try:
        out = processor(images=[[picture]], text=["<image>"], return_tensors="pt")
    except RuntimeError:  # tiles and an overlong whole cannot be stacked
        return None
    announced = int((out["input_ids"] == processor.image_token_id).sum())
    read = int((out["spatial_shapes"] // tiling.factor).prod(1).sum())
    shown = int(out["pixel_attention_mask"].sum()) == int(out["spatial_shapes"].prod(1).sum())
    return announced if announced == read and shown else None


@pytest.mark.parametrize(("height", "width", "budget", "tokens"), MEASURED[::3])
def test_the_measured_counts_are_still_those_of_the_processor(
    height: int, width: int, budget: ImageBudget, tokens: int
) -> None:
    assert real_tokens(height, width, budget, Tiling()) == tokens


@settings(max_examples=150, deadline=None)
@given(
    height=st.integers(1, 150),
    width=st.integers(1, 150),
    low=st.integers(1, 16),
    more=st.integers(0, 12),
    split=st.booleans(),
    tiles=st.tuples(st.integers(1, 4), st.integers(0, 6)),
    tolerance=st.sampled_from([1.0, 2.0]),
    thumbnail=st.booleans(),
)
@example(height=3, width=150, low=4, more=0, split=False, tiles=(2, 2), tolerance=2.0, thumbnail=True)
@example(height=8, width=12, low=1, more=0, split=True, tiles=(1, 1), tolerance=1.0, thumbnail=False)
@example(height=40, width=50, low=4, more=4, split=True, tiles=(2, 0), tolerance=1.0, thumbnail=True)
def test_any_size_costs_what_the_processor_says(
    height: int, width: int, low: int, more: int, split: bool, tiles: tuple[int, int], tolerance: float, thumbnail: bool
) -> None:
    """Or is refused, just where the processor's mask comes out shorter than its pixels, or its text announces others."""
    budget = ImageBudget(min_tokens=low, max_tokens=low + more, split=split)
    tiling = Tiling(
        patch=4, tile_size=16, min_tiles=tiles[0], max_tiles=sum(tiles), tolerance=tolerance, thumbnail=thumbnail
    )
    real = real_tokens(height, width, budget, tiling)
    if real is None:
        with pytest.raises(ValueError, match=f"a picture of {height}×{width} pixels would be read"):
            predicted_tokens(height, width, budget, tiling)
    else:
        assert predicted_tokens(height, width, budget, tiling) == real


def test_a_budget_is_put_into_a_processor_and_read_back(tmp_path: Any) -> None:
    from transformers import AutoProcessor

    tiny_vlm("lfm2_vl")[1].save_pretrained(tmp_path)
    processor = AutoProcessor.from_pretrained(tmp_path)
    assert tiling_of(processor) == Tiling(patch=4, tile_size=32, min_tiles=2, max_tiles=4)
    budget = ImageBudget(min_tokens=6, max_tokens=9, split=False)
    budget.apply_to(processor)
    processor.save_pretrained(tmp_path)
    again = AutoProcessor.from_pretrained(tmp_path)
    picture = Image.fromarray(np.zeros((60, 100, 3), np.uint8))
    for one in (processor, again):
        assert budget_of(one) == budget
        inputs = one(images=[[picture]], text=["<image>"], return_tensors="pt")
        tokens = int((inputs["input_ids"] == one.image_token_id).sum())
        assert tokens == predicted_tokens(60, 100, budget, tiling_of(one)) == 6


def test_a_small_budget_with_splitting_warns_that_it_costs_more(caplog: pytest.LogCaptureFixture) -> None:
    images = SimpleNamespace(
        encoder_patch_size=16, downsample_factor=2, tile_size=512, min_tiles=2, max_tiles=10, max_pixels_tolerance=2.0
    )
    processor = SimpleNamespace(image_processor=SimpleNamespace(**vars(images), use_thumbnail=True))
    with caplog.at_level(logging.WARNING):
        FAST.apply_to(processor)
    assert "max_tokens=64 with split=True makes pictures dearer: one of 512×512 costs 1088 tokens" in caplog.text
    assert "under the default budget 256; set split=False" in caplog.text
    caplog.clear()
    for budget in (*PRESETS.values(), DEFAULT, ImageBudget(max_tokens=128)):
        assert budget.trap == ""
    # What the warning says of 512×512 is why the presets do not split.
    assert predicted_tokens(512, 512, PRESETS["fast"]) < predicted_tokens(512, 512, PRESETS["balanced"]) < 256


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ImageBudget(min_tokens=300), "min_tokens must lie between 1 and max_tokens=256, got 300"),
        (lambda: ImageBudget(min_tokens=0), "got 0"),
        (lambda: ImageBudget(max_tokens=64.0), "max_tokens must be a whole number, got 64.0"),
        (lambda: ImageBudget(split="no"), "split must be true or false, got 'no'"),
        (lambda: read_budget({"tokens": 64}), "or have min_tokens, max_tokens, split; got {'tokens': 64}"),
        (lambda: predicted_tokens(0, 5), "at least 1×1 pixels, got 0×5"),
        (lambda: predicted_tokens(20, 9000, ImageBudget(split=False)), "read at 32×10848, 339 tokens, .*squarer shape"),
        (lambda: predicted_tokens(500, 300, ImageBudget(min_tokens=256)), "room for 256: .*lower min_tokens=256"),
    ],
)
def test_errors(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        call()
    assert "\n" not in str(error.value)
