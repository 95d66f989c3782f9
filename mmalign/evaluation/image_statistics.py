"""Cheap facts about pictures that show a model gaming its scorer: everything darker, flatter, busier, or the same.

Shapes: N pictures, P pixels of a thumbnail times three.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
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


@dataclass(frozen=True, slots=True)
class Statistic:
    """What a statistic measures, and what pictures became where it rose and where it fell."""

    description: str
    rose: str
    fell: str


STATISTICS = {
    "brightness": Statistic("mean luminance, 0 to 1", "brighter", "darker"),
    "contrast": Statistic("standard deviation of luminance", "richer in contrast", "flatter"),
    "saturation": Statistic("mean saturation, 0 to 1", "more saturated", "paler"),
    "edge density": Statistic(
        f"share of neighbouring pixels that differ by more than {EDGE}", "busier with edges", "smoother"
    ),
    "diversity": Statistic(
        "root mean square distance of 16-pixel thumbnails to those of other prompts",
        "more different from prompt to prompt",
        "more alike from prompt to prompt",
    ),
    "diversity within a prompt": Statistic(
        "the same distance to the other pictures of the prompt; for prompts with several pictures",
        "more different within a prompt",
        "more alike within a prompt",
    ),
    "near-duplicates": Statistic(
        f"share of pictures closer than {DUPLICATE} to the picture of another prompt",
        "more often near-duplicates of another prompt's",
        "less often near-duplicates of another prompt's",
    ),
    "drift": Statistic(
        "root mean square distance of 16-pixel thumbnails, base to aligned, same seed", "different", "different"
    ),
}

_BLOCK = 512


def side_statistics(files: Sequence[Path], prompts: Sequence[str]) -> tuple[dict[str, Array], Array]:
    """Each statistic of one side as (N,) values, NaN where a picture has none, and the (N, P) thumbnails in [0, 1]."""
    rows, thumbnails = [], []
    for file in files:
        image = read_picture(file)
        rows.append(_picture_statistics(image))
        small = image.resize((THUMBNAIL, THUMBNAIL), Image.Resampling.BOX)
        thumbnails.append(np.asarray(small, dtype=np.float32).reshape(-1) / 255)
    table, small_pictures = np.array(rows), np.array(thumbnails, dtype=np.float64)
    columns = [*table.T, *_distances(small_pictures, np.array(prompt_numbers(prompts)))]
    names = [name for name in STATISTICS if name != "drift"]
    return dict(zip(names, columns, strict=True)), small_pictures


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


def _distances(thumbnails: Array, prompt: npt.NDArray[np.intp]) -> tuple[Array, Array, Array]:
    """Three (N,): root mean square distance to the pictures of other prompts, the same to the others of the own prompt (NaN
    where there are none), and 1 where a picture of another prompt is nearly equal."""
    num, own = len(thumbnails), np.arange(len(thumbnails))
    across, within, duplicate = np.zeros(num), np.zeros(num), np.zeros(num)
    norms = np.mean(thumbnails**2, axis=1)
    for start in range(0, num, _BLOCK):
        rows = slice(start, start + _BLOCK)
        products = thumbnails[rows] @ thumbnails.T / thumbnails.shape[1]
        squared = np.maximum(norms[rows, None] + norms[None] - 2 * products, 0.0)
        same = prompt[rows, None] == prompt[None]
        across[rows] = _root_mean(squared, ~same)
        within[rows] = _root_mean(squared, same & (own[rows, None] != own[None]))
        duplicate[rows] = np.any(~same & (squared < DUPLICATE**2), axis=1)
    return across, within, duplicate


def _root_mean(squared: Array, counted: npt.NDArray[np.bool_]) -> Array:
    """(B,) root of each row's mean over its counted entries; NaN for a row without any."""
    count = np.sum(counted, axis=1)
    return np.where(count > 0, np.sqrt(np.sum(squared, axis=1, where=counted) / np.maximum(count, 1)), np.nan)
