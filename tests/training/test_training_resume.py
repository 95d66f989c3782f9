"""Killed, stopped, accumulated, shared between processes: the same rows, losses and gradients."""

import json
import random
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from training import worker
from training.runs import Watch, history, lora, moved_lora, pairs, trainer
from transformers import TrainerCallback

LONG: dict[str, Any] = {"max_steps": 8, "save_strategy": "steps", "save_steps": 3, "learning_rate": 1e-3}


def checkpoints(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("checkpoint-*"))


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A whole run with dropout in its LoRA, so that the process's own random state matters too."""
    folder = tmp_path_factory.mktemp("whole")
    run = trainer(folder, peft_config=lora(lora_dropout=0.2), **LONG)
    run.train()
    return {"losses": history(run), "folder": folder, "reference": run.reference.fingerprint()}


# Killed.


def killed_then_resumed(folder: Path, **kill: Any) -> dict[int, float]:
    options = LONG | {"peft_config": lora(lora_dropout=0.2)}
    journal = folder / "journal"
    process = worker.start(worker.train, str(folder), str(journal), options, **kill)
    process.join(240)
    assert process.exitcode == -signal.SIGKILL
    assert worker.read(journal).keys() <= set(range(1, 9))
    again = worker.start(worker.train, str(folder), str(journal), options, resume="latest")
    again.join(240)
    assert again.exitcode == 0
    return worker.read(journal)


def test_killed_at_a_step_and_resumed_is_the_same_run(uninterrupted: dict[str, Any], tmp_path: Path) -> None:
    step = random.randrange(1, 9)
    losses = killed_then_resumed(tmp_path, kill_at=step)
    assert [losses[k] for k in range(1, 9)] == pytest.approx(uninterrupted["losses"], abs=1e-6), f"killed at {step}"


@pytest.mark.parametrize(
    "kill", [{"kill_at": 1}, {"kill_at": 4}, {"kill_at": 7}, {"kill_in": "write_manifest"}], ids=str
)
def test_killed_anywhere_and_resumed_is_the_same_run(
    kill: dict[str, Any], uninterrupted: dict[str, Any], tmp_path: Path
) -> None:
    losses = killed_then_resumed(tmp_path, **kill)
    assert [losses[k] for k in range(1, 9)] == pytest.approx(uninterrupted["losses"], abs=1e-6)


# Stopped.


class Stop(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        control.should_training_stop = state.global_step >= self.step
        return control


@pytest.mark.parametrize("resume", [True, "latest", "path", "argument"])
def test_a_resumed_run_repeats_the_loss_sequence(resume: Any, uninterrupted: dict[str, Any], tmp_path: Path) -> None:
    stopped = trainer(tmp_path, peft_config=lora(lora_dropout=0.2), callbacks=[Stop(5)], **LONG)
    stopped.train()
    assert checkpoints(tmp_path) == ["checkpoint-3"]
    last = tmp_path / "checkpoint-3"
    torch.manual_seed(99)
    options = LONG | ({"resume_from_checkpoint": str(last)} if resume == "argument" else {})
    run = trainer(tmp_path, peft_config=lora(lora_dropout=0.2), **options)
    run.train(**({} if resume == "argument" else {"resume_from_checkpoint": str(last) if resume == "path" else resume}))
    assert history(run) == pytest.approx(uninterrupted["losses"], abs=1e-6)
    assert run.reference.fingerprint() == uninterrupted["reference"]


@pytest.mark.parametrize("method", ["inpo", "sft"])
def test_other_methods_and_full_training_resume(method: str, tmp_path: Path) -> None:
    options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "learning_rate": 1e-4, "peft_config": None}
    whole = trainer(tmp_path / "a", method, **options)
    whole.train()
    (tmp_path / "a" / "checkpoint-4").rename(tmp_path / "gone")
    run = trainer(tmp_path / "a", method, **options)
    run.train(resume_from_checkpoint="latest")
    assert history(run) == pytest.approx(history(whole), abs=1e-6)
    assert run.reference.fingerprint() == whole.reference.fingerprint()
    for name, parameter in run.network.named_parameters():
        torch.testing.assert_close(parameter, dict(whole.network.named_parameters())[name])


def test_latest_without_a_checkpoint_starts_anew(tmp_path: Path) -> None:
    run = trainer(tmp_path / "new")
    run.train(resume_from_checkpoint="latest")
    assert len(history(run)) == 2


def test_the_seed_alone_decides_a_run(tmp_path: Path) -> None:
    def run(number: int, **options: Any) -> list[float]:
        torch.manual_seed(number)
        made = trainer(tmp_path, max_steps=4, learning_rate=1e-3, **options)
        torch.manual_seed(number + 50)
        made.train()
        return history(made)

    assert run(1) == run(2)
    assert run(1) != run(1, seed=5)


