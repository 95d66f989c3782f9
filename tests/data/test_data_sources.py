"""Every source gives the same records; a bad row is named and left out whole."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data.faults import bad_rows
from PIL import Image

from mmalign.data import BadRow, InvalidRow, PairSource, fingerprints, load_pairs

Rows = Callable[..., list[dict[str, Any]]]
Picture = Callable[..., Image.Image]
Packed = Callable[..., bytes]


def _write_parquet(items: list[dict[str, Any]], path: Path, row_group_size: int = 4) -> Path:
    import pyarrow as pa
    import pyarrow.parquet as pq

    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(items), path, row_group_size=row_group_size)
    return path


def _write_folder(folder: Path, lines: list[dict[str, Any]], packed: Packed, picture: Picture) -> Path:
    folder.mkdir(exist_ok=True)
    for number, name in enumerate(("a", "b", "c")):
        (folder / f"{name}.png").write_bytes(packed(picture(seed=number)))
    (folder / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return folder


def _same(one: PairSource, other: PairSource) -> bool:
    pairs = [(one[row], other[row]) for row in range(len(one))]
    return len(one) == len(other) and all(
        (a.row, a.prompt, a.label, a.scores, a.user_id) == (b.row, b.prompt, b.label, b.scores, b.user_id)
        and np.array_equal(np.asarray(a.image_0), np.asarray(b.image_0))
        and np.array_equal(np.asarray(a.image_1), np.asarray(b.image_1))
        for a, b in pairs
    )


def test_all_sources_of_pick_a_pic_agree(tmp_path: Path, pickapic_rows: Rows) -> None:
    from datasets import Dataset, DatasetDict, Image

    items = pickapic_rows(10)
    expected = load_pairs(items)
    file = _write_parquet(items, tmp_path / "one.parquet")
    _write_parquet(items[:7], tmp_path / "many" / "train-00000-of-00002.parquet")
    _write_parquet(items[7:], tmp_path / "many" / "train-00001-of-00002.parquet")
    _write_parquet(items[:2], tmp_path / "many" / "test-00000-of-00001.parquet")
    dataset = Dataset.from_list(items)
    pictures = dataset.cast_column("jpg_0", Image()).cast_column("jpg_1", Image())
    DatasetDict({"train": pictures, "test": dataset.select([0, 1])}).save_to_disk(tmp_path / "saved")
    sources = [file, str(tmp_path / "many"), dataset, pictures, tmp_path / "saved", dataset.with_format("numpy")]
    for source in sources:
        assert _same(load_pairs(source), expected), source
    assert len(load_pairs(tmp_path / "many", split="test")) == len(load_pairs(tmp_path / "saved", split="test")) == 2
    assert expected[3].label == 0.8 and expected[3].user_id == "1" and expected[3].image_0.size == (24, 20)
    assert expected.form == "pickapic" and load_pairs(expected) is expected
    backwards = [load_pairs(file)[row].prompt for row in (9, 0, 5)]
    assert backwards == [items[row]["caption"] for row in (9, 0, 5)]


def test_the_playground_s_parquet_is_read_in_place(
    tmp_path: Path, pickapic_rows: Rows, monkeypatch: pytest.MonkeyPatch
) -> None:
    import mmalign.data.sources as module

    monkeypatch.setattr(module, "files", lambda package: tmp_path)
    with pytest.raises(ValueError, match="mmalign.playground.build pairs"):
        load_pairs("playground")
    extra = {"has_label": True, "are_different": True, "ranking_id": 3, "model_0": "m", "model_1": "m"}
    items = [item | extra for item in pickapic_rows(6)]
    for split, number in (("train", 6), ("test", 2)):
        _write_parquet(items[:number], tmp_path / "assets" / "pairs" / f"{split}.parquet")
    assert _same(load_pairs("playground"), load_pairs(items)) and len(load_pairs("playground", split="test")) == 2
    with pytest.raises(ValueError, match="'train' and 'test'"):
        load_pairs("playground", split="validation")


def test_metadata_jsonl_folder(tmp_path: Path, packed: Packed, picture: Picture) -> None:
    lines: list[dict[str, Any]] = [
        {"prompt": "", "chosen": "a.png", "rejected": "b.png"},
        {"prompt": "é\u2028x", "chosen": "b.png", "rejected": "c.png", "chosen_score": 2, "rejected_score": 3},
    ]
    folder = _write_folder(tmp_path / "set", lines, packed, picture)
    text = "\n".join(json.dumps(line, ensure_ascii=False) for line in lines) + "\n\nnot json\n"
    (folder / "metadata.jsonl").write_text(text, encoding="utf-8-sig")
    source = load_pairs(folder)
    assert (len(source), source.form, source.score_names) == (3, "canonical", ("score",))
    assert (source[0].prompt, source[0].label, source[0].scores, source[0].user_id) == ("", 1.0, {}, None)
    assert source[1].prompt == "é\u2028x" and source[1].scores == {"score": (2.0, 3.0)}
    assert np.array_equal(np.asarray(source[0].image_1), np.asarray(picture(seed=1)))
    assert bad_rows(source) == [BadRow(2, "metadata.jsonl", "line 4 is not a JSON object")]
    assert _same(load_pairs(folder / "metadata.jsonl", max_rows=2), load_pairs(folder, max_rows=2))


def test_faulty_rows_are_dropped_whole_and_named(
    tmp_path: Path, packed: Packed, picture: Picture, pickapic_rows: Rows
) -> None:
    good = pickapic_rows(1)[0]
    jpeg = packed(picture(64, 64), "JPEG")
    huge = packed(Image.new("1", (300, 300)))
    faults: list[tuple[dict[str, Any], str | None, str]] = [
        ({}, None, ""),
        ({"jpg_1": jpeg[: len(jpeg) // 2]}, "jpg_1", "damaged or truncated"),
        ({"jpg_0": None}, "jpg_0", "no image"),
        ({"label_0": None}, "label_0", "expected a finite number, got None"),
        ({"label_0": 1.2, "label_1": -0.2}, "label_0", "1.2 lies outside [0, 1]"),
        ({"label_0": math.nan}, "label_0", "finite number"),
        ({"label_0": "1"}, "label_0", "got '1'"),
        ({"label_0": 1.0, "label_1": 1.0}, "label_1", "expected 1"),
        ({"caption": None}, "caption", "expected text, got None"),
        ({"caption": "half \ud800"}, "caption", "Unicode"),
        ({"caption": ""}, None, ""),
        ({"label_0": 0.5, "label_1": 0.5}, None, ""),
        ({"jpg_1": huge}, "jpg_1", "300×300 is more than 50000 pixels"),
        ({"has_label": False}, "has_label", "never labelled"),
        ({"ps_score_0": [0.2], "ps_score_1": [0.1]}, None, ""),
        ({"ps_score_0": [0.2], "ps_score_1": None}, None, ""),
        ({"ps_score_0": math.nan, "ps_score_1": 0.2, "label_1": None, "has_label": math.nan}, None, ""),
        ({"ps_score_0": "high", "ps_score_1": 0.2}, "ps_score_0", "finite number"),
        ({"jpg_0": packed(picture().convert("RGBA"))}, None, ""),
        ({"jpg_0": "elsewhere.png"}, "jpg_0", "pass root="),
    ]
    source = load_pairs([good | fault for fault, _, _ in faults], max_pixels=50_000)
    found = {bad.row: bad for bad in bad_rows(source)}
    for row, (_, field, reason) in enumerate(faults):
        if field is None:
            assert row not in found and source[row].row == row
            continue
        assert found[row].field == field and reason in found[row].reason, found[row]
        with pytest.raises(InvalidRow, match=f"^row {row}, {field}: "):
            source[row]
    assert source[14].scores == {"ps_score": (0.2, 0.1)} and source[0].scores == {}
    assert source[15].scores == source[16].scores == {} and source[16].label == 1.0


def test_a_folder_s_missing_and_escaping_files_are_named(tmp_path: Path, packed: Packed, picture: Picture) -> None:
    (tmp_path / "secret.png").write_bytes(packed(picture()))
    lines = [
        {"prompt": "x", "chosen": "a.png", "rejected": "none.png"},
        {"prompt": "x", "chosen": "../secret.png", "rejected": "b.png"},
        {"prompt": "x", "chosen": str(tmp_path / "secret.png"), "rejected": "b.png"},
        {"prompt": "x", "chosen": "link.png", "rejected": "b.png"},
        {"prompt": "x", "chosen": "a.png"},
        {"prompt": "x", "chosen": "a.png", "rejected": "b.png"},
    ]
    folder = _write_folder(tmp_path / "set", lines, packed, picture)
    (folder / "link.png").symlink_to(tmp_path / "secret.png")
    bad = {bad.row: (bad.field, bad.reason) for bad in bad_rows(load_pairs(folder))}
    assert sorted(bad) == [0, 1, 2, 3, 4]
    assert bad[0] == ("rejected", "no such file: 'none.png'")
    assert all(bad[row][0] == "chosen" and "folder" in bad[row][1] for row in (1, 2, 3))
    assert bad[4] == ("rejected", "no image (None)")


def test_fingerprint_follows_the_content_and_nothing_else(
    tmp_path: Path, packed: Packed, picture: Picture, pickapic_rows: Rows
) -> None:
    from datasets import Dataset

    items = pickapic_rows(4)
    changed = [items[0] | {"label_0": 0.0, "label_1": 1.0}, *items[1:]]
    for wrap in (list, Dataset.from_list):
        base = load_pairs(wrap(items)).fingerprint
        assert load_pairs(wrap(pickapic_rows(4))).fingerprint == base
        others = [load_pairs(wrap(changed)), load_pairs(wrap(items), max_rows=3), load_pairs(wrap(items[::-1]))]
        others.append(load_pairs(wrap(items), max_pixels=1000))
        assert len({base, *(other.fingerprint for other in others)}) == 5
    file = _write_parquet(items, tmp_path / "x.parquet")
    before = load_pairs(file).fingerprint
    assert load_pairs(file).fingerprint == before
    assert load_pairs(_write_parquet(changed, file)).fingerprint != before
    folder = _write_folder(tmp_path / "set", [{"prompt": "x", "chosen": "a.png", "rejected": "b.png"}], packed, picture)
    before = load_pairs(folder).fingerprint
    (folder / "c.png").write_bytes(b"not named")
    assert load_pairs(folder).fingerprint == before
    (folder / "a.png").write_bytes(packed(picture(seed=9)))
    assert load_pairs(folder).fingerprint != before


def test_pictures_outside_the_table_count_in_its_fingerprint(tmp_path: Path, packed: Packed, picture: Picture) -> None:
    from datasets import Dataset, Image

    for seed, name in enumerate(("a.png", "b.png")):
        (tmp_path / name).write_bytes(packed(picture(seed=seed)))
    named = [{"prompt": "x", "chosen": "a.png", "rejected": "b.png"}]
    file = _write_parquet(named, tmp_path / "pairs.parquet")
    absolute = {name: [str(tmp_path / named[0][name])] for name in ("chosen", "rejected")}
    dataset = Dataset.from_dict({"prompt": ["x"]} | absolute)
    dataset = dataset.cast_column("chosen", Image()).cast_column("rejected", Image())
    with pytest.raises(InvalidRow, match="pass root="):
        load_pairs(dataset)[0]
    opened = [lambda: load_pairs(file), lambda: load_pairs(dataset, root=tmp_path)]
    before = [opening().fingerprint for opening in opened]
    assert all(_same(opening(), load_pairs(named, root=tmp_path)) for opening in opened)
    (tmp_path / "a.png").write_bytes(packed(picture(seed=5)))
    assert all(opening().fingerprint != old for opening, old in zip(opened, before, strict=True))


def test_a_large_source_is_sampled(tmp_path: Path, pickapic_rows: Rows, monkeypatch: pytest.MonkeyPatch) -> None:
    from datasets import Dataset

    monkeypatch.setattr(fingerprints, "READ_WHOLE", 10)
    file = _write_parquet(pickapic_rows(4), tmp_path / "x.parquet")
    before = load_pairs(file).fingerprint
    assert load_pairs(file).fingerprint == before
    assert load_pairs(_write_parquet(pickapic_rows(5), file)).fingerprint != before
    one, other = Dataset.from_list(pickapic_rows(4)), Dataset.from_list(pickapic_rows(5))
    assert load_pairs(one).fingerprint != load_pairs(other).fingerprint


@pytest.mark.parametrize(
    ("source", "options", "says"),
    [
        ([{"prompt": "x", "text": "y"}], {}, "prompt, text: not preference data .* jpg_0"),
        ([], {}, "no rows"),
        (["x"], {}, "row 0: expected a dict, got str"),
        (7, {}, "cannot read rows from int"),
        ("./nowhere", {}, "no such file or folder"),
        ("nowhere/x.parquet", {}, "no such file or folder"),
        ("nowhere.json", {}, "no such file or folder"),
        ("my_pairs/", {}, "no such file or folder"),
        ("playground", {"revision": "main"}, "revision='main' does not apply to the playground"),
        ([{"prompt": "x", "chosen": b"", "rejected": b""}], {"split": "train"}, "split='train' does not apply"),
        ([{"prompt": "x", "chosen": b"", "rejected": b""}], {"max_rows": 0}, "max_rows"),
        ({"a": [], "b": []}, {}, "has no split 'train'; it has a, b"),
    ],
)
def test_what_cannot_be_read_is_refused_with_the_remedy(source: Any, options: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        load_pairs(source, **options)


def test_other_refusals(tmp_path: Path, pickapic_rows: Rows) -> None:
    from datasets import Dataset

    both = pickapic_rows(1)[0] | {"prompt": "x", "chosen": b"", "rejected": b""}
    with pytest.raises(ValueError, match="both forms at once"):
        load_pairs([both])
    with pytest.raises(ValueError, match="neither parquet, nor metadata.jsonl"):
        load_pairs(tmp_path)
    dataset = Dataset.from_list(pickapic_rows(2))
    with pytest.raises(ValueError, match="set_transform"):
        load_pairs(dataset.with_transform(lambda batch: batch))
    file = _write_parquet(pickapic_rows(2), tmp_path / "train.parquet")
    with pytest.raises(ValueError, match="split='test' does not apply"):
        load_pairs(file, split="test")
    _write_parquet([{"prompt": "x", "chosen": "a", "rejected": "b"}], tmp_path / "train-1.parquet")
    with pytest.raises(ValueError, match="columns differ"):
        load_pairs(tmp_path)
    with pytest.raises(IndexError):
        load_pairs(dataset)[2]


def test_hub_ids_are_loaded_by_datasets(pickapic_rows: Rows, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    asked = []

    def load_dataset(name: str, split: str, revision: str | None) -> datasets.Dataset:
        asked.append((name, split, revision))
        if name == "not/there":
            raise ConnectionError("Couldn't reach 'not/there' on the Hub")
        return datasets.Dataset.from_list(pickapic_rows(3))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert _same(load_pairs("some/pairs", revision="abc"), load_pairs(pickapic_rows(3)))
    assert len(load_pairs("some/pairs", split="test_unique")) == 3
    assert asked == [("some/pairs", "train", "abc"), ("some/pairs", "test_unique", None)]
    with pytest.raises(ValueError, match="'not/there' is no local path and could not be loaded from the Hub: Couldn't"):
        load_pairs("not/there")


def test_a_damaged_part_of_a_parquet_file_costs_its_rows_and_names_the_file(
    tmp_path: Path, pickapic_rows: Rows
) -> None:
    import pyarrow.parquet as pq

    file = _write_parquet(pickapic_rows(6), tmp_path / "x.parquet", row_group_size=2)
    content = bytearray(file.read_bytes())
    for column in ("caption", "jpg_0"):
        names = pq.ParquetFile(file).schema_arrow.names
        start = pq.ParquetFile(file).metadata.row_group(1).column(names.index(column)).data_page_offset
        content[start : start + 32] = b"\xff" * 32
    file.write_bytes(content)
    source = load_pairs(file)
    found = bad_rows(source)
    assert [bad.row for bad in found] == [2, 3] and len({bad.reason for bad in found}) == 1
    assert found[0].field == "x.parquet" and "row group 1 of the file is damaged" in found[0].reason
    captions = [item["caption"] for item in pickapic_rows(6)]
    assert source.prompts() == [*captions[:2], None, None, *captions[4:]] and source.fingerprint
    file.write_bytes(b"nothing here at all")
    with pytest.raises(ValueError, match="x.parquet is damaged, or no parquet file"):
        load_pairs(file)


def test_a_folder_in_the_hub_s_convention(tmp_path: Path, packed: Packed, picture: Picture) -> None:
    lines = [{"prompt": "x", "chosen_file_name": "a.png", "rejected_file_name": "b.png"}]
    plain = [{"prompt": "x", "chosen": "a.png", "rejected": "b.png"}]
    folder = _write_folder(tmp_path / "set", lines, packed, picture)
    assert _same(load_pairs(folder), load_pairs(_write_folder(tmp_path / "plain", plain, packed, picture)))
