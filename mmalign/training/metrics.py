"""The health panel between two logged entries: summed over batches, averaged over processes."""

from collections import defaultdict
from collections.abc import Mapping

import torch
from torch import Tensor


def totals(values: Mapping[str, Tensor]) -> dict[str, tuple[float, float]]:
    """Metric name → (sum, number of values), for metrics that have any. Reads the device once."""
    values = {name: value for name, value in values.items() if value.numel()}
    if not values:
        return {}
    sums = torch.stack([value.to(precision_of(value)).sum() for value in values.values()]).tolist()
    return {name: (total, float(value.numel())) for (name, value), total in zip(values.items(), sums, strict=True)}


def precision_of(value: Tensor) -> torch.dtype:
    """What sums are taken in: MPS has no float64."""
    return torch.float32 if value.device.type == "mps" else torch.float64


class MetricSums:
    """Metric name → (sum, weight) since the last `drain`."""

    def __init__(self, world_size: int) -> None:
        self._world_size = world_size
        self._sums: dict[str, list[float]] = defaultdict(_zero)

    def add(self, panel: Mapping[str, tuple[float, float]]) -> None:
        """Takes in the panel of a batch."""
        for name, (total, weight) in panel.items():
            self._sums[name][0] += total
            self._sums[name][1] += weight

    def drain(self) -> dict[str, float]:
        """The means over all processes, each of which must call it; then empty."""
        sums, self._sums = dict(self._sums), defaultdict(_zero)
        parts = [sums]
        if self._world_size > 1:
            parts = [{}] * self._world_size
            torch.distributed.all_gather_object(parts, sums)
        names = sorted({name for part in parts for name in part})
        totals = {name: [sum(part.get(name, _zero())[k] for part in parts) for k in (0, 1)] for name in names}
        return {name: total / weight for name, (total, weight) in totals.items()}


def _zero() -> list[float]:
    return [0.0, 0.0]
