"""No row of another split is read, whichever way files tell theirs, and none is passed over without a word."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import pytest

from mmalign.data import load_pairs
from mmalign.data.prompts import read_prompts


def write(folder: Path, *names: str) -> Path:
    """A file for each name with the one pair whose prompt is that name."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        rows = pa.table({"prompt": [name], "chosen": [b"0"], "rejected": [b"1"]})
        pa.parquet.write_table(rows, folder / f"{name}.parquet")
    return folder


@pytest.mark.parametrize(
    ("train", "test", "split"),
    [
        ("train-00000-of-00001", "test-00000-of-00001", "test"),
        ("train", "test", "test"),
        ("train_0", "test_0", "test"),
        ("train/0000", "test/0000", "test"),
        ("default/train/0000", "default/validation_unique/0000", "validation_unique"),
        ("train/part/test_0", "test/part/0", "test"),
    ],
)
def test_a_split_is_told_by_the_nearest_folder_or_the_file(tmp_path: Path, train: str, test: str, split: str) -> None:
    folder = write(tmp_path, train, test)
    assert load_pairs(folder, split=split).prompts() == read_prompts(folder, split=split) == [test]
    assert load_pairs(folder).prompts() == [train]


def test_the_folder_s_own_name_says_nothing_of_what_lies_in_it(tmp_path: Path) -> None:
    folder = write(tmp_path / "test", "training", "b")
    assert load_pairs(folder).prompts() == ["b", "training"]
    with pytest.raises(ValueError, match="has no split 'train'; it has none"):
        load_pairs(folder, split="train")


def test_a_file_of_no_split_among_others_is_named(tmp_path: Path) -> None:
    folder = write(tmp_path, "train-00000-of-00001", "more")
    with pytest.raises(ValueError, match=r"more.parquet belongs to no split, as other files do \(train\): pass split="):
        load_pairs(folder)
    assert load_pairs(folder, split="train").prompts() == ["train-00000-of-00001"]
