"""The moving average of the trained weights: its formula, where it is used, and that it outlives kills and processes."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny_pipeline
from torch import Tensor
from training import worker
from training.runs import config, history, moved_lora, pairs, trained, trainer
from training.test_training_resume import LONG, Stop
from transformers import TrainerCallback

from mmalign.training.estimate import memory_of

FAST: dict[str, Any] = {"max_steps": 5, "learning_rate": 1e-2, "peft_config": moved_lora()}


class Trajectory(TrainerCallback):
    """The raw weights after every step."""

    def __init__(self) -> None:
        self.run: Any = None
        self.weights: list[dict[str, Tensor]] = []

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.weights.append(trained(self.run))


def trajectory(folder: Path, **options: Any) -> tuple[Any, list[dict[str, Tensor]]]:
    seen = Trajectory()
    run = trainer(folder, callbacks=[seen], **FAST | options)
    seen.run = run
    run.train()
    return run, seen.weights


def averaged(weights: list[dict[str, Tensor]], decay: float) -> dict[str, Tensor]:
    """Σ over steps of each step's weights times its share, which what came later has thinned."""
    steps = range(1, len(weights) + 1)
    decays = [0.0 if step == 1 else min(decay, step / (9 + step)) for step in steps]
    shares = [(1 - decays[k]) * torch.tensor(decays[k + 1 :]).prod().item() for k in range(len(weights))]
    assert sum(shares) == pytest.approx(1)
    return {name: sum(share * w[name] for share, w in zip(shares, weights, strict=True)) for name in weights[0]}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=1e-5, atol=1e-6)


