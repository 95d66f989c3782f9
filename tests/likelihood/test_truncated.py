"""Truncated diffusion fine-tuning against closed forms, diffusers' own DDIM, and what the published scripts say in words."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from likelihood.toys import Gaussian, Recorder, flow, latents, stable_diffusion, wavy
from torch import Tensor

from mmalign.denoisers import Schedule
from mmalign.likelihood import draws
from mmalign.likelihood.truncated import (
    HUBER_WIDTH,
    TruncatedConfig,
    data_error,
    draw_stops,
    renoised,
    time_grid,
    truncated_point,
)

SCHEDULES = {"epsilon": stable_diffusion(), "v_prediction": stable_diffusion("v_prediction"), "flow": flow()}
IMAGES = TruncatedConfig(source="images")


def keyed(rows: int, purpose: str = "x") -> list[torch.Generator]:
    return draws.row_generators(0, 0, list(range(rows)), purpose)


def solved(predict: Any, schedule: Schedule, x: Tensor, stops: Tensor, config: TruncatedConfig = IMAGES) -> Any:
    generators = {"time": keyed(len(x), "time"), "noise": keyed(len(x), "noise")}
    return truncated_point(predict, schedule, x, stops, config, **generators)


def unguided(predict: Any) -> Any:
    return lambda x, t, rows, prompted: predict(x, t, rows)


# Adding noise.


@settings(deadline=None)
@given(name=st.sampled_from(list(SCHEDULES)), t=st.integers(0, 997), gap=st.integers(1, 997), variance=st.floats(0, 4))
def test_noise_is_added_as_the_forward_process_adds_it(name: str, t: int, gap: int, variance: float) -> None:
    """From x_t with the variance that data of any variance have there to x_s with the one they have there."""
    schedule, s = SCHEDULES[name], min(t + gap, 998)
    one, zero = torch.ones(1, 1, dtype=torch.float64), torch.zeros(1, 1, dtype=torch.float64)
    times = torch.tensor([t]), torch.tensor([s])
    kept, spread = renoised(schedule, one, *times, zero), renoised(schedule, zero, *times, one)
    signal, noise = schedule.signal, schedule.noise
    at_t, at_s = (signal[i] ** 2 * variance + noise[i] ** 2 for i in (t, s))
    torch.testing.assert_close(kept.squeeze() ** 2 * at_t + spread.squeeze() ** 2, at_s, rtol=1e-9, atol=1e-12)
    assert kept * signal[t] == pytest.approx(float(signal[s]), rel=1e-12)
    # The form of the released code.
    kappa = noise / signal
    x, xi = latents(2)[:, None].unbind()
    published = signal[s] * (x / signal[t] + (kappa[s] ** 2 - kappa[t] ** 2).sqrt() * xi)
    torch.testing.assert_close(renoised(schedule, x, *times, xi), published, rtol=1e-8, atol=1e-8)


def test_a_flow_is_pure_noise_at_its_end() -> None:
    x, xi = latents(2)[:, None].unbind()
    torch.testing.assert_close(renoised(flow(), x, torch.tensor([500]), torch.tensor([999]), xi), xi)


# The path.


def test_images_start_at_the_published_times_and_come_down_five_of_them() -> None:
    assert time_grid(SCHEDULES["epsilon"], 25).tolist() == list(range(39, 1000, 40))
    stops = draw_stops(SCHEDULES["epsilon"], IMAGES, keyed(400))
    assert set(stops[:, 0].tolist()) == set(range(39, 1000, 40))
    assert (stops[:, -1] == (stops[:, 0] - 200).clamp(min=0)).all()
    low = stops[stops[:, 0] == 79][0]
    assert low.tolist() == [79, 39, 0, 0, 0, 0]


def test_noise_starts_at_the_top_and_stops_anywhere_on_the_grid_but_there() -> None:
    stops = draw_stops(flow(), TruncatedConfig(source="noise"), keyed(400))
    assert set(stops[:, 0].tolist()) == {999} and set(stops[:, -1].tolist()) == set(range(39, 999, 40))
    moves = stops[:, :-1] - stops[:, 1:]
    assert (moves >= 0).all() and (moves.amax(1) - moves.amin(1) <= 1).all()


@pytest.mark.parametrize("name", ["epsilon", "v_prediction"])
def test_the_solver_is_diffusers_ddim(name: str) -> None:
    """Row by row, step by step, down to the estimate of the data at the last state, which is asked for once more."""
    from diffusers import DDIMScheduler

    theirs = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type=name,
        clip_sample=False,
        set_alpha_to_one=False,
    )
    theirs.set_timesteps(25)
    x, stops = (
        latents(3),
        torch.tensor([[999, 959, 919, 879, 839, 799], [239, 199, 159, 119, 79, 39], [79, 39, 0, 0, 0, 0]]),
    )
    watched = Recorder(wavy)
    point = solved(unguided(watched), SCHEDULES[name], x, stops)
    for row, steps in enumerate(((999, 959, 919, 879, 839), (239, 199, 159, 119, 79), (79, 39))):
        state, at = x[row : row + 1], torch.tensor([row])
        for step in steps:
            state = theirs.step(wavy(state, torch.tensor([step]), at), step, state).prev_sample
        landing = int(stops[row, -1])
        output = wavy(state, torch.tensor([landing]), at)
        data = theirs.step(output, landing, state).pred_original_sample
        torch.testing.assert_close(point.target[row : row + 1], data, rtol=1e-4, atol=1e-4)
    assert [rows.tolist() for rows in watched.rows] == [[0, 1, 2], [0, 1, 2], [0, 1], [0, 1], [0, 1], [0, 1, 2]]
    assert point.landing.tolist() == [799, 39, 0]


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_target_is_what_the_data_are_on_average(name: str) -> None:
    """Of Gaussian data the posterior mean is known."""
    schedule = SCHEDULES[name]
    exact = Gaussian(schedule)
    config = TruncatedConfig(solver_steps=1)
    stops = torch.tensor([[999, 600], [500, 100], [300, 0]])
    x = torch.randn(3, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    states: list[Tensor] = []

    def predict(x: Tensor, t: Tensor, rows: Tensor, prompted: bool) -> Tensor:
        states.append(x)
        return exact(x, t, rows)

    point = solved(predict, schedule, x, stops, config)
    signal, noise = (table[stops[:, -1]][:, None] for table in (schedule.signal, schedule.noise))
    gain = signal * exact.std**2 / ((signal * exact.std) ** 2 + noise**2)
    torch.testing.assert_close(
        point.target, exact.mean + gain * (states[-1] - signal * exact.mean), rtol=1e-6, atol=1e-6
    )


def test_times_come_after_the_landing_and_rows_do_not_depend_on_their_batch() -> None:
    schedule, x = flow(), latents(200)
    config = TruncatedConfig(source="noise")
    stops = draw_stops(schedule, config, keyed(200, "stops"))
    whole = solved(unguided(wavy), schedule, x, stops, config)
    assert (whole.timestep > whole.landing).all() and int(whole.timestep.max()) <= 999
    # The last grid time below the top leaves forty; all of them come.
    late = whole.timestep[whole.landing == 959]
    assert late.min() >= 960 and len(set(late.tolist())) > 1
    few = solved(unguided(wavy), schedule, x[:3], stops[:3], config)
    assert torch.equal(few.x_s, whole.x_s[:3]) and torch.equal(few.timestep, whole.timestep[:3])


def test_the_student_stands_anywhere_above_the_landing_and_never_on_it() -> None:
    x, stops = latents(200), torch.full((200, 1), 996)
    times = solved(unguided(wavy), SCHEDULES["epsilon"], x, stops).timestep
    assert set(times.tolist()) == {997, 998, 999}


# Guidance.


@pytest.mark.parametrize(
    ("scale", "asked"), [(0.0, {False}), (1.0, {True}), (-4.0, {True, False}), (7.5, {True, False})]
)
def test_a_branch_that_does_not_count_is_not_run(scale: float, asked: set[bool]) -> None:
    """And both together are what the released code adds up: c + w·(c − ∅), w = g − 1."""
    schedule, seen = SCHEDULES["epsilon"], set()

    def predict(x: Tensor, t: Tensor, rows: Tensor, prompted: bool) -> Tensor:
        seen.add(prompted)
        return wavy(x, t + 300 * prompted, rows)

    def published(x: Tensor, t: Tensor, rows: Tensor) -> Tensor:
        conditional, unconditional = wavy(x, t + 300, rows), wavy(x, t, rows)
        return conditional + (scale - 1) * (conditional - unconditional)

    stops = torch.tensor([[999, 959, 919], [79, 39, 0]])
    config = TruncatedConfig(solver_steps=2, guidance_scale=scale)
    point = solved(predict, schedule, latents(2), stops, config)
    assert seen == asked
    expected = solved(unguided(published), schedule, latents(2), stops, config)
    torch.testing.assert_close(point.target, expected.target, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(point.x_s, expected.x_s, rtol=1e-8, atol=1e-8)


# The norm.


def test_pseudo_huber_is_a_square_near_zero_and_an_absolute_value_far_away() -> None:
    for difference, expected in (
        (0.0, 0.0),
        (1e-5, 1e-10 / (2 * HUBER_WIDTH)),
        (1.0, 1 - HUBER_WIDTH),
        (3.0, 3 - HUBER_WIDTH),
    ):
        loss = data_error(torch.full((1, 4), difference), torch.zeros(1, 4))
        assert loss.item() == pytest.approx(expected, rel=1e-3, abs=1e-20)
    assert data_error(torch.tensor([[1.0, 3.0]]), torch.zeros(1, 2), "l2").item() == 5.0


@pytest.mark.parametrize("name", SCHEDULES)
def test_an_error_of_the_output_is_weighted_by_how_noisy_the_input_is(name: str) -> None:
    """‖Δx̂_0‖² is κ²·‖Δε‖², σ²·‖Δv‖² for v-prediction and for flow."""
    schedule, t, x = SCHEDULES[name], torch.tensor([20, 500, 950]), latents(3)
    right, wrong = wavy(x, t, torch.arange(3)), wavy(x, t + 1, torch.arange(3))
    error = data_error(schedule.to_data(wrong, x, t), schedule.to_data(right, x, t), "l2")
    signal, noise = schedule.signal[t], schedule.noise[t]
    weight = noise**2 / signal**2 if name == "epsilon" else noise**2
    torch.testing.assert_close(error, weight * (wrong - right).square().flatten(1).mean(1), rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_right_output_gives_back_the_data(name: str) -> None:
    schedule, t = SCHEDULES[name], torch.tensor([0, 400, 990])
    x0, noise = latents(3), latents(6)[3:]
    x_t = schedule.add_noise(x0, noise, t)
    output = schedule.target(x0, noise, t, "epsilon" if name == "epsilon" else "velocity")
    torch.testing.assert_close(schedule.to_data(output, x_t, t), x0, rtol=1e-8, atol=1e-8)


def test_settings_that_make_no_path_are_refused() -> None:
    for options, message in (
        ({"source": "pictures"}, "source must be 'noise' or 'images'"),
        ({"solver_steps": 0}, "solver_steps must be at least 1"),
        ({"grid_points": 1}, "grid_points must be at least 2"),
    ):
        with pytest.raises(ValueError, match=message):
            TruncatedConfig(**options)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="grid_points must lie in 2 … 1000, got 2000"):
        time_grid(flow(), 2000)
