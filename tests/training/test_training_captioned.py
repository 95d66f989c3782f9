"""Pictures with captions, where nothing is compared: the same losses as of the preferred sides of pairs."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import save_tiny
from training.runs import history, losses, moved_lora, pairs, trainer
from training.test_training_longalign import run as longalign
from training.test_training_self_npo import rows_of, self_npo

from mmalign import cli
from mmalign.data import load_pairs


def singles() -> list[dict[str, Any]]:
    return [{"prompt": row["prompt"], "image": row["chosen"]} for row in pairs()]


def folder_of(place: Path) -> Path:
    place.mkdir()
    for number, row in enumerate(singles()):
        row["image"].save(place / f"{number}.png")
        (place / f"{number}.txt").write_text(row["prompt"])
    return place


def sft(folder: Path, data: Any) -> Any:
    return trainer(folder, "sft", data=data, peft_config=moved_lora())


def of_pictures(folder: Path, data: Any) -> Any:
    return self_npo(folder, source="images", data=data, peft_config=moved_lora())


def supervised(folder: Path, data: Any) -> Any:
    return longalign(folder, stage="supervised", data=data, peft_config=moved_lora())


@pytest.mark.parametrize("method", [sft, of_pictures, supervised])
def test_losses_are_those_of_the_preferred_sides(method: Any, tmp_path: Path) -> None:
    measure = losses if method is sft else rows_of
    with torch.no_grad():
        ours, theirs = (
            measure(method(tmp_path / str(number), data)) for number, data in enumerate((singles(), pairs()))
        )
    assert torch.equal(ours, theirs) and len(ours) == 2


@pytest.mark.parametrize("method", [sft, of_pictures])
def test_a_folder_of_them_is_trained_on(method: Any, tmp_path: Path) -> None:
    run = method(tmp_path / "run", folder_of(tmp_path / "data"))
    run.train()
    assert len(history(run)) == 2
    run.save_model()


def test_what_compares_says_who_takes_them(tmp_path: Path, brightness: Any) -> None:
    for data in (singles(), folder_of(tmp_path / "data"), load_pairs(singles(), captioned=True)):
        with pytest.raises(
            ValueError, match="sft, self-npo with source='images' and longalign with stage='supervised'"
        ):
            trainer(tmp_path, "dpo", data=data)
    with pytest.raises(ValueError, match="comparison='relabel' compares two pictures"):
        trainer(tmp_path, "sft", data=singles(), comparison="relabel", scorer="pickscore")


def test_the_command_line_checks_them_and_trains(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    folder_of(Path("data"))
    (tmp_path / "data" / "9.png").write_bytes(b"no picture")
    assert cli.main(["validate-data", "data", "--resolution", "16"]) == 1
    shown = capsys.readouterr().out
    assert "usable:   6 pictures of 4 prompts\n" in shown and "left out: 1 rows" in shown
    (bad,) = (json.loads(line) for line in Path("validation/bad_rows.jsonl").read_text().splitlines())
    assert bad["field"] == "prompt" and "found none" in bad["reason"]
    assert Path("validation/contact_sheet.png").is_file()
    save_tiny("sd", "model")
    words = ["--model", "model", "--data", "data", "--max-rows", "4", "--use-cpu", "--max-steps", "1", "--lora-r", "2"]
    assert cli.main(["train", "sft", *words, "--train-batch-size", "2"]) == 0
    assert Path("runs/sft/pytorch_lora_weights.safetensors").is_file()
