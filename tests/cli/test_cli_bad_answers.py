"""Rows that a model cannot be trained on, among rows that it can: `mmalign train` names them and stops, or goes on without them."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_vlm import picture, tiny_vlm

from mmalign.cli.dispatch import main
from mmalign.data import load_answers
from mmalign.data.answer_tokens import encode_answers

KIND = "qwen2_5_vl"
# Of prompt and answer: the good rows fit.
ROOM = 60
ASKED = {"prompt": "Which way?", "chosen": "To the left.", "rejected": "To the right."}
SHOWN = {"prompt": "What is it?", "chosen": "A red bag.", "rejected": "A blue bag."}
GOOD: list[dict[str, Any]] = [ASKED | {"video": {"frames": name, "fps": 8}} for name in ("one", "other")]
GOOD += [SHOWN | {"image": name} for name in ("0.png", "1.png")]
# A row that cannot be used, and what must be said of it.
BAD: dict[str, tuple[dict[str, Any], str]] = {
    "placeholders": (
        SHOWN | {"prompt": "<image> or <image>?", "image": "0.png"},
        r"image: 2 image placeholder\(s\) in prompt but 1 image\(s\) in the row",
    ),
    "video": (ASKED | {"video": "broken.mp4"}, "video: damaged or truncated video"),
    "long clip": (
        ASKED | {"video": {"frames": "long", "fps": 8}},
        r"prompt: \d+ tokens, 120 of them pictures and clips: no room for an answer in max_length \(60\)",
    ),
    "cut picture": (
        SHOWN | {"images": [f"{at}.png" for at in range(4)]},
        r"prompt: \d+ tokens, 64 of them pictures and clips: no room for an answer in max_length \(60\); prompts are never cut",
    ),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, and pictures and clips, one of which is no video."""
    pytest.importorskip("av")
    place = tmp_path_factory.mktemp("bad")
    for part in tiny_vlm(KIND):
        part.save_pretrained(place / "model")
    for name, frames in (("one", 4), ("other", 4), ("long", 40)):
        (place / name).mkdir()
        for at in range(frames):
            picture(24, 20, seed=at).image.save(place / name / f"{at}.png")
    for at in range(4):
        picture(48, 48, seed=at).image.save(place / f"{at}.png")
    (place / "broken.mp4").write_bytes(b"\0\0\0\x18ftypmp42\0\0\0\0mp42isom" + bytes(64))
    return place


def train(method: str, folder: Path, rows: list[dict[str, Any]], run: Path, *options: str) -> int:
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = {"--model": folder / "model", "--data": folder / "rows.jsonl", "--output-dir": run, "--max-length": ROOM}
    words = [str(word) for pair in given.items() for word in pair]
    usual = (
        "--use-cpu --disable-tqdm --save-strategy no --per-device-train-batch-size 2 --max-steps 2 --learning-rate 0.01"
    )
    return main(["train", method, *words, *usual.split(), *options])


def test_truncation_would_cut_into_a_picture(folder: Path) -> None:
    """The fourth of the row that stands for it."""
    model, processor = tiny_vlm(KIND)
    (pair,) = load_answers([BAD["cut picture"][0]], root=folder)
    prompt = encode_answers(pair, processor, model.config).prompt
    assert prompt[[ROOM - 1, ROOM]].tolist() == [processor.image_token_id] * 2


@pytest.mark.parametrize("fault", BAD)
def test_a_bad_row_stops_the_run_and_is_named(fault: str, folder: Path, tmp_path: Path, capsys: Any) -> None:
    row, reason = BAD[fault]
    options = ["--truncate", "answer"] if fault == "cut picture" else []
    method = "rrpo" if fault in ("video", "cut picture") else "token-dpo"
    assert train(method, folder, [*GOOD[:3], row, GOOD[3]], tmp_path / "run", *options) == 2
    told = capsys.readouterr().err
    assert re.search(f"rows.jsonl: 1 of 5 rows cannot be used: row 3, {reason}", told)
    assert "on_bad_row='skip' trains without them" in told
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("method", ["token-dpo", "rrpo"])
def test_a_run_goes_on_without_bad_rows_and_names_them(method: str, folder: Path, tmp_path: Path, capsys: Any) -> None:
    rows = [row for good, (bad, _) in zip(GOOD, BAD.values(), strict=True) for row in (good, bad)]
    assert train(method, folder, rows, tmp_path / "mixed", "--on-bad-row", "skip", "--truncate", "answer") == 0
    card = (tmp_path / "mixed" / "README.md").read_text(encoding="utf-8")
    seen = capsys.readouterr().err
    for told in (seen, card):
        assert "4 of 8 rows left out: row 1, " in told
        for at, (_, reason) in enumerate(BAD.values()):
            assert re.search(f"row {2 * at + 1}, {reason}", told)
    assert "rows.jsonl: 4 rows of up to" in seen
    # What is learnt is what the good rows teach.
    assert train(method, folder, GOOD, tmp_path / "good", "--truncate", "answer") == 0
    mixed, good = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("mixed", "good"))
    assert any(value.any() for name, value in mixed.items() if "lora_B" in name)
    assert mixed.keys() == good.keys() and all(torch.equal(mixed[name], good[name]) for name in good)
