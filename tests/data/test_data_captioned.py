"""Single pictures with captions: which layouts hold them, who reads them, and what is said of those that cannot be read."""

import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from data.faults import bad_rows
from PIL import Image
from tiny import tiny_pipeline

from mmalign.data import ComparisonConfig, PreferenceDataset, collate, compare, encode_pairs, load_pairs, score_pairs
from mmalign.data.texts import load_prompts
from mmalign.denoisers import adapter_for

Picture = Callable[..., Image.Image]
Packed = Callable[..., bytes]


def folder_of(place: Path, picture: Picture, packed: Packed) -> Path:
    for seed, name in enumerate(("b", "a", "sub/c")):
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / f"{name}.png").write_bytes(packed(picture(seed=seed)))
        (place / f"{name}.txt").write_text(f" caption of {name}\n")
    return place


def metadata_of(place: Path, picture: Picture, packed: Packed) -> Path:
    folder_of(place, picture, packed)
    lines = [{"file_name": f"{name}.png", "text": f"caption of {name}"} for name in ("a", "b", "sub/c")]
    (place / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return place


def rows_of(place: Path, picture: Picture, packed: Packed) -> list[dict[str, Any]]:
    seeds = {"a": 1, "b": 0, "sub/c": 2}
    return [{"prompt": f"caption of {name}", "image": picture(seed=seed)} for name, seed in seeds.items()]


def tar_of(place: Path, picture: Picture, packed: Packed) -> Path:
    place.mkdir()
    with tarfile.open(place / "shard.tar", "w") as tar:
        for name, seed in (("a", 1), ("b", 0), ("c", 2)):
            caption = f"caption of {'sub/c' if name == 'c' else name}".encode()
            for ending, content in ((".png", packed(picture(seed=seed))), (".txt", caption)):
                member = tarfile.TarInfo(name + ending)
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    return place


@pytest.mark.parametrize("layout", [folder_of, metadata_of, rows_of, tar_of])
def test_every_layout_gives_pictures_with_their_captions(
    layout: Callable[..., Any], tmp_path: Path, picture: Picture, packed: Packed
) -> None:
    data = layout(tmp_path / "data", picture, packed)
    source = load_pairs(data, captioned=True)
    assert source.prompts() == ["caption of a", "caption of b", "caption of sub/c"] and source.sides == 1
    for row, seed in enumerate((1, 0, 2)):
        record = source[row]
        (image,) = record.sides
        assert image.tobytes() == picture(seed=seed).convert("RGB").tobytes() and record.image_1 is None
    assert load_prompts(data).prompts == source.prompts()
    with pytest.raises(ValueError, match="sft, self-npo with source='images'"):
        load_pairs(data)


def test_a_folder_that_marks_a_picture_as_rejected_holds_pairs(
    tmp_path: Path, picture: Picture, packed: Packed
) -> None:
    folder_of(tmp_path, picture, packed)
    (tmp_path / "a_rejected.png").write_bytes(packed(picture(seed=7)))
    source = load_pairs(tmp_path, captioned=True)
    assert source.sides == 2 and [bad.row for bad in bad_rows(source)] == [1, 2]


def test_names_that_look_like_a_side_are_names(tmp_path: Path, picture: Picture, packed: Packed) -> None:
    (tmp_path / "well_chosen.png").write_bytes(packed(picture()))
    (tmp_path / "well_chosen.txt").write_text("a bag")
    assert load_pairs(tmp_path, captioned=True)[0].prompt == "a bag"


def test_what_cannot_be_read_is_a_bad_row_with_its_reason(tmp_path: Path, picture: Picture, packed: Packed) -> None:
    folder_of(tmp_path, picture, packed)
    (tmp_path / "a.txt").unlink()
    (tmp_path / "b.png").write_bytes(packed(picture())[:60])
    (tmp_path / "d.txt").write_text("nothing to see")
    (tmp_path / "sub" / "c.txt").write_bytes(b"caf\xe9")
    told = {bad.row: (bad.field, bad.reason) for bad in bad_rows(load_pairs(tmp_path, captioned=True))}
    assert told[0] == ("prompt", "expected one prompt file for 'a', found none")
    assert told[1][0] == "image" and "b.png" in told[1][1]
    assert told[2] == ("image", "expected one image file for 'd', found none")
    assert told[3][0] == "prompt" and "not UTF-8" in told[3][1]


def test_folders_without_a_picture_or_a_usable_one_are_refused(
    tmp_path: Path, picture: Picture, packed: Packed
) -> None:
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "readme.txt").write_text("none here")
    with pytest.raises(ValueError, match="nor pictures"):
        load_pairs(tmp_path / "notes", captioned=True)
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "a.png").write_bytes(packed(picture()))
    source = load_pairs(tmp_path / "bare", captioned=True)
    with pytest.raises(ValueError, match="no usable picture; 1 of 1 rows left out: row 0, prompt: expected one prompt"):
        encode_pairs(
            source, adapter_for(tiny_pipeline("sd")), resolution=16, cache_dir=tmp_path / "cache", progress=False
        )


def test_one_side_is_encoded_as_the_chosen_side_of_a_pair_is(tmp_path: Path, picture: Picture) -> None:
    denoiser = adapter_for(tiny_pipeline("sd"))
    singles = [{"prompt": f"{seed}", "image": picture(seed=seed)} for seed in range(3)]
    pairs = [{"prompt": row["prompt"], "chosen": row["image"], "rejected": picture(seed=9)} for row in singles]
    found = []
    for rows in (singles, pairs):
        source = load_pairs(rows, captioned=True)
        encoded = encode_pairs(source, denoiser, resolution=16, cache_dir=tmp_path, progress=False)
        data = PreferenceDataset(encoded, compare(encoded.labels, None, ComparisonConfig()))
        found.append(collate([data[0], data[2]]))
    one, two = found
    assert "rejected" not in one and "size_rejected" not in one
    for name in one:
        assert torch.equal(one[name], two[name]), name


def test_what_compares_two_pictures_refuses_one(picture: Picture) -> None:
    source = load_pairs([{"caption": "a bag", "image": picture()}], captioned=True)
    with pytest.raises(ValueError, match="pairs of them are scored"):
        score_pairs(source, object())  # type: ignore[arg-type]
