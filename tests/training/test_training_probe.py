"""A probe: runs that start alike, leave no trace and measure pairs they never saw; going on where one stopped; a rule with reasons."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from training.runs import config, lora, pairs, pipeline

from mmalign import DiffusionDPOTrainer
from mmalign.training import probe as probing
from mmalign.training.probe import Cell, probe
from mmalign.training.probe_advice import advise, table

ROWS = [row | {"prompt": f"{row['prompt']} {i}"} for i, row in enumerate(pairs(20))]
SMALL: dict[str, Any] = {"steps": 5, "held_out": 0.4, "draws": 2, "per_device_train_batch_size": 2, "use_cpu": True}


def probed(folder: Path, pipe: Any = None, **options: Any) -> Any:
    given: dict[str, Any] = {"learning_rates": [1e-4, 1e-3], "peft_config": lora(), **SMALL}
    return probe(pipe or pipeline(), ROWS, output_dir=folder, **given | options)


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    folder = tmp_path_factory.mktemp("first")
    return probed(folder), folder


# What is run.


@pytest.mark.parametrize("peft_config", ["lora", None])
def test_the_pipeline_is_as_it_was(peft_config: Any, tmp_path: Path) -> None:
    pipe = pipeline()
    pipe.unet.train()
    pipe.unet.conv_in.requires_grad_(False)
    before = {name: value.clone() for name, value in pipe.unet.state_dict().items()}
    flags = [p.requires_grad for p in pipe.unet.parameters()]
    told = probed(
        tmp_path, pipe, peft_config=lora() if peft_config else None, learning_rates=[1e-2], gradient_checkpointing=True
    )
    assert any(told.cells[0].gap)
    after = pipe.unet.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(value, after[name]) for name, value in before.items())
    assert [p.requires_grad for p in pipe.unet.parameters()] == flags and pipe.unet.training
    assert all(p.grad is None for p in pipe.unet.parameters())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["probe.json"]


def test_cells_start_alike_and_differ_in_the_learning_rate_alone(first: Any, tmp_path: Path) -> None:
    low, high = first[0].cells
    assert low.loss[0] == high.loss[0] == pytest.approx(math.log(2), abs=1e-6)
    assert low.gradient_norm[0] == high.gradient_norm[0]
    assert low.prompt == high.prompt and low.reference == high.reference and low.gap != high.gap
    again = probed(tmp_path, learning_rates=[1e-3]).cells[0]
    assert dataclasses.replace(again, seconds=0) == dataclasses.replace(high, seconds=0)


def test_no_cell_trains_on_what_it_is_measured_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[bool, set[int]] = {True: set(), False: set()}
    plain = DiffusionDPOTrainer.pair_losses

    def pair_losses(self: Any, model: Any, inputs: Any, *, epoch: int, data: Any = None) -> Any:
        seen[epoch >= 0] |= set(inputs["row"])
        return plain(self, model, inputs, epoch=epoch, data=data)

    monkeypatch.setattr(DiffusionDPOTrainer, "pair_losses", pair_losses)
    told = probed(tmp_path, learning_rates=[1e-3])
    assert seen[True] and seen[False] and not seen[True] & seen[False]
    measured = told.cells[0]
    assert set(measured.row) == seen[False] and len(set(measured.prompt)) == len(seen[False])
    # Two draws: each pair at two points.
    assert sorted(measured.row) == sorted([*seen[False]] * 2) and len(set(measured.gap)) == len(measured.gap)


def test_at_most_so_many_pairs_are_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows: dict[int, list[int]] = {}

    def measured(trainer: Any, held: Any, rate: float, steps: int, draws: int) -> Cell:
        rows[len(rows)] = [item["row"] for item in held.dataset]
        return cell(rate)

    monkeypatch.setattr(probing, "_run", measured)
    for most in (512, 3):
        probed(tmp_path / str(most), learning_rates=[1e-3], max_held_out=most)
    assert len(rows[0]) > 4 and len(rows[1]) == 3 and set(rows[1]) < set(rows[0])
    assert rows[1][0] == rows[0][0] and rows[1][-1] == rows[0][-1]


def test_the_later_run_finds_the_pairs_encoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probing, "_run", lambda trainer, held, rate, steps, draws: cell(rate))
    cache = tmp_path / "cache"
    probed(tmp_path / "probe", learning_rates=[1e-3], cache_dir=str(cache))
    made = sorted(path.name for path in cache.iterdir())
    run = DiffusionDPOTrainer(
        model=pipeline(), args=config("dpo", tmp_path, cache_dir=str(cache)), train_dataset=ROWS, peft_config=lora()
    )
    assert len(run._train.dataset) == 20 and sorted(path.name for path in cache.iterdir()) == made


def test_finished_cells_are_not_run_again(first: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    told, folder = first
    monkeypatch.setattr(probing, "_run", lambda *args: pytest.fail("ran again"))
    assert probed(folder) == told
    with pytest.raises(ValueError, match=r"probe.json was trained with another steps \(5; now 6\)"):
        probed(folder, steps=6)
    with pytest.raises(ValueError, match="another beta"):
        probed(folder, beta=77.0)
    with pytest.raises(ValueError, match="another held-out pairs"):
        probed(folder, max_held_out=2)


def test_an_interrupted_probe_goes_on_at_its_next_cell(first: Any, tmp_path: Path) -> None:
    kept = json.loads((first[1] / "probe.json").read_text())
    (tmp_path / "probe.json").write_text(json.dumps({"format": 1, "cells": kept["cells"][:1]}))
    told = probed(tmp_path)
    assert told.cells[0] == first[0].cells[0]
    assert told.advice == first[0].advice


def test_a_run_that_diverges_is_told_and_leaves_no_trace(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    pipe = pipeline()
    before = {name: value.clone() for name, value in pipe.unet.state_dict().items()}
    with caplog.at_level("INFO", "mmalign"):
        told = probed(tmp_path, pipe, learning_rates=[1e-4, 1e25])
    assert "not finite" in told.cells[1].diverged and told.cells[1].gap == []
    assert told.advice.readings[1].why_not == "diverged" and told.advice.learning_rate != 1e25
    # A line a cell, and none of what its single steps would say.
    assert (
        "learning rate 0.0001: done in" in caplog.text and "learning rate 1e+25: the loss is not finite" in caplog.text
    )
    assert "step 1/5" not in caplog.text
    assert all(torch.equal(value, pipe.unet.state_dict()[name]) for name, value in before.items())


def test_the_default_grid_surrounds_the_config_s_rate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probing, "_run", lambda trainer, held, rate, steps, draws: cell(rate))
    told = probed(tmp_path, learning_rates=None, learning_rate=3e-4)
    assert [one.learning_rate for one in told.cells] == [3.3e-5, 1e-4, 3e-4, 9e-4, 2.7e-3]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss_type": "mapo", "beta": 0.1}, "'mapo' has no reference"),
        ({"steps": 2}, "steps must be at least 5"),
        ({"learning_rates": [1e-3, 1e-3]}, "must be positive and differ"),
        ({"held_out": 1.0}, "held_out must lie between 0 and 1"),
        ({"held_out": 1e-9}, "no prompt of list is held out"),
        ({"held_out": 1 - 1e-9}, "no prompt of list is left to train on"),
        ({"max_held_out": 0}, "max_held_out must be at least 1"),
        ({"draws": 0}, "draws must be at least 1"),
        ({"beta_saturation": 2.0}, "beta_saturation must lie between 0 and 1"),
    ],
)
def test_what_cannot_be_probed_is_refused(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        probed(tmp_path, **options)
    assert not (tmp_path / "probe.json").exists()


def test_supervised_fine_tuning_has_nothing_to_probe(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="compares nothing"):
        probe(pipeline("sft"), ROWS, output_dir=tmp_path, use_cpu=True)


# What follows from it.


def cell(rate: float, *, right: int = 70, wrong: int = 30, gap: float = 1e-4, **changes: Any) -> Cell:
    """A sound cell: `right` pairs with this gap and `wrong` ones with its negative; the winner gained all of the margin."""
    gaps = [gap] * right + [-gap] * wrong
    plain: dict[str, Any] = {
        "steps": 10,
        "seconds": 0.0,
        "loss": [0.69] * 10,
        "gradient_norm": [1.0, 2.0, 9.0],
        "gap": gaps,
        "chosen": [-2 * g for g in gaps],
        "rejected": [0.0] * len(gaps),
        "reference": [0.01] * len(gaps),
        "row": list(range(len(gaps))),
        "prompt": list(range(len(gaps))),
    }
    return Cell(learning_rate=rate, **plain | changes)


def advice(*cells: Cell, saturation: float = 0.2) -> Any:
    return advise(list(cells), config("dpo", "unused", beta=2000.0), saturation)


def test_a_cell_is_read_by_its_definitions() -> None:
    spiky = [0.69] * 8 + [1.5, 2.0]
    told = advice(cell(1e-3, loss=spiky, chosen=[0.001] * 100, rejected=[0.003] * 100)).readings[0]
    assert told.accuracy == pytest.approx(0.7) and 0.5 < told.accuracy_low < 0.7 < told.accuracy_high < 0.85
    assert told.margin == pytest.approx(0.4e-4) and 0 < told.margin_low < told.margin
    assert told.saturation == pytest.approx(math.tanh(2000 * 1e-4 / 2))
    assert told.auto_beta == pytest.approx(2 * math.atanh(0.2) / 1e-4, rel=1e-6)
    # ρ = −½ · excess: the winner lost 0.0005 where the margin gained 0.001.
    assert told.price == pytest.approx(0.5) and told.chosen_relative == pytest.approx(0.1)
    assert told.gradient_norm == 2.0 and told.loss_spikes == 2
    assert told.why_not == "doubled the first step's loss in 2 of 10 steps"


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"diverged": "the loss is not finite"}, "diverged"),
        ({"loss": [0.69] * 8 + [1.5] * 2}, "doubled the first step's loss in 2 of 10 steps"),
        ({"chosen": [0.002] * 100, "rejected": [0.003] * 100}, "is shown to cost the winner more"),
        # The same price says nothing where no margin is shown.
        ({"right": 52, "wrong": 48, "chosen": [0.002] * 100, "rejected": [0.003] * 100}, "ranks 52.0 %"),
        ({"right": 30, "wrong": 70}, "is shown to rank held-out pairs the wrong way round"),
        # Sound, but beyond chance worse than the best; and not shown to be better than chance.
        ({"right": 70, "wrong": 30}, "ranks 70.0 %"),
        ({"right": 52, "wrong": 48}, "ranks 52.0 %"),
    ],
    ids=["diverged", "spikes", "price", "unshown-price", "backwards", "inaccurate", "chance"],
)
def test_the_largest_sound_rate_is_advised_with_what_speaks_against_the_next(changes: dict[str, Any], why: str) -> None:
    told = advice(cell(1e-4, right=90, wrong=10), cell(3e-4, right=88, wrong=12), cell(1e-3, **changes))
    assert told.learning_rate == 3e-4
    assert (
        "the largest sound one" in told.reasons[0] and why in told.reasons[1] and told.reasons[1].startswith("0.001 ")
    )
    assert told.beta == pytest.approx(2 * math.atanh(0.2) / 1e-4, rel=0.05)


def test_beta_aims_at_the_saturation_that_was_asked_for() -> None:
    assert advice(cell(1e-3), saturation=0.5).beta == pytest.approx(2 * math.atanh(0.5) / 1e-4, rel=0.05)
    assert advice(cell(1e-3, gap=1e-6), saturation=0.5).beta == pytest.approx(2 * math.atanh(0.5) / 1e-6, rel=0.05)


def test_a_loss_without_a_saturation_gets_a_rate_and_the_reason() -> None:
    told = advise([cell(1e-3)], config("dpo", "unused", loss_type="discopop"), 0.2)
    assert told.learning_rate == 1e-3 and told.beta is None
    assert "no beta is advised" in told.reasons[2] and "'discopop' does not" in told.reasons[2]


def test_what_the_probe_could_not_show_is_said() -> None:
    assert "the largest that was tried" in advice(cell(1e-3)).reasons[1]
    told = advice(cell(1e-4, right=52, wrong=48), cell(1e-3, right=53, wrong=47))
    assert told.learning_rate is None and told.beta is None
    assert "no learning rate is shown to tell held-out pairs apart (100 pairs, 10 steps)" in told.reasons[0]
    none = advice(cell(1e-3, diverged="x"), cell(1e-2, right=10, wrong=90))
    assert none.learning_rate is None and none.beta is None
    assert "0.001 diverged; 0.01 is shown to rank held-out pairs the wrong way round" in none.reasons[0]


def test_the_points_of_a_pair_count_once_for_accuracy_and_all_for_saturation() -> None:
    once = cell(1e-3)
    # Each pair at three points: its mean gap is the same, and single points lie further out.
    spread = {name: getattr(once, name) * 3 for name in ("chosen", "rejected", "reference", "row", "prompt")}
    far = [gap + shift for shift in (-9e-4, 0.0, 9e-4) for gap in once.gap]
    one, three = advice(once).readings[0], advice(dataclasses.replace(once, gap=far, **spread)).readings[0]
    assert (three.accuracy, three.accuracy_low) == (one.accuracy, one.accuracy_low)
    assert three.margin == pytest.approx(one.margin) and three.price == pytest.approx(one.price)
    expected = torch.tanh(1000 * torch.tensor(far, dtype=torch.float64).abs()).mean()
    assert three.saturation == pytest.approx(float(expected)) and three.auto_beta < one.auto_beta


def test_the_table_has_a_line_a_rate() -> None:
    shown = table(advice(cell(1e-4), cell(1e-3, diverged="x")).readings).splitlines()
    assert len(shown) == 3 and shown[0].split()[0] == "learning"
    assert "70.0 % (" in shown[1] and shown[2].endswith("diverged") and "–" in shown[2]
    assert shown[1].split()[0] == "0.0001"
