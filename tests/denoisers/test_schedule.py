"""Schedules against diffusers' own arithmetic, and the conversions against their definitions."""

import diffusers
import pytest
import torch

from mmalign.denoisers import Schedule

SD = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
VP_SCHEDULERS = ["DDPMScheduler", "DDIMScheduler", "PNDMScheduler", "EulerDiscreteScheduler"]


def schedule_for(prediction_type: str) -> Schedule:
    if prediction_type == "flow":
        return Schedule.from_scheduler(diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0))
    return Schedule.from_scheduler(diffusers.DDIMScheduler(**SD, prediction_type=prediction_type))


def sample(seed: int = 0, rows: int = 4, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x0, noise = torch.randn(2, rows, 2, 3, 3, generator=generator, dtype=torch.float64).to(dtype)
    return x0, noise


@pytest.mark.parametrize("name", VP_SCHEDULERS + ["DPMSolverMultistepScheduler", "UniPCMultistepScheduler"])
def test_add_noise_agrees_with_diffusers(name: str) -> None:
    x0, noise = sample(dtype=torch.float32)
    t = torch.tensor([0, 17, 500, 999])
    expected = diffusers.DDPMScheduler(**SD).add_noise(x0, noise, t)
    schedule = Schedule.from_scheduler(getattr(diffusers, name)(**SD))
    torch.testing.assert_close(schedule.add_noise(x0, noise, t), expected, rtol=0, atol=2e-5)


def test_inference_settings_do_not_change_the_schedule() -> None:
    euler, flow = diffusers.EulerDiscreteScheduler(**SD), diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    before = [Schedule.from_scheduler(s).fingerprint() for s in (euler, flow)]
    euler.set_timesteps(7)
    flow.set_timesteps(7)
    assert [Schedule.from_scheduler(s).fingerprint() for s in (euler, flow)] == before
    assert before[0] != before[1]


def test_float64_tables_keep_one_minus_alpha_bar() -> None:
    """ᾱ_0 = 1 − β_start, so noise[0]² must be β_start; diffusers' float32 product keeps four digits of it."""
    schedule = schedule_for("epsilon")
    assert float(schedule.noise[0] ** 2) == pytest.approx(0.00085, rel=1e-7)
    torch.testing.assert_close(schedule.signal**2 + schedule.noise**2, torch.ones(1000, dtype=torch.float64))


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flow_table_is_the_schedulers_sigmas(shift: float) -> None:
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
    schedule = Schedule.from_scheduler(scheduler)
    torch.testing.assert_close(schedule.noise.float(), scheduler.sigmas.flip(0), rtol=1e-6, atol=0)
    t = torch.tensor([0, 400, 999])
    torch.testing.assert_close(schedule.model_timestep(t), scheduler.timesteps.flip(0)[t], rtol=1e-6, atol=0)
    x0, noise = sample(rows=3)
    expected = scheduler.scale_noise(x0.float(), scheduler.timesteps.flip(0)[t], noise.float())
    torch.testing.assert_close(schedule.add_noise(x0, noise, t).float(), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("shift", [1.0, 5.0])
@pytest.mark.parametrize("solver", ["UniPC", "DPMSolver", "DEIS"])
def test_flow_table_holds_the_sigmas_at_which_a_solver_for_both_kinds_stops(solver: str, shift: float) -> None:
    scheduler = getattr(diffusers, f"{solver}MultistepScheduler")(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift
    )
    schedule = Schedule.from_scheduler(scheduler)
    # With one step fewer than the table has rows, every step is on a row.
    scheduler.set_timesteps(999)
    apart = (scheduler.sigmas[:-1, None].double() - schedule.noise).abs()
    rows = apart.argmin(1)
    # At σ = 1 UniPC stops 1e-6 below.
    assert apart.min(1).values.max() < 2e-6 and rows.unique().numel() == 999
    # The solvers tell σ·T rounded down.
    rest = schedule.model_timestep(rows) - scheduler.timesteps
    assert rest.min() > -1e-3 and rest.max() < 1.01
    assert Schedule.from_scheduler(scheduler).fingerprint() == schedule.fingerprint()


def test_a_shift_made_for_each_picture_is_left_out_of_the_table() -> None:
    options = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 5.0}
    scheduler = diffusers.UniPCMultistepScheduler(**options, use_dynamic_shifting=True)
    plain = Schedule.from_scheduler(diffusers.FlowMatchEulerDiscreteScheduler(shift=1.0))
    assert Schedule.from_scheduler(scheduler).fingerprint() == plain.fingerprint()


@pytest.mark.parametrize("scaler", [1.0, 0.5, 2.0])
def test_cosine_table_is_continuous_times_own(scaler: float) -> None:
    scheduler = diffusers.DDPMWuerstchenScheduler(scaler=scaler)
    schedule = Schedule.from_scheduler(scheduler)
    x0, noise = sample(dtype=torch.float32, rows=6)
    t = torch.tensor([0, 1, 124, 499, 930, 999])
    expected = scheduler.add_noise(x0, noise, (t + 1) / 1000)
    torch.testing.assert_close(schedule.add_noise(x0, noise, t), expected, rtol=0, atol=2e-5)
    assert schedule.prediction_type == "epsilon" and schedule.max_timestep == 999


def test_log_snr_of_the_cosine_table() -> None:
    schedule = Schedule.from_scheduler(diffusers.DDPMWuerstchenScheduler())
    log_snr = 2 * (schedule.signal / schedule.noise).log()
    t = torch.tensor([249, 499, 749, 999])
    torch.testing.assert_close(log_snr[t], torch.tensor([1.71, -0.02, -1.78, -9.21]).double(), rtol=0, atol=0.005)
    # At the data ᾱ is kept 1e-4 below 1.
    assert float(log_snr.max()) == pytest.approx(9.21, abs=0.005)
    assert (log_snr.diff() <= 0).all()


def test_velocity_target_agrees_with_diffusers() -> None:
    x0, noise = sample(dtype=torch.float32)
    t = torch.tensor([0, 17, 500, 999])
    expected = diffusers.DDPMScheduler(**SD).get_velocity(x0, noise, t)
    actual = schedule_for("v_prediction").target(x0, noise, t, "velocity")
    torch.testing.assert_close(actual, expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "flow"])
