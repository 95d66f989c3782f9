"""Checkpoints are whole or absent, belong to one run, and say why they are refused."""

import errno
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors
import safetensors.torch
import torch
from tiny import tiny_pipeline
from training.runs import history, lora, pairs, trainer

from mmalign import DiffusionDPOPipeline
from mmalign.training import checkpoints
from mmalign.training.checkpoints import STAGING, read_manifest, write_manifest

SAVING: dict[str, Any] = {"max_steps": 2, "save_strategy": "steps", "save_steps": 2}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    trainer(folder, **SAVING).train()
    return folder / "checkpoint-2"


@pytest.fixture
def checkpoint(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "run" / "checkpoint-2"))


def resume(checkpoint: Path, **options: Any) -> Any:
    run = trainer(checkpoint.parent, **SAVING | {"max_steps": 3} | options)
    run.train(resume_from_checkpoint=str(checkpoint))
    return run


def test_a_whole_checkpoint_is_continued(checkpoint: Path) -> None:
    assert len(history(resume(checkpoint))) == 3


@pytest.mark.parametrize(
    "name", ["optimizer.pt", "pytorch_lora_weights.safetensors", "trainer_state.json", "rng_state.pth"]
)
def test_a_missing_file_is_named(name: str, checkpoint: Path) -> None:
    (checkpoint / name).unlink()
    with pytest.raises(ValueError, match=f"lacks {name}.*another checkpoint"):
        resume(checkpoint)


def test_a_changed_file_is_named(checkpoint: Path) -> None:
    content = bytearray((checkpoint / "optimizer.pt").read_bytes())
    content[-9] ^= 1
    (checkpoint / "optimizer.pt").write_bytes(bytes(content))
    with pytest.raises(ValueError, match=r"optimizer\.pt was changed after it was saved"):
        resume(checkpoint)


def test_a_folder_without_manifest_is_no_checkpoint(checkpoint: Path) -> None:
    (checkpoint / "manifest.json").unlink()
    with pytest.raises(ValueError, match="not a finished mmalign checkpoint"):
        resume(checkpoint)


