"""How far the pictures of one side lie from each other, and what each of them does to the means of that.

Shapes: N pictures, P pixels of a thumbnail times three, B of the pictures at once.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from mmalign.evaluation.intervals import Array

DUPLICATE = 0.02  # root mean square difference of thumbnails, out of 1, below which two pictures are near-duplicates
_BLOCK = 512


@dataclass(frozen=True, slots=True)
class Distances:
    """(N,) each. A picture's value depends on all the others, so the spread of the values is not the error of their mean.

    across: root mean square distance to the pictures of other prompts. within: to the others of the own prompt. Both are NaN where
    there are none. duplicate: 1 where a picture of another prompt is nearly equal.
    across_influence, duplicate_influence: with the mean of the values; what a picture adds to that of its own and to those of
    others, so that an interval for the mean of independent draws is one for the mean of the values.
    """

    across: Array
    within: Array
    duplicate: Array
    across_influence: Array
    duplicate_influence: Array


def distances(thumbnails: Array, prompt: npt.NDArray[np.intp]) -> Distances:
    """Of (N, P) thumbnails and the number (N,) of each one's prompt."""
    num, own = len(thumbnails), np.arange(len(thumbnails))
    across, within, duplicate = np.zeros(num), np.zeros(num), np.zeros(num)
    stretched, doubled = np.zeros(num), np.zeros(num)
    norms = np.mean(thumbnails**2, axis=1)
    for start in range(0, num, _BLOCK):
        rows = slice(start, start + _BLOCK)
        products = thumbnails[rows] @ thumbnails.T / thumbnails.shape[1]
        squared = np.maximum(norms[rows, None] + norms[None] - 2 * products, 0.0)
        same = prompt[rows, None] == prompt[None]
        near = ~same & (squared < DUPLICATE**2)
        across[rows] = _root_mean(squared, ~same)
        within[rows] = _root_mean(squared, same & (own[rows, None] != own[None]))
        duplicate[rows] = near.any(axis=1)
        stretched += _stretched(squared, ~same, across[rows])
        doubled += _doubled(near, prompt)
    pulled = duplicate + doubled
    return Distances(across, within, duplicate, across + stretched, pulled - pulled.mean() + duplicate.mean())


def _root_mean(squared: Array, counted: npt.NDArray[np.bool_]) -> Array:
    """(B,) root of each row's mean over its counted entries; NaN for a row without any."""
    count = np.sum(counted, axis=1)
    return np.where(count > 0, np.sqrt(np.sum(squared, axis=1, where=counted) / np.maximum(count, 1)), np.nan)


def _stretched(squared: Array, counted: npt.NDArray[np.bool_], root: Array) -> Array:
    """(N,) what each picture does to the root means (B,) of others: their derivative by its weight. It sums to zero."""
    slope = 2 * root * np.sum(counted, axis=1)
    change = np.where(counted, squared - root[:, None] ** 2, 0.0)
    return np.sum(change / np.where(slope > 0, slope, np.inf)[:, None], axis=0)


def _doubled(near: npt.NDArray[np.bool_], prompt: npt.NDArray[np.intp]) -> Array:
    """(N,) how many of B pictures would be no near-duplicates without this one's prompt, shared among that prompt's pictures."""
    first = np.where(near, prompt, prompt.max() + 1).min(axis=1)
    last = np.where(near, prompt, -1).max(axis=1)
    alone = near & (first == last)[:, None]
    return np.sum(alone / np.maximum(alone.sum(axis=1, keepdims=True), 1), axis=0)
