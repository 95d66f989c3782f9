"""Guidance whose negative branch runs with other weights, inside whatever call the family's own pipeline makes.

    prediction = negative(x, c⁻) + guidance_scale · (network(x, c) − negative(x, c⁻))

Some pipelines make one call on a batch [negative…, positive…] (Stable Diffusion, SDXL, SD 3, CogVideoX): each half is run by itself.
The others (FLUX, Wan) make two, which diffusers tells apart for its caches. The work of a step stays what it was.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import cached_property
from typing import Any

import torch
from diffusers.hooks import HookRegistry, ModelHook
from diffusers.hooks.hooks import BaseState, StateManager
from torch import Tensor, nn

_NAME = "mmalign_negative_branch"
# The same for every row, whatever their length.
_SHARED = ("image_rotary_emb",)
# Within this context the given function is the negative branch.
Negative = Callable[[Callable[..., Any]], AbstractContextManager[Callable[..., Any]]]


@contextmanager
def negative_branch(pipe: Any, network: nn.Module, negative: Negative) -> Iterator[None]:
    """A block in which the negative branch of `pipe`, which calls `network`, runs by `negative`; without guidance nothing does.

    negative: a function of the network's own forward that gives a context with the forward to call instead.
    """
    own = "forward" in vars(network)
    registry = HookRegistry.check_if_exists_or_initialize(network)
    registry.register_hook(_Branches(pipe, negative), _NAME)
    try:
        yield
    finally:
        registry.remove_hook(_NAME, recurse=False)
        if not own:
            # Else a copy of the network would call the original.
            del network.forward


class _Branches(ModelHook):
    _is_stateful = True

    def __init__(self, pipe: Any, negative: Negative) -> None:
        super().__init__()
        self._pipe, self._negative = pipe, negative
        # `cache_context` of diffusers finds it here.
        self.call = StateManager(BaseState)

    def reset_state(self, module: nn.Module) -> nn.Module:
        """Keeps nothing between calls."""
        return module

    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """The network's call, each branch by its own weights."""
        forward = self.fn_ref.original_forward
        which = None if self.call._context is None else self.call._context.name
        if which == "uncond":
            with self._negative(forward) as negative:
                return negative(*args, **kwargs)
        # SD 3's skip-layer guidance calls once more, for the positive branch alone.
        if which == "cond" or not self._guided or kwargs.get("skip_layers") is not None:
            return forward(*args, **kwargs)
        rows = len(args[0] if args else kwargs["hidden_states"])
        if rows % 2:
            raise ValueError(f"{type(self._pipe).__name__} guides in a way of its own, with {rows} rows at once")
        with self._negative(forward) as negative:
            first = negative(*_half(args, rows, 0), **_half(kwargs, rows, 0))
        second = forward(*_half(args, rows, 1), **_half(kwargs, rows, 1))
        return tuple(torch.cat(pair) for pair in zip(first, second, strict=True))

    @property
    def _guided(self) -> bool:
        told = getattr(self._pipe, "do_classifier_free_guidance", None)
        return self._guided_at_first if told is None else bool(told)

    @cached_property
    def _guided_at_first(self) -> bool:
        """CogVideoX decides once, and may move its guidance later (use_dynamic_cfg)."""
        return self._pipe.guidance_scale > 1


def _half(value: Any, rows: int, half: int) -> Any:
    """The first or second half of whatever has one row for each of the batch; all else as it is."""
    if isinstance(value, Tensor):
        return value.chunk(2)[half] if value.ndim and len(value) == rows else value
    if isinstance(value, dict):
        return {key: part if key in _SHARED else _half(part, rows, half) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_half(part, rows, half) for part in value)
    return value
