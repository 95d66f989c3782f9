"""A check at the first step of a run: every weight that is to be trained got a gradient."""

from collections.abc import Callable, Iterable
from typing import Any

from torch import nn
from transformers import TrainerCallback


class EveryWeightLearns(TrainerCallback):
    """ValueError at the first optimiser step for a trained weight without a gradient: it would be saved as trained, and never be.

    `weights`: names and parameters that this step must have reached.
    """

    def __init__(self, weights: Callable[[], Iterable[tuple[str, nn.Parameter]]]) -> None:
        self._weights, self._looked = weights, False

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Looks once."""
        if self._looked:
            return
        self._looked = True
        idle = [name for name, parameter in self._weights() if parameter.grad is None]
        if idle:
            raise ValueError(
                f"{len(idle)} trained weights got no gradient at the first step ({', '.join(idle[:3])}): nothing that the loss reads "
                "goes through them; leave them out of peft_config or trained_parts"
            )
