"""Inputs for every loss in the table: `draw(key, batch)` gives a record and the hyper-parameters that suit it."""

import pytest
import torch

from mmalign import losses

UNPAIRED = [key for key in losses.names() if losses.get(key).unpaired]
SIGNED = [key for key in losses.names() if not losses.get(key).no_strength]


def pytest_generate_tests(metafunc):
    for fixture, keys in (("key", losses.names()), ("signed_key", SIGNED), ("unpaired_key", UNPAIRED)):
        if fixture in metafunc.fixturenames:
            metafunc.parametrize(fixture, keys)


def draw_record(key, batch, *, seed=0, dtype=torch.float64):
    """Log-probabilities below 0 with all that the loss may read, and hyper-parameters off their saturation."""
    generator = torch.Generator().manual_seed(seed)

    def logp():
        return -(0.2 + 3 * torch.rand(batch, generator=generator, dtype=torch.float64)).to(dtype)

    hyper = {"mapo": {"num_train_timesteps": 5}, "diffusion_kto": {"beta": 1.3}, "bco": {"delta": 0.2}}.get(key, {})
    if key == "sdpo":
        hyper = {"rejected_scale": torch.rand(batch, generator=generator, dtype=torch.float64)}
    if losses.get(key).unpaired:
        label = torch.arange(batch) % 2 == 0
        return losses.UnpairedLogProbs(logp(), logp(), label, kl=-logp()), hyper
    lengths = [torch.randint(1, 9, (batch,), generator=generator) for _ in range(2)]
    return losses.PairLogProbs(logp(), logp(), logp(), logp(), *lengths), hyper


@pytest.fixture
def draw():
    return draw_record


@pytest.fixture
def at_ratios():
    """A pair record with the given log-ratios: the reference is 0."""

    def build(chosen, rejected, dtype=torch.float64):
        chosen, rejected = (torch.as_tensor(x, dtype=dtype).reshape(-1) for x in (chosen, rejected))
        zero = torch.zeros_like(chosen)
        return losses.PairLogProbs(chosen, rejected, zero, zero)

    return build
