"""`beta="auto"`: a β at which a stated share of the link is used, found while training begins and then held.

    saturation(β) = 1 − mean_i clamp( ℓ'(|u_i|) / ℓ'(0), 0, 1 ),   u = strength · (ρ_w − ρ_l)

ℓ(D) is the loss of a pair with ρ_w = D/2, ρ_l = −D/2: how much of its slope at policy = reference a pair has lost where the policy has
gone as far with it as it has. For the logistic link it is the mean of tanh(β|u|/2). It takes |u|, as the slope at −u says nothing of
how far the policy went. Losses without a β do not count in a sum.

Why it is held after a while. β is what the policy's distance from the reference costs. Were β to follow the log-ratios for a whole
run (SimpleTuner's auto_beta does: σ(−z) = 0.2 at a running mean of |z|, here a saturation of 0.6), wider log-ratios would make it
smaller, which lets them grow wider, and so on: a loss that no drift ever ends. Held, the link saturates as the log-ratios outgrow it,
as with any β that was typed in. And why it is not solved for at once: at the first step all u are 0, whatever β is; Adam, whose steps
hardly depend on the loss's scale, then lets the log-ratios grow alike for any β, so that they can be measured under the one that a run
starts with.
"""

import json
import logging
import math
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import TrainerCallback

from mmalign import losses
from mmalign.files import write_json

logger = logging.getLogger("mmalign")
FILE = "auto_beta.json"
LARGEST_FACTOR = 1.1  # by which β moves in a step at most: Adam's running squares of the gradient follow it
WINDOW = 20  # steps whose pairs the saturation is told on
_PAIRS_OF_A_STEP = 512
_FAR = 1e6
_CLOSE = 1e-7


@dataclass(frozen=True)
class Slope:
    """The part of an objective that β scales: losses that take β, their weights and other hyper-parameters."""

    names: tuple[str, ...]
    weights: tuple[float, ...]
    options: dict[str, Any] = field(default_factory=dict)

    def at(self, gap: Float[Tensor, " N"], beta: float) -> Float[Tensor, " N"]:
        """ℓ'(D) at every D of `gap`, in float64."""
        distance = gap.detach().double().requires_grad_()
        zero, one = torch.zeros_like(distance), torch.ones_like(distance)
        pair = losses.PairLogProbs(distance / 2, -distance / 2, zero, zero, one, one)
        scale = {"rejected_scale": one} if "sdpo" in self.names else {}
        with torch.enable_grad():
            loss = losses.compute(
                list(self.names), pair, loss_weights=self.weights, **self.options | scale | {"beta": beta}
            )
            return torch.autograd.grad(loss.sum(), distance)[0]

    def saturation(self, gap: Float[Tensor, " N"], beta: float) -> float:
        """The share of the link's slope that pairs with these u have lost at `beta`, in 0 … 1."""
        slope = self.at(torch.cat([gap.abs(), gap.new_zeros(1)]), beta)
        return 1 - float((slope[:-1] / slope[-1]).clamp(0, 1).mean())

    def solve(self, gap: Float[Tensor, " N"], target: float, low: float, high: float) -> float:
        """The β in low … high with this saturation, or the end that comes nearest."""
        if self.saturation(gap, high) <= target:
            return high
        if self.saturation(gap, low) >= target:
            return low
        while high / low > 1 + _CLOSE:
            middle = math.sqrt(low * high)
            low, high = (middle, high) if self.saturation(gap, middle) < target else (low, middle)
        return low


def slope_of(args: Any, saturation: float) -> Slope:
    """The part of the config's objective that β scales; ValueError where it has none, no slope of its own, or never that saturation."""
    if not 0 < saturation < 1:
        raise ValueError(f"beta_saturation must lie between 0 and 1, got {saturation}")
    weights = args.loss_weights or [1.0] * len(args.loss_type)
    chosen = [
        (key, weight)
        for key, weight in zip(args.loss_type, weights, strict=True)
        if "beta" in losses.get(key).hyper and weight
    ]
    for key, _ in chosen:
        info = losses.get(key)
        if info.reference_free:
            published = ", ".join(f"{beta.here:g}" for beta in info.betas) or "none"
            raise ValueError(
                f"beta='auto' measures log-ratios to a reference, and loss_type {key!r} has none: set beta (published: {published})"
            )
        if info.batch_coupled:
            raise ValueError(
                f"beta='auto' needs a loss of single pairs, and loss_type {key!r} sorts its batch: set beta"
            )
    taken = {option for key, _ in chosen for option in losses.get(key).hyper}
    options = {name: value for name, value in args.loss_options().items() if name in taken}
    slope = Slope(tuple(key for key, _ in chosen), tuple(weight for _, weight in chosen), options)
    named = "+".join(slope.names)
    if not slope.at(torch.zeros(1), 1.0) < 0:
        raise ValueError(
            f"beta='auto' needs a loss that falls at policy = reference, and loss_type {named!r} does not: set beta"
        )
    most = slope.saturation(torch.tensor([_FAR]), 1.0)
    if not most > saturation:
        raise ValueError(
            f"loss_type {named!r} keeps a slope however large beta is (saturation {most:.3g} at most): lower beta_saturation from "
            f"{saturation:g}, or set beta"
        )
    return slope


