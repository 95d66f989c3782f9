"""Every reader on crafted files with twenty kinds of fault, and ten thousand fuzzed rows: all named, the rest read."""

import json
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from data import faults
from data.faults import LAYOUTS, MAX_PIXELS, Row
from PIL import Image
from tiny import tiny_pipeline

from mmalign.data import EncodedPairs, InvalidRow, PairRecord, encode_pairs, load_pairs, validate_pairs
from mmalign.data.validation import group_by_kind
from mmalign.denoisers import Denoiser, adapter_for

Packed = Callable[..., bytes]
ENCODE: dict[str, Any] = {"resolution": 16, "progress": False, "latent_mode": "mean", "batch_size": 64}


@pytest.fixture(scope="module")
def denoiser() -> Denoiser:
    return adapter_for(tiny_pipeline("sd"))


@pytest.fixture(scope="module")
def clean(denoiser: Denoiser, tmp_path_factory: pytest.TempPathFactory) -> tuple[EncodedPairs, dict[str, int]]:
    """Every good row of any layout, encoded from a source without faults, and the place of each prompt's row."""
    rows = [faults.clean(number) for number in range(110)] + [faults.clean(0) | {"prompt": "last"}]
    encoded = encode_pairs(load_pairs(rows), denoiser, cache_dir=tmp_path_factory.mktemp("clean"), **ENCODE)
    return encoded, {row["prompt"]: place for place, row in enumerate(rows)}


def _is(record: PairRecord, expected: Row) -> bool:
    sides = ((record.image_0, expected["chosen"]), (record.image_1, expected["rejected"]))
    scores = {name: value for name, value in expected.items() if isinstance(value, tuple)}
    same = all(np.array_equal(np.asarray(one), np.asarray(other)) for one, other in sides)
    return same and (record.prompt, record.label, record.scores) == (expected["prompt"], 1.0, scores)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_fault_is_named_once_and_costs_its_own_row_only(
    layout: str, tmp_path: Path, denoiser: Denoiser, clean: tuple[EncodedPairs, dict[str, int]]
) -> None:
    made, named, expected = LAYOUTS[layout](tmp_path)
    source = load_pairs(made, max_pixels=MAX_PIXELS)
    assert len(named) >= 20
    report = validate_pairs(source, resolution=16, progress=False)
    left = list(report.bad_rows)
    for _, field, reason in named:
        match = next((bad for bad in left if bad.field == field and reason in bad.reason), None)
        assert match is not None, f"{field}: {reason} is not among {[str(bad) for bad in left]}"
        assert "\n" not in str(match)
        left.remove(match)
    assert not left
    assert sorted([*report.usable, *(bad.row for bad in report.bad_rows)]) == list(range(len(source)))
    # What is read is what is right, and what is kept for training is what a source without any fault gives: no half pair.
    assert len(report.usable) == len(expected)
    for row, pair in zip(report.usable, expected, strict=True):
        assert _is(source[row], pair), f"row {row} is not {pair}"
    encoded = encode_pairs(source, denoiser, cache_dir=tmp_path / "cache", **ENCODE)
    assert encoded.rows.tolist() == report.usable and encoded.bad_rows == report.bad_rows
    assert [encoded.prompts[at] for at in encoded.prompt_index] == [pair["prompt"] for pair in expected]
    places, everything = torch.tensor([clean[1][pair["prompt"]] for pair in expected]), torch.arange(len(expected))
    torch.testing.assert_close(encoded.latents(everything), clean[0].latents(places), rtol=1e-4, atol=1e-5)
    for side in (0, 1):
        assert torch.equal(encoded.sizes(everything, side), clean[0].sizes(places, side))


def test_a_file_s_fault_names_the_file(tmp_path: Path) -> None:
    """A row number alone would not say which of the files it is."""
    source = load_pairs(LAYOUTS["named files"](tmp_path)[0], max_pixels=MAX_PIXELS)
    damaged = [bad for bad in validate_pairs(source, resolution=16, progress=False).bad_rows if "damaged" in bad.reason]
    assert len(damaged) > 10 and all(f"_{bad.field}.png'" in bad.reason for bad in damaged)


def _strange(rng: random.Random, png: bytes) -> Any:
    """A value that somebody's export may hold."""
    cut = rng.randrange(len(png))
    flipped = bytearray(png)
    flipped[cut] ^= 1 << rng.randrange(8)
    deep: Any = "x"
    for _ in range(rng.randrange(5)):
        deep = [deep] if rng.random() < 0.5 else {"bytes": deep, "type": "image", "role": "user", "content": deep}
    choices = (
        *(None, "", "x", "\ud800", "a" * 5000, "../a.png", "nul\0", "1", "false", True, 0, 1, -1, 0.5, 2, 10**400),
        *(
            math.nan,
            math.inf,
            1e308,
            b"",
            b"\x89PNG\r\n\x1a\n",
            png[:cut],
            bytes(flipped),
            png,
            {},
            [],
            [[]],
            (),
            set(),
        ),
        *(
            [1, 0],
            [0.5, 0.5],
            [1e308, 1e308],
            ["x", 1],
            [png, png],
            [None, None],
            [png],
            {"bytes": None},
            {"bytes": png},
        ),
        *(
            {"path": "../x"},
            {"bytes": 7, "path": 7},
            object,
            deep,
            [{"role": "assistant", "content": [{"type": "image"}]}],
        ),
    )
    return rng.choice(choices)


