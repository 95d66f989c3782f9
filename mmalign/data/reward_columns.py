"""Rewards that the data carry in columns of their own, in place of a scorer's."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from mmalign.data.encoded import EncodedPairs
from mmalign.data.pairs import PairSource
from mmalign.data.records import InvalidRow

PREFIX = "column:"


@dataclass(frozen=True)
class RewardColumn:
    """One of the columns in `PairSource.score_names`, called "column:<its name>" where a scorer is named.

    logit_scale: to Bradley–Terry, a difference of the column's values is log-odds.
    """

    name: str
    fingerprint: ClassVar[str] = ""
    logit_scale: ClassVar[float] = 1.0

    def scores(self, encoded: EncodedPairs, *, human_ties: bool) -> Float[Tensor, "N 2"]:
        """Of (image_0, image_1); ValueError where there is no such column, or a pair that is compared has no value in it.

        human_ties: whether pairs with label 0.5 are compared.
        """
        column = _known("scorer", self.name, encoded.scores)
        scores = encoded.scores[column]
        missing = ~torch.isfinite(scores).all(1) & ((encoded.labels != 0.5) | human_ties)
        if missing.any():
            raise ValueError(
                f"{int(missing.sum())} pairs have no {column!r} of both pictures, the first is row "
                f"{int(encoded.rows[missing][0])}: fill the column, or drop these rows"
            )
        return scores


def column_scores(source: PairSource, name: str) -> Float[Tensor, "R 2"]:
    """What the column "column:<its name>" says of (image_0, image_1) of every row, without opening a picture.

    NaN where a row has no value or cannot be used; ValueError where there is no such column.
    """
    column = _known("user_scorers", name, source.score_names)
    scores = torch.full((len(source), 2), math.nan)
    for row in range(len(source)):
        try:
            scores[row] = torch.tensor(source.raw(row).scores.get(column, (math.nan, math.nan)))
        except InvalidRow:
            continue
    return scores


def _known(option: str, name: str, columns: Iterable[str]) -> str:
    """The column's own name."""
    column, known = name.removeprefix(PREFIX), list(columns)
    if column not in known:
        has = ", ".join(PREFIX + other for other in known) or "no reward column"
        raise ValueError(f"{option}={name!r}: the data have no such column; they have {has}")
    return column
