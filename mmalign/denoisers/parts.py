"""A pipeline's parts: which of them have weights, and the pipeline in eval mode or without its bar for a while."""

import inspect
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


def networks(pipe: Any) -> dict[str, nn.Module]:
    """The parts of a pipeline that have weights, by name."""
    return {name: part for name, part in pipe.components.items() if isinstance(part, nn.Module)}


@contextmanager
def evaluating(parts: Iterable[nn.Module]) -> Iterator[None]:
    """`parts` in eval mode; afterwards every module is in the mode it was in."""
    training = [module for part in parts for module in part.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def bar_hidden(pipe: Any) -> Iterator[None]:
    """The pipeline without its bar over sampling steps; afterwards the caller's choice stands again."""
    before: dict[str, Any] = dict(vars(pipe).get("_progress_bar_config", {}))
    pipe.set_progress_bar_config(**{**before, "disable": True})
    try:
        yield
    finally:
        pipe.set_progress_bar_config(**before)


def draws_clips(pipe: Any) -> bool:
    """Whether a pipeline draws clips, not pictures: its call asks for their number of frames."""
    return "num_frames" in inspect.signature(type(pipe).__call__).parameters
