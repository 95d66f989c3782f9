"""`mmalign score` on pictures of the playground's reward and judges, and on folders that are wrong."""

import json

import pytest
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