def test_epochs_differ_in_order_and_draws(tmp_path: Path) -> None:
    run = trainer(tmp_path, max_steps=6)
    seen = worker.recorded(run)
    run.train()
    first, second = [row for epoch, row, _ in seen if epoch == 0], [row for epoch, row, _ in seen if epoch == 1]
    assert sorted(first) == sorted(second) == list(range(6)) and first != second


# Accumulated, and shared.

ONE_STEP: dict[str, Any] = {"max_steps": 1, "dtype": torch.float64, "max_grad_norm": 0.0}


def seen_in(folder: Path, **options: Any) -> tuple[dict[int, float], dict[str, torch.Tensor]]:
    watch = Watch()
    run = trainer(folder, peft_config=moved_lora(), callbacks=[watch], **ONE_STEP | options)
    rows = worker.recorded(run)
    run.train()
    return {row: loss for _, row, loss in rows}, watch.gradients[0]


def same(one: Any, other: Any) -> None:
    assert one[0].keys() == other[0].keys()
    for row, loss in one[0].items():
        assert loss == pytest.approx(other[0][row], rel=1e-6)
    assert one[1].keys() == other[1].keys()
    for name, gradient in one[1].items():
        torch.testing.assert_close(gradient, other[1][name], rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize(("method", "landings"), [("dpo", "last"), ("smpo", "last"), ("smpo", "all")])
def test_accumulating_k_times_one_equals_once_k(method: str, landings: str, tmp_path: Path) -> None:
    asked: dict[str, Any] = {"method": method}
    if landings != "last":
        asked["inversion_landings"] = landings
    once = seen_in(tmp_path, per_device_train_batch_size=4, **asked)
    assert len(once[0]) == 4
    for size in (1, 2):
        options = {"per_device_train_batch_size": size, "gradient_accumulation_steps": 4 // size}
        same(seen_in(tmp_path, **asked, **options), once)


def test_a_short_last_micro_batch_weighs_as_its_pairs(tmp_path: Path) -> None:
    data = pairs(5)
    once = seen_in(tmp_path, data=data, per_device_train_batch_size=5)
    options = {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 2, "dataloader_drop_last": False}
    same(seen_in(tmp_path, data=data, **options), once)


def test_two_processes_equal_one(tmp_path: Path) -> None:
    # Eight pairs are two steps of two batches of two; a run on one process would end an epoch with the odd batch.
    options: dict[str, Any] = ONE_STEP | {"max_steps": 2, "data": pairs(8), "eval_dataset": pairs(5, seed=3)}
    options |= {"peft_config": moved_lora()}
    ranks = worker.together(2, tmp_path / "two", options)
    watch = Watch()
    alone = trainer(tmp_path / "one", gradient_accumulation_steps=2, callbacks=[watch], **options)
    rows = worker.recorded(alone)
    alone.train()
    seen = [row for rank in ranks for row in rank["rows"] if row[0] >= 0]
    assert {row[:2] for row in ranks[0]["rows"]}.isdisjoint(row[:2] for row in ranks[1]["rows"])
    same(
        ({row[:2]: row[2] for row in seen}, ranks[0]["gradients"][0]),
        ({row[:2]: row[2] for row in rows}, watch.gradients[0]),
    )
    same(({}, ranks[1]["gradients"][0]), ({}, watch.gradients[0]))
    for entry, other in zip(ranks[0]["history"][:2], alone.state.log_history[:2], strict=True):
        assert entry["loss"] == pytest.approx(other["loss"], rel=1e-6)
        assert entry["errors/chosen"] == pytest.approx(other["errors/chosen"], rel=1e-6)
    # Five evaluation pairs, three on one process and two on the other: a mean over pairs, not over processes.
    assert ranks[0]["metrics"]["eval_loss"] == pytest.approx(alone.evaluate()["eval_loss"], rel=1e-6)


def test_two_processes_resume_in_a_later_epoch(tmp_path: Path) -> None:
    options: dict[str, Any] = {
        "max_steps": 5,
        "save_strategy": "steps",
        "save_steps": 4,
        "per_device_train_batch_size": 1,
    }
    whole = worker.together(2, tmp_path, options)
    again = worker.together(2, tmp_path, options, resume=str(tmp_path / "checkpoint-4"))
    for before, after in zip(whole, again, strict=True):
        (epoch, row, loss), *_ = after["rows"]
        assert epoch == 1 and [(epoch, row)] == [seen[:2] for seen in before["rows"][4:]]
        assert loss == pytest.approx(before["rows"][4][2], abs=1e-6)


def test_the_checkpoint_tells_what_it_belongs_to(uninterrupted: dict[str, Any]) -> None:
    manifest = json.loads((uninterrupted["folder"] / "checkpoint-8" / "manifest.json").read_text())
    assert manifest["facts"]["method"] == "dpo" and manifest["facts"]["reference model"] == uninterrupted["reference"]
    assert {"optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"} <= manifest["files"].keys()
    assert "pytorch_lora_weights.safetensors" in manifest["files"]
    assert checkpoints(uninterrupted["folder"]) == ["checkpoint-3", "checkpoint-6", "checkpoint-8"]
