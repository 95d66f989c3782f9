"""The layouts of HPDv2, HPDv3, ImageReward and TRL give the pairs that they mean."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data.faults import bad_rows
from PIL import Image

from mmalign.data import BadRow, ComparisonConfig, InvalidRow, PairSource, compare, load_pairs

Picture = Callable[..., Image.Image]
Packed = Callable[..., bytes]


@pytest.fixture
def folder(tmp_path: Path, packed: Packed, picture: Picture) -> Path:
    """Pictures 0.png … 3.png, made from the seeds 0 … 3."""
    for number in range(4):
        (tmp_path / f"{number}.png").write_bytes(packed(picture(seed=number)))
    return tmp_path


@pytest.fixture
def seed_of(picture: Picture) -> Callable[[Image.Image], int]:
    """Which of the pictures it is."""

    def find(image: Image.Image) -> int:
        return next(n for n in range(8) if np.array_equal(np.asarray(image), np.asarray(picture(seed=n))))

    return find


@pytest.fixture
def told(seed_of: Callable[[Image.Image], int]) -> Callable[[PairSource], list[tuple[int, int, float]]]:
    """(picture, picture, label) of every pair."""
    return lambda source: [
        (seed_of(pair.image_0), seed_of(pair.image_1), pair.label)
        for pair in map(source.__getitem__, range(len(source)))
    ]


def _json(folder: Path, items: list[dict[str, Any]], name: str = "data.json") -> Path:
    text = "\n".join(map(json.dumps, items)) if name.endswith("l") else json.dumps(items)
    (folder / name).write_text(text, encoding="utf-8")
    return folder / name


@pytest.mark.parametrize(
    ("votes", "label"), [([1, 0], 1.0), ([0, 1], 0.0), ([3, 3], 0.5), ([7, 2], 7 / 9), ([0.25, 0.75], 0.25)]
)
def test_hpdv2_pairs_with_votes(folder: Path, told: Callable[..., Any], votes: list[float], label: float) -> None:
    item = {"prompt": "x", "file_path": ["2.png", "1.png"], "human_preference": votes, "user_hash": "abc"}
    source = load_pairs(_json(folder, [item]))
    assert source.form == "hpdv2" and told(source) == [(2, 1, pytest.approx(label))]


def test_hpdv3_s_first_picture_is_the_preferred_one(folder: Path, told: Callable[..., Any]) -> None:
    rows = [{"prompt": "x", "path1": "3.png", "path2": "0.png", "confidence": c} for c in (0.97, None, 1, 0.5, 0.2)]
    source = load_pairs(_json(folder, rows, "data.jsonl"))
    bad = BadRow(4, "confidence", "the preferred side has a confidence or share of votes of 0.2, expected 0.5 … 1")
    assert source.form == "hpdv3" and bad_rows(source) == [bad]
    assert told(source.select(range(4), "good")) == [(3, 0, 0.97), (3, 0, 1.0), (3, 0, 1.0), (3, 0, 0.5)]


@pytest.mark.parametrize(("pictures", "ranks"), [("image_path", "rank"), ("generations", "ranking")])
def test_a_ranking_gives_every_pair_of_its_pictures(
    folder: Path, told: Callable[..., Any], pictures: str, ranks: str
) -> None:
    items = [
        {"prompt": "x", pictures: ["0.png", "1.png", "2.png", "3.png"], ranks: [2, 1, 5, 2]},
        {"prompt": "y", pictures: ["3.png"], ranks: [1]},
        {"prompt": "z", pictures: ["3.png", "2.png"], ranks: [1, 2]},
    ]
    source = load_pairs(_json(folder, items))
    # 4·3/2 pairs, the ranking that cannot be read, and 1: the smaller rank wins, equal ones tie.
    expected = [(0, 1, 0.0), (0, 2, 1.0), (0, 3, 0.5), (1, 2, 1.0), (1, 3, 1.0), (2, 3, 0.0)]
    assert len(source) == 8 and told(source.select(range(6), "first")) == expected
    assert told(source.select([7], "last")) == [(3, 2, 1.0)] and source.prompts() == ["x"] * 6 + [None, "z"]
    reason = "1 pictures: a comparison needs two"
    assert bad_rows(source) == [BadRow(6, f"{pictures} of row 1", reason)]
    labels = np.array([label for _, _, label in expected])
    import torch

    compared = compare(torch.tensor(labels), None, ComparisonConfig())
    assert len(compared) == 5 and compared.num_human_ties == 1


def test_a_picture_that_is_missing_costs_only_its_own_pairs(folder: Path) -> None:
    items = [{"prompt": "x", "generations": ["0.png", "none.png", "2.png"], "ranking": [1, 2, 3]}]
    source = load_pairs(_json(folder, items))
    bad = bad_rows(source)
    assert [item.row for item in bad] == [0, 2] and {item.field for item in bad} == {"generations[1] of row 0"}
    assert source[1].label == 1.0


def test_image_reward_db_groups_its_pictures_by_prompt(
    tmp_path: Path, told: Callable[..., Any], packed: Packed, picture: Picture
) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq
    from datasets import Dataset, Image

    def row(number: int, key: str, rank: int, prompt: str = "x") -> dict[str, Any]:
        png = packed(picture(seed=number))
        ratings = {"overall_rating": rank + 1, "fidelity_rating": None}
        return {"image": {"bytes": png, "path": None}, "prompt_id": key, "prompt": prompt, "rank": rank} | ratings

    items = [row(0, "a", 2), row(1, "b", 1, "y"), row(2, "a", 1), row(3, "b", 1, "y"), row(4, "a", 2)]
    items += [row(5, "c", 1), row(6, "d", 1, "p"), row(7, "d", 2, "q")]
    pq.write_table(pa.Table.from_pylist(items), tmp_path / "data.parquet", row_group_size=3)
    dataset = Dataset.from_list(items).cast_column("image", Image())
    for source in (load_pairs(tmp_path / "data.parquet"), load_pairs(dataset), load_pairs(items)):
        assert source.form == "imagereward"
        expected = [(0, 2, 0.0), (0, 4, 0.5), (2, 4, 1.0), (1, 3, 0.5)]
        assert told(source.select(range(4), "good")) == expected
        assert source[0].scores == {"overall_rating": (3.0, 2.0)} and source[3].prompt == "y"
        bad = {item.field: item.reason for item in bad_rows(source)}
        assert sorted(bad) == ["prompt of row 7", "prompt_id of row 5"] and "needs two" in bad["prompt_id of row 5"]


def _message(role: str, content: Any) -> list[dict[str, Any]]:
    return [{"role": role, "content": content}]


def test_trl_s_messages_hold_pictures_or_placeholders(
    told: Callable[..., Any], packed: Packed, picture: Picture
) -> None:
    from datasets import Dataset, Features, Image, List, Value

    png = [packed(picture(seed=number)) for number in range(4)]
    held = {
        "prompt": _message("user", "a cat"),
        "chosen": _message("assistant", [{"type": "image", "image": png[0]}]),
        "rejected": _message("assistant", [{"type": "image", "image": {"bytes": png[1], "path": None}}]),
    }
    waiting = {
        "prompt": _message("user", [{"type": "text", "text": "a "}, {"type": "text", "text": "cat"}]),
        "chosen": _message("assistant", [{"type": "image"}]),
        "rejected": _message("assistant", [{"type": "image"}]),
        "images": [png[2], png[3]],
    }
    mixed = {"prompt": "a cat", "chosen": png[3], "rejected": waiting["rejected"], "image": png[0]}
    source = load_pairs([held, waiting, mixed])
    assert source.prompts() == ["a cat"] * 3 == [source[row].prompt for row in range(3)]
    assert told(source) == [(0, 1, 1.0), (2, 3, 1.0), (3, 0, 1.0)]
    part = {"type": Value("string"), "text": Value("string"), "image": Image()}
    message = List({"role": Value("string"), "content": List(part)})
    features = Features(dict.fromkeys(("prompt", "chosen", "rejected"), message) | {"images": List(Image())})
    dataset = Dataset.from_list([waiting], features=features)
    assert told(load_pairs(dataset)) == [(2, 3, 1.0)]
    # A damaged picture is its row's trouble also in the middle of a list that `datasets` would decode by itself.
    damaged = Dataset.from_list([waiting | {"images": [png[2], png[3][:40]]}], features=features)
    with pytest.raises(InvalidRow, match="row 0, rejected: .*damaged"):
        load_pairs(damaged)[0]


@pytest.mark.parametrize(
    ("columns", "label", "field"),
    [
        ({}, 1.0, None),
        ({"confidence": 0.9}, 0.9, None),
        ({"confidence": None, "chosen_votes": 4, "rejected_votes": 1}, 0.8, None),
        ({"confidence": math.nan, "chosen_votes": 4, "rejected_votes": 1}, 0.8, None),
        ({"confidence": 0.9, "chosen_votes": math.nan, "rejected_votes": math.nan}, 0.9, None),
        ({"chosen_votes": 2, "rejected_votes": 2}, 0.5, None),
        ({"chosen_votes": 1, "rejected_votes": 2}, None, "rejected_votes"),
        ({"chosen_votes": 1}, None, "rejected_votes"),
        ({"chosen_votes": 0, "rejected_votes": 0}, None, "chosen_votes"),
        ({"chosen_votes": 5, "rejected_votes": -1}, None, "chosen_votes"),
        ({"confidence": 0.9, "chosen_votes": 4, "rejected_votes": 1}, None, "confidence"),
        ({"confidence": 1.1}, None, "confidence"),
    ],
)
def test_votes_and_confidence_become_the_label(
    columns: dict[str, Any], label: float | None, field: str | None, packed: Packed, picture: Picture
) -> None:
    row = {"prompt": "x", "chosen": packed(picture()), "rejected": packed(picture(seed=1))} | columns
    source = load_pairs([row])
    if field is None:
        assert source[0].label == label
        return
    with pytest.raises(InvalidRow, match=f"^row 0, {field}: "):
        source[0]


def test_a_json_file_that_is_no_list_is_refused(folder: Path) -> None:
    for text in ('{"prompt": "x"}', "[1, 2", ""):
        (folder / "data.json").write_text(text)
        with pytest.raises(ValueError, match="no JSON list of objects"):
            load_pairs(folder / "data.json")


def test_paths_of_a_json_file_may_start_from_another_folder(folder: Path, told: Callable[..., Any]) -> None:
    (folder / "lists").mkdir()
    file = _json(folder / "lists", [{"prompt": "x", "path1": "1.png", "path2": "0.png"}])
    assert len(bad_rows(load_pairs(file))) == 1
    assert told(load_pairs(file, root=folder)) == [(1, 0, 1.0)]


def test_fingerprints_follow_pictures_in_lists(folder: Path, packed: Packed, picture: Picture) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    item = {"prompt": "x", "generations": ["0.png", "1.png"], "ranking": [1, 2]}
    pq.write_table(pa.Table.from_pylist([item]), folder / "data.parquet")
    files = [_json(folder, [item]), folder / "data.parquet"]
    before = [load_pairs(file).fingerprint for file in files]
    assert [load_pairs(file).fingerprint for file in files] == before
    (folder / "1.png").write_bytes(packed(picture(seed=7)))
    assert all(load_pairs(file).fingerprint != old for file, old in zip(files, before, strict=True))
