"""Rewards that the data carry in columns of their own, in place of a scorer's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from mmalign.data.encoded import EncodedPairs

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
        column = self.name.removeprefix(PREFIX)
        if column not in encoded.scores:
            known = ", ".join(PREFIX + name for name in encoded.scores) or "no reward column"
            raise ValueError(f"scorer={self.name!r}: the data have no such column; they have {known}")
        scores = encoded.scores[column]
        missing = ~torch.isfinite(scores).all(1) & ((encoded.labels != 0.5) | human_ties)
        if missing.any():
            raise ValueError(
                f"{int(missing.sum())} pairs have no {column!r} of both pictures, the first is row "
                f"{int(encoded.rows[missing][0])}: fill the column, or drop these rows"
            )
        return scores
