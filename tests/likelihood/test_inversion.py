"""Exact inversion: grids, the path-average identity, masks, coordinates, noise, parity with diffusers' DDIM."""

import math
from dataclasses import replace

import diffusers
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from likelihood.toys import Gaussian, Recorder, flow, latents, stable_diffusion, wavy

from mmalign.denoisers import Schedule
from mmalign.likelihood import (
    InversionConfig,
    draws,
    invert,
    landing_table,
    reconstruct,
    round_trip,
)
from mmalign.likelihood.grids import make_grid

SCHEMES = [
    InversionConfig(),
    InversionConfig(renoise_steps=1),
    InversionConfig(renoise_steps=2, combine="mean_refined"),
    InversionConfig(renoise_steps=3, combine="last"),
    InversionConfig(solver="heun"),
]


def column(values: torch.Tensor) -> torch.Tensor:
    return values.view(-1, 1, 1, 1)


# --- grids ---------------------------------------------------------------------------------------------------------


@settings(max_examples=80, deadline=None)
@given(t=st.integers(0, 999), num_steps=st.integers(1, 1500))
def test_every_grid_ends_at_the_conditioning_timestep(t: int, num_steps: int) -> None:
    grid = make_grid(stable_diffusion(), torch.tensor([t]), InversionConfig(num_steps=num_steps))
    moves = int(grid.moves)
    steps = grid.target[0, :moves].tolist()
    assert grid.landing.item() == steps[-1] == t
    assert moves == min(t + 1, max(1, math.ceil(num_steps * (t + 1) / 1000)))
    assert all(a < b for a, b in zip([-1, *steps], steps, strict=False)), "strictly upwards, from the data"
    assert grid.source[0, :moves].tolist() == [-1, *steps[:-1]]
    gaps = [b - a for a, b in zip([-1, *steps], steps, strict=False)]
    assert max(gaps) - min(gaps) <= 1, "even steps"


@settings(max_examples=40, deadline=None)
@given(
    t=st.lists(st.integers(0, 999), min_size=1, max_size=4),
    num_steps=st.integers(1, 12),
    scheme=st.sampled_from(SCHEMES),
)
def test_landing_is_conditioning_and_no_call_leaves_the_schedule(
    t: list[int], num_steps: int, scheme: InversionConfig
) -> None:
    recorder = Recorder(wavy)
    times = torch.tensor(t)
    config = replace(scheme, num_steps=num_steps)
    result = invert(recorder, stable_diffusion(), latents(len(t)), times, config)
    assert torch.equal(result.landing, times) and torch.equal(result.timestep, times)
    called = torch.cat(recorder.times)
    assert called.min() >= 0 and called.max() <= max(t)
    assert result.num_calls == len(recorder.times)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_network_is_told_the_target_timestep(scheme: InversionConfig) -> None:
    recorder = Recorder(wavy)
    invert(recorder, stable_diffusion(), latents(1), torch.tensor([499]), replace(scheme, num_steps=4))
    targets = [249, 499]  # ⌈4·500/1000⌉ = 2 moves
    calls = 2 if scheme.solver == "heun" else 1 + scheme.renoise_steps
    expected = [[0, 249], [249, 499]] if scheme.solver == "heun" else [[b] * calls for b in targets]
    assert torch.cat(recorder.times).tolist() == sum(expected, [])


def test_timesteps_outside_the_schedule_are_refused() -> None:
    signal = torch.linspace(0.999, 0.0, 50, dtype=torch.float64)
    zero_snr = Schedule("epsilon", signal, (1 - signal**2).sqrt())
    for bad in ([-1], [49], [3, 50]):
        with pytest.raises(ValueError, match="0 … 48"):
            invert(wavy, zero_snr, latents(len(bad)), torch.tensor(bad), InversionConfig())
    with pytest.raises(ValueError, match="num_steps must lie in 1 … 49"):
        invert(wavy, zero_snr, latents(1), torch.tensor([3]), InversionConfig(num_steps=50, grid="strided"))


