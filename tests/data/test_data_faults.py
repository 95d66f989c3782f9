"""Every reader on crafted files with twenty kinds of fault, and ten thousand fuzzed rows: all named, the rest read."""

import json
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tiny import tiny_pipeline

from mmalign.data import InvalidRow, PairSource, encode_pairs, load_pairs, validate_pairs
from mmalign.data.validation import group_by_kind
from mmalign.denoisers import Denoiser, adapter_for

Picture = Callable[..., Image.Image]
Packed = Callable[..., bytes]
# What is changed in a good row, the field that must be named, and a part of the reason.
Fault = tuple[dict[str, Any], str, str]
MAX_PIXELS = 50_000


@pytest.fixture(scope="module")
def denoiser() -> Denoiser:
    return adapter_for(tiny_pipeline("sd"))


@pytest.fixture
def contents(packed: Packed, picture: Picture) -> dict[str, tuple[bytes, str]]:
    """Bytes that are no picture for us, by file name, and why."""
    jpeg, png = packed(picture(64, 64), "JPEG"), packed(picture(64, 64))
    return {
        "cut.jpg": (jpeg[: len(jpeg) // 2], "damaged or truncated"),
        "cut.png": (png[: len(png) // 2], "damaged or truncated"),
        "head.png": (png[:20], "damaged"),
        "text.png": (b"this is no picture", "not an image of a known format"),
        "html.png": (b"<html>404 Not Found</html>", "not an image of a known format"),
        "program.png": (packed(picture(), "EPS"), "not an image of a known format"),
        "huge.png": (packed(Image.new("1", (300, 300))), "300×300 is more than 50000 pixels"),
        "float.tiff": (packed(Image.fromarray(np.zeros((4, 4), dtype=np.float32)), "TIFF"), "floating-point"),
        "signed.tiff": (packed(Image.fromarray(np.full((4, 4), -1, dtype=np.int32)), "TIFF"), "32-bit integer"),
    }


@pytest.fixture
def folder(tmp_path: Path, contents: dict[str, tuple[bytes, str]], packed: Packed, picture: Picture) -> Path:
    """a.png and b.png are good; beside them the bad ones, a link that leads out, and a folder named like a picture."""
    for seed, name in enumerate(("a.png", "b.png")):
        (tmp_path / name).write_bytes(packed(picture(seed=seed)))
    for name, (content, _) in contents.items():
        (tmp_path / name).write_bytes(content)
    outside = tmp_path.parent / f"{tmp_path.name}-secret.png"
    outside.write_bytes(packed(picture()))
    (tmp_path / "link.png").symlink_to(outside)
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "empty.png").touch()
    return tmp_path


@pytest.fixture
def bad_files(contents: dict[str, tuple[bytes, str]]) -> list[tuple[Any, str]]:
    """What can stand where a file's path is expected, and why it cannot be used."""
    named = [(name, reason) for name, (_, reason) in contents.items()]
    return [
        *named,
        ("empty.png", "not an image of a known format"),
        ("none.png", "no such file: 'none.png'"),
        ("folder.png", "no such file"),
        ("link.png", "leads out of the data set's folder"),
        ("../a.png", "leaves the data set's folder"),
        ("/etc/hostname", "leaves the data set's folder"),
        ("C:\\a.png", "leaves the data set's folder"),
        ("https://example.org/a.png", "no such file"),
        ("a" * 5000, "path"),
        ("nul\0.png", "cannot be read"),
        (None, "no image (None)"),
        (7, "got int"),
        (["a.png"], "got list"),
    ]


def _interleaved(good: dict[str, Any], faults: list[Fault]) -> list[dict[str, Any]]:
    """good, good with the first fault, good, good with the second, …, good"""
    rows = [good]
    for change, _, _ in faults:
        rows += [good | change, good]
    return rows


def _check(source: PairSource, faults: list[Fault], good: int, denoiser: Denoiser) -> None:
    """Each fault is named once and nothing else is; the good rows are what is encoded for training."""
    assert len(faults) >= 20
    report = validate_pairs(source, resolution=16, progress=False)
    left = list(report.bad_rows)
    for _, field, reason in faults:
        match = next((bad for bad in left if bad.field == field and reason in bad.reason), None)
        assert match is not None, f"{field}: {reason} is not among {[str(bad) for bad in left]}"
        assert "\n" not in str(match)
        left.remove(match)
    assert not left and len(report.usable) == good
    assert sorted([*report.usable, *(bad.row for bad in report.bad_rows)]) == list(range(len(source)))
    encoded = encode_pairs(source, denoiser, resolution=16, progress=False, latent_mode="mean")
    assert encoded.rows.tolist() == report.usable and encoded.bad_rows == report.bad_rows


def _table_faults(contents: dict[str, tuple[bytes, str]]) -> list[Fault]:
    """Those that a typed table can hold."""
    faults: list[Fault] = [({"jpg_1": content}, "jpg_1", reason) for content, reason in contents.values()]
    return [
        *faults,
        ({"jpg_0": None}, "jpg_0", "no image (None)"),
        ({"jpg_0": b""}, "jpg_0", "no image (no bytes)"),
        ({"caption": None}, "caption", "expected text, got None"),
        ({"label_0": None}, "label_0", "finite number, got None"),
        ({"label_0": math.nan}, "label_0", "finite number, got nan"),
        ({"label_0": math.inf}, "label_0", "finite number, got inf"),
        ({"label_0": 2.0, "label_1": -1.0}, "label_0", "2 lies outside [0, 1]"),
        ({"label_0": -1.0, "label_1": 2.0}, "label_0", "-1 lies outside [0, 1]"),
        ({"label_1": 1.0}, "label_1", "1 + 1, expected 1"),
        ({"label_1": None}, "label_1", "finite number, got None"),
        ({"has_label": False}, "has_label", "never labelled"),
        ({"ps_score_0": None}, "ps_score_0", "finite number, got None"),
        ({"ps_score_1": math.nan}, "ps_score_1", "finite number, got nan"),
    ]


@pytest.fixture
def pickapic(pickapic_rows: Callable[..., list[dict[str, Any]]]) -> dict[str, Any]:
    return pickapic_rows(1)[0] | {"has_label": True, "ps_score_0": 0.2, "ps_score_1": 0.1}


def test_pickapic_in_memory(
    pickapic: dict[str, Any], contents: dict[str, tuple[bytes, str]], denoiser: Denoiser
) -> None:
    faults: list[Fault] = [
        *_table_faults(contents),
        ({"jpg_1": 7}, "jpg_1", "got int"),
        ({"jpg_1": {"bytes": None, "path": None}}, "jpg_1", "no image"),
        ({"jpg_1": "a.png"}, "jpg_1", "pass root="),
        ({"caption": ["x"]}, "caption", "expected text, got list"),
        ({"caption": "half \ud800"}, "caption", "no valid Unicode"),
        ({"label_0": "1"}, "label_0", "got '1'"),
        ({"label_0": 10**400}, "label_0", "more than 18 digits"),
        ({"has_label": "false"}, "has_label", "expected true or false, got 'false'"),
        ({"user_id": {"name": "x"}}, "user_id", "expected text or a number, got dict"),
    ]
    rows = _interleaved(pickapic, faults)
    _check(load_pairs(rows, max_pixels=MAX_PIXELS), faults, len(faults) + 1, denoiser)


@pytest.mark.parametrize("reader", ["parquet", "Dataset", "Dataset of pictures"])
def test_pickapic_in_tables(
    reader: str, tmp_path: Path, pickapic: dict[str, Any], contents: dict[str, tuple[bytes, str]], denoiser: Denoiser
) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq
    from datasets import Dataset
    from datasets import Image as Picture

    faults = _table_faults(contents)
    rows = _interleaved(pickapic, faults)
    source: Any = tmp_path / "pairs.parquet"
    if reader == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), source, row_group_size=7)
    else:
        source = Dataset.from_list(rows)
        if reader == "Dataset of pictures":
            source = source.cast_column("jpg_0", Picture()).cast_column("jpg_1", Picture())
            # There an empty picture and none are the same.
            faults = [fault for fault in faults if "no image" not in fault[2]]
            faults += [({}, "jpg_0", "no image")] * 2
    _check(load_pairs(source, max_pixels=MAX_PIXELS), faults, len(_table_faults(contents)) + 1, denoiser)


def test_metadata_jsonl(folder: Path, bad_files: list[tuple[Any, str]], denoiser: Denoiser) -> None:
    good = {"prompt": "x", "chosen": "a.png", "rejected": "b.png"}
    faults: list[Fault] = [({"rejected": value}, "rejected", reason) for value, reason in bad_files[:-1]]
    faults += [
        ({"rejected": ["a.png"]}, "rejected", "got list (a clip, which only video models read)"),
        ({"rejected": "a.png"}, "rejected", "the same file as chosen"),
        ({"prompt": 3}, "prompt", "expected text, got 3"),
        ({"chosen_score": 1.0}, "rejected_score", "finite number, got None"),
        ({"chosen_score": "high", "rejected_score": 1}, "chosen_score", "got 'high'"),
        ({"confidence": 0.2}, "confidence", "expected 0.5 … 1"),
    ]
    lines = [json.dumps(row) for row in _interleaved(good, faults)]
    broken = ['{"prompt": "x"', "[1, 2]", "null", '{"label": ' + "9" * 5000 + "}", "[" * 100_000, '"text"']
    place = len(lines)
    faults += [({}, "metadata.jsonl", f"line {place + at + 1} is not") for at in range(len(broken))]
    (folder / "metadata.jsonl").write_text("\n".join([*lines, *broken, lines[0]]), encoding="utf-8")
    _check(load_pairs(folder, max_pixels=MAX_PIXELS), faults, len(faults) - len(broken) + 2, denoiser)


VOTES: list[tuple[Any, str]] = [
    (None, "one number for each of two pictures, got None"),
    ([1], "got 1 of them"),
    ([1, 0, 0], "got 3 of them"),
    ([0, 0], "at least one vote"),
    ([2, -1], "counts from 0 up"),
]


def test_hpdv2_pairs(folder: Path, bad_files: list[tuple[Any, str]], denoiser: Denoiser) -> None:
    good = {"prompt": "x", "file_path": ["a.png", "b.png"], "human_preference": [1, 0]}
    faults: list[Fault] = [({"file_path": ["a.png", value]}, "file_path[1]", reason) for value, reason in bad_files]
    faults += [({"human_preference": value}, "human_preference", reason) for value, reason in VOTES]
    faults += [
        ({"human_preference": [1, "0"]}, "human_preference[1]", "got '0'"),
        ({"file_path": ["a.png"]}, "file_path", "a list of two pictures, got 1"),
        ({"file_path": "a.png"}, "file_path", "a list of two pictures, got 'a.png'"),
        ({"prompt": None}, "prompt", "expected text"),
    ]
    (folder / "train.json").write_text(json.dumps(_interleaved(good, faults)))
    _check(load_pairs(folder / "train.json", max_pixels=MAX_PIXELS), faults, len(faults) + 1, denoiser)


def test_hpdv3(folder: Path, bad_files: list[tuple[Any, str]], denoiser: Denoiser) -> None:
    good = {"prompt": "x", "path1": "a.png", "path2": "b.png", "confidence": 0.9}
    faults: list[Fault] = [({"path1": value}, "path1", reason) for value, reason in bad_files]
    faults += [({"confidence": value}, "confidence", "") for value in ("high", 0.4, 1.5, math.nan, [1, 2])]
    faults += [({"prompt": {}}, "prompt", "got dict"), ({"path1": "b.png"}, "path2", "the same file as path1")]
    rows = [*_interleaved(good, faults), 5]
    faults.append(({}, "train.json", f"item {len(rows) - 1} is not a JSON object"))
    (folder / "train.json").write_text(json.dumps(rows))
    _check(load_pairs(folder / "train.json", max_pixels=MAX_PIXELS), faults, len(faults), denoiser)


@pytest.mark.parametrize(("pictures", "ranks"), [("image_path", "rank"), ("generations", "ranking")])
def test_rankings(
    pictures: str, ranks: str, folder: Path, bad_files: list[tuple[Any, str]], denoiser: Denoiser
) -> None:
    good = {"prompt": "x", pictures: ["a.png", "b.png"], ranks: [1, 2]}
    # Rankings of two, so that every one is one row, good or bad, and the i-th fault stands in row 2i + 1.
    changes: list[Fault] = [({pictures: [value, "b.png"]}, f"{pictures}[0]", reason) for value, reason in bad_files]
    changes += [
        ({pictures: None}, pictures, "expected a list, got None"),
        ({pictures: ["a.png"], ranks: [1]}, pictures, "a comparison needs two"),
        ({ranks: 1}, ranks, "expected a list, got 1"),
        ({ranks: [1, 2, 3]}, ranks, "3 ranks for 2 pictures"),
        ({ranks: [1, None]}, f"{ranks}[1]", "finite number, got None"),
        ({ranks: ["1", "2"]}, f"{ranks}[0]", "got '1'"),
        ({ranks: [math.nan, 2]}, f"{ranks}[0]", "got nan"),
        ({"prompt": None}, "prompt", "expected text"),
    ]
    rows = _interleaved(good, changes)
    faults = [(change, f"{field} of row {2 * at + 1}", reason) for at, (change, field, reason) in enumerate(changes)]
    faults.append(({}, f"test.json of row {len(rows)}", f"item {len(rows)} is not a JSON object"))
    (folder / "test.json").write_text(json.dumps([*rows, "x"]))
    _check(load_pairs(folder / "test.json", max_pixels=MAX_PIXELS), faults, len(changes) + 1, denoiser)


def test_image_reward_db(
    contents: dict[str, tuple[bytes, str]], packed: Packed, picture: Picture, denoiser: Denoiser
) -> None:
    good = packed(picture())
    kinds: list[Fault] = [({"image": content}, "image", reason) for content, reason in contents.values()]
    kinds += [({"image": value}, "image", "") for value in (None, b"", 7, "a.png", [])]
    kinds += [({"rank": value}, "rank", "finite number") for value in (None, "1", math.nan, [])]
    kinds += [({"prompt_id": value}, "prompt_id", "expected text or a whole number") for value in (None, 1.5)]
    kinds += [({"prompt": None}, "prompt", "expected text"), ({"overall_rating": None}, "overall_rating", "finite")]
    rows: list[dict[str, Any]] = []
    faults: list[Fault] = []
    for at, (change, field, reason) in enumerate(kinds):
        pair = [{"image": good, "prompt_id": at, "prompt": "x", "rank": rank, "overall_rating": 1} for rank in (1, 2)]
        rows += [pair[0], pair[1] | change]
        # The ratings are read with the pair; a picture, or a row without a rank, is named by its own row.
        faults.append(({}, field if field == "overall_rating" else f"{field} of row {2 * at + 1}", reason))
        if field in ("rank", "prompt_id", "prompt"):
            faults.append(({}, f"prompt_id of row {2 * at}", "the only usable picture"))
    three = [
        {"image": good, "prompt_id": "good", "prompt": "x", "rank": rank, "overall_rating": 1} for rank in (1, 2, 2)
    ]
    _check(load_pairs([*rows, *three], max_pixels=MAX_PIXELS), faults, 3, denoiser)


def test_trl_messages(
    contents: dict[str, tuple[bytes, str]], packed: Packed, picture: Picture, denoiser: Denoiser
) -> None:
    def answer(*parts: Any) -> list[dict[str, Any]]:
        return [{"role": "assistant", "content": list(parts)}]

    hole, user = {"type": "image"}, {"role": "user", "content": "x"}
    pictures = [packed(picture()), packed(picture(seed=1))]
    good = {"prompt": [user], "chosen": answer(hole), "rejected": answer(hole), "images": pictures}
    faults: list[Fault] = [
        ({"images": [pictures[0], content]}, "rejected", reason) for content, reason in contents.values()
    ]
    faults += [
        ({"images": pictures[:1]}, "images", "2 image placeholders but 1 images"),
        ({"images": [*pictures, pictures[0]]}, "images", "2 image placeholders but 3 images"),
        ({"images": None}, "images", "2 image placeholders but 0 images"),
        ({"chosen": answer({"type": "image", "image": pictures[0]})}, "images", "1 image placeholders but 2 images"),
        ({"images": [None, pictures[1]]}, "chosen", "no image"),
        ({"images": ["a.png", pictures[1]]}, "chosen", "pass root="),
        ({"prompt": []}, "prompt", "one message of role 'user', got 0 (none)"),
        ({"prompt": [user, user]}, "prompt", "got 2 ('user', 'user')"),
        ({"prompt": ["x"]}, "prompt", "got 1 ('x')"),
        ({"prompt": [{"role": "system", "content": "x"}]}, "prompt", "got 1 ('system')"),
        ({"prompt": [{"role": "user"}]}, "prompt", "content is None"),
        ({"prompt": [{"role": "user", "content": [hole]}]}, "prompt", "a part of type 'image'"),
        ({"prompt": [{"role": "user", "content": [{"type": "text"}]}]}, "prompt", "only text prompts"),
        ({"chosen": []}, "chosen", "one message of role 'assistant', got 0"),
        ({"chosen": [user]}, "chosen", "got 1 ('user')"),
        ({"chosen": answer()}, "chosen", "one part of type 'image', got 0"),
        ({"chosen": answer(hole, hole)}, "chosen", "one part of type 'image', got 2"),
        ({"chosen": answer({"type": "text", "text": "no"})}, "chosen", "got 1 ('text')"),
        ({"chosen": [{"role": "assistant", "content": "a cat"}]}, "chosen", "content is 'a cat'"),
        ({"rejected": "a cat", "images": pictures[:1]}, "rejected", "pass root="),
    ]
    _check(load_pairs(_interleaved(good, faults), max_pixels=MAX_PIXELS), faults, len(faults) + 1, denoiser)


def test_named_files(
    tmp_path: Path, contents: dict[str, tuple[bytes, str]], packed: Packed, picture: Picture, denoiser: Denoiser
) -> None:
    png = [packed(picture()), packed(picture(seed=1))]
    outside = tmp_path / "outside"
    outside.write_bytes(png[0])
    faults: list[Fault] = []
    folder = tmp_path / "set"
    folder.mkdir()

    def put(
        key: str, chosen: bytes | None = png[0], rejected: bytes | None = png[1], text: bytes | None = b"x"
    ) -> None:
        for name, content in ((f"{key}_chosen.png", chosen), (f"{key}_rejected.png", rejected), (f"{key}.txt", text)):
            if content is not None:
                (folder / name).write_bytes(content)

    for number, (content, reason) in enumerate(contents.values()):
        put(f"good{number}")
        put(f"chosen{number}", chosen=content)
        faults.append(({}, "chosen", f"{reason}"))
        put(f"rejected{number}", rejected=content)
        faults.append(({}, "rejected", f"{reason}"))
    for name, changed, field, reason in (
        ("no chosen", {"chosen": None}, "chosen", "expected one chosen file for 'no chosen', found none"),
        ("no rejected", {"rejected": None}, "rejected", "found none"),
        ("no text", {"text": None}, "prompt", "expected one prompt file for 'no text', found none"),
        ("text alone", {"chosen": None, "rejected": None}, "chosen", "'text alone', found none"),
        ("latin", {"text": "é".encode("latin-1")}, "prompt", "'latin.txt' is not UTF-8"),
        ("empty", {"chosen": b""}, "chosen", "not an image"),
    ):
        put(name, **changed)
        faults.append(({}, field, reason))
    for key in ("two", "link", "dangling"):
        put(key, chosen=None if key != "two" else png[0])
    (folder / "two-chosen.jpg").write_bytes(png[0])
    (folder / "link_chosen.png").symlink_to(outside)
    (folder / "dangling_chosen.png").symlink_to(folder / "nowhere.png")
    faults += [({}, "chosen", "found 'two-chosen.jpg', 'two_chosen.png'"), ({}, "chosen", "leads out")]
    faults.append(({}, "chosen", "no such file: 'dangling_chosen.png'"))
    source = load_pairs(folder, max_pixels=MAX_PIXELS)
    _check(source, faults, len(contents), denoiser)
    # A row number alone would not say which of the files it is.
    damaged = [bad for bad in validate_pairs(source, resolution=16, progress=False).bad_rows if "damaged" in bad.reason]
    assert all(f"_{bad.field}.png'" in bad.reason for bad in damaged)


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
