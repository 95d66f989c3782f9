"""Errors as log-ratios: spaces, signs, the value and slope of the loss at the reference, SDPO's safeguard."""

import math

import pytest
import torch
from likelihood.toys import flow, stable_diffusion
from tiny import tiny_pipeline

from mmalign import losses
from mmalign.denoisers import Schedule, adapter_for
from mmalign.likelihood import (
    InversionConfig,
    excess_errors,
    forward_points,
    invert,
    mean_squared_error,
    output_space_scale,
    pair_log_probs,
    prediction_error,
)

SCHEDULES = {"epsilon": stable_diffusion(), "v_prediction": stable_diffusion("v_prediction"), "flow": flow()}
SPACES = ["epsilon", "velocity"]


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def outputs(schedule: Schedule, t: torch.Tensor, eps: torch.Tensor, x0: torch.Tensor) -> torch.Tensor:
    """What a model of this parameterisation outputs when it believes in (x̂_0, ε̂)."""
    if schedule.prediction_type == "epsilon":
        return eps
    if schedule.is_flow:
        return eps - x0
    signal, noise = (table[t].view(-1, 1, 1, 1) for table in (schedule.signal, schedule.noise))
    return signal * eps - noise * x0


@pytest.mark.parametrize("loss_space", SPACES)
@pytest.mark.parametrize("name", SCHEDULES)
def test_errors_are_measured_in_the_space_that_was_asked_for(name: str, loss_space: str) -> None:
    """Against the definition: the model's ε̂, or its v̂, minus the ones the noised latent was made with."""
    schedule, t = SCHEDULES[name], torch.tensor([0, 30, 500, 990])
    x0, noise, wrong = random(3, 4, 2, 3, 3)
    point = forward_points(schedule, x0, t, noise)
    signal, sigma = (table[t].view(-1, 1, 1, 1) for table in (schedule.signal, schedule.noise))
    x0_hat = (point.x_t - sigma * wrong) / signal  # the belief that goes with ε̂ = wrong
    prediction = outputs(schedule, t, wrong, x0_hat)
    if loss_space == "epsilon":
        difference = wrong - noise
    elif schedule.is_flow:
        difference = (wrong - x0_hat) - (noise - x0)
    else:
        difference = (signal * wrong - sigma * x0_hat) - (signal * noise - sigma * x0)
    error = prediction_error(prediction, point.x_t, point.target, t, schedule, loss_space)  # type: ignore[arg-type]
    torch.testing.assert_close(error, difference.square().mean((1, 2, 3)), rtol=1e-8, atol=0)
    default = prediction_error(prediction, point.x_t, point.target, t, schedule)
    assert torch.equal(default, error) == (loss_space == ("velocity" if schedule.is_flow else "epsilon"))


def test_mean_squared_error_is_a_float32_mean_per_row() -> None:
    prediction, target = random(3, 4, 5, 5), random(3, 4, 5, 5, seed=1)
    expected = ((prediction - target) ** 2).mean((1, 2, 3))
    error = mean_squared_error(prediction.bfloat16(), target.float())
    assert error.dtype == torch.float32 and error.shape == (3,)
    torch.testing.assert_close(error.double(), expected, rtol=2e-2, atol=0)
    # bfloat16 accumulation would lose this difference entirely.
    assert mean_squared_error(torch.full((1, 100), 1.0 + 2**-7).bfloat16(), torch.ones(1, 100)).item() > 0


def make_pairs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    schedule, t = stable_diffusion(), torch.tensor([10, 600]).repeat(2)
    point = forward_points(schedule, random(4, 2, 3, 3), t, random(2, 2, 3, 3, seed=1).repeat(2, 1, 1, 1))
    return point.x_t, point.target, t


def test_policy_equal_to_reference_gives_exactly_log_two() -> None:
    x_t, target, t = make_pairs()
    prediction = random(4, 2, 3, 3, seed=3).float().requires_grad_()
    m, r = excess_errors(prediction, prediction, x_t.float(), target.float(), t, stable_diffusion())
    logps = pair_log_probs(m, r)
    loss = losses.compute("sigmoid", logps, beta=5000.0)
    assert torch.equal(loss, torch.full((2,), math.log(2)))
    assert not r.requires_grad and m.requires_grad


def test_slope_at_the_reference_is_a_quarter_beta() -> None:
    """dL/dm^w = +β/4 and dL/dm^l = −β/4 with z = −½·β·Δ."""
    beta, m = 200.0, torch.tensor([0.3, 0.4, 0.5, 0.9], dtype=torch.float64, requires_grad=True)
    losses.compute("sigmoid", pair_log_probs(m, m.detach()), beta=beta).sum().backward()
    torch.testing.assert_close(m.grad, torch.tensor([1.0, 1.0, -1.0, -1.0], dtype=torch.float64) * beta / 4)


def test_log_probs_are_minus_half_the_errors_and_a_better_winner_lowers_the_loss() -> None:
    m, r = torch.tensor([0.2, 0.6, 0.5, 0.7]), torch.tensor([0.4, 0.5, 0.3, 0.8])
    logps = pair_log_probs(m, r)
    delta = (m - r)[:2] - (m - r)[2:]  # −0.4 (winner gained), +0.2
    loss = losses.compute("sigmoid", logps, beta=10.0)
    torch.testing.assert_close(loss, torch.nn.functional.softplus(0.5 * 10.0 * delta))
    assert loss[0] < math.log(2) < loss[1]
    assert pair_log_probs(m, None).reference_chosen is None
    swapped = pair_log_probs(m.roll(2), r.roll(2))
    torch.testing.assert_close(
        losses.compute("sigmoid", swapped, beta=10.0), torch.nn.functional.softplus(-5.0 * delta)
    )


