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
    assert listed[0] == {"row": 1, "source_row": 1, "field": "rejected", "reason": "no such file: 'none0.png'"}


def test_what_training_would_keep_depends_on_its_resolution(folder, tmp_path):
    words = ["validate-data", str(folder(GOOD | {"chosen": "thin.png"})), "--output-dir", str(tmp_path / "out")]
    assert cli.main([*words, "--resolution", "16"]) == 0
    assert cli.main([*words, "--resolution", "512"]) == 1


def test_with_aspect_buckets_a_pair_has_the_shape_that_training_gives_it(folder, tmp_path, capsys):
    for name, size in (("tall.png", (32, 96)), ("wide.png", (96, 32))):
        Image.new("RGB", size).save(tmp_path / name)
    words = ["validate-data", str(folder(GOOD | {"chosen": "tall.png", "rejected": "wide.png"}))]
    words += ["--output-dir", str(tmp_path / "out")]
    assert cli.main(words) == 0
    assert cli.main([*words, "--aspect-buckets"]) == 1
    assert "chosen and rejected: 32×96 would lose 67% in the pair's shape 512×512" in capsys.readouterr().out


def test_rankings_are_told_as_such_with_the_rows_they_stand_in(folder, tmp_path, capsys):
    ranking = {"prompt": "a bag", "generations": ["a.png", "b.png", "c.png"], "ranking": [1, 2, 2]}
    file, out = tmp_path / "rankings.json", tmp_path / "out"
    file.write_text(json.dumps([ranking, ranking]))
    assert cli.main(["validate-data", str(file), "--output-dir", str(out)]) == 1
    shown = capsys.readouterr().out
    assert "2 rankings → 6 pairs" in shown and "told:     6 pairs of 1 prompts; 2 of them ties" in shown
    assert "usable:   0 pairs" in shown and "start from with --root" in shown
    listed = [json.loads(line) for line in (out / "bad_rows.jsonl").read_text().splitlines()]
    assert [line["source_row"] for line in listed] == [0, 0, 0, 1, 1, 1]
    file.write_text(json.dumps([ranking | {"generations": ["0.png", "1.png", "thin.png"]}]))
    folder()
    assert cli.main(["validate-data", str(file), "--output-dir", str(out)]) == 1
    shown = capsys.readouterr().out
    assert "generations[2] of row 0: 1×60000 is too long and thin" in shown and "--root" not in shown


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


ANSWERS = {"question": "<image>\nwhat?", "answer": "a bag", "pred": "a shoe", "image": "0.png"}


def test_answers_are_known_by_their_columns(folder, tmp_path, capsys):
    marked = ANSWERS | {"answer_masked": "a <MASK>bag</MASK>", "user_id": "u"}
    wrong = ANSWERS | {"question": "<image><image>what?"}
    out = tmp_path / "out"
    assert cli.main(["validate-data", str(folder(ANSWERS, marked, wrong)), "--output-dir", str(out)]) == 1
    shown = capsys.readouterr().out
    assert "3 rows, rrpo columns" in shown and "2 pairs of 1 prompts, 1 users; 0 of them ties" in shown
    assert "in them:  2 pictures, 0 clips; 1 pairs with marked phrases" in shown and "left out: 1 rows" in shown
    assert "       1  image: 2 image placeholder(s) in question but 1 image(s) in the row" in shown
    assert json.loads((out / "bad_rows.jsonl").read_text())["row"] == 2
    sheet = np.asarray(Image.open(out / "contact_sheet.png").convert("RGB"))
    assert (sheet == np.asarray(Image.open(tmp_path / "0.png"))[0, 0]).all(-1).sum() >= 16


def test_answers_without_pictures_have_no_sheet(folder, tmp_path, capsys):
    out = tmp_path / "out"
    assert (
        cli.main(
            ["validate-data", str(folder({"prompt": "x", "chosen": "a", "rejected": "b"})), "--output-dir", str(out)]
        )
        == 0
    )
    assert [path.name for path in out.iterdir()] == ["bad_rows.jsonl"]
    assert "1 rows, preference columns" in capsys.readouterr().out


def test_the_kind_can_be_said(folder, tmp_path, capsys):
    place = str(folder({"prompt": "x", "chosen": "0.png", "rejected": "1.png"}))
    words = ["validate-data", place, "--output-dir", str(tmp_path / "out")]
    assert cli.main(words) == 0 and "canonical columns" in capsys.readouterr().out
    assert cli.main([*words, "--kind", "answers"]) == 0 and "preference columns" in capsys.readouterr().out
    assert cli.main([*words, "--kind", "answers", "--resolution", "32"]) == 2
    assert "--resolution does not apply to answers" in capsys.readouterr().err
    assert cli.main([*words, "--fps", "2"]) == 2 and "--fps is for answers" in capsys.readouterr().err


def test_help_tells_the_exit_codes(capsys):
    assert cli.main(["validate-data", "--help"]) == 0
    assert "Exit code: 0 every row can be used; 1 some rows were left out" in capsys.readouterr().out


def test_the_playground_is_clean(tmp_path):
    words = ["validate-data", "playground", "--split", "test", "--max-rows", "50", "--resolution", "32"]
    assert cli.main([*words, "--output-dir", str(tmp_path)]) == 0
