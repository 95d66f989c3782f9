"""Every landing of an inversion as a training point."""

from pathlib import Path
from typing import Any

import pytest
import torch
from training.runs import batch, history, losses, moved_lora, trainer

EVERY: dict[str, Any] = {"inversion_landings": "all", "inversion_steps": 3}


@pytest.mark.parametrize("method", ["inpo", "smpo"])
def test_every_landing_is_a_point_of_its_own_pair(method: str, tmp_path: Path) -> None:
    run = trainer(tmp_path, method, peft_config=moved_lora(), **EVERY)
    loss, measured, pairs_ = run.pair_losses(run.model, batch(run, (0, 2)), epoch=0)
    rows = batch(run, (0, 2))["row"]
    assert loss.shape == (6,) and pairs_.rows == rows * 3
    landed = measured.timestep.unflatten(0, (3, 2))
    assert (landed // 334 == torch.arange(3)[:, None]).all() and (landed.diff(dim=0) - 333).abs().max() <= 1
    assert torch.equal(measured.point.timestep, measured.timestep.repeat(2))
    # A latent that stood beside another picture's would not be rebuilt from its target.
    rebuilt = run.denoiser.schedule.add_noise(pairs_.x0, measured.point.target, measured.point.timestep)
    torch.testing.assert_close(rebuilt, measured.point.x_t, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("options", [{}, {"inversion_eta": 0.3}], ids=["exact", "eta"])
def test_a_batch_of_paths_is_its_pairs(options: dict[str, Any], tmp_path: Path) -> None:
    """Prompts, strengths and pictures stay together: a pair's landings are the same alone and among others."""
    asked: dict[str, Any] = {"dtype": torch.float64, "peft_config": moved_lora()}
    run = trainer(tmp_path, "inpo", **asked, **EVERY, **options)
    together = losses(run, (0, 1, 3)).unflatten(0, (3, 3))
    for place, item in enumerate((0, 1, 3)):
        torch.testing.assert_close(losses(run, (item,)), together[:, place], rtol=1e-9, atol=1e-12)
    assert together.unique().numel() == 9


def test_the_last_landing_alone_would_be_one_of_them(tmp_path: Path) -> None:
    """On a grid of one step the only landing is the last one."""
    every = trainer(tmp_path, "smpo", **EVERY | {"inversion_steps": 1})
    loss, measured, _ = every.pair_losses(every.model, batch(every), epoch=0)
    alone = trainer(tmp_path, "smpo", inversion_steps=1)
    again, drawn, _ = alone.pair_losses(alone.model, batch(alone), epoch=0)
    assert loss.shape == (2,) and torch.equal(measured.timestep, drawn.timestep) and torch.equal(loss, again)


@pytest.mark.parametrize("method", ["inpo", "smpo", "sft"])
def test_every_landing_trains_evaluates_and_reports(method: str, tmp_path: Path) -> None:
    latents = {"latents": "ddim"} if method == "sft" else {}
    run = trainer(tmp_path, method, eval_dataset=None, max_steps=2, learning_rate=1e-2, **EVERY, **latents)
    run.train()
    assert len(history(run)) == 2 and all(torch.isfinite(torch.tensor(history(run))))
    assert {f"target/rms_by_time/{k}_of_4" for k in (2, 3, 4)} <= run.state.log_history[0].keys()
