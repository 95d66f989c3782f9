"""The reference's errors kept across runs: the same losses, no reference call, and nothing foreign believed."""

from pathlib import Path
from typing import Any

import pytest
import torch
from training import worker
from training.runs import history, lora, moved_lora, pairs, trainer

from mmalign.training.reference_cache import ReferenceErrors


def counted(run: Any) -> list[int]:
    """Grows by one at every call of the reference."""
    calls: list[int] = []
    plain = run.reference.model

    def model(policy: Any) -> Any:
        calls.append(1)
        return plain(policy)

    object.__setattr__(run.reference, "model", model)
    return calls


def trained(folder: Path, **options: Any) -> tuple[list[float], int]:
    """The losses of a run, and how often it called its reference."""
    run = trainer(folder, max_steps=4, learning_rate=1e-2, cache_dir=str(folder), **options)
    calls = counted(run)
    run.train()
    return history(run), len(calls)


CASES: dict[str, dict[str, Any]] = {"adapter": {}, "by reference": {"method": "inpo", "inversion_model": "reference"}}


@pytest.mark.parametrize("name", CASES)
def test_a_second_run_has_the_same_losses_without_a_reference(name: str, tmp_path: Path) -> None:
    options = CASES[name]
    plain, calls = trained(tmp_path, **options)
    first, first_calls = trained(tmp_path, reference_cache=True, **options)
    second, second_calls = trained(tmp_path, reference_cache=True, **options)
    assert plain == first == second and calls == first_calls
    # An inversion by the reference still calls it.
    assert second_calls == (4 if name == "by reference" else 0)


def test_another_beta_and_loss_find_the_same_errors(tmp_path: Path) -> None:
    trained(tmp_path, reference_cache=True)
    assert trained(tmp_path, reference_cache=True, beta=77.0, loss_type="hinge")[1] == 0
    assert trained(tmp_path, reference_cache=True, per_device_train_batch_size=1)[1] < 4


@pytest.mark.parametrize(
    "options",
    [
        {"seed": 7},
        {"share_noise": False},
        {"prompt_dropout": 1.0},
        {"data": pairs(5, seed=9)},
        {"loss_space": "velocity"},
    ],
    ids=lambda options: next(iter(options)),
)
def test_whatever_changes_the_points_is_computed_anew(options: dict[str, Any], tmp_path: Path) -> None:
    trained(tmp_path, reference_cache=True)
    assert trained(tmp_path, reference_cache=True, **options)[1] == 4


def test_another_base_is_another_reference(tmp_path: Path) -> None:
    trained(tmp_path, reference_cache=True)
    run = trainer(tmp_path, max_steps=4, cache_dir=str(tmp_path), reference_cache=True)
    with torch.no_grad():
        next(p for p in run.network.parameters() if not p.requires_grad).mul_(1.5)
    calls = counted(run)
    run.train()
    assert len(calls) == 4


def test_evaluation_asks_the_reference_once(tmp_path: Path) -> None:
    run = trainer(
        tmp_path, eval_dataset=pairs(4, seed=3), reference_cache=True, cache_dir=str(tmp_path), peft_config=moved_lora()
    )
    calls = counted(run)
    first = run.evaluate()
    asked = len(calls)
    assert asked > 0 and run.evaluate()["eval_loss"] == first["eval_loss"] and len(calls) == asked


def test_two_processes_write_one_table(tmp_path: Path) -> None:
    options: dict[str, Any] = {
        "max_steps": 2,
        "data": pairs(8),
        "reference_cache": True,
        "cache_dir": str(tmp_path / "cache"),
    }
    options |= {"peft_config": lora(), "save_strategy": "no"}
    worker.together(2, tmp_path / "two", options)
    alone = trainer(tmp_path / "one", gradient_accumulation_steps=2, **options)
    calls = counted(alone)
    alone.train()
    assert calls == []


def test_a_changed_file_is_refused_and_a_cleared_one_is_made_anew(tmp_path: Path) -> None:
    from mmalign.data import clear_cache
    from mmalign.data.shards import read_notes, read_shard, write_shard

    trained(tmp_path, reference_cache=True)
    (path,) = tmp_path.glob("reference-*.safetensors")
    tables, notes = read_shard(path), read_notes(path)
    write_shard(path, {name: table + 1 for name, table in tables.items()}, notes)
    with pytest.raises(ValueError, match="was changed after it was written: delete it"):
        trained(tmp_path, reference_cache=True)
    assert clear_cache(tmp_path) > 0 and not list(tmp_path.glob("reference-*"))
    assert trained(tmp_path, reference_cache=True)[1] == 4


def test_runs_side_by_side_lose_nothing(tmp_path: Path) -> None:
    one, other = (ReferenceErrors(tmp_path, {"a": 1}, num_rows=4, sides=2) for _ in range(2))
    one.keep(0, [1, 3], torch.tensor([1.0, 2.0, 3.0, 4.0]))
    other.keep(0, [0], torch.tensor([5.0, 6.0]))
    other.keep(2, [0], torch.tensor([7.0, 8.0]))
    one.write()
    other.write()
    again = ReferenceErrors(tmp_path, {"a": 1}, num_rows=4, sides=2)
    found = again.find(0, [3, 0])
    assert found is not None and found.tolist() == [2.0, 5.0, 4.0, 6.0]
    assert again.find(0, [0, 2]) is None and again.find(1, [0]) is None and again.find(2, [0]) is not None
    assert ReferenceErrors(tmp_path, {"a": 2}, num_rows=4, sides=2).find(0, [0]) is None


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("inpo", {}, "needs points that the policy does not choose"),
        ("inpo", {"inversion_model": "reference", "inversion_landings": "all"}, "keeps one point a pair"),
        ("dpo", {"loss_type": "simpo", "beta": 2.5}, "it has no reference"),
        ("dpo", {"loss_type": "aot"}, "takes one timestep a batch"),
        ("sft", {}, "has no effect on supervised fine-tuning"),
    ],
)
def test_where_nothing_can_be_kept_it_is_refused(
    method: str, options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, method, reference_cache=True, **options)
