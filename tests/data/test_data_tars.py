"""WebDataset shards: which members make which rows, and what is no shard."""

import io
import json
import random
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data.faults import bad_rows, packed, picture, put, seen
from PIL import Image

from mmalign.data import BadRow, InvalidRow, PairSource, load_pairs, tars

Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Members, given by name, in a tar of that name; None is a symbolic link."""

    def call(shard: str, members: dict[str, Any]) -> Path:
        path = tmp_path / shard
        path.parent.mkdir(parents=True, exist_ok=True)
        with tarfile.open(path, "w") as tar:
            for name, content in members.items():
                put(tar, name, content or b"", tarfile.REGTYPE if content is not None else tarfile.SYMTYPE)
        return path

    return call


def pair(key: str, number: int) -> dict[str, bytes]:
    return {
        f"{key}.chosen.png": picture(number, 0),
        f"{key}.rejected.png": picture(number, 1),
        f"{key}.txt": f"row {number}".encode(),
    }


def numbers(source: PairSource) -> list[int]:
    """Which pairs these are, told by their pictures and prompts at once."""
    found = []
    for record in map(source.__getitem__, range(len(source))):
        number = int(record.prompt.removeprefix("row "))
        for side, image in enumerate((record.image_0, record.image_1)):
            assert np.array_equal(np.asarray(image), np.asarray(seen(number, side)))
        found.append(number)
    return found


def test_a_shard_a_folder_and_a_pattern_give_rows_in_order(tmp_path: Path, write: Write) -> None:
    for shard in range(3):
        # The keys start anew in every shard, as some writers have it.
        write(f"set/shard-{shard:03}.tar", pair("0000", 2 * shard) | pair("0001", 2 * shard + 1))
    assert numbers(load_pairs(tmp_path / "set" / "shard-001.tar")) == [2, 3]
    assert numbers(load_pairs(tmp_path / "set")) == [0, 1, 2, 3, 4, 5]
    assert numbers(load_pairs(f"{tmp_path}/set/shard-{{001..002}}.tar")) == [2, 3, 4, 5]
    assert numbers(load_pairs(f"{tmp_path}/set/shard-{{0..0}}{{00..01}}.tar", max_rows=3)) == [0, 1, 2]
    with pytest.raises(ValueError, match=r"2 of 4 shards are missing, the first is .*shard-003.tar"):
        load_pairs(f"{tmp_path}/set/shard-{{001..004}}.tar")
    with pytest.raises(ValueError, match="root=.* does not apply to tar files"):
        load_pairs(f"{tmp_path}/set/shard-{{001..002}}.tar", root=tmp_path)
    for split, number in (("train", 6), ("test", 7)):
        write(f"splits/{split}-000000.tar", pair("a", number))
    assert numbers(load_pairs(tmp_path / "splits")) == [6]
    assert numbers(load_pairs(tmp_path / "splits", split="test")) == [7]


def test_members_of_a_key_need_not_lie_together(write: Write) -> None:
    members = list((pair("a", 0) | pair("b", 1) | pair("deep/folder/a", 2)).items())
    random.Random(0).shuffle(members)
    assert sorted(numbers(load_pairs(write("x.tar", dict(members))))) == [0, 1, 2]


def test_columns_of_pick_a_pic(write: Write) -> None:
    labels = {"label_0": 0.25, "label_1": 0.75, "user_id": 7, "ps_score_0": 1, "ps_score_1": 2}
    members: dict[str, Any] = {}
    for number, names in enumerate((("jpg_0.jpg", "jpg_1.png"), ("0.jpg", "1.jpg"), ("jpg_0", "jpg_1"))):
        members |= {f"{number}.{name}": picture(number, side) for side, name in enumerate(names)}
        members[f"{number}.json"] = json.dumps(labels | ({"prompt": "row 0"} if number == 0 else {})).encode()
        if number:
            members[f"{number}.txt"] = f"row {number}".encode()
    members |= {"3.0.jpg": picture(3, 0), "3.1.jpg": picture(3, 1), "3.json": b'{"prompt": "row 3", "label": 0}'}
    source = load_pairs(write("x.tar", members))
    assert source.form == "pickapic" and source.prompts() == ["row 0", "row 1", "row 2", "row 3"]
    assert numbers(source.select(range(3), "good")) == [0, 1, 2]
    assert all((source[row].label, source[row].user_id) == (0.25, "7") for row in range(3))
    assert source[0].scores == {"ps_score": (1.0, 2.0)}
    assert bad_rows(source) == [BadRow(3, "label_0", "expected a finite number, got None")]


def test_rankings_of_one_picture_a_key(write: Write) -> None:
    members: dict[str, Any] = {}
    for side in (0, 1):
        members[f"{side}.jpg"] = picture(4, side)
        members[f"{side}.json"] = json.dumps({"prompt": "row 4", "prompt_id": "p", "rank": side}).encode()
    source = load_pairs(write("x.tar", members))
    assert source.form == "imagereward" and numbers(source) == [4] and source[0].label == 1.0


def test_nothing_of_a_member_s_name_touches_the_disk(tmp_path: Path, write: Write) -> None:
    """Names that would lead out are names only: nothing is extracted."""
    source = load_pairs(write("in/x.tar", pair("../../escape", 0) | pair("/etc/escape", 1)))
    assert numbers(source) == [0, 1]
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["in", "x.tar"]


def test_a_member_s_fault_names_the_member(write: Write) -> None:
    (bad,) = bad_rows(load_pairs(write("x.tar", pair("a", 0) | {"a.chosen.png": b"no picture"})))
    assert bad.reason.endswith("or damaged in 'a.chosen.png'")


def test_a_member_that_no_column_needs_costs_nothing(write: Write) -> None:
    extra = {"a.png": b"no picture", "b.png": None, "c.jpg": picture(0, 0), "c.png": picture(0, 1)}
    members = extra | pair("a", 0) | pair("b", 1) | pair("c", 2) | pair("d", 3)
    assert numbers(load_pairs(write("x.tar", members))) == [0, 1, 2, 3]
    assert numbers(load_pairs(write("y.tar", {"a.png": None} | pair("a", 0)))) == [0]


def test_names_that_begin_here_and_prompts_told_twice_are_one(write: Write) -> None:
    members = {f"./{name}" if name.endswith("png") else name: content for name, content in pair("a", 0).items()}
    members |= {"a.txt": b"row 0\n", "./a.json": b'{"prompt": " row 0 "}'}
    assert numbers(load_pairs(write("x.tar", members))) == [0]


def test_videos_in_a_shard_are_read(write: Write, tmp_path: Path) -> None:
    import av

    members: dict[str, Any] = {"a.txt": b"x"}
    for side, shade in (("chosen", 40), ("rejected", 200)):
        with av.open(str(tmp_path / "clip.mp4"), "w") as container:
            stream = container.add_stream("mpeg4", rate=8)
            stream.width, stream.height, stream.pix_fmt = 32, 32, "yuv420p"
            for _ in range(3):
                frame = Image.new("RGB", (32, 32), (shade,) * 3)
                container.mux(stream.encode(av.VideoFrame.from_image(frame)))
            container.mux(stream.encode())
        members[f"a.{side}.mp4"] = (tmp_path / "clip.mp4").read_bytes()
    record = load_pairs(write("x.tar", members), num_frames=2)[0]
    assert [len(side) for side in (record.image_0, record.image_1)] == [2, 2]
    assert abs(np.asarray(record.image_0[0]).mean() - 40) < 5 < abs(np.asarray(record.image_1[0]).mean() - 40)


def test_members_are_limited(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tars, "PICTURE_BYTES", 2000)
    noise = packed(Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)))
    source = load_pairs(write("x.tar", pair("a", 0) | pair("b", 1) | {"b.rejected.png": noise}))
    with pytest.raises(InvalidRow, match=f"row 1, rejected: 'b.rejected.png' has {len(noise)} bytes, more than 2000"):
        source[1]
    assert source[0].prompt == "row 0"


def test_what_is_no_whole_shard_is_refused(tmp_path: Path, write: Write) -> None:
    import gzip

    whole = write("x.tar", pair("a", 0) | pair("b", 1)).read_bytes()
    end = len(whole.rstrip(b"\0")) // 512 * 512 + 512
    second = io.BytesIO()
    with tarfile.open(fileobj=second, mode="w") as tar:
        put(tar, "c.txt", b"x")
    damaged = bytearray(whole)
    damaged[whole.index(b"b.chosen.png")] ^= 1
    for name, content in {
        "empty.tar": b"",
        "text.tar": b"this is no tar file" * 100,
        "packed.tar.gz": gzip.compress(whole),
        "packed.tar": gzip.compress(whole),
        "cut in a member.tar": whole[: whole.index(b"b.chosen.png") + 600],
        "cut in a header.tar": whole[: whole.index(b"b.chosen.png") + 100],
        "cut between.tar": whole[: whole.index(b"b.chosen.png")],
        "without end.tar": whole[:end],
        "damaged header.tar": bytes(damaged),
        "two in one.tar": whole + second.getvalue(),
    }.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match="is damaged, cut off, or no uncompressed tar file"):
            load_pairs(tmp_path / name)
    with pytest.raises(ValueError, match="no such file"):
        load_pairs("nowhere/x.tar")


def test_a_shard_that_changes_afterwards_is_noticed(write: Write) -> None:
    path = write("x.tar", pair("a", 0) | pair("b", 1))
    source, before = load_pairs(path), load_pairs(path).fingerprint
    assert load_pairs(path).fingerprint == before
    content = path.read_bytes()
    path.write_bytes(content[: content.index(b"b.rejected.png")])
    with pytest.raises(InvalidRow, match="row 1, rejected: x.tar was shortened since it was opened"):
        source[1]
    path.write_bytes(content.replace(b"row 1", b"row 2"))
    assert load_pairs(path).fingerprint != before


def test_any_byte_may_be_wrong(tmp_path: Path, write: Write) -> None:
    """Refused as a whole or read whole: 120 shards with a changed byte, and never a picture of another pair."""
    whole = write("x.tar", pair("a", 0) | pair("b", 1)).read_bytes()
    rng = random.Random(0)
    refused = 0
    for _ in range(120):
        damaged = bytearray(whole)
        damaged[rng.randrange(len(whole) - 8000)] = rng.randrange(256)
        (tmp_path / "x.tar").write_bytes(damaged)
        try:
            source = load_pairs(tmp_path / "x.tar")
        except ValueError:
            refused += 1
            continue
        bad = bad_rows(source)
        assert len(bad) <= len(source) <= 3 and all("\n" not in str(item) for item in bad)
    assert refused > 10
