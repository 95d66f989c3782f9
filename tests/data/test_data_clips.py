"""Clips as sides of a pair: every form they may have, which of their frames are used, and what is said of those that cannot be."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import tiny_pipeline
from torch import Tensor

from mmalign.data import InvalidRow, PairSource, encode_pairs, load_pairs, score_pairs, validate_pairs
from mmalign.data import clips as module
from mmalign.data.clips import glance, read_clip, write_clip
from mmalign.data.images import BadImage
from mmalign.denoisers import adapter_for

Packed = Callable[..., bytes]


def frames(number: int, *, size: tuple[int, int] = (24, 20)) -> list[Image.Image]:
    """Frame k is one grey, 10 + 12·k: GIF and lossless WebP keep it."""
    return [Image.new("RGB", size, (10 + 12 * k,) * 3) for k in range(number)]


def told(clip: Any) -> list[int]:
    """Which of `frames` these are."""
    return [(frame.getpixel((3, 3))[0] - 10) // 12 for frame in clip]


def animated(packed: Packed, format: str, number: int) -> bytes:
    first, *rest = frames(number)
    return packed(first, format, save_all=True, append_images=rest, lossless=True, duration=100)


def stored(folder: Path, number: int) -> str:
    """A folder of frames whose numbers are not padded, among files that are none."""
    place = folder / "clip"
    place.mkdir()
    for k, frame in enumerate(frames(number)):
        frame.save(place / f"frame_{k}.png")
    (place / "notes.txt").write_text("no frame")
    (place / ".hidden.png").write_bytes(b"no frame")
    return "clip"


@pytest.mark.parametrize(
    ("total", "wanted", "used"),
    [(9, 9, list(range(9))), (17, 9, list(range(0, 17, 2))), (12, 5, [0, 3, 6, 8, 11]), (7, 1, [0]), (1, 1, [0])],
)
def test_every_form_gives_the_same_evenly_spaced_frames(
    total: int, wanted: int, used: list[int], packed: Packed, tmp_path: Path
) -> None:
    name = stored(tmp_path, total)
    listed: list[Any] = frames(total)
    listed[-1] = packed(listed[-1])
    forms: dict[str, Any] = {
        "list": listed,
        "paths": [f"clip/frame_{k}.png" for k in range(total)],
        "folder": name,
        "gif": animated(packed, "GIF", total),
        "apng": animated(packed, "PNG", total),
        "webp": {"bytes": animated(packed, "WEBP", total), "path": "elsewhere.webp"},
    }
    for form, value in forms.items():
        assert told(read_clip(value, wanted, roots=(tmp_path,))) == used, form


def test_a_picture_is_a_clip_of_one_frame(packed: Packed) -> None:
    for value in (frames(1)[0], packed(frames(1)[0])):
        assert told(read_clip(value, 1)) == [0]
        with pytest.raises(BadImage, match=r"holds 1 frame.s., and 9 are asked for"):
            read_clip(value, 9)


def test_what_is_written_is_read_back_to_the_pixel(tmp_path: Path) -> None:
    values = np.random.default_rng(0).integers(0, 256, (5, 20, 24, 3), dtype=np.uint8)
    clip = tuple(map(Image.fromarray, values))
    write_clip(clip, tmp_path / "clip.webp", 8)
    back = read_clip("clip.webp", 5, roots=(tmp_path,))
    assert np.array_equal(np.stack([np.asarray(frame) for frame in back]), values)
    with Image.open(tmp_path / "clip.webp") as image:
        image.load()
        assert image.info["duration"] == 125


def test_clips_that_cannot_be_used_say_why(packed: Packed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stored(tmp_path, 3)
    (tmp_path / "empty").mkdir()
    inner = tmp_path / "inner"
    (inner / "linked").mkdir(parents=True)
    (inner / "linked" / "0.png").symlink_to(tmp_path / "clip" / "frame_0.png")
    whole = animated(packed, "GIF", 9)
    path = tmp_path / "open.gif"
    path.write_bytes(whole)
    other = [*frames(2), Image.new("RGB", (8, 8))]
    faults: list[tuple[Any, str]] = [
        ("clip", "holds 3 frame"),
        ("empty", "holds 0 frame"),
        ("none", "no such file: 'none'"),
        (".", "no such file"),
        ("../clip", "leaves the data set's folder"),
        ([], "holds 0 frame"),
        (None, "no image"),
        (7, "got int"),
        ([*frames(8), b"rubbish"], "frame 8: not an image of a known format"),
        ([*frames(8), "none.png"], "frame 8: no such file"),
        ([*frames(8), other], "frame 8: expected an image, its bytes or a path, got list"),
        ([*frames(8), other[-1]], "frames of different sizes: 8×8, 24×20"),
        (whole[: len(whole) // 2], r"damaged or truncated|holds \d frame"),
        (Image.open(path), "an opened animation"),
    ]
    for value, reason in faults:
        with pytest.raises(BadImage, match=reason):
            read_clip(value, 9, roots=(tmp_path,))
    with pytest.raises(BadImage, match="frame 0: path 'linked/0.png' leads out"):
        read_clip("linked", 1, roots=(inner,))
    monkeypatch.setattr(module, "MAX_FRAMES", 8)
    for value in (whole, frames(9), animated(packed, "WEBP", 9)):
        with pytest.raises(BadImage, match="more than 8 frames: cut the clip"):
            read_clip(value, 3)
    monkeypatch.setattr(module, "MAX_FRAMES", 4096)
    monkeypatch.setattr(module, "MAX_CLIP_PIXELS", 9 * 479)
    for value in (whole, frames(9)):
        with pytest.raises(BadImage, match="9 frames of 24×20, and 479 pixels a frame are the limit"):
            read_clip(value, 9)
        assert len(read_clip(value, 8)) == 8


def rows(folder: Path | None = None) -> list[dict[str, Any]]:
    """Three pairs of clips; the second is too short on one side."""
    short = frames(4)
    pair: dict[str, Any] = {"chosen": frames(9), "rejected": frames(17)}
    return [{"prompt": f"a red bag {k}", **pair, **({"rejected": short} if k == 1 else {})} for k in range(3)]


def test_clips_are_encoded_frame_for_frame_and_short_ones_dropped_whole(tmp_path: Path) -> None:
    denoiser = adapter_for(tiny_pipeline("cogvideox"))
    source = load_pairs(rows(), num_frames=9)
    encoded = encode_pairs(source, denoiser, resolution=16, cache_dir=tmp_path, latent_mode="mean", progress=False)
    assert [(bad.row, bad.field) for bad in encoded.bad_rows] == [(1, "rejected")]
    assert "holds 4 frame(s), and 9 are asked for" in encoded.bad_rows[0].reason
    greys = torch.tensor([10 + 12 * k for k in range(0, 17, 2)]) / 127.5 - 1
    pixels = greys.view(1, 1, 9, 1, 1).expand(1, 3, 9, 16, 16)
    latents = encoded.latents(torch.tensor([1]))[:, 1]
    torch.testing.assert_close(latents, denoiser.encode_image(pixels), rtol=0, atol=1e-5)
    assert encoded.sizes(torch.tensor([0]), 0).tolist() == [[20, 24, 0, 1, 16, 16]]
    with pytest.raises(ValueError, match="cogvideox reads clips"):
        encode_pairs(load_pairs(rows()), denoiser, resolution=16, cache_dir=tmp_path)
    report = validate_pairs(source, resolution=16, progress=False)
    assert report.usable == [0, 2] and [bad.row for bad in report.bad_rows] == [1]


def test_a_picture_family_calls_a_clip_a_bad_row(tmp_path: Path) -> None:
    stored(tmp_path, 9)
    one, clip = frames(1)[0], frames(9)
    source = load_pairs(
        [{"prompt": "a", "chosen": clip, "rejected": one}, {"prompt": "a", "chosen": one, "rejected": "clip"}],
        root=tmp_path,
    )
    for row, reason in enumerate(["row 0, chosen: .* got list .a clip", "row 1, rejected: .* is a folder .of frames?"]):
        with pytest.raises(InvalidRow, match=reason):
            source[row]
    denoiser = adapter_for(tiny_pipeline("sd"))
    with pytest.raises(ValueError, match="num_frames=9 has no effect"):
        encode_pairs(source.as_clips(9), denoiser, resolution=16, cache_dir=tmp_path / "cache")


def test_the_fingerprint_knows_every_frame_and_their_number(tmp_path: Path) -> None:
    name = stored(tmp_path, 9)

    def source(num_frames: int | None, prompt: str = "a") -> PairSource:
        pairs = [{"prompt": prompt, "chosen": name, "rejected": name}]
        return load_pairs(pairs, root=tmp_path, num_frames=num_frames)

    pictures, nine = source(None).fingerprint, source(9).fingerprint
    assert len({pictures, nine, source(1).fingerprint}) == 3
    assert source(None).as_clips(9).fingerprint == source(1).as_clips(9).fingerprint == nine
    changed = tmp_path / name / "frame_4.png"
    Image.new("RGB", (24, 20), "red").save(changed)
    assert source(9).fingerprint != nine and source(None).fingerprint == pictures


def test_folders_of_pairs_and_json_name_clips(packed: Packed, tmp_path: Path) -> None:
    named, listed = tmp_path / "named", tmp_path / "listed"
    for folder in (named, listed):
        folder.mkdir()
    (named / "1_chosen.gif").write_bytes(animated(packed, "GIF", 9))
    (named / "1_rejected.webp").write_bytes(animated(packed, "WEBP", 17))
    (named / "1.txt").write_text("a red bag")
    stored(listed, 9)
    paths = [f"clip/frame_{k}.png" for k in range(9)]
    (listed / "metadata.jsonl").write_text(
        json.dumps({"prompt": "a red bag", "chosen": "clip", "rejected": paths[::-1]})
    )
    for folder, second in ((named, list(range(0, 17, 2))), (listed, list(range(9))[::-1])):
        record = load_pairs(folder, num_frames=9)[0]
        assert told(record.image_0) == list(range(9)) and told(record.image_1) == second


def test_columns_of_lists_of_pictures_and_of_videos_are_read(packed: Packed) -> None:
    from datasets import Dataset, Features, List, Value, Video
    from datasets import Image as Picture

    one = [packed(frame) for frame in frames(9)]
    videos = [{"bytes": animated(packed, "GIF", number), "path": None} for number in (9, 5)]
    for side, values in ((List(Picture()), [one, one[:5]]), (Video(), videos)):
        columns = Features({"prompt": Value("string"), "chosen": side, "rejected": side})
        data = Dataset.from_dict({"prompt": ["a"], "chosen": values[:1], "rejected": values[1:]}, columns)
        source = load_pairs(data, num_frames=3)
        assert told(source[0].image_0) == [0, 4, 8] and told(source[0].image_1) == [0, 2, 4]
        assert len(source.fingerprint) == 64


def test_the_same_clip_twice_is_no_pair(packed: Packed) -> None:
    clip = [packed(frame) for frame in frames(9)]
    with pytest.raises(InvalidRow, match="rejected: the same picture as chosen"):
        load_pairs([{"prompt": "a", "chosen": clip, "rejected": list(clip)}], num_frames=3)[0]


def test_a_clips_score_is_the_mean_over_its_frames(tmp_path: Path) -> None:
    class Brightness:
        name, fingerprint = "brightness", "brightness"

        def score(self, images: Any, prompts: Any) -> Tensor:
            assert len(images) == len(prompts)
            return torch.tensor([float(image.getpixel((0, 0))[0]) for image in images])

    scores = score_pairs(load_pairs(rows(), num_frames=9), Brightness(), cache_dir=tmp_path, progress=False)  # type: ignore[arg-type]
    assert scores[0].tolist() == scores[2].tolist() == [10 + 12 * 4, 10 + 12 * 8] and scores[1].isnan().all()


def test_a_glance_is_the_first_middle_and_last_frame() -> None:
    strip = glance(tuple(frames(9)))
    assert strip.size == (72, 20) and [told([strip.crop((24 * k, 0, 24 * k + 24, 20))])[0] for k in range(3)] == [
        0,
        4,
        8,
    ]
    picture = frames(1)[0]
    assert glance(picture) is picture and glance((picture,)).size == (24, 20)


def test_a_video_without_its_reader_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    for start in (b"\0\0\0\x20ftypisom", b"\x1aE\xdf\xa3"):
        with pytest.raises(ImportError, match=r'pip install "mmalign\[video\]"'):
            read_clip(start + bytes(64), 9)


@pytest.mark.parametrize(("ending", "codec"), [("mp4", "mpeg4"), ("mov", "mpeg4"), ("webm", "libvpx-vp9")])
def test_videos_are_read(ending: str, codec: str, tmp_path: Path) -> None:
    import av

    file = tmp_path / f"clip.{ending}"
    with av.open(str(file), "w") as container:
        stream = container.add_stream(codec, rate=8)
        stream.width, stream.height, stream.pix_fmt = 32, 32, "yuv420p"
        for frame in frames(17, size=(32, 32)):
            container.mux(stream.encode(av.VideoFrame.from_image(frame)))
        container.mux(stream.encode())
    for value in (f"clip.{ending}", file.read_bytes()):
        clip = read_clip(value, 9, roots=(tmp_path,))
        levels = [float(np.asarray(frame).mean()) for frame in clip]
        assert levels == pytest.approx([10 + 24 * k for k in range(9)], abs=4) and clip[0].size == (32, 32)
        with pytest.raises(BadImage, match="holds 17 frame"):
            read_clip(value, 18, roots=(tmp_path,))
    with pytest.raises(BadImage, match="damaged or truncated video"):
        read_clip(file.read_bytes()[:40], 9)
