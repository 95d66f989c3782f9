"""Clips in conversations: which frames are read, what is told of them, and decoded frames that are kept on disk."""

import logging
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from mmalign.data import InvalidRow, clear_cache, load_answers
from mmalign.data import answer_media as module
from mmalign.data.ahead import in_order
from mmalign.data.answer_media import ClipReading, open_clip
from mmalign.data.answer_records import VideoClip
from mmalign.data.clips import Limits, sample_clip, write_clip
from mmalign.data.images import BadImage

TOTAL, RATE = 20, 10


def frames(number: int = TOTAL, size: tuple[int, int] = (24, 16)) -> list[Image.Image]:
    """Frame k is one grey, 12·k."""
    return [Image.new("RGB", size, (12 * k,) * 3) for k in range(number)]


def told(clip: VideoClip) -> list[int]:
    """Which of `frames` these are; a lossy codec moves a grey by less than half a step."""
    return [round(np.asarray(frame).mean() / 12) for frame in clip.frames]


def encoded(form: str = "mp4", codec: str = "mpeg4", *, seconds_of_sound: int = 0, **options: str) -> bytes:
    """Twenty frames in two seconds; titled TITLE. options: of the container."""
    av = pytest.importorskip("av")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, f"clip.{form}")
        with av.open(str(path), "w", format=form, options=options) as container:
            container.metadata["title"] = "TITLE"
            stream = container.add_stream(codec, rate=RATE)
            stream.width, stream.height, stream.pix_fmt, stream.bit_rate = 24, 16, "yuv420p", 4_000_000
            sound = container.add_stream("aac", rate=8000) if seconds_of_sound else None
            for frame in frames():
                container.mux(stream.encode(av.VideoFrame.from_image(frame)))
            container.mux(stream.encode())
            for at in range(8000 * seconds_of_sound // 1024):
                silence = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
                silence.sample_rate, silence.pts = 8000, 1024 * at
                container.mux(sound.encode(silence))
            container.mux(sound.encode() if sound else [])
        return path.read_bytes()


@pytest.fixture(scope="module")
def video() -> bytes:
    """Twenty frames in two seconds."""
    return encoded()


@pytest.mark.parametrize(
    ("reading", "used"),
    [
        ({"num_frames": 3}, [0, 10, 19]),
        ({"num_frames": 20}, list(range(20))),
        ({"fps": 10}, list(range(20))),
        ({"fps": 5}, list(range(0, 20, 2))),
        ({"fps": 4}, [0, 2, 5, 7, 10, 12, 15, 17]),
        ({"fps": 0.1}, [0]),
    ],
)
def test_every_form_gives_the_same_frames_and_says_where_they_stood(
    reading: dict[str, Any], used: list[int], video: bytes, tmp_path: Path
) -> None:
    (tmp_path / "clip.mp4").write_bytes(video)
    write_clip(tuple(frames()), tmp_path / "clip.webp", RATE)
    (tmp_path / "folder").mkdir()
    for number, frame in enumerate(frames()):
        frame.save(tmp_path / "folder" / f"{number}.png")
    forms: dict[str, Any] = {
        "file": "clip.mp4",
        "bytes": {"bytes": video, "path": None},
        "animation": "clip.webp",
        "frames": {"frames": frames(), "fps": RATE},
        "frames of arrow": {"frames": frames(), "fps": 10.0, "indices": None, "total_frames": 20, "bytes": None},
        "folder": {"frames": "folder", "fps": RATE},
    }
    for form, value in forms.items():
        clip = open_clip(value, ClipReading(**reading), roots=(tmp_path,))
        assert told(clip) == list(clip.indices) == used, form
        assert (clip.frames_per_second, clip.total_frames) == (RATE, TOTAL), form


def test_frames_that_were_taken_before_keep_their_numbers() -> None:
    known = {"frames": frames(5), "fps": 30, "indices": [0, 30, 60, 90, 120], "total_frames": 150}
    assert open_clip(known, ClipReading()).indices == (0, 30, 60, 90, 120)
    clip = open_clip(known, ClipReading(num_frames=3))
    assert (told(clip), clip.indices, clip.frames_per_second, clip.total_frames) == ([0, 2, 4], (0, 60, 120), 30, 150)
    assert open_clip(known, ClipReading(fps=0.5)).indices == (0, 60, 120)
    # 500 is 15 steps of 10 / 0.3, and by a hair less in floats.
    assert len(module._at_rate(range(501), 10, 0.3)) == 16
    later = known | {"indices": [10, 40, 70, 100, 130]}
    assert open_clip(later, ClipReading(fps=0.5)).indices == (10, 70, 130)
    assert open_clip(known | {"total_frames": None}, ClipReading()).total_frames == 121
    with pytest.raises(BadImage, match="holds fewer than 2 frames a second"):
        open_clip(known, ClipReading(fps=2))


def test_numbers_of_numpy_and_torch_are_numbers() -> None:
    """As whoever sampled the frames has them."""
    known = {
        "frames": frames(3),
        "fps": np.float32(30),
        "indices": np.arange(0, 90, 30),
        "total_frames": torch.tensor(90),
    }
    for indices in (known["indices"], list(known["indices"]), torch.arange(0, 90, 30)):
        clip = open_clip(known | {"indices": indices}, ClipReading())
        assert (clip.frames_per_second, clip.indices, clip.total_frames) == (30, (0, 30, 60), 90)
        assert {type(value) for value in (*clip.indices, clip.total_frames)} == {int}


def test_a_rate_that_nobody_tells_is_assumed_aloud(caplog: pytest.LogCaptureFixture) -> None:
    module._say_assumed.cache_clear()
    with caplog.at_level(logging.WARNING, "mmalign"):
        assert open_clip(frames(4), ClipReading(source_fps=8)).frames_per_second == 8
        assert not caplog.records
        assert open_clip(frames(4), ClipReading()).frames_per_second == 24
        assert open_clip(frames(4), ClipReading()).frames_per_second == 24
    assert len(caplog.records) == 1 and "24 are assumed" in caplog.records[0].message


def test_it_must_be_said_which_frames_of_a_video_are_read(video: bytes) -> None:
    """A plain ValueError: the run stops, and does not leave out every row."""
    source = load_answers([{"prompt": "x", "chosen": "a", "rejected": "b", "video": video}])
    with pytest.raises(ValueError, match="pass num_frames=… or fps=…") as caught:
        source[0]
    assert not isinstance(caught.value, InvalidRow)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"num_frames": 4, "fps": 2.0}, "num_frames=4 and fps=2: give one of the two"),
        ({"num_frames": 0}, "num_frames must be at least 1"),
        ({"fps": 0.0}, "fps must be above 0"),
        ({"source_fps": float("inf")}, "source_fps must be above 0 and finite"),
        ({"longest_side": 0}, "longest_side must be at least 1"),
    ],
)
def test_options_that_cannot_be_meant_are_refused(options: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        load_answers([{"prompt": "x", "chosen": "a", "rejected": "b"}], **options)


def test_videos_that_cannot_be_used_say_why(video: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    faults: list[tuple[bytes, dict[str, Any], str]] = [
        (video[: len(video) // 2], {"num_frames": 3}, "damaged or truncated video"),
        (video[:64], {"num_frames": 3}, "damaged or truncated video"),
        (video, {"num_frames": 21}, r"holds 20 frame\(s\), and 21 are asked for"),
        (video, {"fps": 12}, "holds fewer than 12 frames a second"),
        (video, {"fps": 10, "limits": Limits(max_frames=19)}, "more than 19 frames: cut the clip"),
        (video, {"fps": 10, "limits": Limits(max_pixels=300)}, "300 pixels a frame are the limit"),
    ]
    for value, reading, reason in faults:
        with pytest.raises(BadImage, match=reason):
            open_clip(value, ClipReading(**reading))
    # The room is for the frames that are used, in the size in which they are.
    monkeypatch.setattr("mmalign.data.clips.MAX_CLIP_PIXELS", 24 * 16 * 5)
    assert len(open_clip(video, ClipReading(num_frames=5)).frames) == 5
    with pytest.raises(BadImage, match="6 frames of 24×16, and 320 pixels a frame are the limit"):
        open_clip(video, ClipReading(num_frames=6))
    assert len(open_clip(video, ClipReading(num_frames=6, limits=Limits(longest_side=12))).frames) == 6


@pytest.mark.parametrize(
    ("form", "codec", "options"), [("mp4", "mpeg4", {"movflags": "faststart"}), ("webm", "libvpx", {})]
)
def test_a_video_that_breaks_off_is_no_shorter_video(form: str, codec: str, options: dict[str, str]) -> None:
    """FFmpeg reads what there is of it and reports no error."""
    whole = encoded(form, codec, **options)
    assert open_clip(whole, ClipReading(num_frames=3)).indices == (0, 10, 19)
    for share in (0.7, 0.8):
        with pytest.raises(BadImage, match="damaged or truncated video: the file breaks off"):
            open_clip(whole[: int(share * len(whole))], ClipReading(num_frames=3))


@pytest.mark.parametrize(
    "whole",
    [
        lambda: encoded(seconds_of_sound=6),  # goes on behind the pictures
        lambda: encoded("webm", "libvpx", live="1"),  # was never told how long it is
        lambda: encoded().replace(b"TITLE", b"\xe9t\xe9\xe9\xe9"),  # Latin-1
    ],
    ids=["sound", "live", "title"],
)
def test_unusual_videos_are_whole(whole: Callable[[], bytes]) -> None:
    assert told(open_clip(whole(), ClipReading(num_frames=3))) == [0, 10, 19]


def test_what_a_video_tells_of_its_rate_comes_first(video: bytes) -> None:
    assert open_clip(video, ClipReading(num_frames=3, source_fps=99)).frames_per_second == RATE


def test_large_frames_are_shrunk(video: bytes) -> None:
    for value in (video, frames(), {"frames": frames(), "fps": 3}):
        clip = open_clip(value, ClipReading(num_frames=2, limits=Limits(longest_side=12)))
        assert [frame.size for frame in clip.frames] == [(12, 8)] * 2 and told(clip) == [0, 19]
    assert open_clip(video, ClipReading(num_frames=1, limits=Limits(longest_side=24))).frames[0].size == (24, 16)


def test_a_video_is_decoded_once(video: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second reading, under another name, takes the same pixels and numbers from the disk; another sampling does not."""
    rows = [{"prompt": "x", "chosen": "a", "rejected": "b", "video": name} for name in ("one.mp4", "two.mp4")]
    for row in rows:
        (tmp_path / row["video"]).write_bytes(video)
    options: dict[str, Any] = {"root": tmp_path, "frame_cache": tmp_path / "cache"}
    plain = load_answers(rows, root=tmp_path, num_frames=3)
    kept = load_answers(rows, num_frames=3, **options)
    (first,) = kept[0].media
    monkeypatch.setattr(module, "sample_clip", lambda *args, **options: pytest.fail("decoded again"))
    again = [kept[at].media[0] for at in (0, 1)]
    monkeypatch.undo()
    (expected,) = plain[0].media
    for clip in (first, *again):
        assert isinstance(clip, VideoClip) and isinstance(expected, VideoClip)
        assert (clip.indices, clip.total_frames) == (expected.indices, expected.total_frames)
        assert clip.frames_per_second == expected.frames_per_second
        assert all(np.array_equal(a, b) for a, b in zip(clip.frames, expected.frames, strict=True))
    assert kept.fingerprint() == plain.fingerprint() != load_answers(rows, num_frames=4, **options).fingerprint()
    files = list((tmp_path / "cache").glob("*.safetensors"))
    for other in (
        {"num_frames": 4},
        {"fps": 5},
        {"num_frames": 3, "longest_side": 12},
        {"num_frames": 3, "max_pixels": 999},
    ):
        load_answers(rows, **options, **other)[0]
    assert len(files) == 1 and len(list((tmp_path / "cache").glob("*.safetensors"))) == 5
    assert clear_cache(tmp_path / "cache") > 0 and not list((tmp_path / "cache").iterdir())


def test_readers_at_once_decode_a_video_once(video: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decoded: list[int] = []

    def counted(*args: Any, **options: Any) -> Any:
        decoded.append(1)
        return sample_clip(*args, **options)

    monkeypatch.setattr(module, "sample_clip", counted)
    reading = ClipReading(num_frames=3, cache=tmp_path)
    clips = list(in_order(lambda _: open_clip(video, reading), range(8), 4))
    assert len(decoded) == 1 and all(told(clip) == [0, 10, 19] for clip in clips)
    # What is said of the video beside it is no part of the file.
    other = open_clip({"frames": video, "fps": 5}, reading)
    assert (other.frames_per_second, clips[0].frames_per_second, len(decoded)) == (5, RATE, 2)


def test_kept_frames_that_were_changed_are_refused(video: bytes, tmp_path: Path) -> None:
    reading = ClipReading(num_frames=3, cache=tmp_path)
    open_clip(video, reading)
    (file,) = tmp_path.glob("*.safetensors")
    whole = file.read_bytes()
    for damaged in (
        whole[:-1] + bytes([whole[-1] ^ 1]),
        whole[:100],
        whole.replace(b"10.0, 20]", b"10.0, 21]"),
    ):
        assert damaged != whole
        file.write_bytes(damaged)
        with pytest.raises(ValueError, match="was changed after it was written: delete it") as caught:
            open_clip(video, reading)
        assert not isinstance(caught.value, BadImage)


def test_pictures_and_folders_of_frames_are_not_kept(tmp_path: Path) -> None:
    reading = ClipReading(num_frames=3, source_fps=8, cache=tmp_path)
    assert told(open_clip(frames(), reading)) == [0, 10, 19] and not list(tmp_path.iterdir())