def test_a_perfect_output_converts_to_the_noise(prediction_type: str) -> None:
    schedule = schedule_for(prediction_type)
    x0, noise = sample()
    t = torch.tensor([0, 17, 500, 998])
    x_t = schedule.add_noise(x0, noise, t)
    output = noise if prediction_type == "epsilon" else schedule.target(x0, noise, t, "velocity")
    torch.testing.assert_close(schedule.to_noise(output, x_t, t), noise, rtol=0, atol=1e-12)
    direction = noise - x0 if prediction_type == "flow" else noise
    torch.testing.assert_close(schedule.to_direction(output, x_t, t), direction, rtol=0, atol=1e-12)
    torch.testing.assert_close(schedule.target(x0, noise, t), direction, rtol=0, atol=1e-12)
    # Unified coordinates: x_t/scale = x_0 + λ·direction.
    level, scale = schedule.level(t).view(-1, 1, 1, 1), schedule.scale(t).view(-1, 1, 1, 1)
    torch.testing.assert_close(x_t / scale, x0 + level * direction, rtol=1e-12, atol=1e-12)


def test_zero_terminal_snr_bounds_the_drawable_timesteps() -> None:
    scheduler = diffusers.DDIMScheduler(**SD, prediction_type="v_prediction", rescale_betas_zero_snr=True)
    schedule = Schedule.from_scheduler(scheduler)
    top = schedule.max_timestep
    assert float(schedule.signal[-1]) == 0 and 900 < top < 999
    assert float(schedule.signal[top] ** 2) > 1e-5 >= float(schedule.signal[top + 1] ** 2)
    assert schedule_for("epsilon").max_timestep == schedule_for("flow").max_timestep == 999


@pytest.mark.parametrize(
    ("given", "returned"), [(torch.float16, torch.float32), (torch.bfloat16, torch.float32), (torch.float64,) * 2]
)
def test_arithmetic_is_float32_or_better(given: torch.dtype, returned: torch.dtype) -> None:
    x0, noise = sample(dtype=given)
    t, schedule = torch.tensor([0, 17, 500, 999]), schedule_for("v_prediction")
    x_t = schedule.add_noise(x0, noise, t)
    assert x_t.dtype == schedule.to_noise(noise, x_t.to(given), t).dtype == returned
    exact = schedule.add_noise(x0.double(), noise.double(), t)
    torch.testing.assert_close(x_t.double(), exact, rtol=0, atol=1e-6)


def test_the_data_stand_at_level_zero() -> None:
    for prediction_type in ("epsilon", "flow"):
        schedule = schedule_for(prediction_type)
        assert schedule.level(torch.tensor([-1])).item() == 0
        assert schedule.scale(torch.tensor([-1])).item() == 1


def test_unsupported_schedulers_are_named() -> None:
    with pytest.raises(ValueError, match="prediction_type='sample'"):
        Schedule.from_scheduler(diffusers.DDIMScheduler(**SD, prediction_type="sample"))
    for kind, flow in (("flow_prediction", False), ("epsilon", True)):
        with pytest.raises(ValueError, match=f"prediction_type='{kind}' and use_flow_sigmas={flow} is not supported"):
            Schedule.from_scheduler(diffusers.UniPCMultistepScheduler(prediction_type=kind, use_flow_sigmas=flow))
    with pytest.raises(ValueError, match="EDMEulerScheduler"):
        Schedule.from_scheduler(diffusers.EDMEulerScheduler())
    with pytest.raises(ValueError, match="invert_sigmas"):
        Schedule.from_scheduler(diffusers.FlowMatchEulerDiscreteScheduler(invert_sigmas=True))
