"""The playground's training: stopped and resumed is the same run, and the committed curves are what the scripts give."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from mmalign.playground import autoencoder, base, photographs
from mmalign.playground.fit import FitConfig, fit
from mmalign.playground.paths import CURVES, STABLE_DIFFUSION

CONFIG = FitConfig(steps=12, learning_rate=1e-2, warmup=2, ema=0.9, save_every=5, curve_every=2)


def run(folder: Path | None, stop_after: int | None = None, config: FitConfig = CONFIG) -> tuple[list, nn.Module]:
    torch.manual_seed(0)
    model = nn.Linear(3, 1)

    def loss_of(step: int, generator: torch.Generator) -> torch.Tensor:
        return model(torch.randn(8, 3, generator=generator)).sub(1).square().mean()

    checkpoint = None if folder is None else folder / "run.pt"
    return fit(model, loss_of, config, checkpoint=checkpoint, stop_after=stop_after), model


@pytest.mark.parametrize("stop", [1, 5, 7])
def test_stopped_and_resumed_is_the_same_run(tmp_path: Path, stop: int) -> None:
    curve, model = run(None)
    run(tmp_path, stop_after=stop)
    resumed_curve, resumed = run(tmp_path)
    assert resumed_curve[-2:] == curve[-2:]
    assert torch.equal(resumed.weight, model.weight)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run.pt"]


def test_a_checkpoint_of_other_settings_is_refused(tmp_path: Path) -> None:
    run(tmp_path, stop_after=5)
    with pytest.raises(ValueError, match="other settings"):
        run(tmp_path, config=FitConfig(steps=12, learning_rate=2e-2, warmup=2, ema=0.9))


def test_a_constant_rate_may_go_on_to_more_steps(tmp_path: Path) -> None:
    short = FitConfig(steps=6, learning_rate=1e-2, warmup=2, constant=True, curve_every=2)
    run(tmp_path, config=short)
    longer = FitConfig(steps=12, learning_rate=1e-2, warmup=2, constant=True, curve_every=2)
    went_on, _ = run(tmp_path, config=longer)
    at_once, _ = run(None, config=longer)
    assert went_on == at_once


def test_centring_changes_no_picture() -> None:
    model = autoencoder.build()
    pixels = autoencoder.picture_batch(photographs.load("test"), 0, 16, stream=1) * 2 - 1
    with torch.no_grad():
        before = model.decode(model.encode(pixels).latent_dist.mean).sample
        autoencoder.centre(model, pixels)
        latents = model.encode(pixels).latent_dist.mean
        after = model.decode(latents).sample
    torch.testing.assert_close(after, before, atol=1e-5, rtol=1e-4)
    assert latents.mean((0, 2, 3)).abs().max() < 1e-5
    assert abs(float((latents * model.config.scaling_factor).square().mean().sqrt()) - 1) < 1e-3


def test_fifty_steps_of_the_base_meet_the_committed_curve() -> None:
    from diffusers import AutoencoderKL

    committed = {entry["step"]: entry["loss"] for entry in json.loads((CURVES / "base.json").read_text())}
    vae = AutoencoderKL.from_pretrained(STABLE_DIFFUSION / "vae", torch_dtype=torch.float32)
    _, curve = base.train(vae, stop_after=50)
    assert [entry["step"] for entry in curve] == [25, 50]
    for entry in curve:
        assert entry["loss"] == pytest.approx(committed[entry["step"]], rel=2e-3)