def check_auto_beta(args: Any) -> None:
    """ValueError for options of beta='auto' that would have no effect, or with which it would have none."""
    if args.beta_calibration_steps < 1:
        raise ValueError(f"beta_calibration_steps must be at least 1, got {args.beta_calibration_steps}")
    if args.beta == "auto":
        slope_of(args, args.beta_saturation)
        return
    for name in ("beta_saturation", "beta_calibration_steps"):
        if getattr(args, name) != type(args).__dataclass_fields__[name].default:
            raise ValueError(f"{name} has no effect with a fixed beta: set beta='auto'")


class AutoBeta(TrainerCallback):
    """Moves `trainer.beta` after each of the first `beta_calibration_steps` steps that follow the warm-up, then leaves it.

    Of every step the first 512 pairs count, over all processes; they are gathered, so that every process moves alike.
    """

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        self.slope = slope_of(trainer.args, trainer.args.beta_saturation)
        self._step: list[float] = []
        self._window: deque[list[float]] = deque(maxlen=WINDOW)

    def observe(self, gap: Float[Tensor, " B"]) -> None:
        """Takes in u of a batch, until β is held."""
        if not self._held(self.trainer.state.global_step):
            self._step += gap.detach().abs().tolist()

    def _last_step(self) -> int:
        args = self.trainer.args
        return int(args.get_warmup_steps(self.trainer.state.max_steps)) + int(args.beta_calibration_steps)

    def _held(self, step: int) -> bool:
        return step >= self._last_step()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """ValueError for a run that would be over before β is held."""
        if state.max_steps <= self._last_step():
            raise ValueError(
                f"beta='auto' is held from step {self._last_step()} on (warm-up and beta_calibration_steps), and the run has "
                f"{state.max_steps}: lower beta_calibration_steps, or set beta"
            )

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Moves β towards the one at which the window's pairs have the stated saturation, by a factor of 1.1 at most."""
        last = self._last_step()
        if state.global_step > last:
            return
        self._window.append(self._gathered())
        gap = torch.tensor([u for step in self._window for u in step], dtype=torch.float64)
        warming_up = state.global_step <= last - args.beta_calibration_steps
        if warming_up or not gap.any():
            return
        beta = self.trainer.beta
        low, high = beta / LARGEST_FACTOR, beta * LARGEST_FACTOR
        self.trainer.beta = self.slope.solve(gap, args.beta_saturation, low, high)
        if state.global_step == last and state.is_world_process_zero:
            self._tell(self.slope.saturation(gap, self.trainer.beta), arrived=low < self.trainer.beta < high)

    def _gathered(self) -> list[float]:
        args = self.trainer.args
        parts = [self._step]
        if args.world_size > 1:
            parts = [[]] * args.world_size
            torch.distributed.all_gather_object(parts, self._step)
        self._step = []
        # Sorted: how pairs were spread over processes must not show in the last digit.
        return sorted(u for part in parts for u in part[: max(1, _PAIRS_OF_A_STEP // len(parts))])

    def _tell(self, saturation: float, *, arrived: bool) -> None:
        args = self.trainer.args
        logger.info(
            "beta is held at %.4g from step %d on (saturation %.3f over the last %d steps)",
            self.trainer.beta,
            self.trainer.state.global_step,
            saturation,
            len(self._window),
        )
        if not arrived:
            logger.warning(
                "beta was still moving when it was held, and its saturation is %.3f instead of %g: raise beta_calibration_steps",
                saturation,
                args.beta_saturation,
            )

    def save(self, folder: Path) -> None:
        """Writes β and what it is told by to `auto_beta.json`."""
        write_json(folder / FILE, {"beta": self.trainer.beta, "window": list(self._window)})

    def load(self, folder: Path) -> None:
        """Goes on where a checkpoint was written."""
        saved = json.loads((folder / FILE).read_text(encoding="utf-8"))
        self.trainer.beta = saved["beta"]
        self._window = deque(saved["window"], maxlen=WINDOW)
        self._step = []
