"""A moving average of the trained weights, kept beside them while they train and put in their place wherever a result is looked at."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn
from transformers import TrainerCallback

# Where a checkpoint keeps it, in the files in which it keeps what is trained, so that other libraries load it too.
AVERAGE_FOLDER = "ema"


class MovingAverage(TrainerCallback):
    """`diffusers.training_utils.EMAModel` over what is trained, in its precision (never below float32), one step an optimiser step.

    After step n the decay is min(decay, n / (9 + n)), and 0 at the first, so that the start of training is not part of the average.
    The two factors of a LoRA are averaged each for itself, which is not the average of their products.

    `read`: puts trained weights from a folder on the network.
    """

    def __init__(self, network: nn.Module, decay: float, read: Callable[[Path], None]) -> None:
        self._network, self._decay, self._read = network, decay, read
        self._ema: Any = None

    def start(self) -> None:
        """Begins at the weights as they are, on their device."""
        from diffusers.training_utils import EMAModel

        self._ema = EMAModel(self._trained(), decay=self._decay, foreach=True)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Takes in the weights of this step; which one it is decides the decay, also after a resume."""
        self._ema.optimization_step = state.global_step - 1
        self._ema.step(self._trained())

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """The network with the averaged weights; afterwards with the trained ones again. Outside of a run it holds what it holds."""
        if self._ema is None or self._ema.temp_stored_params is not None:
            yield
            return
        self._ema.store(self._trained())
        self._ema.copy_to(self._trained())
        try:
            yield
        finally:
            self._ema.restore(self._trained())

    def load(self, folder: Path) -> None:
        """Reads the average of a checkpoint; the network holds it then."""
        self._read(folder / AVERAGE_FOLDER)
        self._ema.shadow_params = [parameter.detach().clone() for parameter in self._trained()]

    def finish(self) -> None:
        """Leaves the averaged weights in the network for good."""
        if self._ema is not None:
            self._ema.copy_to(self._trained())
            self._ema = None

    def _trained(self) -> list[nn.Parameter]:
        return [parameter for parameter in self._network.parameters() if parameter.requires_grad]
