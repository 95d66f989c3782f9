"""Reward gradients step by step against the gradient of the whole sampler, in float64, and against closed forms."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny import tiny_pipeline
from torch import Tensor

from mmalign.denoisers import Schedule, adapter_for
from mmalign.likelihood.rollout import (
    RolloutConfig,
    Start,
    draw_start,
    exact_losses,
    graph_losses,
    rollout,
    step_weights,
    timesteps,
)

ROWS = [3, 8]


@pytest.fixture(scope="module", params=["sd", "sd-v", "sd3"])
def pipe(request: Any) -> Any:
    made = tiny_pipeline(request.param)
    adapter_for(made).module.double()
    return made


def predictor(pipe: Any) -> Callable[[Tensor, Tensor, Tensor, bool], Tensor]:
    denoiser = adapter_for(pipe)
    text, empty = (
        denoiser.encode_prompt(prompts).to(dtype=torch.float64) for prompts in (["a red bag", "a dress"], [""])
    )

    def predict(x: Tensor, t: Tensor, row: Tensor, conditioned: bool) -> Tensor:
        return denoiser.predict(denoiser.module, x, t, text[row] if conditioned else empty[[0] * len(x)])

    return predict


def reward(x0: Tensor) -> Tensor:
    """Not linear, so that ∂L/∂x̂_0 depends on the picture."""
    target = torch.linspace(-1, 1, x0[0].numel(), dtype=x0.dtype).reshape(x0[0].shape)
    return torch.tanh(x0 * target).flatten(1).mean(1) + (x0 - target).square().flatten(1).mean(1)


def gradients(network: torch.nn.Module, losses: Tensor) -> list[Tensor]:
    network.zero_grad()
    (losses * torch.tensor([0.3, 1.7], dtype=losses.dtype)).sum().backward()
    return [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in network.parameters()]


CASES = [
    RolloutConfig(num_steps=6, grad_steps=3),
    RolloutConfig(num_steps=6, grad_steps=2, grad_cond_only=True, guidance_scale=3),
    RolloutConfig(num_steps=6, grad_steps=3, grad_uncond_only=True, guidance_scale=5),
    RolloutConfig(num_steps=4, grad_steps=4, guidance_scale=1),
    RolloutConfig(num_steps=4, grad_steps=4, guidance_scale=1, solver="renoise"),
    RolloutConfig(num_steps=4, grad_steps=2, guidance_scale=2, solver="renoise"),
]


@pytest.mark.parametrize("config", CASES, ids=lambda c: f"{c.solver}-{c.num_steps}-{c.grad_steps}-{c.guidance_scale:g}")
def test_step_by_step_gradients_are_those_of_the_whole_sampler(pipe: Any, config: RolloutConfig) -> None:
    denoiser, predict = adapter_for(pipe), predictor(pipe)
    network, schedule = denoiser.module, denoiser.schedule
    start = draw_start(0, 0, ROWS, (4, 8, 8), config, dtype=torch.float64)
    if config.stride > 1:
        start = Start(start.noise, torch.tensor([1, 0]), start.renoise)
    exact = exact_losses(predict, schedule, start, config, reward, list(network.parameters()))
    ours = gradients(network, exact)
    whole = graph_losses(predict, schedule, start, config, reward, checkpointed=False)
    theirs = gradients(network, whole)
    torch.testing.assert_close(exact, whole, rtol=1e-12, atol=1e-12)
    largest = max(float(gradient.abs().max()) for gradient in theirs)
    assert largest > 1e-6
    for mine, other in zip(ours, theirs, strict=True):
        assert float((mine - other).abs().max()) <= 1e-10 * largest


def test_checkpoints_change_nothing_but_memory() -> None:
    pipe = tiny_pipeline("sd")
    adapter_for(pipe).module.double()
    predict, schedule, network = predictor(pipe), adapter_for(pipe).schedule, pipe.unet
    start = draw_start(0, 0, ROWS, (4, 8, 8), CASES[0], dtype=torch.float64)
    pairs = [
        gradients(network, graph_losses(predict, schedule, start, CASES[0], reward, checkpointed=c))
        for c in (True, False)
    ]
    for one, other in zip(*pairs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


def test_the_rollout_is_what_diffusers_ddim_draws() -> None:
    from diffusers import DDIMScheduler

    pipe = tiny_pipeline("sd")
    denoiser, predict = adapter_for(pipe), predictor(pipe)
    config = RolloutConfig(num_steps=5, grad_steps=5, guidance_scale=4)
    start = draw_start(1, 0, ROWS, (4, 8, 8), config)
    denoiser.module.double()
    ours = rollout(predict, denoiser.schedule, Start(start.noise.double(), start.offset), config).x0
    sampler = DDIMScheduler.from_config(
        pipe.scheduler.config, timestep_spacing="trailing", set_alpha_to_one=True, clip_sample=False
    )
    sampler.set_timesteps(5)
    x, rows = start.noise.double(), torch.arange(2)
    for t in sampler.timesteps:
        at = torch.full((2,), int(t))
        with torch.no_grad():
            free, bound = (predict(x, at, rows, conditioned) for conditioned in (False, True))
        x = sampler.step(free + 4 * (bound - free), t, x).prev_sample
    assert sampler.timesteps.tolist() == timesteps(denoiser.schedule, config).tolist() == [999, 799, 599, 399, 199]
    torch.testing.assert_close(ours, x, rtol=1e-3, atol=1e-4)


def test_weights_of_the_published_grid_are_those_of_the_paper_s_schedule() -> None:
    """Stable Diffusion's schedule, 50 steps: the numbers of spec 02, B5.2."""
    schedule = adapter_for(tiny_pipeline("sd")).schedule
    config = RolloutConfig()
    weights, grid = -step_weights(schedule, config), timesteps(schedule, config)
    assert grid.tolist() == list(range(999, 0, -20))
    assert [round(value, 3) for value in weights[0::10].tolist()] == [1.648, 0.438, 0.156, 0.074, 0.047]
    assert round(float(weights[-1]), 3) == 0.134
    # The moves down from x_T add up to its level.
    torch.testing.assert_close(weights.sum(), schedule.level(grid[:1])[0])


