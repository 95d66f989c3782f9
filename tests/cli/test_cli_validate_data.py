"""`mmalign validate-data`: what it prints, what it writes, and its exit code."""

import json

import numpy as np
import pytest
from PIL import Image

from mmalign import cli


@pytest.fixture
def folder(tmp_path):
    """Three pictures, and a function that writes metadata.jsonl about them."""
    for seed in range(3):
        values = np.random.default_rng(seed).integers(0, 256, (20, 24, 3), dtype=np.uint8)
        Image.fromarray(values).save(tmp_path / f"{seed}.png")
    Image.new("RGB", (1, 60000)).save(tmp_path / "thin.png")

    def write(*rows):
        (tmp_path / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return tmp_path

    return write


GOOD = {"prompt": "a red\nbag", "chosen": "0.png", "rejected": "1.png"}


def test_good_data(folder, tmp_path, capsys):
    tie = GOOD | {"prompt": "", "chosen_votes": 1, "rejected_votes": 1, "user_id": "u"}
    out = tmp_path / "out"
    assert cli.main(["validate-data", str(folder(GOOD, GOOD, tie)), "--output-dir", str(out)]) == 0
    shown = capsys.readouterr().out
    assert "3 rows, canonical columns" in shown and "3 pairs of 2 prompts, 1 users; 1 of them ties" in shown
    assert "left out: 0 rows" in shown and str(out / "contact_sheet.png") in shown
    assert sorted(path.name for path in out.iterdir()) == ["bad_rows.jsonl", "contact_sheet.png"]
    assert (out / "bad_rows.jsonl").read_text() == ""
    sheet = np.asarray(Image.open(out / "contact_sheet.png").convert("RGB"))
    # The first picture lies on the sheet enlarged by a whole factor: its corner's colour is there in a block.
    first = np.asarray(Image.open(tmp_path / "0.png"))[0, 0]
    assert (sheet == first).all(-1).sum() >= 16


def test_bad_rows_are_counted_by_kind_and_listed(folder, tmp_path, capsys):
    missing = [GOOD | {"rejected": f"none{i}.png"} for i in range(7)]
    rows = [GOOD, *missing, GOOD | {"prompt": None}, GOOD | {"chosen": "thin.png"}]
    out = tmp_path / "out"
    assert cli.main(["validate-data", "--data", str(folder(*rows)), "--output-dir", str(out)]) == 1
    shown = capsys.readouterr().out
    assert "1 pairs of 1 prompts; 0 of them ties" in shown and "left out: 9 rows" in shown
    assert "       7  rejected: no such file: 'none0.png'\n          rows 1, 2, 3, 4, 5, …\n" in shown
    assert "       1  prompt: expected text, got None (an empty prompt is '')\n          rows 8\n" in shown
    assert "       1  chosen: 1×60000 is too long and thin to be cropped to 512×512\n          rows 9\n" in shown
    listed = [json.loads(line) for line in (out / "bad_rows.jsonl").read_text().splitlines()]
    assert [line["row"] for line in listed] == list(range(1, 10)) and listed[7]["field"] == "prompt"
    assert listed[0] == {"row": 1, "field": "rejected", "reason": "no such file: 'none0.png'"}


def test_what_training_would_keep_depends_on_its_resolution(folder, tmp_path):
    words = ["validate-data", str(folder(GOOD | {"chosen": "thin.png"})), "--output-dir", str(tmp_path / "out")]
    assert cli.main([*words, "--resolution", "16"]) == 0
    assert cli.main([*words, "--resolution", "512"]) == 1


def test_without_a_usable_row_no_earlier_sheet_remains(folder, tmp_path, capsys):
    out = tmp_path / "out"
    assert cli.main(["validate-data", str(folder(GOOD)), "--output-dir", str(out)]) == 0
    assert cli.main(["validate-data", str(folder(GOOD | {"prompt": 1})), "--output-dir", str(out)]) == 1
    assert [path.name for path in out.iterdir()] == ["bad_rows.jsonl"]
    assert "contact_sheet.png" not in capsys.readouterr().out.splitlines()[-1]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([], "--data is missing"),
        (["./nowhere"], "no such file or folder"),
        (["playground", "--split", "validation"], "'train' and 'test'"),
        (["playground", "--resolution", "0"], "at least 1"),
        (["playground", "--max-rows", "x"], "--max-rows"),
        (["playground", "elsewhere"], "elsewhere"),
    ],
)
def test_what_cannot_be_opened_is_a_usage_error(words, says, tmp_path, capsys):
    assert cli.main(["validate-data", *words, "--output-dir", str(tmp_path / "out")]) == 2
    assert says in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_help_tells_the_exit_codes(capsys):
    assert cli.main(["validate-data", "--help"]) == 0
    assert "Exit code: 0 every row can be used; 1 some rows were left out" in capsys.readouterr().out


def test_the_playground_is_clean(tmp_path):
    words = ["validate-data", "playground", "--split", "test", "--max-rows", "50", "--resolution", "32"]
    assert cli.main([*words, "--output-dir", str(tmp_path)]) == 0
