"""Consistency distillation against diffusers: the boundary of LCMScheduler, the step of DDIMScheduler."""

import pytest
import torch
from diffusers import DDIMScheduler, LCMScheduler

from mmalign.denoisers.schedule import Schedule
from mmalign.likelihood.consistency import consistency_losses, draw_times, jump, teacher_step
from mmalign.likelihood.draws import row_generators

SETTINGS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
SHAPE = (4, 3, 6, 6)
T = torch.tensor([999, 400, 25, 10])


def noise(seed: int) -> torch.Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def teacher(x: torch.Tensor, t: torch.Tensor, conditioned: bool = True) -> torch.Tensor:
    return (x * (1.3 if conditioned else 0.7)).sin() + t.view(-1, 1, 1, 1) / 1000


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_the_teacher_s_step_is_ddim_under_guidance(kind: str) -> None:
    scheduler = DDIMScheduler(**SETTINGS, prediction_type=kind, clip_sample=False)
    schedule, x = Schedule.from_scheduler(scheduler), noise(0)
    found, later = teacher_step(teacher, schedule, x, T, 7.5)
    assert later.tolist() == [979, 380, 5, 0]
    scheduler.set_timesteps(50)
    alpha = torch.cumprod(1 - scheduler.betas.double(), 0)
    output = teacher(x, T, False) + 7.5 * (teacher(x, T, True) - teacher(x, T, False))
    for row in range(4):
        now, then = alpha[T[row]], alpha[later[row]]
        if kind == "epsilon":
            epsilon, data = output[row], (x[row] - (1 - now).sqrt() * output[row]) / now.sqrt()
        else:
            epsilon = now.sqrt() * output[row] + (1 - now).sqrt() * x[row]
            data = now.sqrt() * x[row] - (1 - now).sqrt() * output[row]
        expected = then.sqrt() * data + (1 - then).sqrt() * epsilon
        torch.testing.assert_close(found[row], expected, rtol=1e-9, atol=1e-9)
        if T[row] >= 20 and kind == "epsilon":
            stepped = scheduler.step(output[row : row + 1], int(T[row]), x[row : row + 1]).prev_sample
            torch.testing.assert_close(found[row], stepped[0], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_a_jump_is_what_lcm_scheduler_draws_at(kind: str) -> None:
    scheduler = LCMScheduler(**SETTINGS, prediction_type=kind, clip_sample=False)
    schedule, x = Schedule.from_scheduler(scheduler), noise(1)
    found = jump(teacher, schedule, x, T)
    scheduler.set_timesteps(timesteps=T.tolist())
    for row in range(4):
        output = teacher(x, T)[row : row + 1]
        denoised = scheduler.step(output, T[row], x[row : row + 1], generator=torch.Generator()).denoised
        torch.testing.assert_close(found[row], denoised[0], rtol=1e-4, atol=1e-4)
    # At the data themselves nothing is left to do.
    assert torch.equal(jump(teacher, schedule, x, torch.zeros(4, dtype=torch.long)), x)


def test_a_student_whose_jumps_agree_has_no_loss_and_the_target_no_gradient() -> None:
    schedule = Schedule.from_scheduler(DDIMScheduler(**SETTINGS))
    data, later = noise(2), T - 10
    x, x_later = (schedule.add_noise(data, noise(3), t) for t in (T, later))

    def perfect(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        # Of the one picture that it knows: so that c_skip·x + c_out·x̂_0 is the picture.
        scaled = (10 * t.double()).view(-1, 1, 1, 1)
        skip, out = 0.25 / (scaled**2 + 0.25), scaled / (scaled**2 + 0.25).sqrt()
        signal, sigma = (table[t].view(-1, 1, 1, 1) for table in (schedule.signal, schedule.noise))
        return (x - signal * (data - skip * x) / out) / sigma

    losses = consistency_losses(perfect, schedule, x, T, x_later, later.clamp(min=1))
    assert float(losses[:3].max()) < 1e-9
    weight, calls = torch.ones((), dtype=torch.float64, requires_grad=True), []

    def student(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        calls.append((t.tolist(), torch.is_grad_enabled()))
        return weight * teacher(x, t)

    losses = consistency_losses(student, schedule, x, T, x_later, later)
    assert calls == [(later.tolist(), False), (T.tolist(), True)] and losses.shape == (4,)
    apart = jump(teacher, schedule, x, T) - jump(teacher, schedule, x_later, later)
    expected = ((apart**2 + 1e-6).sqrt() - 1e-3).flatten(1).mean(1)
    torch.testing.assert_close(losses, expected, rtol=1e-9, atol=1e-12)


def test_times_are_drawn_from_ten_to_the_last_by_row() -> None:
    schedule = Schedule.from_scheduler(DDIMScheduler(**SETTINGS))
    drawn = draw_times(schedule, row_generators(0, 0, list(range(4000)), "timestep"))
    assert 10 <= int(drawn.min()) < 15 and 995 <= int(drawn.max()) <= 999
    assert int(drawn[7]) == int(draw_times(schedule, row_generators(0, 0, [7], "timestep"))[0])
