"""What a run will take, told before its first step: memory that is certain to be held, and time from one timed forward pass."""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback

from mmalign.denoisers import Schedule
from mmalign.likelihood.config import InversionConfig
from mmalign.likelihood.grids import make_grid

logger = logging.getLogger("mmalign")
# Bytes of optimiser state for a trained float32 weight; Adam's two moments unless named here.
_STATE_BYTES = {"adafactor": 0, "sgd": 0, "adagrad": 4, "rmsprop": 4, "lion_32bit": 4, "lion_8bit": 1}
_ADAM_BYTES = 8
_ADAM_8BIT_BYTES = 2


@dataclass(frozen=True)
class Memory:
    """Bytes: weights of the network, gradients and optimiser state of what is trained, and the reference's own copy."""

    weights: int
    gradients: int
    optimizer: int
    reference: int

    @property
    def total(self) -> int:
        """Everything but activations."""
        return self.weights + self.gradients + self.optimizer + self.reference

    def __str__(self) -> str:
        parts = {
            "weights": self.weights,
            "gradients": self.gradients,
            "optimiser": self.optimizer,
            "reference copy": self.reference,
        }
        told = ", ".join(f"{name} {_size(value)}" for name, value in parts.items() if value)
        return f"{_size(self.total)} ({told}) plus activations"


def memory_of(network: nn.Module, reference: nn.Module | None, optim: str) -> Memory:
    """What is held while `network` is trained; `reference` is a frozen copy, if there is one."""
    trained = [p for p in network.parameters() if p.requires_grad]
    return Memory(
        weights=_bytes(network),
        gradients=sum(p.numel() * p.element_size() for p in trained),
        optimizer=sum(p.numel() for p in trained) * _state_bytes(optim),
        reference=0 if reference is None else _bytes(reference),
    )


def forward_equivalents(
    schedule: Schedule,
    inversion: InversionConfig | None,
    *,
    has_reference: bool,
    recomputes: bool = False,
    every_landing: bool = False,
) -> float:
    """Forward passes that one batch costs: 3 for the policy with its backward (4 with checkpointing), 1 for the reference, and those of
    the inversion: its mean number of moves over the timesteps, times the network calls of a move.

    With every_landing a batch holds num_steps training points a pair: divide by num_steps for the cost of a point.
    """
    total = 3.0 + has_reference + recomputes
    if inversion is None:
        return total
    calls = 2 if inversion.solver == "heun" else 1 + inversion.renoise_steps
    if every_landing:
        return inversion.num_steps * (total + calls)
    moves = make_grid(schedule, torch.arange(schedule.max_timestep + 1), inversion).moves
    return total + calls * moves.double().mean().item()


def timed(call: Callable[[], object], device: torch.device) -> float:
    """Seconds of one call; the first one, which sets up kernels, is not counted."""
    start = 0.0
    for _ in range(2):
        _wait(device)
        start = time.perf_counter()
        call()
        _wait(device)
    return time.perf_counter() - start


class Announcement(TrainerCallback):
    """Says before the first step what will be trained, and, where a bar is wanted, what memory and time that takes."""

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Logs the settings; times one forward pass unless `disable_tqdm` is set."""
        if not state.is_world_process_zero:
            return
        logger.info(args.describe(args.world_size, elements=self.trainer.elements))
        if not args.disable_tqdm and logger.isEnabledFor(logging.INFO):
            logger.info(estimate(self.trainer, state.max_steps - state.global_step))


def estimate(trainer: Any, steps: int) -> str:
    """Memory and time of the next `steps` optimiser steps, in two lines."""
    args, frozen = trainer.args, trainer.reference
    copied = frozen.module if frozen.kind == "copy" else None
    memory = memory_of(trainer.network, copied, args.optim.value)
    forwards = forward_equivalents(
        trainer.denoiser.schedule,
        args.inversion(),
        has_reference=frozen.kind != "none",
        recomputes=bool(args.gradient_checkpointing),
        every_landing=args.inversion_landings == "all",
    )
    seconds = timed(trainer.one_forward(), args.device) * forwards * args.gradient_accumulation_steps
    room = ""
    if args.device.type == "cuda":
        room = f" of {_size(torch.cuda.mem_get_info(args.device)[1])} on {args.device}"
    return (
        f"memory: at least {memory}{room}\ntime: about {duration(seconds * steps)} for {steps} steps of {seconds:.3g} s "
        f"({forwards:.1f} forward passes a batch; sample pictures, evaluation and saving come on top)"
    )


def duration(seconds: float) -> str:
    """ "40 s", "12 min", "3.5 h"."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _wait(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def _state_bytes(optim: str) -> int:
    if optim in _STATE_BYTES:
        return _STATE_BYTES[optim]
    return _ADAM_8BIT_BYTES if "8bit" in optim else _ADAM_BYTES


def _bytes(module: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in module.parameters())


def _size(number: int) -> str:
    for unit, scale in (("GiB", 2**30), ("MiB", 2**20)):
        if number >= scale:
            return f"{number / scale:.1f} {unit}"
    return f"{number / 2**10:.0f} KiB"
