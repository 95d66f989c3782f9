"""Where a pipeline's parts stand: brought to the training device for a while and put back, and what a device cannot hold."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from mmalign.denoisers import Schedule
from mmalign.denoisers.parts import networks


@contextmanager
def on_device(parts: list[nn.Module], device: torch.device) -> Iterator[None]:
    """`parts` on `device`; afterwards each is where it was."""
    homes = [(part, next(part.parameters()).device) for part in parts]
    away = [(part, home) for part, home in homes if home != device]
    for part, _ in away:
        part.to(device)
    try:
        yield
    finally:
        for part, home in away:
            part.to(home)


def refuse_offloading(pipe: Any) -> None:
    """ValueError for a pipeline whose parts move by themselves while they run; the trainer places them."""
    for name, part in networks(pipe).items():
        if any("_hf_hook" in vars(module) or "_diffusers_hook" in vars(module) for module in part.modules()):
            raise ValueError(
                f"{name} has offloading or casting hooks, which would move weights while they are trained: load the pipeline anew, or "
                "call pipe.remove_all_hooks(), and enable them again after training"
            )


def storable(schedule: Schedule, device: torch.device) -> Schedule:
    """The schedule in a precision that `device` can hold: Apple's MPS has no float64, so its tables become float32 there.

    They were computed in float64, so float32 only rounds them once (relative error 6e-8).
    """
    if device.type != "mps":
        return schedule
    return Schedule(schedule.prediction_type, schedule.signal.float(), schedule.noise.float())
