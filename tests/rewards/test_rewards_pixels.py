"""Preprocessing against torchvision's, the original scorers' own tool."""

import math

import numpy as np
import pytest
import torch
from PIL import Image
from rewards.reference import MEAN, STD, cropped
from torchvision.transforms import functional as tv

from mmalign.rewards.pixels import crop_images, crop_pixels, normalise, pad_pixels, to_pixels

SHAPES = [(24, 24), (40, 30), (25, 60), (17, 31), (30, 101), (200, 150)]


def noise(height: int, width: int) -> Image.Image:
    values = np.random.default_rng(height * width).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values)


@pytest.mark.parametrize("size", [16, 24, 37])
@pytest.mark.parametrize("shape", SHAPES)
def test_crops(shape: tuple[int, int], size: int) -> None:
    image = noise(*shape)
    exact = crop_images([image], size)
    torch.testing.assert_close(normalise(exact)[0], cropped(image, size), rtol=0, atol=1e-6)
    near = crop_pixels(to_pixels(image), size)
    assert (near - exact).abs().max() * 255 <= (0 if min(shape) == size else 1.1)


def test_half_a_pixel_of_margin_goes_where_it_is_told() -> None:
    row = torch.arange(27.0).expand(1, 3, 24, 27) / 255
    for rounding, first in ((round, 2), (math.floor, 1)):
        assert crop_pixels(row, 24, rounding=rounding)[0, 0, 0, 0] * 255 == pytest.approx(first)


@pytest.mark.parametrize("antialias", [True, False])
@pytest.mark.parametrize("shape", [*SHAPES, (2, 400)])
def test_bars(shape: tuple[int, int], antialias: bool) -> None:
    size, pixels = 24, to_pixels(noise(*shape))
    scale = size / max(shape)
    height, width = max(1, round(shape[0] * scale)), max(1, round(shape[1] * scale))
    expected = tv.resize(pixels, [height, width], tv.InterpolationMode.BICUBIC, antialias=antialias)
    top, left = (size - height) // 2, (size - width) // 2
    expected = tv.pad(expected, [left, top, size - width - left, size - height - top])
    padded = pad_pixels(pixels, size, antialias=antialias)
    assert padded.shape == (1, 3, size, size)
    torch.testing.assert_close(padded, expected, rtol=0, atol=1e-6)


def test_colours_of_other_modes_and_channels() -> None:
    red = Image.new("RGBA", (2, 1), (255, 0, 51, 128))
    assert to_pixels(red).shape == (1, 3, 1, 2)
    torch.testing.assert_close(to_pixels(red)[0, :, 0, 0], torch.tensor([1.0, 0.0, 0.2]))
    values = torch.tensor(MEAN)[None, :, None, None] + torch.tensor(STD)[None, :, None, None] * 2
    torch.testing.assert_close(normalise(values), torch.full((1, 3, 1, 1), 2.0))
