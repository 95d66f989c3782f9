"""Crafted preference rows and tiny models for the data tests."""

import io
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from PIL import Image


def _picture(height: int = 20, width: int = 24, seed: int = 0) -> Image.Image:
    values = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values)


def _packed(image: Image.Image, format: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def _pickapic_rows(number: int = 10) -> list[dict[str, Any]]:
    labels = [1.0, 0.0, 0.5, 0.8]
    return [
        {
            "caption": f"a {('red', 'blue', 'green')[i % 3]} shirt",
            "jpg_0": _packed(_picture(20, 24, 2 * i), "JPEG"),
            "jpg_1": _packed(_picture(30, 18, 2 * i + 1), "JPEG"),
            "label_0": labels[i % 4],
            "label_1": 1 - labels[i % 4],
            "user_id": i % 2,
        }
        for i in range(number)
    ]


@pytest.fixture
def picture() -> Callable[..., Image.Image]:
    return _picture


@pytest.fixture
def packed() -> Callable[..., bytes]:
    return _packed


@pytest.fixture
def pickapic_rows() -> Callable[..., list[dict[str, Any]]]:
    return _pickapic_rows
