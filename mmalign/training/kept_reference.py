"""The reference's log-probabilities that a run of a token model finds and keeps, a table a data set."""

from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from mmalign.data.answer_tokens import AnswerBatch
from mmalign.data.storage import default_cache_dir
from mmalign.training.answer_cache import ReferenceTokens
from mmalign.training.token_config import TokenConfig
from mmalign.training.token_data import Answers

# How far a token's log-probability may be from the one that was kept: rows are padded otherwise in another batch.
_HALF_TOLERANCE, _TOLERANCE = 0.1, 1e-3


class KeptReference:
    """Tables in `args.cache_dir`. fingerprint: of the reference's weights; dtype: theirs. autocast: accelerate's mixed precision."""

    def __init__(self, args: TokenConfig, fingerprint: str, dtype: torch.dtype, autocast: str) -> None:
        self.fingerprint = fingerprint
        self._args, self._dtype, self._autocast = args, dtype, autocast
        self._tables: dict[str, ReferenceTokens] = {}

    def of(self, data: Answers) -> ReferenceTokens:
        """The table of these rows, read where it is on disk."""
        return self._table(data.fingerprint)

    def _table(self, rows: str) -> ReferenceTokens:
        if rows not in self._tables:
            folder = Path(self._args.cache_dir) if self._args.cache_dir else default_cache_dir()
            half = self._autocast != "no" or self._dtype.itemsize < 4
            parts = {
                "reference": self.fingerprint,
                "rows": rows,
                "joint": self._args.joint,
                "dtype": str(self._dtype),
                "autocast": self._autocast,
            }
            self._tables[rows] = ReferenceTokens(folder, parts, tolerance=_HALF_TOLERANCE if half else _TOLERANCE)
        return self._tables[rows]

    def holds(self, *datasets: Answers | None) -> bool:
        """Whether every row of these data sets is known."""
        return all(data is None or self.of(data).holds(data.dataset.rows, data.sides) for data in datasets)

    def find(self, data: Answers, batch: AnswerBatch) -> Float[Tensor, "R T"] | None:
        """What is known of a batch; None unless all of it is. ValueError for a table of other tokens."""
        return self.of(data).find(batch.rows, batch.supervised)

    def settle(
        self, data: Answers, batch: AnswerBatch, known: Tensor | None, live: Tensor | None
    ) -> Float[Tensor, "R T"] | None:
        """What the batch is measured with: what is known, compared with what was measured `live`, or that, which is then kept."""
        if live is None or live is known:
            return known
        if known is None:
            self.of(data).keep(batch.rows, live, batch.supervised)
            return live
        self.of(data).verify(batch.rows, known, live)
        # A run that goes on must see the very numbers of the one that was stopped.
        return known

    def write(self) -> None:
        """Brings what is new to disk. Every process must call it."""
        known = [list(self._tables)]
        if self._args.world_size > 1:
            # A process that had no row of a small data set has no table of it yet.
            known = [[]] * self._args.world_size
            torch.distributed.all_gather_object(known, list(self._tables))
        for rows in sorted({rows for tables in known for rows in tables}):
            self._table(rows).write(self._args.world_size, self._args.process_index)
