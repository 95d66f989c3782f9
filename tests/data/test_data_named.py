"""A folder whose files are paired by name."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from data.faults import bad_rows
from PIL import Image

from mmalign.data import BadRow, load_pairs

Write = Callable[..., None]


@pytest.fixture
def write(tmp_path: Path, packed: Callable[..., bytes], picture: Callable[..., Image.Image]) -> Write:
    """Pictures of the seeds 0, 1 … under these names; texts hold their own name."""

    def call(*names: str) -> None:
        for seed, name in enumerate(names):
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(f" {name}\n".encode() if name.endswith(".txt") else packed(picture(seed=seed)))

    return call


def test_both_spellings_and_subfolders(tmp_path: Path, write: Write, picture: Callable[..., Image.Image]) -> None:
    write("a_chosen.png", "a_rejected.PNG", "a.txt", "sub/b.png", "sub/b-rejectedlabel.png", "sub/b.txt", ".hid.png")
    source = load_pairs(tmp_path)
    assert source.form == "canonical" and source.prompts() == ["a.txt", "sub/b.txt"]
    for row, seeds in enumerate(((0, 1), (3, 4))):
        for image, seed in zip((source[row].image_0, source[row].image_1), seeds, strict=True):
            assert np.array_equal(np.asarray(image), np.asarray(picture(seed=seed)))
        assert source[row].label == 1.0


def test_what_has_no_counterpart_is_named(tmp_path: Path, write: Write) -> None:
    write("a_chosen.png", "a_rejected.png", "a.txt", "b_chosen.png", "b.txt", "c-rejected.png", "c.txt", "d.txt")
    write("e_chosen.png", "e.jpg", "e_rejected.png", "e.txt", "f.png", "f_rejected.png")
    bad = bad_rows(load_pairs(tmp_path))
    assert bad == [
        BadRow(1, "rejected", "expected one rejected file for 'b', found none"),
        BadRow(2, "chosen", "expected one chosen file for 'c', found none"),
        BadRow(3, "chosen", "expected one chosen file for 'd', found none"),
        BadRow(4, "chosen", "expected one chosen file for 'e', found 'e.jpg', 'e_chosen.png'"),
        BadRow(5, "prompt", "expected one prompt file for 'f', found none"),
    ]


def test_a_text_is_read_from_inside_the_folder_only(tmp_path: Path, write: Write) -> None:
    write("set/a_chosen.png", "set/a_rejected.png", "secret.txt")
    (tmp_path / "set" / "a.txt").symlink_to(tmp_path / "secret.txt")
    (bad,) = bad_rows(load_pairs(tmp_path / "set"))
    assert bad.field == "prompt" and "leads out of the data set's folder" in bad.reason


def test_a_folder_without_a_rejected_picture_is_no_source(tmp_path: Path, write: Write) -> None:
    write("a_chosen.png", "a.png", "a.txt")
    with pytest.raises(ValueError, match="none of them named as rejected"):
        load_pairs(tmp_path)
