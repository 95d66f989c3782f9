"""Preference data in every layout, with faults between good rows: for each a source, what is wrong with it, and what is right.

`LAYOUTS[name](folder)` writes the data and returns (what load_pairs is given, the faults, the good rows as plain pairs). The pictures
of the good rows are of every odd kind that can be used, so that leaving out what is bad costs nothing that is good.
"""

import io
import json
import math
import struct
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mmalign.data import BadRow, PairSource, validate_pairs

Row = dict[str, Any]
# What is changed in a good row, the field that must be named, and a part of the reason.
Fault = tuple[Row, str, str]
Made = tuple[Any, list[Fault], list[Row]]
MAX_PIXELS = 50_000


def bad_rows(source: PairSource) -> list[BadRow]:
    """What of a source no training can use."""
    return validate_pairs(source, resolution=1, progress=False).bad_rows


# Pictures.


def packed(image: Image.Image, format: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def picture(number: int, side: int) -> bytes:
    """The stored picture of one side of good row `number`; no two are the same, and their kinds take turns."""
    plain = seen(number, side)
    kind = _kind(number, side)
    if kind == "animated":
        frames = [Image.new("P", plain.size, index) for index in (0, 1)]
        for frame in frames:
            frame.putpalette([*plain.getpixel((0, 0)), 9, 9, 9])  # type: ignore[misc]
        return packed(frames[0], "GIF", save_all=True, append_images=frames[1:])
    if kind == "16 bit":
        return packed(Image.fromarray(np.asarray(plain)[..., 0].astype(np.uint16) * 257))
    if kind == "cmyk":
        return packed(plain.convert("CMYK"), "TIFF")
    if kind == "turned":
        exif = Image.Exif()
        exif[0x0112] = 6
        return packed(plain.transpose(Image.Transpose.ROTATE_90), exif=exif.tobytes())
    if kind == "transparent":
        layer = plain.convert("RGBA")
        layer.paste((1, 2, 3, 0), (0, 0, 1, 1))
        return packed(layer)
    return packed(plain)


def seen(number: int, side: int) -> Image.Image:
    """What must be read from `picture(number, side)`."""
    kind = _kind(number, side)
    grey = kind == "16 bit"
    colour = (number, number if grey else 20, number if grey else 10 + side)
    image = Image.new("RGB", (1, 1) if kind == "one pixel" else (6, 4 + side), colour)
    if kind == "turned":
        image.paste((255, 0, 0), (0, 0, 3, 2))
    if kind == "transparent":
        image.paste((255, 255, 255), (0, 0, 1, 1))
    return image


def _kind(number: int, side: int) -> str:
    kinds = ("plain", "animated", "16 bit", "cmyk", "turned", "one pixel", "transparent")
    return kinds[(2 * number + side) % len(kinds)]


def _png_of_size(width: int, height: int) -> bytes:
    """A PNG whose header promises that many pixels."""
    small = packed(Image.new("1", (8, 8)))
    header = b"IHDR" + struct.pack(">II", width, height) + small[24:29]
    return small[:12] + header + struct.pack(">I", zlib.crc32(header)) + small[33:]


def contents() -> dict[str, tuple[bytes, str]]:
    """Bytes that are no picture for us, by file name, and why."""
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    jpeg, png = packed(noise, "JPEG"), packed(noise)
    return {
        "cut.jpg": (jpeg[: len(jpeg) // 2], "damaged or truncated"),
        "cut.png": (png[: len(png) // 2], "damaged or truncated"),
        "head.png": (png[:20], "Truncated File Read"),
        "text.png": (b"this is no picture", "not an image of a known format"),
        "html.png": (b"<html>404 Not Found</html>", "not an image of a known format"),
        "program.png": (packed(noise, "EPS"), "not an image of a known format"),
        "no width.png": (_png_of_size(0, 8), "not an image of a known format"),
        "huge.png": (packed(Image.new("1", (300, 300))), "300×300 is more than 50000 pixels"),
        "bomb.png": (_png_of_size(20_000, 20_000), "decompression bomb"),
        "float.tiff": (packed(Image.fromarray(np.zeros((4, 4), dtype=np.float32)), "TIFF"), "floating-point"),
        "signed.tiff": (packed(Image.fromarray(np.full((4, 4), -1, dtype=np.int32)), "TIFF"), "32-bit integer"),
    }


# What several layouts share.


def clean(number: int, **more: Any) -> Row:
    """Good row `number` in the simplest layout, which every other one must equal."""
    return {"prompt": f"row {number}", "chosen": seen(number, 0), "rejected": seen(number, 1), **more}


def interleaved(good: Callable[[int], Row], faults: list[Fault]) -> tuple[list[Row], list[Row]]:
    """Good, good with the first fault, good, good with the second, …, good: the rows, and those left as plain pairs."""
    rows = [good(0)]
    for at, (change, _, _) in enumerate(faults):
        rows += [good(2 * at + 1) | change, good(2 * at + 2)]
    return rows, [clean(number) for number in range(0, len(rows), 2)]


def write_pictures(folder: Path, rows: int) -> None:
    """<n>-0.img and <n>-1.img of that many rows; beside them bad files, a link that leads out, and a folder named like a picture."""
    for number in range(rows):
        for side in (0, 1):
            (folder / f"{number}-{side}.img").write_bytes(picture(number, side))
    for name, (content, _) in contents().items():
        (folder / name).write_bytes(content)
    outside = folder.parent / f"{folder.name}-secret.png"
    outside.write_bytes(picture(0, 0))
    (folder / "link.png").symlink_to(outside)
    (folder / "folder.png").mkdir()
    (folder / "empty.png").touch()


def bad_paths() -> list[tuple[Any, str]]:
    """What can stand in a column of paths, and why it cannot be used."""
    return [
        *((name, reason) for name, (_, reason) in contents().items()),
        ("empty.png", "not an image of a known format"),
        ("none.png", "no such file: 'none.png'"),
        ("folder.png", "no such file"),
        ("link.png", "leads out of the data set's folder"),
        ("../0-0.img", "leaves the data set's folder"),
        ("/etc/hostname", "leaves the data set's folder"),
        ("C:\\a.png", "leaves the data set's folder"),
        ("https://example.org/a.png", "no such file"),
        ("a" * 5000, "path"),
        ("nul\0.png", "cannot be read"),
        (None, "no image (None)"),
    ]


def faults_of(field: str, values: list[tuple[Any, str]]) -> list[Fault]:
    """The same column at fault with one value after another."""
    return [({field: value}, field, reason) for value, reason in values]


def faults_of_numbers() -> list[Fault]:
    """Those of (prompt, chosen, rejected) with scores, confidence and votes that a typed table can hold."""
    return [
        ({"prompt": None}, "prompt", "expected text, got None"),
        ({"chosen_score": math.inf, "rejected_score": 1.0}, "chosen_score", "finite number, got inf"),
        ({"confidence": 0.2}, "confidence", "expected 0.5 … 1"),
        ({"confidence": 1.5}, "confidence", "expected 0.5 … 1"),
        ({"confidence": math.inf}, "confidence", "finite number, got inf"),
        ({"chosen_votes": 5.0, "rejected_votes": -1.0}, "chosen_votes", "counts from 0 up"),
        ({"chosen_votes": 0.0, "rejected_votes": 0.0}, "chosen_votes", "at least one vote"),
        ({"chosen_votes": 1.0, "rejected_votes": 2.0}, "rejected_votes", "expected 0.5 … 1"),
        ({"chosen_votes": 1.0}, "rejected_votes", "finite number, got None"),
        ({"chosen_votes": 2.0, "rejected_votes": 1.0, "confidence": 0.9}, "confidence", "keep one of the two"),
    ]


def in_files(number: int) -> Row:
    return {"prompt": f"row {number}", "chosen": f"{number}-0.img", "rejected": f"{number}-1.img"}


def faults_of_paths() -> list[Fault]:
    same: list[Fault] = [
        ({"chosen": "0-0.img", "rejected": "0-0.img"}, "rejected", "the same file as chosen"),
        ({"chosen": "0-0.img", "rejected": "./0-0.img"}, "rejected", "the same picture as chosen"),
    ]
    return faults_of("rejected", bad_paths()) + same + faults_of_numbers()


def faults_of_json() -> list[Fault]:
    """Those that only a file without types can hold as well."""
    return [
        ({"rejected": 7}, "rejected", "got int"),
        ({"rejected": ["0-0.img"]}, "rejected", "got list (a clip, which only video models read)"),
        ({"rejected": {"src": "0-0.img"}}, "rejected", "no image"),
        ({"prompt": 3}, "prompt", "expected text, got 3"),
        ({"prompt": "half \ud800"}, "prompt", "no valid Unicode"),
        ({"chosen_score": "high", "rejected_score": 1}, "chosen_score", "got 'high'"),
        ({"user_id": {"name": "x"}}, "user_id", "expected text or a number, got dict"),
    ]


# The layouts.


def json_list(folder: Path) -> Made:
    faults = [*faults_of_paths(), *faults_of_json()]
    rows, good = interleaved(in_files, faults)
    write_pictures(folder, len(rows))
    items = [*rows, None, "text", [1]]
    faults += [({}, "pairs.json", f"item {len(rows) + at} is not a JSON object") for at in range(3)]
    (folder / "pairs.json").write_text(json.dumps(items))
    return folder / "pairs.json", faults, good


def json_lines(folder: Path, name: str = "pairs.jsonl") -> Made:
    faults = [*faults_of_paths(), *faults_of_json()]
    rows, good = interleaved(in_files, faults)
    write_pictures(folder, len(rows))
    broken = ['{"prompt": "x"', "[1, 2]", "null", '{"label": ' + "9" * 5000 + "}", "[" * 100_000, '"text"']
    faults += [({}, name, f"line {len(rows) + at + 1} is not") for at in range(len(broken))]
    lines = [*map(json.dumps, rows), *broken, "", json.dumps(in_files(0) | {"prompt": "last"})]
    (folder / name).write_text("\n".join(lines), encoding="utf-8")
    return folder / name, faults, [*good, clean(0) | {"prompt": "last"}]


def metadata_jsonl(folder: Path) -> Made:
    _, faults, good = json_lines(folder, "metadata.jsonl")
    return folder, faults, good


def parquet_of_paths(folder: Path) -> Made:
    import pyarrow as pa
    import pyarrow.parquet as pq

    faults = faults_of_paths()
    rows, good = interleaved(in_files, faults)
    write_pictures(folder, len(rows))
    pq.write_table(_table(pa, rows), folder / "pairs.parquet", row_group_size=5)
    return folder / "pairs.parquet", faults, good


def _pickapic(number: int) -> Row:
    pictures = {"jpg_0": picture(number, 0), "jpg_1": picture(number, 1)}
    scores = {"ps_score_0": 0.2, "ps_score_1": 0.1}
    return {"caption": f"row {number}", "label_0": 1.0, "label_1": 0.0, "has_label": True, **pictures, **scores}


def _faults_of_tables() -> list[Fault]:
    """Those of Pick-a-Pic's columns that a typed table can hold."""
    same = picture(0, 0)
    return [
        *[({"jpg_1": content}, "jpg_1", reason) for content, reason in contents().values()],
        ({"jpg_0": None}, "jpg_0", "no image (None)"),
        ({"jpg_0": b""}, "jpg_0", "no image (no bytes)"),
        ({"jpg_0": same, "jpg_1": same}, "jpg_1", "the same picture as jpg_0"),
        ({"caption": None}, "caption", "expected text, got None"),
        ({"label_0": None}, "label_0", "finite number, got None"),
        ({"label_0": math.nan}, "label_0", "finite number, got nan"),
        ({"label_0": math.inf}, "label_0", "finite number, got inf"),
        ({"label_0": 2.0, "label_1": -1.0}, "label_0", "2 lies outside [0, 1]"),
        ({"label_0": -1.0, "label_1": 2.0}, "label_0", "-1 lies outside [0, 1]"),
        ({"label_1": 1.0}, "label_1", "1 + 1, expected 1"),
        ({"has_label": False}, "has_label", "never labelled"),
        ({"ps_score_0": math.inf}, "ps_score_0", "finite number, got inf"),
    ]


def _scored(good: list[Row]) -> list[Row]:
    return [row | {"ps_score": (0.2, 0.1)} for row in good]


def in_memory(folder: Path) -> Made:
    faults: list[Fault] = [
        *_faults_of_tables(),
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
    rows, good = interleaved(_pickapic, faults)
    return rows, faults, _scored(good)


def parquet_of_bytes(folder: Path) -> Made:
    import pyarrow as pa
    import pyarrow.parquet as pq

    faults = _faults_of_tables()
    rows, good = interleaved(_pickapic, faults)
    pq.write_table(pa.Table.from_pylist(rows), folder / "pairs.parquet", row_group_size=7)
    return folder / "pairs.parquet", faults, _scored(good)


def dataset(folder: Path) -> Made:
    from datasets import Dataset

    faults = _faults_of_tables()
    rows, good = interleaved(_pickapic, faults)
    return Dataset.from_list(rows), faults, _scored(good)


def dataset_of_pictures(folder: Path) -> Made:
    from datasets import Image as Picture

    made, faults, good = dataset(folder)
    # There an empty picture and none are the same.
    faults = [(change, field, "no image" if "no image" in reason else reason) for change, field, reason in faults]
    return made.cast_column("jpg_0", Picture()).cast_column("jpg_1", Picture()), faults, good


def saved_dataset(folder: Path) -> Made:
    from datasets import DatasetDict

    made, faults, good = dataset_of_pictures(folder)
    DatasetDict({"train": made, "test": made.select([0])}).save_to_disk(folder / "saved")
    return folder / "saved", faults, good


def hpdv2(folder: Path) -> Made:
    def good(number: int) -> Row:
        paths = [f"{number}-0.img", f"{number}-1.img"]
        return {"prompt": f"row {number}", "file_path": paths, "human_preference": [1, 0]}

    faults: list[Fault] = [({"file_path": ["0-0.img", value]}, "file_path[1]", reason) for value, reason in bad_paths()]
    faults += faults_of(
        "human_preference",
        [
            (None, "one number for each of two pictures, got None"),
            ([1], "got 1 of them"),
            ([1, 0, 0], "got 3 of them"),
            ([0, 0], "at least one vote"),
            ([2, -1], "counts from 0 up"),
        ],
    )
    faults += [
        ({"human_preference": [1, "0"]}, "human_preference[1]", "got '0'"),
        ({"file_path": ["0-0.img"]}, "file_path", "a list of two pictures, got 1"),
        ({"file_path": "0-0.img"}, "file_path", "a list of two pictures, got '0-0.img'"),
        ({"file_path": ["0-0.img"] * 2}, "file_path[1]", "the same file as file_path[0]"),
        ({"prompt": None}, "prompt", "expected text"),
    ]
    rows, kept = interleaved(good, faults)
    write_pictures(folder, len(rows))
    (folder / "train.json").write_text(json.dumps(rows))
    return folder / "train.json", faults, kept


def hpdv3(folder: Path) -> Made:
    def good(number: int) -> Row:
        return {"prompt": f"row {number}", "path1": f"{number}-0.img", "path2": f"{number}-1.img", "confidence": 1}

    faults = faults_of("path1", [*bad_paths(), (["0-0.img"], "got list")])
    faults += faults_of(
        "confidence", [("high", "got 'high'"), (0.4, "0.5 … 1"), (1.5, "0.5 … 1"), ([1, 2], "got list")]
    )
    faults += [({"confidence": math.inf}, "confidence", "got inf"), ({"prompt": {}}, "prompt", "got dict")]
    faults.append(({"path1": "0-0.img", "path2": "0-0.img"}, "path2", "the same file as path1"))
    rows, kept = interleaved(good, faults)
    write_pictures(folder, len(rows))
    faults.append(({}, "train.json", f"item {len(rows)} is not a JSON object"))
    (folder / "train.json").write_text(json.dumps([*rows, 5]))
    return folder / "train.json", faults, kept


def _rankings(folder: Path, pictures: str, ranks: str) -> Made:
    """Rankings of two, so that every one is one row, good or bad, and the i-th fault stands in row 2i + 1."""

    def good(number: int) -> Row:
        return {"prompt": f"row {number}", pictures: [f"{number}-0.img", f"{number}-1.img"], ranks: [1, 2]}

    changes: list[Fault] = [({pictures: [value, "0-1.img"]}, f"{pictures}[0]", reason) for value, reason in bad_paths()]
    changes += [
        ({pictures: ["0-0.img"] * 2}, f"{pictures}[1]", "the same file"),
        ({pictures: None}, pictures, "expected a list, got None"),
        ({pictures: ["0-0.img"], ranks: [1]}, pictures, "a comparison needs two"),
        ({ranks: 1}, ranks, "expected a list, got 1"),
        ({ranks: [1, 2, 3]}, ranks, "3 ranks for 2 pictures"),
        ({ranks: [1, None]}, f"{ranks}[1]", "finite number, got None"),
        ({ranks: ["1", "2"]}, f"{ranks}[0]", "got '1'"),
        ({ranks: [math.nan, 2]}, f"{ranks}[0]", "got nan"),
        ({"prompt": None}, "prompt", "expected text"),
    ]
    rows, kept = interleaved(good, changes)
    write_pictures(folder, len(rows))
    faults = [(change, f"{field} of row {2 * at + 1}", reason) for at, (change, field, reason) in enumerate(changes)]
    faults.append(({}, f"test.json of row {len(rows)}", f"item {len(rows)} is not a JSON object"))
    (folder / "test.json").write_text(json.dumps([*rows, "x"]))
    return folder / "test.json", faults, kept


def hpdv2_rankings(folder: Path) -> Made:
    return _rankings(folder, "image_path", "rank")


def imagereward_rankings(folder: Path) -> Made:
    return _rankings(folder, "generations", "ranking")


def imagereward(folder: Path) -> Made:
    """A picture a row: two rows of one prompt_id, the second of which is at fault, then good ones."""
    kinds: list[Fault] = [({"image": content}, "image", reason) for content, reason in contents().values()]
    kinds += faults_of("image", [(value, "image") for value in (None, b"", 7, [])] + [("a.png", "pass root=")])
    kinds += faults_of("rank", [(value, "finite number") for value in (None, "1", math.nan, [])])
    kinds += faults_of("prompt_id", [(value, "expected text or a whole number") for value in (None, 1.5)])
    kinds += [({"prompt": None}, "prompt", "expected text"), ({"overall_rating": "high"}, "overall_rating", "finite")]
    kinds.append(({"image": picture(0, 0)}, "image", "the same picture as image of row"))
    rows: list[Row] = []
    faults: list[Fault] = []
    good: list[Row] = []
    for at, (change, field, reason) in enumerate(kinds):
        pair = [
            {
                "image": picture(at, side),
                "prompt_id": at,
                "prompt": f"row {at}",
                "rank": side,
                "overall_rating": 1 - side,
            }
            for side in (0, 1)
        ]
        first = pair[0] | ({"image": picture(0, 0)} if "same picture" in reason else {})
        # The ratings are read with the pair; a picture, or a row without a rank, is named by its own row.
        faults.append(({}, field if field == "overall_rating" else f"{field} of row {len(rows) + 1}", reason))
        if field in ("rank", "prompt_id", "prompt"):
            faults.append(({}, f"prompt_id of row {len(rows)}", "the only usable picture"))
        rows += [first, pair[1] | change, *(side | {"prompt_id": f"good {at}"} for side in pair)]
        good.append(clean(at, overall_rating=(1.0, 0.0)))
    return rows, faults, good


def trl(folder: Path) -> Made:
    def answer(*parts: Any) -> list[Row]:
        return [{"role": "assistant", "content": list(parts)}]

    hole, user = {"type": "image"}, {"role": "user", "content": "x"}
    one = [picture(0, 0), picture(0, 1)]

    def good(number: int) -> Row:
        pictures = [picture(number, 0), picture(number, 1)]
        prompt = [{"role": "user", "content": f"row {number}"}]
        return {"prompt": prompt, "chosen": answer(hole), "rejected": answer(hole), "images": pictures}

    faults: list[Fault] = [
        ({"images": [one[0], content]}, "rejected", reason) for content, reason in contents().values()
    ]
    faults += [
        ({"images": one[:1]}, "images", "2 image placeholders but 1 images"),
        ({"images": [*one, one[0]]}, "images", "2 image placeholders but 3 images"),
        ({"images": None}, "images", "2 image placeholders but 0 images"),
        ({"chosen": answer({"type": "image", "image": one[0]})}, "images", "1 image placeholders but 2 images"),
        ({"images": [None, one[1]]}, "chosen", "no image"),
        ({"images": [one[0], one[0]]}, "rejected", "the same picture as chosen"),
        ({"images": ["a.png", one[1]]}, "chosen", "pass root="),
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
        ({"rejected": "a cat", "images": one[:1]}, "rejected", "pass root="),
    ]
    rows, kept = interleaved(good, faults)
    return rows, faults, kept


def named(folder: Path) -> Made:
    """Files paired by name; a fault is a key whose files are changed, None where one is left out."""
    outside = folder / "outside"
    outside.write_bytes(picture(0, 0))
    place = folder / "set"
    place.mkdir()
    kinds: list[tuple[str, Row, str, str]] = []
    for number, (content, reason) in enumerate(contents().values()):
        kinds.append((f"bad chosen {number}", {"chosen": content}, "chosen", reason))
        kinds.append((f"bad rejected {number}", {"rejected": content}, "rejected", reason))
    kinds += [
        ("same", {"chosen": picture(0, 0), "rejected": picture(0, 0)}, "rejected", "the same picture as chosen"),
        ("no chosen", {"chosen": None}, "chosen", "expected one chosen file for 'no chosen', found none"),
        ("no rejected", {"rejected": None}, "rejected", "found none"),
        ("no text", {"prompt": None}, "prompt", "expected one prompt file for 'no text', found none"),
        ("text alone", {"chosen": None, "rejected": None}, "chosen", "'text alone', found none"),
        ("latin", {"prompt": "é".encode("latin-1")}, "prompt", "'latin.txt' is not UTF-8"),
        ("empty", {"chosen": b""}, "chosen", "not an image"),
        ("two", {}, "chosen", "found 'two-chosen.jpg', 'two_chosen.png'"),
        ("link", {"chosen": None}, "chosen", "leads out"),
        ("dangling", {"chosen": None}, "chosen", "no such file: 'dangling_chosen.png'"),
    ]
    for number, (key, change, _, _) in enumerate(kinds):
        parts: Row = {"chosen": picture(number, 0), "rejected": picture(number, 1), "prompt": f"row {number}".encode()}
        for name, files in ((key, parts | change), (f"good {number:03}", parts)):
            endings = {"chosen": "_chosen.png", "rejected": "_rejected.png", "prompt": ".txt"}
            for part, content in files.items():
                if content is not None:
                    (place / f"{name}{endings[part]}").write_bytes(content)
    (place / "two-chosen.jpg").write_bytes(picture(0, 0))
    (place / "link_chosen.png").symlink_to(outside)
    (place / "dangling_chosen.png").symlink_to(place / "nowhere.png")
    faults: list[Fault] = [({}, field, reason) for _, _, field, reason in kinds]
    return place, faults, [clean(number) for number in range(len(kinds))]


def put(tar: tarfile.TarFile, name: str, content: bytes = b"", kind: bytes = tarfile.REGTYPE) -> None:
    """One member; links point at a file that is there."""
    member = tarfile.TarInfo(name)
    member.size, member.type, member.linkname = len(content), kind, "/etc/hostname"
    tar.addfile(member, io.BytesIO(content))


def webdataset(folder: Path) -> Made:
    """A shard whose samples come in every accepted spelling; a fault is a key whose members are changed or added to."""
    kinds: list[tuple[dict[str, Any], str, str]] = []
    for content, reason in contents().values():
        kinds.append(({"chosen.jpg": content}, "chosen", reason))
        kinds.append(({"rejected.webp": content}, "rejected", reason))
    nothing = {"chosen.jpg": None}
    kinds += [
        ({"rejected.webp": picture(1, 0), "chosen.jpg": picture(1, 0)}, "rejected", "the same picture as chosen"),
        (nothing, "chosen", "has no such member in 000.tar"),
        ({"rejected.webp": None}, "rejected", "has no such member in 000.tar"),
        ({"chosen.jpg": b""}, "chosen", "no image (no bytes)"),
        ({"chosen.png": picture(1, 0)}, "chosen", "has more than one such member"),
        ({"chosen.jpg": tarfile.SYMTYPE}, "chosen", "is a link, a device or a sparse file"),
        ({"chosen.jpg": tarfile.LNKTYPE}, "chosen", "is a link, a device or a sparse file"),
        ({"rejected.webp": tarfile.CHRTYPE}, "rejected", "is a link, a device or a sparse file"),
        ({"rejected.webp": tarfile.FIFOTYPE}, "rejected", "is a link, a device or a sparse file"),
        ({"txt": tarfile.SYMTYPE}, "txt", "is a link, a device or a sparse file"),
        ({"txt": None}, "prompt", "expected text, got None"),
        ({"txt": "é".encode("latin-1")}, "txt", "is not UTF-8"),
        ({"txt": b"x" * (2**22 + 1)}, "txt", "more than 4194304"),
        ({"prompt.txt": b"another"}, "prompt.txt", "has more than one prompt"),
        ({"json": b'{"prompt": "another"}'}, "prompt", "has prompts that differ"),
        ({"json": b'{"confidence": 0.2}'}, "confidence", "expected 0.5 … 1"),
        ({"json": b'{"chosen_votes": -1, "rejected_votes": 0}'}, "chosen_votes", "counts from 0 up"),
        ({"json": b'{"chosen": "../a.png"}'}, "json", "holds 'chosen': a picture is a member of its own"),
        ({"json": b"[1]"}, "json", "is not a JSON object"),
        ({"json": b"[" * 100_000}, "json", "is not a JSON object"),
        ({"json": b'{"a": 1'}, "json", "is not a JSON object"),
        ({"txt": None, "json": b'{"prompt": "half \\ud800"}'}, "prompt", "no valid Unicode"),
        ({"txt": None, "json": b'{"prompt": 3}'}, "prompt", "expected text, got 3"),
        ({"txt": b"x", "chosen.jpg": None, "rejected.webp": None, "notes.md": b"x"}, "chosen", "no such member"),
    ]
    spellings = ({"chosen": "chosen.jpg", "rejected": "rejected.webp", "prompt": "txt"},
                 {"chosen": "chosen", "rejected": "REJECTED.PNG", "prompt": "caption.txt"},
                 {"chosen": "chosen.tiff", "rejected": "rejected.bmp", "prompt": "json"})  # fmt: skip
    with tarfile.open(folder / "000.tar", "w") as tar:
        put(tar, "set", kind=tarfile.DIRTYPE)
        put(tar, ".hidden.jpg", b"x")
        for number, (change, _, _) in enumerate(kinds):
            parts = {"chosen": picture(number, 0), "rejected": picture(number, 1), "prompt": f"row {number}\n".encode()}
            usual = {spellings[0][part]: content for part, content in parts.items()}
            for name, content in (usual | change).items():
                if content is not None:
                    special = content in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE)
                    kind, content = (content, b"") if special else (tarfile.REGTYPE, content)
                    put(tar, f"set/{number:03}.{name}", content, kind)
            spelling = spellings[number % len(spellings)]
            if spelling["prompt"] == "json":
                parts["prompt"] = json.dumps({"caption": f"row {number}", "model": None}).encode()
            for part, content in parts.items():
                put(tar, f"../good {number}.{spelling[part]}", content)
    faults: list[Fault] = [({}, field, reason) for _, field, reason in kinds]
    return folder / "000.tar", faults, [clean(number) for number in range(len(kinds))]


def _table(pa: Any, rows: list[Row]) -> Any:
    """With a column for every key of any row."""
    names = dict.fromkeys(name for row in rows for name in row)
    return pa.Table.from_pydict({name: [row.get(name) for row in rows] for name in names})


LAYOUTS: dict[str, Callable[[Path], Made]] = {
    "a list of dicts": in_memory,
    ".json": json_list,
    ".jsonl": json_lines,
    "metadata.jsonl": metadata_jsonl,
    "parquet of bytes": parquet_of_bytes,
    "parquet of paths": parquet_of_paths,
    "Dataset": dataset,
    "Dataset of pictures": dataset_of_pictures,
    "save_to_disk": saved_dataset,
    "HPDv2": hpdv2,
    "HPDv3": hpdv3,
    "HPDv2 rankings": hpdv2_rankings,
    "ImageReward rankings": imagereward_rankings,
    "ImageRewardDB": imagereward,
    "TRL messages": trl,
    "named files": named,
    "WebDataset": webdataset,
}
