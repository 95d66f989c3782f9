"""What a run will take, told before its first step: memory that is certain to be held, and time from one timed forward pass."""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from mmalign.denoisers import Schedule
from mmalign.denoisers.parts import stored
from mmalign.likelihood.config import InversionConfig
from mmalign.likelihood.grids import make_grid
from mmalign.training.optimizers import state_bytes

logger = logging.getLogger("mmalign")


@dataclass(frozen=True)
class Memory:
    """Bytes: weights of the network, gradients, optimiser state and average of what is trained, the reference's own copy."""

    weights: int
    gradients: int
    optimizer: int
    average: int
    reference: int

    @property
    def total(self) -> int:
        """Everything but activations."""
        return self.weights + self.gradients + self.optimizer + self.average + self.reference

    def __str__(self) -> str:
        parts = {
            "weights": self.weights,
            "gradients": self.gradients,
            "optimiser": self.optimizer,
            "moving average": self.average,
            "reference copy": self.reference,
        }
        told = ", ".join(f"{name} {_size(value)}" for name, value in parts.items() if value)
        return f"{_size(self.total)} ({told}) plus activations"


def memory_of(network: nn.Module, reference: nn.Module | None, optim: str, *, averages: bool = False) -> Memory:
    """What is held while `network` is trained; `reference`: a frozen copy, if there is one; `averages`: a moving one is kept."""
    trained = [p for p in network.parameters() if p.requires_grad]
    size = sum(p.numel() * p.element_size() for p in trained)
    return Memory(
        weights=_bytes(network),
        gradients=size,
        optimizer=sum(state_bytes(optim, p) for p in trained),
        average=size if averages else 0,
        reference=0 if reference is None else _bytes(reference),
    )


def trained_passes(*, adapted: bool, recomputes: bool) -> float:
    """Forward passes that the policy costs with its backward: 3, or 2 where a LoRA alone is trained; 1 more with checkpointing."""
    return (2.0 if adapted else 3.0) + recomputes


def forward_equivalents(
    schedule: Schedule,
    inversion: InversionConfig | None,
    *,
    has_reference: bool,
    adapted: bool = False,
    recomputes: bool = False,
    every_landing: bool = False,
    visits: float | None = None,
) -> float:
    """Forward passes that one batch costs: 3 for the policy with its backward, 2 where a LoRA alone is trained, 1 more with
    checkpointing (0.75 in the UNets, where the last layer of a block is not repeated); 1 for the reference; and those of the inversion:
    its mean number of moves over the timesteps, times the network calls of a move.

    A backward computes gradients of activations (1) and of weights (1), of a frozen base only the former. Counted in the playground
    (benchmarks/training_cost.py), DPO's point costs 2.90 with a LoRA and 3.97 with all weights, the reference's pass included.

    With every_landing a batch holds num_steps training points a pair: divide by num_steps for the cost of a point. visits: how often a
    pair comes before its path is computed anew, where landings are used in turn.
    """
    policy = trained_passes(adapted=adapted, recomputes=recomputes)
    total = policy + has_reference
    if inversion is None:
        return total
    calls = 2 if inversion.solver == "heun" else 1 + inversion.renoise_steps
    if visits is not None:
        return policy + inversion.num_steps * (calls + has_reference) / max(1.0, visits)
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
    memory = memory_of(trainer.network, copied, args.optim.value, averages=args.ema_decay is not None)
    forwards = trainer.forward_passes(steps)
    seconds = timed(trainer.one_forward(), args.device) * forwards * args.gradient_accumulation_steps
    room = ""
    if args.device.type == "cuda":
        room = f" of {_size(torch.cuda.mem_get_info(args.device)[1])} on {args.device}"
    return (
        f"memory: at least {memory}{room}\ntime: about {duration(seconds * steps)} for {steps} steps of {seconds:.3g} s "
        f"({forwards:.1f} forward passes a batch; {trainer.on_top} come on top)"
    )


def duration(seconds: float) -> str:
    """ "40 s", "12 min", "3.5 h"."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _wait(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def _bytes(module: nn.Module) -> int:
    """Of weights, buffers, and what comes with quantised weights: the state dict has it all."""
    state = [value for value in module.state_dict().values() if isinstance(value, Tensor)]
    return sum(part.numel() * part.element_size() for value in state for part in stored(value))


def _size(number: int) -> str:
    for unit, scale in (("GiB", 2**30), ("MiB", 2**20)):
        if number >= scale:
            return f"{number / scale:.1f} {unit}"
    return f"{number / 2**10:.0f} KiB"