@pytest.mark.parametrize(
    ("options", "fact"),
    [
        ({"seed": 1}, "seed"),
        ({"data": pairs(6, seed=5)}, "data"),
        ({"data": pairs(5)}, "data"),
        ({"method": "inpo", "beta": 5000.0}, "method"),
        ({"kind": "sd", "pipe": "other"}, "reference model"),
        ({"peft_config": lora(r=4)}, "peft_config"),
        ({"peft_config": None}, "peft_config"),
        ({"beta": 100.0}, "beta"),
        ({"learning_rate": 1e-3}, "learning_rate"),
        ({"loss_type": "ipo"}, "loss_type"),
        ({"prompt_dropout": 0.0}, "prompt_dropout"),
        ({"gradient_accumulation_steps": 2}, "batch"),
        ({"max_grad_norm": 5.0}, "max_grad_norm"),
        ({"bf16": True}, "bf16"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_checkpoint_of_another_run_is_refused(options: dict[str, Any], fact: str, checkpoint: Path) -> None:
    if options.get("pipe") == "other":
        other = tiny_pipeline("sd")
        with torch.no_grad():
            other.unet.conv_in.bias.add_(1e-3)
        options = {"pipe": DiffusionDPOPipeline._adopt(other)}
    with pytest.raises(ValueError, match=rf"trained with another {fact} \(.*; now .*Restore it, or start anew"):
        resume(checkpoint, **options)


def test_what_a_resumed_run_may_change(checkpoint: Path) -> None:
    assert (
        len(history(resume(checkpoint, logging_steps=1, save_steps=1, dataloader_num_workers=0, report_to="none"))) == 3
    )


def test_weights_alone_cannot_be_continued(tmp_path: Path) -> None:
    trainer(tmp_path, **SAVING, save_only_model=True).train()
    assert not (tmp_path / "checkpoint-2" / "optimizer.pt").exists()
    with pytest.raises(ValueError, match="save_only_model"):
        resume(tmp_path / "checkpoint-2")


def test_every_checkpoint_loads_into_plain_diffusers(checkpoint: Path) -> None:
    pipe = tiny_pipeline("sd")
    pipe.load_lora_weights(checkpoint)
    assert pipe.unet.peft_config["default_0"].r == 2


def test_the_oldest_go_and_the_best_stays(tmp_path: Path) -> None:
    options = {
        "max_steps": 4,
        "save_strategy": "steps",
        "save_steps": 1,
        "save_total_limit": 2,
        "eval_strategy": "steps",
    }
    run = trainer(
        tmp_path,
        eval_dataset=pairs(4, seed=7),
        eval_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="rewards/margins",
        learning_rate=1e-3,
        **options,
    )
    run.train()
    margins = [entry["eval_rewards/margins"] for entry in run.state.log_history if "eval_loss" in entry]
    best = 1 + margins.index(max(margins))
    assert run.state.best_model_checkpoint == str(tmp_path / f"checkpoint-{best}")
    kept = {path.name for path in tmp_path.glob("checkpoint-*")}
    assert kept == {f"checkpoint-{best}", "checkpoint-4"} | ({"checkpoint-3"} if best == 4 else set())
    assert run.evaluate()["eval_rewards/margins"] == pytest.approx(max(margins), rel=1e-5)


@pytest.mark.parametrize(
    ("peft_config", "rate", "greater"), [("lora", 1e-3, False), (None, 1e-6, True)], ids=["lora", "full"]
)
def test_the_best_weights_are_those_that_are_kept(peft_config: Any, rate: float, greater: bool, tmp_path: Path) -> None:
    run = trainer(
        tmp_path,
        peft_config=peft_config,
        eval_dataset=pairs(4, seed=7),
        eval_strategy="steps",
        eval_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="z/mean_square",
        greater_is_better=greater,
        learning_rate=rate,
        **SAVING | {"save_steps": 1, "max_steps": 3},
    )
    run.train()
    squares = [entry["eval_z/mean_square"] for entry in run.state.log_history if "eval_loss" in entry]
    best = max(squares) if greater else min(squares)
    assert best != squares[-1] and run.state.best_global_step == 1 + squares.index(best)
    assert run.evaluate()["eval_z/mean_square"] == pytest.approx(best, rel=1e-4)


# A full disk. What the two libraries raise was seen on a one-megabyte file system.


def no_space(*args: Any, **kwargs: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def no_space_in_safetensors(*args: Any, **kwargs: Any) -> None:
    raise safetensors.SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


def no_space_in_torch(*args: Any, **kwargs: Any) -> None:
    raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 576 vs 534")


@pytest.mark.parametrize(
    ("where", "fail"),
    [
        ((torch, "save"), no_space_in_torch),
        ((safetensors.torch, "save_file"), no_space_in_safetensors),
        ((checkpoints.json, "dumps"), no_space),
    ],
    ids=["torch", "safetensors", "json"],
)
def test_a_full_disk_leaves_no_half_written_checkpoint(
    where: Any, fail: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = trainer(tmp_path, **SAVING)
    _ = run.facts
    plain = getattr(*where)

    def failing(*args: Any, **kwargs: Any) -> Any:
        return fail() if (tmp_path / STAGING).exists() else plain(*args, **kwargs)

    monkeypatch.setattr(*where, failing)
    with pytest.raises(
        OSError, match="no space left on the disk that holds .*free some, or choose another folder"
    ) as caught:
        run.train()
    assert caught.value.errno == errno.ENOSPC and "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_at_the_end_keeps_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = trainer(tmp_path, max_steps=1)
    run.train()
    run.save_model()
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    monkeypatch.setattr(safetensors.torch, "save_file", no_space_in_safetensors)
    with pytest.raises(OSError, match="no space left"):
        run.save_model()
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_manifest_lists_files_in_folders_too(tmp_path: Path) -> None:
    (tmp_path / "unet").mkdir()
    (tmp_path / "unet" / "weights").write_text("w")
    write_manifest(tmp_path, {"seed": 1})
    assert json.loads((tmp_path / "manifest.json").read_text())["files"].keys() == {"unet/weights"}
    assert read_manifest(tmp_path) == {"seed": 1}
