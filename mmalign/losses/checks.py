"""Checks of hyper-parameters: what is out of range is an error that names the range."""

import math

import torch
from torch import Tensor


def require_positive(name: str, value: float | int) -> None:
    """Raise unless `value` is a finite number above 0."""
    if not (value > 0 and math.isfinite(value)):
        raise ValueError(f"{name} must be a finite number above 0, got {value}")


def require_nonnegative(name: str, value: float | Tensor) -> None:
    """Raise if `value`, or any of its items, is negative. NaN passes: it must reach the loss and be seen there."""
    if bool(torch.as_tensor(value < 0).any()):
        raise ValueError(f"{name} must not be negative, got {_range(value)}")


def require_smoothing(value: float | Tensor, interval: str, *, why: str) -> None:
    """Raise unless label_smoothing, a number or one for each item, lies in `interval`, written like "[0, 0.5)"."""
    low, high = (float(bound) for bound in interval[1:-1].split(","))
    under = value < low if interval[0] == "[" else value <= low
    over = value > high if interval[-1] == "]" else value >= high
    if bool(torch.as_tensor(under).any()) or bool(torch.as_tensor(over).any()):
        raise ValueError(f"label_smoothing must lie in {interval} {why}, got {_range(value)}")


def _range(value: float | Tensor) -> str:
    if not isinstance(value, Tensor):
        return str(value)
    return f"{float(value.min()):g} to {float(value.max()):g}" if value.numel() > 1 else f"{float(value):g}"
