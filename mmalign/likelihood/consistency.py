"""Latent consistency distillation (arXiv:2310.04378) as LongAlign's LCM variant has it: a network that jumps to the data from anywhere.

One guided step of the teacher leads from x_t to x_t', `SKIP` timesteps on. The student's jumps from both must agree:

    L = ρ(f_θ(x_t, t) − sg f_θ(x_t', t')),    f = c_skip(t)·x + c_out(t)·x̂_0,    c_skip = σ²/((s·t)² + σ²),  c_out = s·t/√((s·t)² + σ²)

with σ = ½ and s = 10, as diffusers' LCMScheduler has them, and ρ the pseudo-Huber norm. VP schedules; B rows.
"""

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mmalign.denoisers.schedule import Schedule, precise, rows_like
from mmalign.likelihood import draws
from mmalign.likelihood.truncated import data_error

Student = Callable[[Tensor, Tensor], Tensor]
"""student(x, t) → raw model output of x's rows under their prompts."""

Teacher = Callable[[Tensor, Tensor, bool], Tensor]
"""teacher(x, t, conditioned) → the same; conditioned False: of the empty prompt."""

SKIP, FIRST = 20, 10
_SIGMA, _SCALING = 0.5, 10.0


def draw_times(schedule: Schedule, generators: Sequence[torch.Generator]) -> Int[Tensor, " B"]:
    """t of every row, uniform over FIRST … the last timestep, on the CPU."""
    return draws.randint(generators, FIRST, schedule.max_timestep + 1)


@torch.no_grad()
def teacher_step(
    teacher: Teacher,
    schedule: Schedule,
    x: Float[Tensor, "B ..."],
    t: Int[Tensor, " B"],
    guidance_scale: float,
) -> tuple[Float[Tensor, "B ..."], Int[Tensor, " B"]]:
    """One DDIM step of unconditional + g·(conditional − unconditional): (x_t', t'), t' at least 0."""
    later, x = (t - SKIP).clamp(min=0), precise(x)
    free, bound = (schedule.to_direction(teacher(x, t, conditioned), x, t) for conditioned in (False, True))
    moved = rows_like(schedule.level(later) - schedule.level(t), x) * (free + guidance_scale * (bound - free))
    return rows_like(schedule.scale(later), x) * (x / rows_like(schedule.scale(t), x) + moved), later


def jump(
    student: Student, schedule: Schedule, x: Float[Tensor, "B ..."], t: Int[Tensor, " B"]
) -> Float[Tensor, "B ..."]:
    """f(x, t), x itself at t = 0."""
    scaled = _SCALING * t.double()
    skip, out = _SIGMA**2 / (scaled**2 + _SIGMA**2), scaled / (scaled**2 + _SIGMA**2).sqrt()
    found = schedule.to_data(student(x, t), x, t)
    return rows_like(skip, found) * precise(x) + rows_like(out, found) * found


def consistency_losses(
    student: Student,
    schedule: Schedule,
    x: Float[Tensor, "B ..."],
    t: Int[Tensor, " B"],
    x_later: Float[Tensor, "B ..."],
    later: Int[Tensor, " B"],
) -> Float[Tensor, " B"]:
    """How far the jumps from both places lie apart; the later one is the target."""
    with torch.no_grad():
        target = jump(student, schedule, x_later, later)
    return data_error(jump(student, schedule, x, t), target)