def _good_rows(png: tuple[bytes, bytes], number: int) -> list[dict[str, Any]]:
    """A good row of every form."""
    zero, one = png
    parts = [[{"role": "assistant", "content": [{"type": "image"}]}]] * 2
    return [
        {"caption": "x", "jpg_0": zero, "jpg_1": one, "label_0": 1, "label_1": 0, "has_label": True, "user_id": 3},
        {"prompt": "x", "chosen": zero, "rejected": one, "chosen_score": 1, "rejected_score": 0, "confidence": None},
        {"prompt": [{"role": "user", "content": "x"}], "chosen": parts[0], "rejected": parts[1], "images": [zero, one]},
        {"prompt": "x", "file_path": [zero, one], "human_preference": [1, 0]},
        {"prompt": "x", "path1": zero, "path2": one, "confidence": 0.9},
        {"prompt": "x", "image_path": [zero, one], "rank": [1, 2]},
        {"prompt": "x", "generations": [zero, one], "ranking": [1, 2]},
        {"prompt": "x", "prompt_id": number // 2, "image": zero if number % 2 == 0 else one, "rank": number % 2},
    ]


@pytest.mark.parametrize("form", range(8))
def test_fuzzed_rows_are_read_whole_or_named(form: int, packed: Packed) -> None:
    """1250 rows of each of eight forms, a third of them untouched. Every picture tells by its colour whose side it is."""
    rng = random.Random(form)
    rows, untouched = [], []
    for number in range(1250):
        # Red and green tell the row, blue the side.
        owner = number - number % 2 if form == 7 else number
        colours = [(owner >> 8, owner & 255, 100 + side) for side in (0, 1)]
        png = (packed(Image.new("RGB", (2, 2), colours[0])), packed(Image.new("RGB", (2, 2), colours[1])))
        row = _good_rows(png, number)[form]
        fields = rng.sample(sorted(row), rng.choice((0, 1, 2)))
        for field in fields:
            if rng.random() < 0.2:
                del row[field]
            else:
                row[field] = _strange(rng, png[0])
        rows.append(row)
        untouched.append(not fields)
    # All columns in one row, so that the form is recognised whatever was deleted.
    source = load_pairs([*rows, _good_rows((b"", b""), -1)[form]])
    assert len(source.prompts()) == len(source) and source.fingerprint
    read, named = 0, []
    for row in range(len(source)):
        try:
            record = source[row]
        except InvalidRow as error:
            named.append(error.bad_row)
            assert error.bad_row.row == row and error.bad_row.field and error.bad_row.reason
            assert "\n" not in str(error.bad_row)
            continue
        read += 1
        assert isinstance(record.prompt, str) and 0 <= record.label <= 1 and record.row == row
        corners = [image.getpixel((0, 0)) for image in (record.image_0, record.image_1)]
        assert all(image.mode == "RGB" and image.size == (2, 2) for image in (record.image_0, record.image_1))
        # Only where rows are grouped by a fuzzed prompt_id may pictures of two rows meet.
        assert form == 7 or corners[0][:2] == corners[1][:2]
        if form < 5 and untouched[row]:
            assert corners == [(row >> 8, row & 255, 100), (row >> 8, row & 255, 101)]
    assert read >= (sum(untouched) if form < 7 else 100) and len(named) > 100 and read + len(named) == len(source)
    assert sum(len(problem.rows) for problem in group_by_kind(named)) == len(named)


def test_fuzzed_lines_of_metadata_jsonl(tmp_path: Path, packed: Packed) -> None:
    """1000 lines, most with characters changed, dropped or doubled: as many rows as lines that are not blank."""
    rng = random.Random(0)
    for side in (0, 1):
        (tmp_path / f"{side}.png").write_bytes(packed(Image.new("RGB", (2, 2), (0, 0, side))))
    good = json.dumps(
        {"prompt": "a cat", "chosen": "0.png", "rejected": "1.png", "chosen_votes": 3, "rejected_votes": 1}
    )
    lines = [good]
    for _ in range(999):
        text = list(good)
        for _ in range(rng.choice((0, 1, 1, 2, 8))):
            at = rng.randrange(len(text))
            text[at : at + rng.randrange(2)] = rng.choice(
                ('"', "{", "}", "9" * 5000, "\\", "\x00", "é", "", "e999", "[" * 2000)
            )
        lines.append("".join(text))
    (tmp_path / "metadata.jsonl").write_text("\n".join(lines), encoding="utf-8")
    source = load_pairs(tmp_path)
    report = validate_pairs(source, resolution=2, progress=False)
    assert len(source) == 1000 and len(report.usable) + len(report.bad_rows) == 1000 and source.fingerprint
    assert all(row in report.usable for row, line in enumerate(lines) if line == good) and len(report.bad_rows) > 300
