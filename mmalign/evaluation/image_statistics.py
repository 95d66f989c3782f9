"""Cheap facts about pictures that show a model gaming its scorer: everything darker, flatter, busier, or the same.

Shapes: N pictures, P pixels of a thumbnail times three.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from mmalign.evaluation.drawing import prompt_numbers
from mmalign.evaluation.intervals import Array
from mmalign.evaluation.scorers import read_picture

THUMBNAIL = 16
EDGE = 0.1  # difference of neighbouring luminances, out of 1, that counts as an edge
DUPLICATE = 0.02  # root mean square difference of thumbnails, out of 1, below which two pictures are near-duplicates

DESCRIPTIONS = {
    "brightness": "mean luminance, 0 to 1",
    "contrast": "standard deviation of luminance",
    "saturation": "mean saturation, 0 to 1",
    "edge density": f"share of neighbouring pixels that differ by more than {EDGE}",
    "diversity": "root mean square distance of 16-pixel thumbnails to those of other prompts",
    "near-duplicates": f"share of pictures closer than {DUPLICATE} to the picture of another prompt",
}

_BLOCK = 512


def side_statistics(files: Sequence[Path], prompts: Sequence[str]) -> tuple[dict[str, Array], Array]:
    """Each statistic of `DESCRIPTIONS` as (N,) values, and the (N, P) thumbnails in [0, 1]."""
    rows, thumbnails = [], []
    for file in files:
        image = read_picture(file)
        rows.append(_picture_statistics(image))
        small = image.resize((THUMBNAIL, THUMBNAIL), Image.Resampling.BOX)
        thumbnails.append(np.asarray(small, dtype=np.float32).reshape(-1) / 255)
    table, small_pictures = np.array(rows), np.array(thumbnails, dtype=np.float64)
    diversity, duplicate = _distances(small_pictures, np.array(prompt_numbers(prompts)))
    columns = [*table.T, diversity, duplicate]
    return dict(zip(DESCRIPTIONS, columns, strict=True)), small_pictures


def drift(base: Array, aligned: Array) -> Array:
    """(N,) root mean square difference of the two sides' (N, P) thumbnails, drawn from the same seeds."""
    return np.sqrt(np.mean((base - aligned) ** 2, axis=1))


def _picture_statistics(image: Image.Image) -> tuple[float, float, float, float]:
    pixels = np.asarray(image, dtype=np.float64) / 255
    luminance = pixels @ np.array([0.299, 0.587, 0.114])
    brightest, darkest = pixels.max(axis=-1), pixels.min(axis=-1)
    saturation = (brightest - darkest) / np.maximum(brightest, 1e-9)
    steps = np.concatenate([np.diff(luminance, axis=axis).reshape(-1) for axis in (0, 1)])
    edges = np.mean(np.abs(steps) > EDGE) if steps.size else 0.0
    return float(luminance.mean()), float(luminance.std()), float(saturation.mean()), float(edges)


def _distances(thumbnails: Array, prompt: npt.NDArray[np.intp]) -> tuple[Array, Array]:
    """(N,) root mean square distance to the pictures of other prompts, and (N,) 1 where one of them is nearly equal."""
    num = len(thumbnails)
    diversity, duplicate = np.zeros(num), np.zeros(num)
    norms = np.mean(thumbnails**2, axis=1)
    for start in range(0, num, _BLOCK):
        rows = slice(start, start + _BLOCK)
        squared = norms[rows, None] + norms[None] - 2 * thumbnails[rows] @ thumbnails.T / thumbnails.shape[1]
        squared = np.where(prompt[rows, None] == prompt[None], np.nan, np.maximum(squared, 0.0))
        others = np.isfinite(squared)
        diversity[rows] = np.sqrt(np.nansum(squared, axis=1) / np.maximum(others.sum(axis=1), 1))
        duplicate[rows] = np.any(np.where(others, squared, np.inf) < DUPLICATE**2, axis=1)
    return diversity, duplicate
