"""Noise schedules as two tables, and the conversions between what a denoiser predicts and what a loss compares.

Every denoiser noises with x_t = signal[t]·x_0 + noise[t]·n. Two kinds differ only in their coordinates:

    VP (ε or v models)   signal = √ᾱ, noise = √(1−ᾱ)    u = x/signal   level λ = noise/signal   direction ε
    flow                 signal = 1−σ, noise = σ         u = x          level λ = σ              direction v = n − x_0

In both, u = x_0 + λ·direction, which is why inversion needs one algorithm only. Shapes: B rows, T timesteps.
"""

import hashlib
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

PredictionType = Literal["epsilon", "v_prediction", "flow"]
LossSpace = Literal["epsilon", "velocity"]

# Rows of a table for a schedule of continuous time, of which none tells the number.
_CONTINUOUS = 1000
# Below this ᾱ the level σ̂ exceeds 300 and x_t no longer holds the picture (zero-terminal-SNR tables end at ᾱ = 0).
SMALLEST_ALPHA_BAR = 1e-5


@dataclass(frozen=True, eq=False)
class Schedule:
    """The (T,) float64 tables of x_t = signal·x_0 + noise·n, and what the model predicts.

    Arithmetic runs in float32, or in float64 when the input is float64; half-precision inputs are raised to float32.
    """

    prediction_type: PredictionType
    signal: Float[Tensor, " T"]
    noise: Float[Tensor, " T"]

    @classmethod
    def from_scheduler(cls, scheduler: Any) -> "Schedule":
        """Read the training schedule out of a diffusers scheduler, whatever its inference settings are."""
        config = scheduler.config
        if "beta_start" in config:
            prediction_type, flow = config.get("prediction_type", "epsilon"), config.get("use_flow_sigmas", False)
            if flow and prediction_type == "flow_prediction":
                # Solvers that serve both kinds (UniPC, DPM-Solver, …): the betas in their config are not used.
                return cls._flow(config, "flow_shift")
            if flow or prediction_type not in ("epsilon", "v_prediction"):
                raise ValueError(
                    f"{type(scheduler).__name__} with prediction_type={prediction_type!r} and use_flow_sigmas={flow} is "
                    "not supported; supported are prediction_type 'epsilon' and 'v_prediction' without, "
                    "'flow_prediction' with use_flow_sigmas, and FlowMatchEulerDiscreteScheduler"
                )
            if "snr_shift_scale" in config:
                # CogVideoX shifts and rescales ᾱ after the product, so that its betas no longer tell it.
                alpha_bar = scheduler.alphas_cumprod.double().cpu()
            else:
                # The product is taken again in float64: in float32, 1 − ᾱ_0 keeps only four digits.
                alpha_bar = torch.cumprod(1 - scheduler.betas.double().cpu(), dim=0)
            return cls(prediction_type, alpha_bar.sqrt(), (1 - alpha_bar).sqrt())
        if "shift" in config and "base_shift" in config:
            if config.get("invert_sigmas", False):
                raise ValueError("flow schedules with invert_sigmas=True (noise at σ = 0) are not supported")
            return cls._flow(config, "shift")
        if "scaler" in config and "s" in config:
            return cls._cosine(config["scaler"], config["s"])
        raise ValueError(
            f"{type(scheduler).__name__} has neither betas nor flow sigmas in its config; supported are the DDPM "
            "family (DDPM, DDIM, PNDM, Euler, DPM-Solver, …), FlowMatchEulerDiscreteScheduler and DDPMWuerstchenScheduler"
        )

    @classmethod
    def _flow(cls, config: Any, shift: str) -> "Schedule":
        """σ = 1/T … 1, moved by the config's field `shift` unless the shift is made for each picture."""
        steps = config["num_train_timesteps"]
        sigma = torch.arange(1, steps + 1, dtype=torch.float64) / steps
        if not config.get("use_dynamic_shifting", False):
            sigma = config[shift] * sigma / (1 + (config[shift] - 1) * sigma)
        return cls("flow", 1 - sigma, sigma)

    @classmethod
    def _cosine(cls, scaler: float, offset: float) -> "Schedule":
        """ᾱ = cos²(π/2 · (r + s)/(1 + s)) over its value at 0, kept within 1e-4 of its ends, for ratios r = 1/T … 1 of an ε-model.

        scaler moves the ratio: r^scaler below 1, 1 − (1 − r)^scaler above.
        """
        ratio = torch.arange(1, _CONTINUOUS + 1, dtype=torch.float64) / _CONTINUOUS
        ratio = 1 - (1 - ratio) ** scaler if scaler > 1 else ratio**scaler
        angle = torch.pi / 2 * (torch.cat([torch.zeros(1), ratio]) + offset) / (1 + offset)
        alpha_bar = (angle.cos() ** 2 / angle[0].cos() ** 2)[1:].clamp(1e-4, 0.9999)
        return cls("epsilon", alpha_bar.sqrt(), (1 - alpha_bar).sqrt())

    @property
    def num_timesteps(self) -> int:
        return self.signal.shape[0]

    @property
    def is_flow(self) -> bool:
        return self.prediction_type == "flow"

    @property
    def max_timestep(self) -> int:
        """The largest timestep that may be drawn: ᾱ_t > 1e-5 for VP, the last one for flow."""
        if self.is_flow:
            return self.num_timesteps - 1
        return int((self.signal**2 > SMALLEST_ALPHA_BAR).nonzero().max())

    @property
    def loss_space(self) -> LossSpace:
        """The space in which errors are compared unless told otherwise: ε for VP models, velocity for flow."""
        return "velocity" if self.is_flow else "epsilon"

    def to(self, device: torch.device | str) -> "Schedule":
        """The same tables on another device, which spares a copy at every call."""
        return Schedule(self.prediction_type, self.signal.to(device), self.noise.to(device))

    def fingerprint(self) -> str:
        """sha256 of prediction type and tables: the part of a cache key that the schedule owns."""
        digest = hashlib.sha256(self.prediction_type.encode())
        for table in (self.signal, self.noise):
            digest.update(table.detach().cpu().double().numpy().tobytes())
        return digest.hexdigest()

    def level(self, t: Int[Tensor, " B"]) -> Float[Tensor, " B"]:
        """λ_t in float64: σ̂ = noise/signal for VP, σ for flow. t = −1 stands for the data itself (λ = 0)."""
        noise, signal = self._gather(self.noise, t), self._gather(self.signal, t)
        level = noise if self.is_flow else noise / signal
        return torch.where(t < 0, torch.zeros_like(level), level)

    def scale(self, t: Int[Tensor, " B"]) -> Float[Tensor, " B"]:
        """x/u in float64: signal for VP, 1 for flow. t = −1 stands for the data itself (scale 1)."""
        signal = self._gather(self.signal, t)
        return torch.where((t < 0) | self.is_flow, torch.ones_like(signal), signal)

    def model_timestep(self, t: Int[Tensor, " B"]) -> Tensor:
        """What the network is told: t itself for VP, σ_t·T for flow."""
        return (self._gather(self.noise, t) * self.num_timesteps).float() if self.is_flow else t

    def add_noise(
        self, x0: Float[Tensor, "B ..."], noise: Float[Tensor, "B ..."], t: Int[Tensor, " B"]
    ) -> Float[Tensor, "B ..."]:
        """x_t = signal[t]·x_0 + noise[t]·n."""
        signal, sigma = self._coefficients(t, x0)
        return signal * precise(x0) + sigma * precise(noise)

    def to_noise(
        self, output: Float[Tensor, "B ..."], x_fed: Float[Tensor, "B ..."], t: Int[Tensor, " B"]
    ) -> Float[Tensor, "B ..."]:
        """The model's output as a noise prediction: ε | √ᾱ·v + √(1−ᾱ)·x | x + (1−σ)·v.

        t is the timestep the model was told, x_fed the tensor it was fed, also where the two do not belong together.
        """
        if self.prediction_type == "epsilon":
            return precise(output)
        signal, sigma = self._coefficients(t, x_fed)
        if self.is_flow:
            return precise(x_fed) + signal * precise(output)
        return signal * precise(output) + sigma * precise(x_fed)

    def to_direction(
        self, output: Float[Tensor, "B ..."], x_fed: Float[Tensor, "B ..."], t: Int[Tensor, " B"]
    ) -> Float[Tensor, "B ..."]:
        """The model's output as d(u)/dλ: ε for VP models, v for flow."""
        return precise(output) if self.is_flow else self.to_noise(output, x_fed, t)

    def to_data(
        self, output: Float[Tensor, "B ..."], x_fed: Float[Tensor, "B ..."], t: Int[Tensor, " B"]
    ) -> Float[Tensor, "B ..."]:
        """The model's output as an estimate of the data: (x − √(1−ᾱ)·ε)/√ᾱ | √ᾱ·x − √(1−ᾱ)·v | x − σ·v."""
        signal, sigma = self._coefficients(t, x_fed)
        if self.is_flow:
            return precise(x_fed) - sigma * precise(output)
        if self.prediction_type == "epsilon":
            return (precise(x_fed) - sigma * precise(output)) / signal
        return signal * precise(x_fed) - sigma * precise(output)

    def target(
        self,
        x0: Float[Tensor, "B ..."],
        noise: Float[Tensor, "B ..."],
        t: Int[Tensor, " B"],
        loss_space: LossSpace | None = None,
    ) -> Float[Tensor, "B ..."]:
        """What a perfect denoiser would output for forward noise: n in ε-space; n − x_0 (flow) or √ᾱ·n − √(1−ᾱ)·x_0."""
        if (loss_space or self.loss_space) == "epsilon":
            return precise(noise)
        if self.is_flow:
            return precise(noise) - precise(x0)
        signal, sigma = self._coefficients(t, x0)
        return signal * precise(noise) - sigma * precise(x0)

    def _gather(self, table: Tensor, t: Tensor) -> Tensor:
        return table.to(t.device)[t.clamp(min=0)]

    def _coefficients(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        return rows_like(self._gather(self.signal, t), like), rows_like(self._gather(self.noise, t), like)


def precise(x: Tensor) -> Tensor:
    """x in float32, or in float64 if it already is."""
    return x if x.dtype == torch.float64 else x.float()


def rows_like(values: Float[Tensor, " B"], like: Float[Tensor, "..."]) -> Tensor:
    """One number a row, on like's device, in its precise dtype, shaped (B, 1, …, 1) to broadcast over such rows."""
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    return values.to(like.device, dtype).view(-1, *[1] * (like.ndim - 1))
