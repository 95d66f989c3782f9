"""`mmalign score` on pictures of the playground's reward and judges, and on folders that are wrong."""

import json

import pytest
import torch
from PIL import Image

from mmalign import cli
from mmalign.rewards import scorer


@pytest.fixture
def pictures(tmp_path):
    rows = [
        {"file_name": f"{name}.png", "prompt": f"a {name} bag on yellow", "seed": 1}
        for name in ("red", "blue", "green")
    ]
    for row in rows:
        Image.new("RGB", (32, 32), row["file_name"].removesuffix(".png")).save(tmp_path / row["file_name"])
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path


def test_every_picture_has_its_score_by_every_scorer(pictures, capsys):
    assert cli.main(["score", "--pictures", str(pictures), "--scorers", "playground", "judge-B"]) == 0
    shown = capsys.readouterr().out
    rows = json.loads((pictures / "scores.json").read_text())
    images = [Image.open(pictures / row["file_name"]) for row in rows]
    expected = scorer("playground").score(images, [row["prompt"] for row in rows])
    assert [row["scores"]["playground"] for row in rows] == pytest.approx(expected.tolist())
    assert all(row["scores"].keys() == {"playground", "judge-B"} for row in rows)
    assert f"mean {expected.mean().item():.4f}" in shown and "3 pictures; every score" in shown


def test_one_prompt_may_serve_all(pictures):
    (pictures / "metadata.jsonl").unlink()
    words = ["score", "--pictures", str(pictures), "--prompt", "a red bag on yellow", "--scorers", "playground"]
    assert cli.main(words) == 0
    rows = json.loads((pictures / "scores.json").read_text())
    assert [row["file_name"] for row in rows] == ["blue.png", "green.png", "red.png"]
    assert {row["prompt"] for row in rows} == {"a red bag on yellow"}


def test_sheets_and_folders_are_no_pictures(pictures):
    Image.new("RGB", (64, 64)).save(pictures / "grid.png")
    Image.new("RGB", (64, 64)).save(pictures / "side_by_side.png")
    (pictures / "folder.png").mkdir()
    words = ["score", "--pictures", str(pictures), "--prompt", "a bag", "--scorers", "playground"]
    assert cli.main(words) == 0
    told = json.loads((pictures / "scores.json").read_text())
    assert [(row["file_name"], row["prompt"]) for row in told] == [
        (f"{n}.png", "a bag") for n in ("red", "blue", "green")
    ]
    (pictures / "metadata.jsonl").unlink()
    assert cli.main(words) == 0
    assert [row["file_name"] for row in json.loads((pictures / "scores.json").read_text())] == [
        "blue.png",
        "green.png",
        "red.png",
    ]


def test_a_prompt_may_hold_a_line_separator(pictures):
    row = {"file_name": "red.png", "prompt": "a red\u2028bag"}
    (pictures / "metadata.jsonl").write_text(json.dumps(row, ensure_ascii=False) + "\n", encoding="utf-8")
    assert cli.main(["score", "--pictures", str(pictures), "--scorers", "playground"]) == 0
    assert json.loads((pictures / "scores.json").read_text())[0]["prompt"] == row["prompt"]


def test_scores_are_added_to_those_of_earlier_calls_while_picture_and_prompt_are_the_same(
    pictures, monkeypatch, capsys
):
    levels = {"first": 1.0, "second": 2.0}

    class Level:
        def __init__(self, name):
            self.name = self.fingerprint = name

        def score(self, images, prompts):
            return levels[self.name] * torch.tensor([float(image.getpixel((0, 0))[0]) for image in images])

    monkeypatch.setattr("mmalign.cli.score.scorer_named", lambda name, device: Level(name))

    def scored(name):
        assert cli.main(["score", "--pictures", str(pictures), "--scorers", name]) == 0
        return {row["file_name"]: row for row in json.loads((pictures / "scores.json").read_text())}

    Image.new("RGB", (32, 32), (10, 0, 0)).save(pictures / "blue.png")
    two = (pictures / "metadata.jsonl").read_text().split("\n")[:2]
    (pictures / "metadata.jsonl").write_text("\n".join(two))
    scored("first")
    assert "median 132.5" in capsys.readouterr().out, "the mean of the middle two"
    both = scored("second")
    assert both["red.png"]["scores"] == {"first": 255.0, "second": 510.0}
    assert both["red.png"]["fingerprints"] == {"first": "first", "second": "second"}
    Image.new("RGB", (32, 32), (100, 0, 0)).save(pictures / "red.png")
    again = scored("second")
    assert again["red.png"]["scores"] == {"second": 200.0}
    assert again["blue.png"]["scores"] == {"first": 10.0, "second": 20.0}
    (pictures / "scores.json").write_text('{"mine": 1}')
    assert cli.main(["score", "--pictures", str(pictures), "--scorers", "first"]) == 2
    assert "scores.json was not written by mmalign score" in capsys.readouterr().err


def test_mistakes_are_one_line(pictures, tmp_path, capsys):
    def told(*words):
        assert cli.main(["score", *words]) == 2
        shown = capsys.readouterr().err
        assert shown.count("\n") == 1
        return shown

    assert "no such folder" in told("--pictures", str(tmp_path / "gone"), "--scorers", "playground")
    assert "no scorer 'beauty'" in told("--pictures", str(pictures), "--scorers", "beauty")
    assert "--scorers is missing" in told("--pictures", str(pictures))
    (pictures / "red.png").unlink()
    assert "lacks red.png" in told("--pictures", str(pictures), "--scorers", "playground")
    table = pictures / "metadata.jsonl"
    table.write_text('{"file_name": "blue.png"}\n')
    assert "line 1 has no prompt" in told("--pictures", str(pictures), "--scorers", "playground")
    table.write_text("blue.png\n")
    assert "line 1 is no JSON" in told("--pictures", str(pictures), "--scorers", "playground")
    table.unlink()
    assert "give --prompt for all of them" in told("--pictures", str(pictures), "--scorers", "playground")
