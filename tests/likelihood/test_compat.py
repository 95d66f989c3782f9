"""compat="official-0.20": the released scripts' grid, calls and targets, with the numbers measured on them."""

import math

import pytest
import torch
from likelihood.toys import Recorder, stable_diffusion, wavy

from mmalign.likelihood import OFFICIAL_INVERSION, InversionConfig, draws, invert, landing_table
from mmalign.likelihood.grids import make_grid


def config(num_steps: int, **options: object) -> InversionConfig:
    return InversionConfig(num_steps=num_steps, compat="official-0.20", **options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("num_steps", "distance", "leak", "spread"),
    [(5, 99.3, 0.177, 1.264), (10, 49.4, 0.080, 1.139), (20, 24.5, 0.038, 1.072)],
)
def test_landing_table(num_steps: int, distance: float, leak: float, spread: float) -> None:
    table = landing_table(stable_diffusion(), config(num_steps))
    assert float((table.landing - table.timestep).abs().double().mean()) == pytest.approx(distance, abs=0.06)
    assert float(table.leak.abs().mean()) == pytest.approx(leak, abs=6e-4)
    assert float(table.spread.mean()) == pytest.approx(spread, abs=6e-4)


def test_landings_miss_by_up_to_a_step_and_stop_below_the_top() -> None:
    table = landing_table(stable_diffusion(), config(5))
    assert (table.landing - table.timestep).abs().max() <= 199
    assert table.landing[0] == 1 and (table.landing[802:] == 801).all()
    assert (landing_table(stable_diffusion(), config(10)).landing[902:] == 901).all()
    assert float(table.leak[50]) == pytest.approx(-0.49, abs=5e-3)
    assert float(table.spread[50]) == pytest.approx(2.26, abs=5e-3)


def test_the_network_is_asked_at_the_source_a_negative_timestep_first() -> None:
    grid = make_grid(stable_diffusion(), torch.tensor([999]), config(10))
    assert grid.first[0].tolist() == [-99, 1, 101, 201, 301, 401, 501, 601, 701, 801]
    recorder = Recorder(wavy)
    invert(recorder, stable_diffusion(), torch.zeros(1, 2), torch.tensor([500]), config(5, renoise_steps=1))
    assert torch.cat(recorder.times).tolist() == [-199, -199, 1, 1, 201, 201, 401, 401]


def scripted(t: int, x0: torch.Tensor, num_steps: int, corrections: int, eta: float, half: bool) -> torch.Tensor:
    """The released procedure restated in x-space: returns the target it would regress on."""
    alpha_bar = stable_diffusion().signal ** 2
    stride, rows = 1000 // num_steps, torch.zeros(1, dtype=torch.long)
    generator = draws.row_generators(3, 0, [0], "inversion")[0]

    def alpha(step: int) -> float:
        return float(alpha_bar[max(step, 0)])

    def move(x: torch.Tensor, e: torch.Tensor, s: int) -> torch.Tensor:
        clean = (x - math.sqrt(1 - alpha(s)) * e) / math.sqrt(alpha(s))
        return math.sqrt(alpha(s + stride)) * clean + math.sqrt(1 - alpha(s + stride)) * e

    x = x0
    for s in range(1 - stride, 1 + stride * (num_steps - 1), stride):
        if s >= t:
            break
        first = e = wavy(x, rows + s, rows)
        if corrections:
            e = (first + wavy(move(x, first, s), rows + s, rows)) / 2
        x = move(x, e, s)
        if eta:
            a, b = alpha(s), alpha(s + stride)
            variance = (1 - a) / (1 - b) * (1 - b / a)
            x = x + eta * math.sqrt(variance) * torch.randn(x.shape[1:], generator=generator).double()
    at_t = alpha_bar[t].half() if half else alpha_bar[t]
    signal, noise = at_t.sqrt().double(), (1 - at_t).sqrt().double()
    return (x - signal * x0) / noise


@pytest.mark.parametrize("t", [0, 1, 2, 450, 999])
@pytest.mark.parametrize("method", OFFICIAL_INVERSION)
def test_targets_are_those_of_the_released_procedure(method: str, t: int) -> None:
    official = OFFICIAL_INVERSION[method]
    x0 = torch.randn(1, 2, 3, 3, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    generators = draws.row_generators(3, 0, [0], "inversion") if official.eta else None
    result = invert(wavy, stable_diffusion(), x0, torch.tensor([t]), official, generators)
    expected = scripted(t, x0, official.num_steps, official.renoise_steps, official.eta, half=True)
    torch.testing.assert_close(result.target, expected, rtol=1e-9, atol=1e-9)
    assert result.timestep.item() == t and result.landing.item() == 1 + 1000 // official.num_steps * (
        result.moves.item() - 1
    )


def test_released_constants() -> None:
    inpo, sd15, sdxl = (OFFICIAL_INVERSION[key] for key in ("inpo", "smpo-sd15", "smpo-sdxl"))
    assert (inpo.num_steps, inpo.renoise_steps, inpo.eta, inpo.eta_form) == (10, 0, 0.1, "published")
    assert (sd15.num_steps, sd15.renoise_steps, sd15.combine, sd15.eta) == (5, 1, "mean", 0.0)
    assert (sdxl.num_steps, sdxl.renoise_steps, sdxl.combine, sdxl.eta) == (10, 1, "mean", 0.0)


def test_half_precision_alphas_distort_the_smallest_timesteps() -> None:
    """(1−ᾱ) off by +14.9 % at t = 0 and −14 % at t = 1: seen as the ratio of two targets with the data taken out."""
    schedule, x0 = stable_diffusion(), torch.zeros(1, 4, dtype=torch.float64)

    def ratio(t: int) -> float:
        exact, rounded = (
            invert(lambda x, time, rows: torch.ones_like(x), schedule, x0, torch.tensor([t]), config(10, fp16_alphas=f))
            for f in (False, True)
        )
        return float((exact.target / rounded.target)[0, 0] ** 2)

    assert ratio(0) == pytest.approx(1.149, abs=2e-3)
    assert ratio(1) == pytest.approx(0.86, abs=5e-3)
    assert ratio(500) == pytest.approx(1, abs=1e-3)


def test_only_eps_models_have_a_released_procedure() -> None:
    with pytest.raises(ValueError, match="ε models only"):
        invert(wavy, stable_diffusion("v_prediction"), torch.zeros(1, 2), torch.tensor([5]), config(10))
