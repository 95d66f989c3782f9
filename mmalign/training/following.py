"""A reference that follows what is trained: θ̄ ← d·θ̄ + (1 − d)·θ after every optimiser step, from the start on."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback

# Where a checkpoint keeps it, in the files of `save_trained`.
REFERENCE_FOLDER = "reference"


class FollowingReference(TrainerCallback):
    """The trained weights of a network a second time, trailing behind, and put in their place to predict with.

    The two factors of a LoRA follow each for itself, which is not the average of their products.
    """

    def __init__(self, network: nn.Module, decay: float) -> None:
        self._decay = decay
        self._trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
        self._kept = [parameter.detach().clone() for parameter in self._trained]

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Goes to where the network has gone."""
        pairs = zip(self._kept, self._trained, strict=True)
        self._kept = [kept.to(parameter.device) for kept, parameter in pairs]

    @torch.no_grad()
    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Moves towards the trained weights."""
        torch._foreach_lerp_(self._kept, [parameter.data for parameter in self._trained], 1 - self._decay)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """The network with these weights; nothing is copied."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    def _exchange(self) -> None:
        for at, parameter in enumerate(self._trained):
            parameter.data, self._kept[at] = self._kept[at], parameter.data
