"""Noise on the way up (η): both forms against their formulas, their limits, and who shares a draw."""

import math
from dataclasses import replace

import pytest
import torch
from likelihood.toys import flow, latents, stable_diffusion, wavy

from mmalign.denoisers import Schedule
from mmalign.likelihood import InversionConfig, draws, invert


def by_hand(schedule: Schedule, x0: torch.Tensor, steps: list[int], eta: float, form: str, seed: int) -> torch.Tensor:
    """One row's noisy inversion written in x-space from the formulas of DDIM-η; returns x at the last step."""
    generator = draws.row_generators(seed, 0, [0], "inversion")[0]
    x, alpha_a, time = x0, 1.0, torch.zeros(1, dtype=torch.long)
    for step in steps:
        alpha_b = float(schedule.signal[step] ** 2)
        e = wavy(x, time + step, time)
        n = torch.randn(x.shape[1:], generator=generator).double()
        clean = (x - math.sqrt(1 - alpha_a) * e) / math.sqrt(alpha_a)
        if form == "bayes":
            r = eta * math.sqrt((1 - alpha_b / alpha_a) / (1 - alpha_b))
            x = math.sqrt(alpha_b) * clean + math.sqrt(1 - alpha_b) * (math.sqrt(1 - r * r) * e + r * n)
        else:
            variance = (1 - alpha_a) / (1 - alpha_b) * (1 - alpha_b / alpha_a)
            x = math.sqrt(alpha_b) * clean + math.sqrt(1 - alpha_b) * e + eta * math.sqrt(variance) * n
        alpha_a = alpha_b
    return x


@pytest.mark.parametrize("form", ["bayes", "published"])
def test_noise_enters_as_in_the_formulas(form: str) -> None:
    schedule, x0 = stable_diffusion(), latents(1)
    config = InversionConfig(num_steps=5, eta=0.4, eta_form=form)  # type: ignore[arg-type]
    result = invert(wavy, schedule, x0, torch.tensor([999]), config, draws.row_generators(7, 0, [0], "inversion"))
    expected = by_hand(schedule, x0, [199, 399, 599, 799, 999], 0.4, form, seed=7)
    torch.testing.assert_close(result.x_t, expected, rtol=1e-10, atol=1e-10)
    # The target stays the noise between latent and data, in the same units.
    tau = (result.x_t - schedule.signal[999] * x0) / schedule.noise[999]
    torch.testing.assert_close(result.target, tau, rtol=0, atol=1e-12)
    assert (result.x_t - by_hand(schedule, x0, [199, 399, 599, 799, 999], 0.0, form, seed=7)).abs().max() > 0.05


def test_eta_one_is_the_forward_process() -> None:
    """x_t then forgets the network: √ᾱ_t·x_0 plus noise of exactly the marginal's standard deviation."""
    schedule, t = stable_diffusion(), torch.tensor([0, 300, 999])
    x0 = torch.full((3, 30_000), 0.8, dtype=torch.float64)
    config = InversionConfig(num_steps=7, eta=1.0)
    results = [
        invert(model, schedule, x0, t, config, draws.row_generators(0, 0, range(3), "inversion")).x_t
        for model in (wavy, lambda x, time, rows: 5 + 0 * x)
    ]
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=1e-6)
    for row in range(3):
        noise = (results[0][row] - schedule.signal[t[row]] * 0.8) / schedule.noise[t[row]]
        assert abs(float(noise.std()) - 1) < 0.015 and abs(float(noise.mean())) < 0.02


@pytest.mark.parametrize(("form", "low", "high"), [("bayes", 0.98, 1.02), ("published", 1.3, 1.7)])
def test_the_bayes_form_keeps_the_marginal_and_the_published_form_inflates_it(
    form: str, low: float, high: float
) -> None:
    """On data N(0, 1) every marginal is N(0, 1) and the exact network is √(1−ᾱ)·x."""
    schedule = stable_diffusion()

    def exact(x: torch.Tensor, time: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        return schedule.noise[time][:, None] * x

    x0 = torch.randn(1, 8_000, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    spreads = {}
    for eta in (0.0, 0.5):
        config = InversionConfig(num_steps=200, eta=eta, eta_form=form)  # type: ignore[arg-type]
        generators = draws.row_generators(0, 0, [0], "inversion")
        spreads[eta] = float(invert(exact, schedule, x0, torch.tensor([999]), config, generators).x_t.std())
    assert low < spreads[0.5] / spreads[0.0] < high


def test_shared_noise_is_shared_by_the_sides_of_a_pair_only() -> None:
    schedule, x0 = stable_diffusion(), torch.zeros(4, 2, 3, 3, dtype=torch.float64)
    t = torch.tensor([500, 80, 500, 80])
    config = InversionConfig(eta=0.5, share_eta_noise=True)

    def nothing(x: torch.Tensor, time: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(x)

    x_t = invert(nothing, schedule, x0, t, config, draws.row_generators(0, 0, range(2), "inversion")).x_t
    assert torch.equal(x_t[:2], x_t[2:]) and not torch.equal(x_t[0], x_t[1])
    apart = replace(config, share_eta_noise=False)
    x_t = invert(nothing, schedule, x0, t, apart, draws.row_generators(0, 0, range(4), "inversion")).x_t
    assert not torch.equal(x_t[:2], x_t[2:])
    with pytest.raises(ValueError, match="same timestep"):
        invert(nothing, schedule, x0, t + torch.arange(4), config, draws.row_generators(0, 0, range(2), "inversion"))


def test_noise_needs_generators_and_a_variance_preserving_model() -> None:
    with pytest.raises(ValueError, match="2 generators for 2 latents, got none"):
        invert(wavy, stable_diffusion(), latents(2), torch.tensor([1, 2]), InversionConfig(eta=0.1))
    with pytest.raises(ValueError, match="flow"):
        invert(wavy, flow(), latents(2), torch.tensor([1, 2]), InversionConfig(eta=0.1))
