"""Schedules and analytic denoisers for the inversion tests: everything here has a closed form."""

import torch
from torch import Tensor

from mmalign.denoisers import Schedule


def stable_diffusion(prediction_type: str = "epsilon") -> Schedule:
    """The scaled-linear schedule of Stable Diffusion, written out."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    alpha_bar = torch.cumprod(1 - betas, dim=0)
    return Schedule(prediction_type, alpha_bar.sqrt(), (1 - alpha_bar).sqrt())  # type: ignore[arg-type]


def flow() -> Schedule:
    sigma = torch.arange(1, 1001, dtype=torch.float64) / 1000
    return Schedule("flow", 1 - sigma, sigma)


class Mixture:
    """Two-dimensional Gaussian mixture with its exact noise prediction ε*(x, t) = −√(1−ᾱ_t)·∇log q_t(x)."""

    means = torch.tensor([[1.5, 0.0], [-1.0, 1.0], [0.0, -1.5]], dtype=torch.float64)
    std = torch.tensor([0.3, 0.2, 0.4], dtype=torch.float64)
    weights = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    seed = 0

    def __init__(self, schedule: Schedule) -> None:
        self.schedule = schedule

    def sample(self, count: int) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed)
        which = torch.multinomial(self.weights, count, replacement=True, generator=generator)
        noise = torch.randn(count, 2, generator=generator, dtype=torch.float64)
        return self.means[which] + self.std[which][:, None] * noise

    def __call__(self, x: Tensor, t: Tensor, rows: Tensor) -> Tensor:
        t = t.clamp(min=0)  # the released scripts also ask for negative timesteps
        signal, noise = self.schedule.signal[t][:, None], self.schedule.noise[t][:, None]
        variance = (signal * self.std) ** 2 + noise**2
        away = x[:, None] - signal[..., None] * self.means
        share = torch.softmax(self.weights.log() - variance.log() - away.square().sum(-1) / (2 * variance), dim=1)
        return noise * (share[..., None] * away / variance[..., None]).sum(1)


class Gaussian:
    """Data N(μ, s²): the exact prediction of each parameterisation, and the exact probability-flow solution."""

    mean, std = 0.7, 0.5

    def __init__(self, schedule: Schedule) -> None:
        self.schedule = schedule

    def __call__(self, x: Tensor, t: Tensor, rows: Tensor) -> Tensor:
        signal, noise = self.schedule.signal[t][:, None], self.schedule.noise[t][:, None]
        score = -(x - signal * self.mean) / ((signal * self.std) ** 2 + noise**2)
        eps = -noise * score
        if self.schedule.prediction_type == "epsilon":
            return eps
        x0 = (x + noise**2 * score) / signal.clamp(min=1e-9)
        # At σ = 1 a flow's picture is pure noise and the best guess of the data is their mean.
        x0 = torch.where(signal > 1e-9, x0, torch.full_like(x, self.mean))
        return eps - x0 if self.schedule.is_flow else signal * eps - noise * x0

    def solution(self, x0: Tensor, t: Tensor) -> Tensor:
        signal, noise = self.schedule.signal[t][:, None], self.schedule.noise[t][:, None]
        spread = ((signal * self.std) ** 2 + noise**2).sqrt()
        return signal * self.mean + spread * (x0 - self.mean) / self.std


class Recorder:
    """A predictor that keeps what it was asked and what it answered."""

    def __init__(self, predict: object) -> None:
        self.predict, self.inputs, self.times, self.rows, self.outputs = predict, [], [], [], []  # type: ignore[var-annotated]

    def __call__(self, x: Tensor, t: Tensor, rows: Tensor) -> Tensor:
        output = self.predict(x, t, rows)  # type: ignore[operator]
        for kept, value in zip((self.inputs, self.times, self.rows, self.outputs), (x, t, rows, output), strict=True):
            kept.append(value.clone())
        return output


def wavy(x: Tensor, t: Tensor, rows: Tensor) -> Tensor:
    """Elementwise, nonlinear, different for every timestep and every row of the batch."""
    shape = (-1,) + (1,) * (x.ndim - 1)
    return torch.sin(x * 1.3 + t.to(x.dtype).view(shape) / 200 + rows.to(x.dtype).view(shape) * 0.7) + 0.2 * x


def latents(rows: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(rows, 2, 3, 3, generator=torch.Generator().manual_seed(5), dtype=torch.float64).to(dtype)
