"""Cheap facts about pictures that show a model gaming its scorer: everything darker, flatter, busier, or the same.

Shapes: N pictures, P pixels of a thumbnail times three.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from mmalign.evaluation.distances import DUPLICATE, distances
from mmalign.evaluation.drawing import prompt_numbers
from mmalign.evaluation.intervals import Array
from mmalign.evaluation.scorers import read_picture

THUMBNAIL = 16
EDGE = 0.1  # difference of neighbouring luminances, out of 1, that counts as an edge


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


@dataclass(frozen=True, slots=True)
class SideStatistics:
    """values: (N,) by the statistic's name, NaN where a picture has none. influences: for those in which a picture's value depends on
    other prompts' pictures, (N,) values of the same mean whose spread is the error of that mean. thumbnails: (N, P) in [0, 1].
    """

    values: dict[str, Array]
    influences: dict[str, Array]
    thumbnails: Array


def side_statistics(files: Sequence[Path], prompts: Sequence[str]) -> SideStatistics:
    """Every statistic of one side."""
    rows, thumbnails = [], []
    for file in files:
        image = read_picture(file)
        rows.append(_picture_statistics(image))
        small = image.resize((THUMBNAIL, THUMBNAIL), Image.Resampling.BOX)
        thumbnails.append(np.asarray(small, dtype=np.float32).reshape(-1) / 255)
    table, small_pictures = np.array(rows), np.array(thumbnails, dtype=np.float64)
    found = distances(small_pictures, np.array(prompt_numbers(prompts)))
    columns = [*table.T, found.across, found.within, found.duplicate]
    names = [name for name in STATISTICS if name != "drift"]
    return SideStatistics(
        values=dict(zip(names, columns, strict=True)),
        influences={"diversity": found.across_influence, "near-duplicates": found.duplicate_influence},
        thumbnails=small_pictures,
    )


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
