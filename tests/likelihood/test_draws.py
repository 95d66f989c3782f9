"""Draws are keyed by row: the same alone, in any batch, in any order, for any dtype."""

import torch

from mmalign.denoisers import Schedule
from mmalign.likelihood import draw_timesteps, draws

ROWS = [3, 17, 900_001, 4]


def all_draws(rows: list[int], **key: object) -> list[torch.Tensor]:
    generators = draws.row_generators(**(dict(seed=1, epoch=2, rows=rows, purpose="noise") | key))  # type: ignore[arg-type]
    return [draws.randn(generators, (2, 3)), draws.rand(generators), draws.randint(generators, 0, 1000)]


def test_a_row_draws_the_same_alone_and_in_any_batch() -> None:
    together = all_draws(ROWS)
    for position, row in enumerate(ROWS):
        for batch, alone in zip(together, all_draws([row]), strict=True):
            assert torch.equal(batch[position], alone[0])
    for batch, reordered in zip(together, all_draws(ROWS[::-1]), strict=True):
        assert torch.equal(batch, reordered.flip(0))
    for batch, tensor_rows in zip(together, all_draws(torch.tensor(ROWS)), strict=True):  # type: ignore[arg-type]
        assert torch.equal(batch, tensor_rows)


def test_seed_epoch_row_and_purpose_each_change_the_draw() -> None:
    base = all_draws(ROWS)[0]
    for change in (dict(seed=2), dict(epoch=1), dict(purpose="timestep"), dict(rows=[r + 1 for r in ROWS])):
        other = all_draws(**(dict(rows=ROWS) | change))[0]  # type: ignore[arg-type]
        assert all((mine != theirs).all() for mine, theirs in zip(base, other, strict=True))
    # The key's parts do not run into one another.
    assert not torch.equal(all_draws([1], seed=1, epoch=12)[0], all_draws([1], seed=11, epoch=2)[0])


def test_draws_have_their_distribution() -> None:
    generators = draws.row_generators(0, 0, range(2000), "moments")
    normal = draws.randn(generators, (50,))
    assert abs(normal.mean()) < 0.01 and abs(normal.std() - 1) < 0.01
    # First draws of neighbouring rows must be as independent as draws within a row.
    assert abs(normal[:, 0].mean()) < 0.08 and abs(torch.corrcoef(normal[:, :2].T)[0, 1]) < 0.08
    uniform = draws.rand(draws.row_generators(0, 0, range(2000), "uniform"))
    assert uniform.min() >= 0 and uniform.max() < 1 and abs(uniform.mean() - 0.5) < 0.03
    integers = draws.randint(draws.row_generators(0, 0, range(2000), "integers"), 2, 5)
    assert sorted(set(integers.tolist())) == [2, 3, 4]


def test_the_dtype_rounds_a_draw_but_does_not_change_it() -> None:
    single, double, half = (
        draws.randn(draws.row_generators(0, 0, [1], "x"), (40,), dtype)
        for dtype in (torch.float32, torch.float64, torch.bfloat16)
    )
    assert torch.equal(single.double(), double) and torch.equal(single.bfloat16(), half)


def test_timesteps_stay_drawable() -> None:
    signal = torch.linspace(0.999, 0.0, 50, dtype=torch.float64)
    schedule = Schedule("v_prediction", signal, (1 - signal**2).sqrt())
    generators = draws.row_generators(0, 0, range(500), "timestep")
    drawn = draw_timesteps(schedule, generators)
    assert sorted(set(drawn.tolist())) == list(range(49))  # the last has signal 0
    last = draw_timesteps(schedule, draws.row_generators(0, 0, range(500), "timestep"), last_stratum_of=10)
    assert sorted(set(last.tolist())) == list(range(44, 49))
