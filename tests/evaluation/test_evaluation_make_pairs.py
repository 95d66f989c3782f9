"""Pairs that a model draws and a scorer judges: best against worst, readable as data, resumable, and only where scores differ."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny import tiny_pipeline

from mmalign.data import load_pairs
from mmalign.evaluation import make_pairs

PROMPTS = ["a red bag", "a blue shoe"]


def made(folder: Path, scorer: Any, **options: Any) -> Any:
    given: dict[str, Any] = {"num_inference_steps": 2, "guidance_scale": 1.0, "num_images_per_prompt": 3}
    return make_pairs(tiny_pipeline("sd"), PROMPTS, scorer, output_dir=folder, progress=False, **given | options)


def red(image: Any) -> float:
    return float(np.asarray(image)[..., 0].mean() / 255)


def test_the_best_is_chosen_over_the_worst_and_the_folder_is_data(tmp_path: Path, channel_scorer: Any) -> None:
    result = made(tmp_path, channel_scorer("red"))
    assert (result.num_pairs, result.num_left_out) == (2, 0)
    source = load_pairs(tmp_path)
    assert [source[row].prompt for row in range(2)] == PROMPTS
    pictures = sorted(tmp_path.rglob("*.png"))
    assert len(pictures) == 6
    assert json.loads((tmp_path / "judged_by.json").read_text()) == {"scorer": "red", "fingerprint": "channel-0"}
    for row in range(2):
        record = source[row]
        assert record.label == 1 and record.scores["score"] == pytest.approx((red(record.image_0), red(record.image_1)))
        assert record.scores["score"][0] > record.scores["score"][1]


def test_a_second_call_draws_nothing_and_a_prompt_listed_twice_counts_once(tmp_path: Path, channel_scorer: Any) -> None:
    made(tmp_path, channel_scorer("red"))
    drawn = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.png")}
    table = (tmp_path / "metadata.jsonl").read_text()
    pipe = tiny_pipeline("sd")
    options: dict[str, Any] = {"num_inference_steps": 2, "guidance_scale": 1.0, "num_images_per_prompt": 3}
    again = make_pairs(
        pipe, [*PROMPTS, PROMPTS[0]], channel_scorer("red"), output_dir=tmp_path, progress=False, **options
    )
    assert again.num_pairs == 2 and (tmp_path / "metadata.jsonl").read_text() == table
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.png")} == drawn


def test_a_lone_prompt_is_not_drawn_letter_by_letter(tmp_path: Path, channel_scorer: Any) -> None:
    options: dict[str, Any] = {"num_inference_steps": 1, "guidance_scale": 1.0, "progress": False}
    with pytest.raises(ValueError, match="prompts must be a list"):
        make_pairs(tiny_pipeline("sd"), PROMPTS[0], channel_scorer("red"), output_dir=tmp_path, **options)
    assert not list(tmp_path.iterdir())


def test_pairs_closer_than_the_margin_are_left_out(tmp_path: Path, channel_scorer: Any) -> None:
    made(tmp_path, channel_scorer("red"))
    rows = [json.loads(line) for line in (tmp_path / "metadata.jsonl").read_text().splitlines()]
    near, far = sorted(row["chosen_score"] - row["rejected_score"] for row in rows)
    result = made(tmp_path, channel_scorer("red"), min_margin=(near + far) / 2)
    assert (result.num_pairs, result.num_left_out) == (1, 1)
    with pytest.raises(ValueError, match="no prompt has two pictures whose red scores differ by more than 5"):
        made(tmp_path, channel_scorer("red"), min_margin=5.0)
    for bad in ({"num_images_per_prompt": 1}, {"min_margin": -1.0}, {"min_margin": float("nan")}):
        with pytest.raises(ValueError, match=f"{next(iter(bad))} must be"):
            made(tmp_path, channel_scorer("red"), **bad)
