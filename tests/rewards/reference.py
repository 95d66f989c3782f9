"""Straight-line float64 transformers on bare weights, and the pictures and prompts that every scorer is tried on."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision import transforms

from mmalign.rewards import NetworkScorer, Scorer

PROMPTS = ["a red shirt", "a blue bag on a black background", "", "a red shirt", "sneaker " * 80]
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)

Weights = dict[str, Tensor]


def pictures() -> list[Image.Image]:
    rng = np.random.default_rng(0)
    shapes = [(28, 28), (40, 30), (25, 60), (28, 19), (33, 33)]
    return [Image.fromarray(rng.integers(0, 256, (*shape, 3), dtype=np.uint8)) for shape in shapes]


def random_weights(shapes: dict[str, tuple[int, ...]], seed: int = 0) -> Weights:
    """Normal draws by name; those of norms lie about 1, matrices keep the size of what they read."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, shape in shapes.items():
        draw = torch.randn(shape, generator=generator)
        if len(shape) < 2:
            weights[name] = 0.3 * draw + (1 if name.endswith("weight") else 0)
        else:
            weights[name] = draw / math.prod(shape[1:]) ** 0.5
    return weights


def double(weights: Weights) -> Weights:
    return {name: value.double() for name, value in weights.items()}


def part(weights: Weights, prefix: str) -> Weights:
    return {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}


def linear(w: Weights, name: str, x: Tensor) -> Tensor:
    return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]


def norm(w: Weights, name: str, x: Tensor, eps: float = 1e-5) -> Tensor:
    spread = ((x - x.mean(-1, keepdim=True)) ** 2).mean(-1, keepdim=True)
    return (x - x.mean(-1, keepdim=True)) / (spread + eps).sqrt() * w[f"{name}.weight"] + w[f"{name}.bias"]


def attend(q: Tensor, k: Tensor, v: Tensor, heads: int, causal: bool = False) -> Tensor:
    """One head after the other; rows are tokens."""
    out = []
    for one, two, three in zip(q.chunk(heads, 1), k.chunk(heads, 1), v.chunk(heads, 1), strict=True):
        logits = one @ two.T / one.shape[1] ** 0.5
        if causal:
            logits = logits + torch.full_like(logits, float("-inf")).triu(1)
        out.append(logits.softmax(1) @ three)
    return torch.cat(out, 1)


def gelu(x: Tensor) -> Tensor:
    return x * 0.5 * (1 + torch.erf(x / 2**0.5))


def patches(pixels: Tensor, weight: Tensor) -> Tensor:
    """(tokens, width) of one picture (3, S, S): each patch times the kernel, row by row."""
    size = weight.shape[-1]
    tiles = [
        pixels[:, top : top + size, left : left + size].flatten()
        for top in range(0, pixels.shape[1], size)
        for left in range(0, pixels.shape[2], size)
    ]
    return torch.stack(tiles) @ weight.flatten(1).T


def cropped(image: Image.Image, size: int) -> Tensor:
    """Preprocessing of OpenAI's CLIP and of ImageReward, of torchvision's parts."""
    steps = [
        transforms.Resize(size, interpolation=transforms.InterpolationMode.BICUBIC),
        transforms.CenterCrop(size),
        transforms.ToTensor(),
        transforms.Normalize(MEAN, STD),
    ]
    return transforms.Compose(steps)(image)


def check_gradients(
    scorer: NetworkScorer, size: int, *, levels: float, read: Callable[[Any], Tensor] = lambda inputs: inputs
) -> None:
    """score_pixels against score, its gradient against a difference, and what is read of other sizes to so many levels of 255.

    read: the tensor in what the scorer preprocessed.
    """
    from mmalign.rewards.pixels import to_pixels

    images, prompts = pictures(), PROMPTS
    native = [image.resize((size, size)) for image in images]
    pixels = torch.cat([to_pixels(image) for image in native]).requires_grad_()
    scores = scorer.score_pixels(pixels, prompts)
    torch.testing.assert_close(scores.detach(), scorer.score(native, prompts), rtol=0, atol=1e-5)
    scores.sum().backward()
    gradient = pixels.grad
    assert gradient is not None and torch.isfinite(gradient).all() and gradient.abs().amax((1, 2, 3)).min() > 0
    step = 1e-2 * gradient / gradient.norm()
    inside = pixels.detach().clamp(0.1, 0.9)
    moved = scorer.score_pixels(inside + step, prompts).sum() - scorer.score_pixels(inside - step, prompts).sum()
    at_middle = inside.clone().requires_grad_()
    scorer.score_pixels(at_middle, prompts).sum().backward()
    torch.testing.assert_close(moved, 2 * (at_middle.grad * step).sum(), rtol=2e-2, atol=1e-5)
    for image in images:
        off = read(scorer.preprocess_pixels(to_pixels(image))) - read(scorer.preprocess([image]))
        assert off.abs().max() <= levels / 255 / min(STD) + 1e-6
    assert all(parameter.grad is None for parameter in scorer.model.parameters())


def check_scorer(scorer: Scorer) -> None:
    """Scores are of the right form and a pair's own, whatever stands beside it and however it is batched."""
    images = pictures()
    scores = scorer.score(images, PROMPTS)
    assert isinstance(scorer, Scorer) and scores.shape == (5,) and scores.dtype == torch.float32
    assert not scores.requires_grad and scores.device.type == "cpu" and scorer.score([], []).shape == (0,)
    order = [3, 0, 4, 2, 1]
    mixed = scorer.score([images[i] for i in order], [PROMPTS[i] for i in order])
    torch.testing.assert_close(mixed, scores[order], rtol=0, atol=1e-5)
    alone = torch.cat([scorer.score([image], [prompt]) for image, prompt in zip(images, PROMPTS, strict=True)])
    torch.testing.assert_close(alone, scores, rtol=0, atol=1e-5)