def differ(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return max((one[name] - other[name]).abs().max().item() for name in one) > 1e-3


@pytest.mark.parametrize(("decay", "peft_config"), [(0.2, moved_lora()), (0.999, moved_lora()), (0.999, None)])
def test_the_network_ends_with_the_average_of_its_trajectory(decay: float, peft_config: Any, tmp_path: Path) -> None:
    run, weights = trajectory(tmp_path, ema_decay=decay, peft_config=peft_config)
    assert len(weights) == 5 and differ(weights[-1], trained(run))
    same(trained(run), averaged(weights, decay))


def test_averaging_changes_no_step_and_no_decay_is_the_last_one(tmp_path: Path) -> None:
    plain, raw = trajectory(tmp_path)
    run, same_raw = trajectory(tmp_path, ema_decay=0.9)
    assert history(run) == history(plain)
    assert all(torch.equal(raw[-1][name], same_raw[-1][name]) for name in raw[-1])
    none, _ = trajectory(tmp_path, ema_decay=0.0)
    assert all(torch.equal(raw[-1][name], trained(none)[name]) for name in raw[-1])


def test_what_is_saved_and_stays_in_the_pipeline_is_the_average(tmp_path: Path) -> None:
    run, weights = trajectory(tmp_path, ema_decay=0.9, save_strategy="steps", save_steps=5)
    run.save_model()
    average = averaged(weights, 0.9)
    loaded = {}
    for name, folder in {"end": "", "raw": "checkpoint-5", "average": "checkpoint-5/ema"}.items():
        pipe = tiny_pipeline("sd")
        pipe.load_lora_weights(tmp_path / folder, adapter_name="default")
        loaded[name] = {key: p.detach() for key, p in pipe.unet.named_parameters() if "lora" in key}
    same(loaded["end"], average)
    same(loaded["average"], average)
    same(loaded["raw"], weights[-1])
    assert "moving average of the trained weights, decay 0.9 (ema_decay)" in (tmp_path / "README.md").read_text()
    same(trained(run), average)


def test_a_user_who_saves_in_the_middle_gets_the_average_and_the_run_goes_on(tmp_path: Path) -> None:
    class Save(TrainerCallback):
        def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            run.save_model(str(tmp_path / "middle"))

    run = trainer(tmp_path, callbacks=[Save()], ema_decay=0.9, save_strategy="steps", save_steps=3, **FAST)
    run.train()
    plain, weights = trajectory(tmp_path / "plain", save_strategy="no")
    assert history(run) == history(plain)
    name = "pytorch_lora_weights.safetensors"
    assert (tmp_path / "middle" / name).read_bytes() != (tmp_path / "checkpoint-5" / name).read_bytes()
    same(trained(run), averaged(weights, 0.9))


def test_the_average_is_evaluated_and_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mmalign.training import samples

    drawn: list[dict[str, Tensor]] = []
    plain = samples.draw
    monkeypatch.setattr(samples, "draw", lambda pipe, args: drawn.append(trained(run)) or plain(pipe, args))
    seen = Trajectory()
    run = trainer(
        tmp_path,
        callbacks=[seen],
        ema_decay=0.9,
        eval_dataset=pairs(4, seed=7),
        eval_strategy="steps",
        eval_steps=5,
        validation_prompts=["a red shirt"],
        validation_steps=3,
        validation_inference_steps=1,
        **FAST,
    )
    seen.run = run
    start = trained(run)
    run.train()
    same(drawn[0], start)
    same(drawn[1], averaged(seen.weights[:3], 0.9))
    told = [entry for entry in run.state.log_history if "eval_loss" in entry][0]
    # Afterwards the network holds the average, and says the same.
    assert run.evaluate()["eval_loss"] == pytest.approx(told["eval_loss"], rel=1e-5)
    with torch.no_grad():
        for name, parameter in run.network.named_parameters():
            parameter.copy_(seen.weights[-1].get(name, parameter))
    assert run.evaluate()["eval_loss"] != pytest.approx(told["eval_loss"], rel=1e-5)


def test_the_best_average_is_kept(tmp_path: Path) -> None:
    options = FAST | {"max_steps": 3, "save_strategy": "steps", "save_steps": 1, "ema_decay": 0.5}
    run = trainer(
        tmp_path,
        eval_dataset=pairs(4, seed=7),
        eval_strategy="steps",
        eval_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="z/mean_square",
        greater_is_better=True,
        **options,
    )
    run.train()
    squares = [entry["eval_z/mean_square"] for entry in run.state.log_history if "eval_loss" in entry]
    assert max(squares) != squares[-1]
    assert run.evaluate()["eval_z/mean_square"] == pytest.approx(max(squares), rel=1e-4)


@pytest.mark.parametrize("peft_config", [moved_lora(), None], ids=["lora", "full"])
def test_a_resumed_run_has_the_average_of_the_whole_one(peft_config: Any, tmp_path: Path) -> None:
    options = LONG | {"peft_config": peft_config, "ema_decay": 0.9}
    whole = trainer(tmp_path / "whole", **options)
    whole.train()
    trainer(tmp_path / "run", callbacks=[Stop(5)], **options).train()
    run = trainer(tmp_path / "run", **options)
    run.train(resume_from_checkpoint="latest")
    assert history(run) == pytest.approx(history(whole), abs=1e-6)
    same(trained(run), trained(whole))
    with pytest.raises(ValueError, match=r"another ema_decay \(0\.9; now None\)"):
        trainer(tmp_path / "run", **options | {"ema_decay": None}).train(resume_from_checkpoint="latest")
    (tmp_path / "run" / "checkpoint-8" / "ema").rename(tmp_path / "gone")
    with pytest.raises(ValueError, match="lacks ema/"):
        trainer(tmp_path / "run", **options).train(resume_from_checkpoint="latest")


def test_killed_and_resumed_ends_with_the_same_average(tmp_path: Path) -> None:
    options = LONG | {"ema_decay": 0.9}
    ends = []
    for name, kills in (("whole", [{}]), ("killed", [{"kill_at": 5}, {"resume": "latest"}])):
        folder = tmp_path / name
        for kill in kills:
            process = worker.start(worker.train, str(folder), str(folder / "journal"), options, **kill)
            process.join(240)
            assert bool(process.exitcode) == ("kill_at" in kill)
        manifest = json.loads((folder / "checkpoint-8" / "manifest.json").read_text())
        ends.append({name: file["sha256"] for name, file in manifest["files"].items() if name.startswith("ema/")})
    assert ends[0] == ends[1] and len(ends[0]) == 1


def test_two_processes_keep_the_average_of_one(tmp_path: Path) -> None:
    options: dict[str, Any] = FAST | {
        "max_steps": 2,
        "dtype": torch.float64,
        "data": pairs(8),
        "eval_dataset": pairs(5, seed=3),
        "ema_decay": 0.9,
    }
    ranks = worker.together(2, tmp_path / "two", options)
    alone = trainer(tmp_path / "one", gradient_accumulation_steps=2, **options)
    alone.train()
    for rank in ranks:
        same(rank["trained"], trained(alone))
    assert ranks[0]["metrics"]["eval_loss"] == pytest.approx(alone.evaluate()["eval_loss"], rel=1e-6)


def test_an_interrupted_run_leaves_the_average_too(tmp_path: Path) -> None:
    class Interrupt(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 3:
                raise KeyboardInterrupt

    seen = Trajectory()
    run = trainer(tmp_path, callbacks=[seen, Interrupt()], ema_decay=0.9, **FAST)
    seen.run = run
    with pytest.raises(KeyboardInterrupt):
        run.train()
    same(trained(run), averaged(seen.weights, 0.9))


@pytest.mark.parametrize("decay", [-0.1, 1.0, float("nan")])
def test_a_decay_that_averages_nothing_is_refused(decay: float, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="ema_decay must be 0 or more and below 1"):
        config("dpo", tmp_path, ema_decay=decay)


def test_memory_counts_the_average() -> None:
    memory = memory_of(torch.nn.Linear(10, 10, bias=False), None, "adamw_torch", averages=True)
    assert memory.average == 400 and memory.total == 400 + 400 + 800 + 400 and "moving average" in str(memory)