def test_a_batch_of_pairs_is_the_mean_of_single_pairs_in_loss_and_gradient() -> None:
    """A real (tiny) UNet, three pairs with their own timesteps, inverted latents, loss and parameter gradients."""
    pipe = tiny_pipeline("sd")
    denoiser, unet = adapter_for(pipe), pipe.unet
    conditioning = denoiser.encode_prompt(["a red sneaker", "a bag", ""])
    x0, t = random(6, 4, 8, 8, seed=2).float(), torch.tensor([800, 40, 333])
    reference = tiny_pipeline("sd", seed=1).unet

    def pair_loss(pairs: list[int]) -> torch.Tensor:
        rows = torch.tensor(pairs + [p + 3 for p in pairs])
        both, times = conditioning[torch.tensor(pairs)].repeat_pair(), t[pairs].repeat(2)
        point = invert(
            lambda x, time, active: denoiser.predict(unet, x, time, both[active]),
            denoiser.schedule,
            x0[rows],
            times,
            InversionConfig(num_steps=4, renoise_steps=1),
        )
        with torch.no_grad():
            other = denoiser.predict(reference, point.x_t, times, both)
        policy = denoiser.predict(unet, point.x_t, times, both)
        m, r = excess_errors(policy, other, point.x_t, point.target, times, denoiser.schedule)
        return losses.compute("sigmoid", pair_log_probs(m, r), beta=10.0).mean()

    def gradient(loss: torch.Tensor) -> torch.Tensor:
        unet.zero_grad()
        loss.backward()
        return torch.cat([p.grad.flatten() for p in unet.parameters() if p.grad is not None])

    batch = pair_loss([0, 1, 2])
    singles = [pair_loss([pair]) for pair in range(3)]
    assert torch.stack(singles).std() > 1e-3, "the pairs must differ for this to mean anything"
    torch.testing.assert_close(batch, torch.stack(singles).mean(), rtol=1e-4, atol=1e-5)
    together, apart = gradient(batch), torch.stack([gradient(loss) for loss in singles]).mean(0)
    assert together.norm() > 1e-3
    torch.testing.assert_close(together, apart, rtol=1e-3, atol=1e-5 * float(together.norm()) + 1e-6)


def test_a_bfloat16_network_leaves_errors_in_float32() -> None:
    pipe = tiny_pipeline("sd-v")
    denoiser = adapter_for(pipe)
    conditioning, t = denoiser.encode_prompt(["a bag", "a dress"]), torch.tensor([5, 700])
    point = forward_points(denoiser.schedule, random(2, 4, 8, 8), t, random(2, 4, 8, 8, seed=1))

    def error() -> torch.Tensor:
        with torch.no_grad():
            prediction = denoiser.predict(pipe.unet, point.x_t, t, conditioning)
        return prediction_error(prediction, point.x_t.float(), point.target.float(), t, denoiser.schedule)

    exact = error()
    pipe.unet.to(torch.bfloat16)
    rounded = error()
    assert rounded.dtype == torch.float32
    torch.testing.assert_close(rounded, exact, rtol=0.05, atol=0)


@pytest.mark.parametrize("loss_space", SPACES)
@pytest.mark.parametrize("name", SCHEDULES)
def test_safeguard_from_autograd(name: str, loss_space: str) -> None:
    """λ from gradients of the errors with respect to the raw outputs, also with unequal timesteps in a pair."""
    schedule, t = SCHEDULES[name], torch.tensor([30, 500, 700, 90, 700, 640])
    x_t, target = random(2, 6, 2, 3, 3)
    aligned = random(3, 2, 3, 3, seed=4)
    prediction = torch.cat([aligned, aligned * torch.tensor([1.0, -1.0, 0.2]).view(3, 1, 1, 1)])
    if name != "epsilon":
        prediction = prediction + random(6, 2, 3, 3, seed=5)
    prediction.requires_grad_()
    error = prediction_error(prediction, x_t, target, t, schedule, loss_space)  # type: ignore[arg-type]
    (gradient,) = torch.autograd.grad(error.sum(), prediction)
    scale = output_space_scale(prediction, x_t, target, t, schedule, mu=0.9, loss_space=loss_space)  # type: ignore[arg-type]
    assert scale.shape == (3,) and not scale.requires_grad
    for pair in range(3):
        winner, loser = gradient[pair].flatten(), gradient[pair + 3].flatten()
        agreement = float(winner @ loser)
        expected = min(1.0, 0.1 * float(winner @ winner) / agreement) if agreement > 0 else 1.0
        assert float(scale[pair]) == pytest.approx(expected, rel=1e-9)
        # To first order a step along −(g_w − λ·g_l) keeps at least μ = 0.9 of the winner's own progress.
        assert float(winner @ (winner - scale[pair] * loser)) >= 0.9 * float(winner @ winner) * (1 - 1e-9)


def test_safeguard_limits() -> None:
    """Same gradients on both sides: λ = 1 − μ. Opposite: nothing to guard."""
    schedule, t = stable_diffusion(), torch.tensor([400, 400])
    same = random(1, 2, 3, 3).repeat(2, 1, 1, 1)
    zero = torch.zeros_like(same)
    assert output_space_scale(same, zero, zero, t, schedule, mu=0.6).item() == pytest.approx(0.4)
    opposite = same * torch.tensor([1.0, -1.0]).view(2, 1, 1, 1)
    assert output_space_scale(opposite, zero, zero, t, schedule, mu=0.6).item() == 1
    assert output_space_scale(zero, zero, zero, t, schedule, mu=0.6).item() == 1
