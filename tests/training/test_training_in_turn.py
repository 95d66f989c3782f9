"""Inversion paths kept between visits: the points are those of an inversion, each landing has its turn, and stale ones are not used."""

from pathlib import Path
from typing import Any

import pytest
import torch
from training import worker
from training.runs import history, lora, losses, moved_lora, pairs, trainer

from mmalign.data import clear_cache
from mmalign.data.shards import read_notes, write_shard

KEPT: dict[str, Any] = {"inversion_landings": "in_turn", "inversion_model": "reference", "inversion_steps": 3}
OWN: dict[str, Any] = KEPT | {"inversion_model": "policy", "inversion_refresh": 8}


def calls(run: Any) -> list[int]:
    """Grows by the number of rows at every call of the network."""
    seen: list[int] = []
    run.network.register_forward_pre_hook(lambda module, args, kwargs: seen.append(1), with_kwargs=True)
    return seen


def run_of(folder: Path, method: str = "smpo", **options: Any) -> Any:
    return trainer(folder, method, **{"cache_dir": str(folder / "cache"), **KEPT} | options)


@pytest.mark.parametrize("method", ["inpo", "smpo"])
@pytest.mark.parametrize("options", [KEPT, OWN], ids=["reference", "policy"])
def test_landings_are_those_of_every_landing_and_come_in_turn(
    method: str, options: dict[str, Any], tmp_path: Path
) -> None:
    shared: dict[str, Any] = {"dtype": torch.float64, "peft_config": moved_lora(), "prompt_dropout": 0.0, **options}
    kept = run_of(tmp_path, method, **shared)
    every = trainer(tmp_path, method, **shared | {"inversion_landings": "all", "inversion_refresh": None})
    expected = losses(every, (0, 2)).unflatten(0, (3, 2))
    assert kept.args.inversion_eta == every.args.inversion_eta
    visits = torch.stack([losses(kept, (0, 2), epoch=epoch) for epoch in range(3)])
    # In three visits a pair meets its three landings, each once, starting at one of its own.
    for pair in range(2):
        torch.testing.assert_close(
            visits[:, pair].sort().values, expected[:, pair].sort().values, rtol=1e-9, atol=1e-12
        )
    torch.testing.assert_close(losses(kept, (0, 2), epoch=3), visits[0], rtol=0, atol=0)


def test_a_known_pair_costs_one_call_of_the_policy(tmp_path: Path) -> None:
    run = run_of(tmp_path)
    made = calls(run)
    first = losses(run)
    # Three moves of two calls (one ReNoise correction), the reference at three landings, the policy at one.
    assert len(made) == 3 * 2 + 3 + 1
    assert torch.equal(losses(run), first) and len(made) == 11
    losses(run, (0, 3))
    # Pair 3 alone is inverted.
    assert len(made) == 11 + 10


def test_a_second_run_takes_them_from_the_folder(tmp_path: Path) -> None:
    options: dict[str, Any] = {"max_steps": 6, "learning_rate": 1e-2}
    first = run_of(tmp_path, **options)
    first.train()
    files = list((tmp_path / "cache").glob("paths-*/*.safetensors"))
    second = run_of(tmp_path, **options)
    made = calls(second)
    second.train()
    assert history(first) == history(second)
    # The first batch is inverted once more, to see that the folder tells the truth.
    assert len(made) == 6 + 9 and files == list((tmp_path / "cache").glob("paths-*/*.safetensors"))
    other = run_of(tmp_path, beta=77.0, loss_type="hinge", max_steps=6)
    made = calls(other)
    other.train()
    assert len(made) == 6 + 9
    assert clear_cache(tmp_path / "cache") > 0 and not list((tmp_path / "cache").glob("paths-*"))


@pytest.mark.parametrize(
    "options", [{"seed": 7}, {"data": pairs(6, seed=9)}, {"inversion_steps": 2}, {"prompt_dropout": 1.0}]
)
def test_other_points_are_other_paths(options: dict[str, Any], tmp_path: Path) -> None:
    run_of(tmp_path, max_steps=3).train()
    again = run_of(tmp_path, max_steps=3, **options)
    made = calls(again)
    again.train()
    assert len(made) == 3 * (3 * options.get("inversion_steps", 3) + 1)


