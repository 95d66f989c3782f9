"""Denscore's loss against its formula: a pair's logit is the mean over segments, and ties count half."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch.nn.functional import normalize

from mmalign.rewards import ClipScorer
from mmalign.rewards.segment_loss import pair_losses, segment_logits

LENGTHS = [3, 1, 2]


def test_a_pair_s_logits_are_its_own_segments_means() -> None:
    generator = torch.Generator().manual_seed(0)
    pictures = normalize(torch.randn(6, 5, generator=generator, dtype=torch.float64), dim=1)
    pieces = normalize(torch.randn(6, 5, generator=generator, dtype=torch.float64), dim=1)
    found = segment_logits(10 * pictures @ pieces.T, LENGTHS)
    start = 0
    for pair, length in enumerate(LENGTHS):
        mean = sum(pieces[start + k] for k in range(length)) / length
        expected = [10 * float(pictures[pair] @ mean), 10 * float(pictures[3 + pair] @ mean)]
        assert found[pair].tolist() == pytest.approx(expected, rel=1e-12)
        start += length


def test_they_are_what_the_scorer_says_in_segments(clip_folder: Path) -> None:
    """Scaled scores of pictures and prompts, from the logits of one pass through CLIPModel as training makes it."""
    clip = ClipScorer.from_pretrained(clip_folder).in_segments()
    rng = np.random.default_rng(0)
    images = [Image.fromarray(rng.integers(0, 256, (24, 24, 3), dtype=np.uint8)) for _ in range(4)]
    prompts = ["A red shirt. A blue bag. It is on white.", "A green dress."]
    pieces = [clip.segments(prompt) for prompt in prompts]
    assert [len(piece) for piece in pieces] == [3, 1]
    tokens = clip.tokenizer([x for p in pieces for x in p], padding="max_length", max_length=16, return_tensors="pt")
    with torch.no_grad():
        logits = clip.model(**tokens, pixel_values=clip.preprocess(images)).logits_per_image
    found = segment_logits(logits, [3, 1])
    for side in (0, 1):
        expected = clip.score(images[2 * side : 2 * side + 2], prompts, scaled=True)
        torch.testing.assert_close(found[:, side], expected, rtol=1e-5, atol=1e-5)


@given(st.floats(-20, 20), st.floats(-20, 20), st.sampled_from([0.0, 0.25, 0.5, 0.9, 1.0]))
def test_the_loss_is_a_divergence_and_its_gradient_what_the_label_lacks(a: float, b: float, label: float) -> None:
    logits = torch.tensor([[a, b]], dtype=torch.float64, requires_grad=True)
    loss = pair_losses(logits, torch.tensor([label], dtype=torch.float64))
    loss.sum().backward()
    loss = loss.detach()
    chosen = 1 / (1 + math.exp(b - a))
    expected = sum(
        w * (math.log(w) - math.log(p)) for w, p in ((label, chosen), (1 - label, 1 / (1 + math.exp(a - b)))) if w
    )
    assert float(loss) == pytest.approx(expected, rel=1e-9, abs=1e-12)
    assert float(loss) >= -1e-12
    assert logits.grad is not None and logits.grad[0].tolist() == pytest.approx(
        [chosen - label, label - chosen], abs=1e-9
    )


def test_a_clear_choice_is_a_logistic_loss_and_a_tie_of_equals_is_none() -> None:
    logits = torch.tensor([[2.0, -1.0], [2.0, -1.0], [0.7, 0.7]])
    losses = pair_losses(logits, torch.tensor([1.0, 0.0, 0.5]))
    torch.testing.assert_close(losses, torch.tensor([math.log1p(math.exp(-3)), math.log1p(math.exp(3)), 0.0]))


def test_segments_share_one_verdict() -> None:
    """One segment may be wrong where the others make up for it: the loss of the mean, not the mean of losses."""
    logits = torch.tensor([[4.0, -2.0], [0.0, 0.0]])
    loss = pair_losses(segment_logits(logits, [2]), torch.tensor([1.0]))
    assert float(loss) == pytest.approx(math.log1p(math.exp(-1)), rel=1e-6)