# --- the target ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_target_is_the_noise_between_latent_and_data(scheme: InversionConfig, prediction_type: str) -> None:
    """τ = (x_t − √ᾱ_t·x_0)/√(1−ᾱ_t) to 1e-12 in float64, from t = 0 to the top."""
    schedule, t = stable_diffusion(prediction_type), torch.tensor([0, 1, 40, 500, 999])
    x0 = latents(5)
    result = invert(wavy, schedule, x0, t, scheme)
    expected = (result.x_t - column(schedule.signal[t]) * x0) / column(schedule.noise[t])
    torch.testing.assert_close(result.target, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_target_is_the_level_weighted_average_of_the_predictions(dtype: torch.dtype) -> None:
    """τ = Σ(σ̂_b − σ̂_a)·ε/σ̂_t of what the network really said; a float32 running sum stays within 1e-6 of it."""
    schedule = stable_diffusion()
    ratio = schedule.noise / schedule.signal
    worst = 0.0
    for t in (0, 3, 99, 450, 999):
        recorder = Recorder(wavy)
        x0 = latents(2, dtype)
        result = invert(recorder, schedule, x0, torch.tensor([t, t]), InversionConfig(num_steps=10))
        total, level = torch.zeros_like(x0, dtype=torch.float64), 0.0
        for step, output in zip(recorder.times, recorder.outputs, strict=True):
            total += (ratio[step[0]] - level) * output.double()
            level = float(ratio[step[0]])
        tolerance = 1e-12 if dtype == torch.float64 else 1e-6
        torch.testing.assert_close(result.target.double(), total / level, rtol=0, atol=tolerance)
        subtraction = (result.x_t - schedule.signal[t].to(dtype) * x0) / schedule.noise[t].to(dtype)
        worst = max(worst, float((subtraction.double() - total / level).abs().max()))
    if dtype == torch.float32:
        assert worst > 2e-6, "a plain difference would not have met this tolerance"


def test_flow_target_is_the_sigma_weighted_average_velocity() -> None:
    schedule, x0, t = flow(), latents(2), torch.tensor([699, 699])
    recorder = Recorder(wavy)
    result = invert(recorder, schedule, x0, t, InversionConfig(num_steps=7))
    assert len(recorder.outputs) == 5
    sigmas = [0.0] + [float(step[0] + 1) / 1000 for step in recorder.times]
    weights = [b - a for a, b in zip(sigmas, sigmas[1:], strict=False)]
    average = sum(w * v for w, v in zip(weights, recorder.outputs, strict=True)) / 0.7
    torch.testing.assert_close(result.target, average, rtol=0, atol=1e-12)
    torch.testing.assert_close(result.x_t, x0 + 0.7 * average, rtol=0, atol=1e-12)


def test_one_uncorrected_move_has_the_prediction_on_the_data_as_its_target() -> None:
    x0, t = latents(2), torch.tensor([0, 80])
    result = invert(wavy, stable_diffusion(), x0, t, InversionConfig(num_steps=10))
    torch.testing.assert_close(result.target, wavy(x0, t, torch.arange(2)), rtol=0, atol=1e-12)
    assert result.moves.tolist() == [1, 1] and torch.isfinite(result.x_t).all()


@pytest.mark.parametrize(("combine", "weights"), [("mean", [0.5, 0.25]), ("mean_refined", [0, 0.75]), ("last", [0, 1])])
def test_renoise_combines_its_predictions_as_named(combine: str, weights: list[float]) -> None:
    """The k-th call of a move answers k-dependently: e_0 = 1, e_1 = 3, e_2 = 5."""
    counter = iter([1.0, 3.0, 5.0])
    inputs = []

    def predict(x: torch.Tensor, t: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        inputs.append(x)
        return torch.full_like(x, next(counter))

    schedule, x0 = stable_diffusion(), latents(1)
    config = InversionConfig(num_steps=1, renoise_steps=2, combine=combine)  # type: ignore[arg-type]
    result = invert(predict, schedule, x0, torch.tensor([300]), config)
    expected = {"mean": 3.0, "mean_refined": 4.0, "last": 5.0}[combine]
    torch.testing.assert_close(result.target, torch.full_like(x0, expected))
    # Every correction starts from the clean latent again, moved by the newest prediction alone.
    for fed, estimate in zip(inputs[1:], [1.0, 3.0], strict=True):
        torch.testing.assert_close(fed, schedule.signal[300] * x0 + schedule.noise[300] * estimate)


# --- coordinates and parameterisations -----------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_v_model_walks_the_same_path_as_its_eps_model(scheme: InversionConfig) -> None:
    eps, velocity, t = stable_diffusion(), stable_diffusion("v_prediction"), torch.tensor([0, 250, 999])

    def as_v(x: torch.Tensor, time: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """The v that stands for wavy's ε at the timestep told and the tensor fed."""
        signal, noise = column(eps.signal[time]), column(eps.noise[time])
        return (wavy(x, time, rows) - noise * x) / signal

    expected = invert(wavy, eps, latents(3), t, scheme)
    actual = invert(as_v, velocity, latents(3), t, scheme)
    torch.testing.assert_close(actual.x_t, expected.x_t, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(actual.target, expected.target, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("schedule", [stable_diffusion(), stable_diffusion("v_prediction"), flow()])
def test_all_parameterisations_reach_the_exact_solution(schedule: Schedule) -> None:
    """Linear denoisers of Gaussian data: Euler's error halves with twice the steps; Heun's falls by four on flows.

    On a VP schedule Heun keeps a floor of 0.006, because the data themselves have no timestep to be asked about.
    """
    toy, t = Gaussian(schedule), torch.tensor([699, 699])
    x0 = torch.tensor([[1.4, 0.2], [0.1, 1.0]], dtype=torch.float64)

    def error(num_steps: int, solver: str) -> float:
        config = InversionConfig(num_steps=num_steps, solver=solver)  # type: ignore[arg-type]
        return float((invert(toy, schedule, x0, t, config).x_t - toy.solution(x0, t)).abs().max())

    euler = [error(n, "euler") for n in (80, 160, 320)]
    assert euler[2] < 0.016 and all(1.7 < a / b < 2.1 for a, b in zip(euler, euler[1:], strict=False))
    assert error(20, "heun") < 0.007
    if schedule.is_flow:
        assert 3.5 < error(20, "heun") / error(40, "heun") < 5


def test_reconstruct_is_diffusers_ddim_sampler() -> None:
    """From t = 999 with N = 10 both walk 999, 899, …, 99, data."""
    schedule, x = stable_diffusion(), latents(2, torch.float64)
    scheduler = diffusers.DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        timestep_spacing="trailing",
        clip_sample=False,
        set_alpha_to_one=True,
    )
    scheduler.set_timesteps(10)
    expected, rows = x, torch.arange(2)
    for step in scheduler.timesteps:
        expected = scheduler.step(wavy(expected, step.expand(2), rows), step, expected).prev_sample
    t = torch.full((2,), 999)
    torch.testing.assert_close(
        reconstruct(wavy, schedule, x, t, InversionConfig(num_steps=10)), expected, rtol=1e-3, atol=1e-3
    )


def test_inversion_is_diffusers_inverse_ddim() -> None:
    schedule, x0 = stable_diffusion(), latents(2, torch.float64)
    scheduler = diffusers.DDIMInverseScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        timestep_spacing="trailing",
        clip_sample=False,
        set_alpha_to_one=True,
    )
    scheduler.set_timesteps(10)
    assert scheduler.timesteps.tolist() == list(range(99, 1000, 100))
    expected, rows = x0, torch.arange(2)
    for step in scheduler.timesteps:
        expected = scheduler.step(wavy(expected, step.expand(2), rows), step, expected).prev_sample
    result = invert(wavy, schedule, x0, torch.full((2,), 999), InversionConfig(num_steps=10))
    torch.testing.assert_close(result.x_t, expected, rtol=1e-3, atol=1e-3)


def test_round_trip_reports_what_it_measures() -> None:
    schedule, x0, t = stable_diffusion(), latents(3), torch.tensor([50, 400, 999])
    trip = round_trip(wavy, schedule, x0, t, InversionConfig())
    difference = (trip.reconstruction - x0).flatten(1)
    torch.testing.assert_close(trip.rmse, difference.square().mean(1).sqrt())
    span = x0.flatten(1).amax(1) - x0.flatten(1).amin(1)
    torch.testing.assert_close(trip.psnr, 10 * torch.log10(span**2 / difference.square().mean(1)))
    fixed = round_trip(wavy, schedule, x0, t, InversionConfig(), data_range=2.0)
    torch.testing.assert_close(fixed.psnr, 10 * torch.log10(4 / difference.square().mean(1)))

    def constant(x: torch.Tensor, time: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        return torch.full_like(x, 0.3)

    assert round_trip(constant, schedule, x0, t, InversionConfig()).rmse.max() < 1e-12


# --- batches -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", [*SCHEMES, InversionConfig(eta=0.3), InversionConfig(eta=0.1, eta_form="published")])
def test_a_masked_batch_equals_single_rows(scheme: InversionConfig) -> None:
    schedule, t, x0 = stable_diffusion(), torch.tensor([999, 0, 340, 120]), latents(4)

    def generators() -> list[torch.Generator]:
        return draws.row_generators(0, 0, range(4), "inversion")

    batch = invert(wavy, schedule, x0, t, scheme, generators())
    for row in range(4):

        def alone(x: torch.Tensor, time: torch.Tensor, rows: torch.Tensor, row: int = row) -> torch.Tensor:
            return wavy(x, time, rows + row)

        single = invert(alone, schedule, x0[row : row + 1], t[row : row + 1], scheme, generators()[row : row + 1])
        torch.testing.assert_close(batch.x_t[row], single.x_t[0], rtol=0, atol=1e-13)
        torch.testing.assert_close(batch.target[row], single.target[0], rtol=0, atol=1e-13)
        assert batch.moves[row] == single.moves[0]


def test_rows_that_have_arrived_are_not_computed_again() -> None:
    recorder = Recorder(wavy)
    result = invert(
        recorder, stable_diffusion(), latents(3), torch.tensor([99, 999, 299]), InversionConfig(renoise_steps=1)
    )
    assert result.moves.tolist() == [1, 10, 3]
    assert sum(len(rows) for rows in recorder.rows) == 2 * (1 + 10 + 3)
    assert [rows.tolist() for rows in recorder.rows[:8:2]] == [[0, 1, 2], [1, 2], [1, 2], [1]]


def test_half_precision_latents_and_networks_leave_the_arithmetic_in_float32() -> None:
    schedule, x0, t = stable_diffusion("v_prediction"), latents(2), torch.tensor([120, 700])

    def half(x: torch.Tensor, time: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        return wavy(x.bfloat16(), time, rows)

    result = invert(half, schedule, x0.bfloat16(), t, InversionConfig(renoise_steps=1))
    assert result.x_t.dtype == result.target.dtype == torch.float32
    exact = invert(wavy, schedule, x0.bfloat16().double(), t, InversionConfig(renoise_steps=1))
    assert (result.target - exact.target).abs().max() < 0.1
    identity = (result.x_t - column(schedule.signal[t]).float() * x0.bfloat16().float()) / column(schedule.noise[t])
    torch.testing.assert_close(result.target, identity.float(), rtol=0, atol=1e-5)


def test_inversion_leaves_no_graph_and_does_not_change_its_input() -> None:
    weight, x0 = torch.ones((), requires_grad=True), latents(2, torch.float32)
    before = x0.clone()
    result = invert(lambda x, t, rows: weight * x, stable_diffusion(), x0, torch.tensor([5, 900]), InversionConfig())
    assert not result.x_t.requires_grad and not result.target.requires_grad
    assert torch.equal(x0, before)
    (weight * result.x_t).sum().backward()  # not inference tensors: usable in the graph of the loss
    assert weight.grad is not None


# --- paths ---------------------------------------------------------------------------------------------------------


def test_each_landing_on_a_strided_grid_is_the_inversion_to_that_timestep() -> None:
    schedule, x0 = stable_diffusion(), latents(2)
    config = InversionConfig(num_steps=5, renoise_steps=1, grid="strided")
    path = invert(wavy, schedule, x0, torch.tensor([967, 451]), config, keep_path=True).path
    assert [point.timestep.tolist() for point in path] == [[167, 51], [367, 251], [567, 451], [767], [967]]
    for point in path:
        t = point.timestep
        direct = invert(wavy, schedule, x0[point.rows], t, config)
        torch.testing.assert_close(point.x_t, direct.x_t, rtol=0, atol=1e-13)
        torch.testing.assert_close(point.target, direct.target, rtol=0, atol=1e-13)


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 1000), st.integers(1, 60))
def test_strided_landings_from_the_last_stratum_are_uniform(top: int, steps: int) -> None:
    """Over every timestep of the last stratum, all others are landed on once or, where strata cannot be equal, at most twice."""
    steps = min(steps, top)
    schedule = Schedule("flow", *(torch.linspace(0, 1, top, dtype=torch.float64) for _ in range(2)))
    last = torch.arange(top + (-top // steps), top)
    grid = make_grid(schedule, last, InversionConfig(num_steps=steps, grid="strided"))
    assert (grid.moves == steps).all() and (grid.target.diff(dim=1) > 0).all()
    counts = torch.bincount(grid.target.flatten(), minlength=top)
    assert counts.min() == 1 and counts.max() <= (1 if top % steps == 0 else 2)


@pytest.mark.parametrize("schedule", [stable_diffusion(), flow()])
def test_every_landing_of_a_per_sample_path_is_a_valid_point(schedule: Schedule) -> None:
    x0, t = latents(3), torch.tensor([999, 0, 555])
    result = invert(wavy, schedule, x0, t, InversionConfig(num_steps=6), keep_path=True)
    assert len(result.path) == 6
    for point in result.path:
        signal, noise = column(schedule.signal[point.timestep]), column(schedule.noise[point.timestep])
        direction = point.target + x0[point.rows] if schedule.is_flow else point.target
        torch.testing.assert_close(point.x_t, signal * x0[point.rows] + noise * direction, rtol=0, atol=1e-12)
    last = result.path[-1]
    assert last.rows.tolist() == [0] and torch.equal(last.x_t[0], result.x_t[0])
    with pytest.raises(ValueError, match="keep_path"):
        invert(wavy, stable_diffusion(), x0, t, InversionConfig(compat="official-0.20"), keep_path=True)


# --- configuration -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(num_steps=0), "num_steps"),
        (dict(combine="mean_refined"), "mean_refined"),
        (dict(solver="heun", renoise_steps=1), "heun"),
        (dict(eta=1.5), "eta"),
        (dict(share_eta_noise=True), "share_eta_noise"),
        (dict(fp16_alphas=True), "fp16_alphas"),
        (dict(compat="official-0.20", solver="heun"), "compat"),
        (dict(compat="official-0.20", eta=0.1), "published"),
        (dict(combine="average"), "combine must be one of"),
        (dict(compat="official"), "compat must be one of"),
    ],
)
def test_options_that_cannot_act_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        InversionConfig(**options)  # type: ignore[arg-type]


def test_exact_grids_have_no_leak() -> None:
    for config in (InversionConfig(), InversionConfig(grid="strided")):
        table = landing_table(stable_diffusion(), config)
        assert torch.equal(table.landing, table.timestep)
        assert table.leak.abs().max() == 0 and (table.spread - 1).abs().max() == 0