def test_what_was_changed_or_is_not_true_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    run_of(tmp_path, max_steps=3).train()
    (file,) = (tmp_path / "cache").glob("paths-*/*.safetensors")
    tensors, notes = load_file(file), read_notes(file)
    write_shard(file, {name: part * 2 for name, part in tensors.items()}, notes)
    with pytest.raises(ValueError, match="was changed after it was written: delete it"):
        run_of(tmp_path, max_steps=3).train()
    # Whole and well signed, but not what this model computes.
    from mmalign.training.kept_paths import KeptPath

    rows = sorted({int(name.split("/")[0]) for name in tensors})
    wrong = {
        row: KeptPath(tensors[f"{row}/target"] * 2, tensors[f"{row}/timestep"], tensors[f"{row}/error"]) for row in rows
    }
    changed = {
        f"{row}/{name}": getattr(path, name) for row, path in wrong.items() for name in ("target", "timestep", "error")
    }
    write_shard(file, changed, notes | {"sha256": {str(row): path.digest() for row, path in wrong.items()}})
    with pytest.raises(ValueError, match="not those that this run computes"):
        run_of(tmp_path, max_steps=3).train()
    write_shard(file, tensors, notes | {"parts": {}})
    with pytest.raises(ValueError, match="was changed after it was written"):
        run_of(tmp_path, max_steps=3).train()


def test_paths_of_the_policy_are_renewed(tmp_path: Path) -> None:
    """Each pair is inverted once a round; what the policy has become shows in the next one; nothing is written."""
    run = run_of(tmp_path, **OWN, max_steps=16, peft_config=moved_lora(), learning_rate=1e-2)
    made = calls(run)
    run.train()
    # Six pairs, two a step: an epoch is three steps. Each round of eight steps inverts each pair once.
    steps, pairs_twice = 16, 2 * 3
    assert len(made) == steps + pairs_twice * 9
    assert not list((tmp_path / "cache").glob("paths-*"))
    exact = losses(run, (0, 1), epoch=4)
    with torch.no_grad():
        for parameter in run.network.parameters():
            if parameter.requires_grad:
                parameter.mul_(1.5)
    run.state.global_step = 24
    assert not torch.allclose(losses(run, (0, 1), epoch=4), exact)


@pytest.mark.parametrize("options", [KEPT, OWN], ids=["reference", "policy"])
def test_a_resumed_run_sees_the_same_paths(options: dict[str, Any], tmp_path: Path) -> None:
    asked: dict[str, Any] = {**options, "max_steps": 16, "learning_rate": 1e-2, "peft_config": lora()}
    whole = trainer(tmp_path / "whole", "smpo", cache_dir=str(tmp_path / "a"), **asked)
    whole.train()
    saved: dict[str, Any] = {"save_strategy": "steps", "save_steps": 8, "cache_dir": str(tmp_path / "b")}
    trainer(tmp_path / "cut", "smpo", **asked, **saved).train()
    resumed = trainer(tmp_path / "cut", "smpo", **asked, **saved)
    resumed.train(resume_from_checkpoint=str(tmp_path / "cut" / "checkpoint-8"))
    assert history(resumed) == pytest.approx(history(whole), abs=1e-6)


def test_evaluation_by_the_policy_is_never_stale(tmp_path: Path) -> None:
    run = trainer(tmp_path, "smpo", eval_dataset=pairs(4, seed=3), peft_config=moved_lora(), **OWN)
    first = run.evaluate()["eval_loss"]
    assert run.evaluate()["eval_loss"] == first
    with torch.no_grad():
        for parameter in run.network.parameters():
            if parameter.requires_grad:
                parameter.mul_(2.0)
    made = calls(run)
    assert run.evaluate()["eval_loss"] != first and len(made) == 10


def test_two_processes_share_the_folder(tmp_path: Path) -> None:
    options: dict[str, Any] = {
        "method": "inpo",
        "max_steps": 2,
        "data": pairs(8),
        "cache_dir": str(tmp_path / "cache"),
        "peft_config": lora(),
        "save_strategy": "no",
        **KEPT,
    }
    worker.together(2, tmp_path / "two", options)
    alone = trainer(tmp_path / "one", gradient_accumulation_steps=2, **options)
    made = calls(alone)
    alone.train()
    assert len(made) == 4 + 3 + 3


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("smpo", {"inversion_landings": "in_turn"}, "inversion_refresh belongs to"),
        ("smpo", KEPT | {"inversion_refresh": 9}, "inversion_refresh belongs to"),
        ("smpo", OWN | {"inversion_refresh": 0}, "at least 1"),
        ("smpo", OWN | {"save_strategy": "steps", "save_steps": 9}, "multiple of inversion_refresh"),
        ("smpo", OWN | {"save_strategy": "epoch"}, "multiple of inversion_refresh"),
        ("smpo", OWN | {"inversion_refresh": 3}, "no pair comes twice in so few steps"),
        ("inpo", KEPT | {"inversion_compat": "official-0.20", "inversion_eta_form": "published"}, "exact landings"),
        ("smpo", KEPT | {"reference_cache": True}, "one point a pair"),
        ("smpo", KEPT | {"loss_type": "aot"}, "must not mix the noise levels"),
        ("dpo", KEPT, "no effect|needs latents"),
    ],
)
def test_what_cannot_be_kept_is_refused(method: str, options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, method, **options)
