"""What becomes of every option that is inherited from transformers: it acts, is handed on, or is refused by name."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from training.runs import batch, config, history, moved_lora, pairs, trainer
from transformers import TrainingArguments

from mmalign.training.config import DenoiserConfig
from mmalign.training.inherited import ACTS, PASSED, REFUSED, RUN_OPTIONS, defaults_of


def test_the_table_covers_the_installed_transformers() -> None:
    names = set(TrainingArguments.__dataclass_fields__)
    assert names == ACTS | PASSED | set(REFUSED)
    assert len(ACTS) + len(PASSED) + len(REFUSED) == len(names)
    assert set(RUN_OPTIONS) <= ACTS


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_a_refused_option_raises_with_its_reason(name: str, tmp_path: Path) -> None:
    default = defaults_of(DenoiserConfig)[name]
    value = (not default) if isinstance(default, bool) else "other"
    with pytest.raises(ValueError) as caught:
        config("dpo", tmp_path, **{name: value})
    assert str(caught.value) == f"{name}={value!r} is refused: {REFUSED[name]}"


def weights_after(folder: Path, **options: Any) -> torch.Tensor:
    run = trainer(folder, peft_config=moved_lora(), **{"max_steps": 3, "learning_rate": 1e-3} | options)
    run.train()
    return torch.cat([p.detach().flatten() for p in run.network.parameters() if p.requires_grad])


# Options that change the weights after three steps.
CHANGES_WEIGHTS: dict[str, Any] = {
    "learning_rate": 2e-3,
    "lr_scheduler_type": "linear",
    "lr_scheduler_kwargs": ({"lr_scheduler_type": "polynomial"}, {"power": 3.0}),
    "warmup_steps": 2,
    "optim": "adafactor",
    "weight_decay": 0.9,
    "adam_beta1": 0.1,
    "adam_beta2": 0.5,
    "adam_epsilon": 1.0,
    "gradient_accumulation_steps": 2,
    "max_grad_norm": ({"optim": "sgd"}, 1e-3),
    "bf16": True,
    "seed": 3,
    "data_seed": 3,
    "per_device_train_batch_size": 1,
    "max_steps": 2,
    "num_train_epochs": ({"max_steps": -1, "num_train_epochs": 1}, 2),
}


@pytest.fixture(scope="module")
def plain_weights(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., torch.Tensor]:
    known: dict[str, torch.Tensor] = {}

    def get(**options: Any) -> torch.Tensor:
        key = repr(options)
        if key not in known:
            known[key] = weights_after(tmp_path_factory.mktemp("plain"), **options)
        return known[key]

    return get


@pytest.mark.parametrize("name", CHANGES_WEIGHTS)
def test_an_inherited_option_changes_the_run(name: str, plain_weights: Any, tmp_path: Path) -> None:
    given = CHANGES_WEIGHTS[name]
    base, value = given if isinstance(given, tuple) else ({}, given)
    assert not torch.equal(plain_weights(**base), weights_after(tmp_path, **base | {name: value}))


@pytest.mark.parametrize("spelling", ["gradient_checkpointing", "activation_checkpointing"])
def test_gradient_checkpointing_changes_no_weight(spelling: str, plain_weights: Any, tmp_path: Path) -> None:
    run = trainer(tmp_path, max_steps=1, **{spelling: True})
    counted = []
    plain = torch.utils.checkpoint.checkpoint
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.utils.checkpoint, "checkpoint", lambda *a, **k: counted.append(1) or plain(*a, **k))
        run.train()
    assert counted and not run.network.is_gradient_checkpointing
    torch.testing.assert_close(weights_after(tmp_path, **{spelling: True}), plain_weights(), rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(("name", "value"), [("fp16", True), ("tf32", True)])
def test_what_a_cpu_cannot_do_is_an_error(name: str, value: Any, tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("a GPU can")
    with pytest.raises(ValueError, match=f"(?i){name}"):
        trainer(tmp_path, **{name: value})


def test_logging_options(tmp_path: Path) -> None:
    def logged(**options: Any) -> list[int]:
        run = trainer(tmp_path, max_steps=5, **{"logging_steps": 2} | options)
        run.train()
        return [entry["step"] for entry in run.state.log_history if "loss" in entry]

    # The last step is always there.
    assert logged() == [2, 4, 5]
    assert logged(logging_steps=3, logging_first_step=True) == [1, 3, 5]
    assert logged(logging_strategy="no") == []
    assert logged(logging_strategy="epoch") == [3, 5]


def test_evaluation_options(tmp_path: Path) -> None:
    def evaluated(**options: Any) -> list[int]:
        run = trainer(tmp_path, eval_dataset=pairs(4, seed=7), max_steps=4, **options)
        run.train()
        return [entry["step"] for entry in run.state.log_history if "eval_loss" in entry]

    assert evaluated() == []
    assert evaluated(eval_strategy="steps", eval_steps=2) == [2, 4]
    assert evaluated(eval_strategy="steps", eval_steps=2, eval_on_start=True, eval_delay=3) == [0, 4]
    run = trainer(tmp_path, eval_dataset=pairs(4, seed=7), per_device_eval_batch_size=3)
    sizes = []
    plain = run.pair_losses
    run.pair_losses = lambda model, inputs, **kw: sizes.append(len(inputs["row"])) or plain(model, inputs, **kw)
    first = run.evaluate()
    assert sizes == [3, 1]
    run.args.per_device_eval_batch_size = 4
    assert run.evaluate()["eval_loss"] == pytest.approx(first["eval_loss"], rel=1e-6)


def test_saving_options(tmp_path: Path) -> None:
    def saved(name: str, **options: Any) -> list[str]:
        trainer(tmp_path / name, max_steps=3, **options).train()
        return sorted(path.name for path in (tmp_path / name).glob("checkpoint-*"))

    assert saved("no") == []
    assert saved("steps", save_strategy="steps", save_steps=2) == ["checkpoint-2", "checkpoint-3"]
    assert saved("limit", save_strategy="steps", save_steps=1, save_total_limit=1) == ["checkpoint-3"]
    assert saved("only", save_strategy="steps", save_steps=3, save_only_model=True) == ["checkpoint-3"]
    assert not (tmp_path / "only" / "checkpoint-3" / "optimizer.pt").exists()


def test_loader_options(tmp_path: Path) -> None:
    options = {
        "dataloader_num_workers": 1,
        "dataloader_persistent_workers": True,
        "dataloader_prefetch_factor": 3,
        "dataloader_multiprocessing_context": "spawn",
        "dataloader_in_order": False,
    }
    loader = trainer(tmp_path, **options).get_train_dataloader()
    assert (loader.num_workers, loader.persistent_workers, loader.prefetch_factor, loader.in_order) == (
        1,
        True,
        3,
        False,
    )
    assert loader.multiprocessing_context.get_start_method() == "spawn"
    args = dataclasses.replace(config("dpo", tmp_path), use_cpu=False, dataloader_pin_memory=True)
    assert args.dataloader_pin_memory and not config("dpo", tmp_path).dataloader_pin_memory
    assert [len(b["row"]) for b in trainer(tmp_path, per_device_train_batch_size=4).get_train_dataloader()] == [4]
    ragged = trainer(tmp_path, per_device_train_batch_size=4, dataloader_drop_last=False).get_train_dataloader()
    assert [len(b["row"]) for b in ragged] == [4, 2]


def test_worker_processes_change_nothing(tmp_path: Path) -> None:
    runs = [trainer(tmp_path, dataloader_num_workers=workers) for workers in (0, 1)]
    for run in runs:
        run.train()
    assert history(runs[0]) == history(runs[1])


def test_the_rest_of_what_acts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers.trainer

    emptied = []
    monkeypatch.setattr(transformers.trainer, "clear_device_cache", lambda: emptied.append(1))
    run = trainer(tmp_path / "out", torch_empty_cache_steps=1, use_cpu=True)
    run.train()
    assert len(emptied) == 2 and (tmp_path / "out").is_dir() and run.args.device.type == "cpu"
    kinds = {type(c).__name__ for c in run.callback_handler.callbacks}
    assert {"Lines", "LastStep"} <= kinds and not {"PrinterCallback", "ProgressCallback", "Bar"} & kinds
    barred = {type(c).__name__ for c in trainer(tmp_path, disable_tqdm=False).callback_handler.callbacks}
    assert "Bar" in barred and not {"PrinterCallback", "ProgressCallback", "Lines"} & barred
    try:
        trainer(tmp_path, full_determinism=True)
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)


def test_every_inherited_option_that_acts_is_seen_acting() -> None:
    elsewhere = """
        output_dir tf32 fp16 gradient_checkpointing activation_checkpointing torch_empty_cache_steps logging_strategy logging_steps
        logging_first_step disable_tqdm eval_strategy eval_steps eval_delay per_device_eval_batch_size eval_on_start save_only_model
        save_strategy save_steps save_total_limit load_best_model_at_end metric_for_best_model greater_is_better full_determinism
        use_cpu dataloader_drop_last dataloader_num_workers dataloader_pin_memory dataloader_persistent_workers
        dataloader_prefetch_factor dataloader_multiprocessing_context dataloader_in_order resume_from_checkpoint
    """.split()
    assert CHANGES_WEIGHTS.keys() | set(elsewhere) == ACTS


def test_batches_follow_the_loader(tmp_path: Path) -> None:
    run = trainer(tmp_path)
    assert batch(run, (3,))["row"] == [3]
