"""Which inversion is worth its calls: the orderings of the project's notes on an analytic Gaussian mixture.

Means, weights, standard deviations and seed stand in toys.py. Every scheme inverts the same samples to the top of its
own grid; measured are the round trip through the same N-step DDIM sampler, the distance to the exact ODE solution
at the landing, and the landing's standard deviation relative to the exact solution's.
"""

from dataclasses import dataclass

import pytest
import torch
from likelihood.toys import Mixture, stable_diffusion

from mmalign.likelihood import InversionConfig, invert, round_trip

STEPS = (5, 10, 20)
SCHEMES = {
    "official": InversionConfig(compat="official-0.20"),
    "official average": InversionConfig(compat="official-0.20", renoise_steps=1),
    "target": InversionConfig(),
    "average": InversionConfig(renoise_steps=1),
    "last of 1": InversionConfig(renoise_steps=1, combine="last"),
    "last of 3": InversionConfig(renoise_steps=3, combine="last"),
    "heun": InversionConfig(solver="heun"),
}


@dataclass(frozen=True)
class Measured:
    back: list[float]
    ode: list[float]
    spread: list[float]


def rms(x: torch.Tensor) -> float:
    return float(x.square().mean().sqrt())


@pytest.fixture(scope="module")
def table() -> dict[str, Measured]:
    schedule = stable_diffusion()
    mixture = Mixture(schedule)
    x0, top = mixture.sample(200), torch.full((200,), 999)
    exact: dict[int, torch.Tensor] = {}
    measured = {}
    for name, scheme in SCHEMES.items():
        back, ode, spread = [], [], []
        for num_steps in STEPS:
            config = InversionConfig(**{**vars(scheme), "num_steps": num_steps})
            trip = round_trip(mixture, schedule, x0, top, config)
            landing = int(trip.inversion.landing[0])
            if landing not in exact:
                fine = InversionConfig(num_steps=150, solver="heun")
                exact[landing] = invert(mixture, schedule, x0, torch.full((200,), landing), fine).x_t
            back.append(rms(trip.reconstruction - x0))
            ode.append(rms(trip.inversion.x_t - exact[landing]))
            spread.append(float(trip.inversion.x_t.std() / exact[landing].std()))
        measured[name] = Measured(back, ode, spread)
    assert rms(exact[999]) == pytest.approx(1.0, abs=0.1)
    return measured


@pytest.mark.parametrize("name", SCHEMES)
def test_round_trips_close_with_more_steps(table: dict[str, Measured], name: str) -> None:
    back = table[name].back
    assert back[0] > 1.1 * back[1] > 1.2 * back[2] and back[2] < 0.7 * back[0]


def test_the_target_timestep_is_what_makes_correction_work(table: dict[str, Measured]) -> None:
    for k in range(3):
        assert table["target"].back[k] < table["official"].back[k]
        assert table["average"].back[k] < 0.9 * table["target"].back[k]
        assert table["average"].back[k] < table["official average"].back[k]
    # With both calls at the source timestep the correction does not pay for itself on the coarsest grid.
    assert table["official average"].back[0] > table["official"].back[0]
    for k in range(2):
        assert table["average"].ode[k] < table["target"].ode[k]


def test_heun_follows_the_ode_best_and_at_second_order(table: dict[str, Measured]) -> None:
    for k in range(3):
        assert all(table["heun"].ode[k] < table[name].ode[k] for name in SCHEMES if name != "heun")
    assert table["heun"].ode[1] > 2.3 * table["heun"].ode[2]
    assert table["target"].ode[1] < 2.3 * table["target"].ode[2]


def test_more_corrections_invert_the_coarse_sampler_and_leave_the_ode(table: dict[str, Measured]) -> None:
    for k in range(3):
        assert table["last of 3"].back[k] < table["last of 1"].back[k] < table["average"].back[k]
        assert table["last of 3"].ode[k] > 1.2 * table["last of 1"].ode[k]


def test_spread_is_too_narrow_at_the_source_and_too_wide_after_many_corrections(table: dict[str, Measured]) -> None:
    for k, narrow in enumerate((0.7, 0.8, 0.9)):
        assert table["official"].spread[k] < narrow and table["official average"].spread[k] < narrow
        assert 1.0 < table["target"].spread[k] < 1.15
        assert table["last of 3"].spread[k] > max(1.15, table["last of 1"].spread[k])