def test_normalised_weights_are_equal_and_keep_the_sum() -> None:
    schedule = adapter_for(tiny_pipeline("sd")).schedule
    raw, even = (RolloutConfig(num_steps=4, grad_steps=2, guidance_scale=1, weights=w) for w in ("raw", "normalised"))
    start = Start(torch.zeros(2, 1), torch.tensor([0, 1]))
    predict = lambda x, t, row, conditioned: x  # noqa: E731
    one, other = rollout(predict, schedule, start, raw), rollout(predict, schedule, start, even)
    torch.testing.assert_close(one.weights.sum(0), other.weights.sum(0))
    assert torch.equal(other.weights[0], other.weights[1]) and not torch.allclose(one.weights[0], one.weights[1])
    assert one.timesteps.tolist() == [[999, 749], [499, 249]]


def test_a_row_s_picture_offset_and_gradient_do_not_depend_on_its_batch(pipe: Any) -> None:
    config = RolloutConfig(num_steps=4, grad_steps=2, guidance_scale=1, solver="renoise")
    both = draw_start(5, 2, [3, 8], (2, 3), config)
    alone = draw_start(5, 2, [8], (2, 3), config)
    assert torch.equal(both.noise[1:], alone.noise) and torch.equal(both.offset[1:], alone.offset)
    assert all(torch.equal(one[1:], other) for one, other in zip(both.renoise, alone.renoise, strict=True))
    assert len(alone.renoise) == 3
    offsets = draw_start(0, 0, range(200), (1,), RolloutConfig(num_steps=6, grad_steps=2, guidance_scale=1)).offset
    assert set(offsets.tolist()) == {0, 1, 2}


def test_no_gradient_is_made_where_none_is_wanted() -> None:
    schedule = Schedule("flow", torch.tensor([0.5, 0.0]).double(), torch.tensor([0.5, 1.0]).double())
    weight = torch.nn.Parameter(torch.ones(()))
    config = RolloutConfig(num_steps=2, grad_steps=2, guidance_scale=1)
    start = Start(torch.ones(1, 3), torch.zeros(1, dtype=torch.long))
    predict = lambda x, t, row, conditioned: weight * x  # noqa: E731
    with torch.no_grad():
        losses = exact_losses(predict, schedule, start, config, lambda x0: x0.sum(1), [weight])
    # Euler by hand: 1 − ½·1 = ½, then ½ − ½·½ = ¼, three numbers of it.
    assert not losses.requires_grad and losses.tolist() == pytest.approx([0.75])
    # Inputs are detached: ∂/∂w = −½·(1 + ½), three numbers of it; through the inputs it would be less.
    exact_losses(predict, schedule, start, config, lambda x0: x0.sum(1), [weight]).sum().backward()
    assert float(weight.grad) == pytest.approx(-2.25)


@pytest.mark.parametrize("losses_of", [exact_losses, graph_losses])
@pytest.mark.parametrize("scale", [1.5, 5.0, 12.0])
def test_the_empty_prompt_s_own_network_learns_one_minus_g_of_what_it_would_alone(losses_of: Any, scale: float) -> None:
    """Euler from σ = 1 to 0 with constant velocities: x̂_0 = x_T − n − g·(p − n), so that ∂(Σ x̂_0)/∂n = −(1 − g) a number."""
    schedule = Schedule("flow", torch.tensor([0.5, 0.0]).double(), torch.tensor([0.5, 1.0]).double())
    negative, positive = (torch.nn.Parameter(torch.tensor(value).double()) for value in (0.3, -0.2))
    start = Start(torch.ones(1, 3).double(), torch.zeros(1, dtype=torch.long))

    def gradient(config: RolloutConfig, alone: bool) -> float:
        negative.grad = positive.grad = None

        def predict(x: Tensor, t: Tensor, row: Tensor, conditioned: bool) -> Tensor:
            return (positive if conditioned and not alone else negative) * torch.ones_like(x)

        parameters = {"parameters": [negative, positive]} if losses_of is exact_losses else {}
        losses_of(predict, schedule, start, config, lambda x0: x0.sum(1), **parameters).sum().backward()
        assert positive.grad is None
        return float(negative.grad)

    alone = gradient(RolloutConfig(num_steps=2, grad_steps=2, guidance_scale=1), True)
    guided = gradient(RolloutConfig(num_steps=2, grad_steps=2, guidance_scale=scale, grad_uncond_only=True), False)
    assert alone == pytest.approx(-3) and guided == pytest.approx((1 - scale) * alone) and guided * alone < 0


def test_senseless_settings_are_refused() -> None:
    for wrong in (
        {"solver": "x"}, {"weights": "x"}, {"grad_steps": 3}, {"grad_steps": 0}, {"guidance_scale": 0.5},
        {"guidance_scale": 1, "grad_cond_only": True}, {"guidance_scale": 1, "grad_uncond_only": True},
        {"grad_cond_only": True, "grad_uncond_only": True},
    ):  # fmt: skip
        with pytest.raises(ValueError):
            RolloutConfig(**wrong)
    with pytest.raises(ValueError, match="no gradient of a sampler"):
        graph_losses(None, None, None, RolloutConfig(weights="normalised"), reward)  # type: ignore[arg-type]
