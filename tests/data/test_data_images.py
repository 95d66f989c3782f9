"""Every sort of picture becomes upright 8-bit RGB, or says why it cannot."""

import io
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mmalign.data.images import BadImage, fit, inside, to_pixels, to_rgb

Picture = Callable[..., Image.Image]
Packed = Callable[..., bytes]


def test_transparency_is_laid_on_white(packed: Packed) -> None:
    rgba = Image.new("RGBA", (2, 1), (200, 0, 0, 0))
    rgba.putpixel((1, 0), (200, 0, 0, 255))
    flat = to_rgb(packed(rgba))
    assert flat.mode == "RGB" and flat.getpixel((0, 0)) == (255, 255, 255) and flat.getpixel((1, 0)) == (200, 0, 0)
    half = to_rgb(Image.new("RGBA", (1, 1), (0, 0, 0, 128)))
    assert abs(half.getpixel((0, 0))[0] - 127) <= 1
    assert to_rgb(Image.new("LA", (1, 1), (10, 0))).getpixel((0, 0)) == (255, 255, 255)


def test_palette_with_and_without_transparency(packed: Packed) -> None:
    palette = Image.new("P", (2, 1))
    palette.putpalette([250, 10, 20, 1, 2, 3])
    palette.putpixel((1, 0), 1)
    plain = to_rgb(packed(palette))
    assert [plain.getpixel((x, 0)) for x in (0, 1)] == [(250, 10, 20), (1, 2, 3)]
    clear = to_rgb(packed(palette, "PNG", transparency=1))
    assert [clear.getpixel((x, 0)) for x in (0, 1)] == [(250, 10, 20), (255, 255, 255)]


def test_sixteen_bit_grey_is_scaled_not_clipped(packed: Packed) -> None:
    values = np.array([[0, 257 * 100, 65535]], dtype=np.uint16)
    grey = to_rgb(packed(Image.fromarray(values)))
    assert [grey.getpixel((x, 0)) for x in range(3)] == [(0, 0, 0), (100, 100, 100), (255, 255, 255)]
    with pytest.raises(BadImage, match="floating-point"):
        to_rgb(Image.fromarray(np.zeros((2, 2), dtype=np.float32)))


def test_exif_orientation_is_honoured(picture: Picture, packed: Packed) -> None:
    upright = picture(4, 6)
    exif = Image.Exif()
    exif[0x0112] = 6
    stored = packed(upright.transpose(Image.Transpose.ROTATE_90), "PNG", exif=exif.tobytes())
    assert np.array_equal(np.asarray(to_rgb(stored)), np.asarray(upright))


def test_animation_gives_its_first_frame(packed: Packed) -> None:
    frames = [Image.new("RGB", (3, 3), colour) for colour in ("red", "blue")]
    for format in ("GIF", "WEBP"):
        stored = packed(frames[0], format, save_all=True, append_images=frames[1:], duration=50, loop=0)
        red, _, blue = to_rgb(stored).getpixel((1, 1))
        assert red > 200 and blue < 50


@pytest.mark.parametrize("mode", ["1", "L", "CMYK", "YCbCr", "RGB", "P"])
def test_other_modes_become_rgb(mode: str, picture: Picture) -> None:
    assert to_rgb(picture().convert(mode)).mode == "RGB"


def test_damaged_bytes_are_named_as_such(picture: Picture, packed: Packed) -> None:
    jpeg = packed(picture(64, 64), "JPEG")
    for broken in (jpeg[: len(jpeg) // 2], jpeg[:20], b"nothing", packed(picture())[:60]):
        with pytest.raises(BadImage, match="damaged"):
            to_rgb(broken)
    for nothing in (None, b"", {"bytes": None, "path": None}):
        with pytest.raises(BadImage, match="no image"):
            to_rgb(nothing)
    with pytest.raises(BadImage, match="got int"):
        to_rgb(7)


def test_a_format_that_runs_a_program_is_not_opened(picture: Picture) -> None:
    buffer = io.BytesIO()
    picture().save(buffer, "EPS")
    with pytest.raises(BadImage, match="known format"):
        to_rgb(buffer.getvalue())


def test_pixels_are_limited(packed: Packed) -> None:
    large = packed(Image.new("1", (600, 600)))
    with pytest.raises(BadImage, match="600×600 is more than 1000 pixels"):
        to_rgb(large, max_pixels=1000)
    # A header that promises 20,000 × 20,000 pixels: refused before anything of that size is made.
    header = b"IHDR" + struct.pack(">II", 20_000, 20_000) + large[24:29]
    bomb = large[:12] + header + struct.pack(">I", zlib.crc32(header)) + large[33:]
    with pytest.raises(BadImage, match="limit of .* pixels|more than"):
        to_rgb(bomb)
    with pytest.raises(BadImage, match="too long and thin"):
        fit(Image.new("RGB", (1, 60000)), 64, 64)


def test_paths_never_leave_their_folder(tmp_path: Path, packed: Packed, picture: Picture) -> None:
    inner, outer = tmp_path / "set", tmp_path / "secret.png"
    inner.mkdir()
    for place in (outer, inner / "a.png"):
        place.write_bytes(packed(picture()))
    (inner / "link.png").symlink_to(outer)
    (inner / "folder").symlink_to(tmp_path)
    (inner / "near.png").symlink_to(inner / "a.png")
    assert inside("a.png", [inner], False) == inner / "a.png"
    assert to_rgb("near.png", roots=[inner]).size == (24, 20)
    escapes = ("../secret.png", str(outer), "link.png", "folder/secret.png", "..\\secret.png", "C:\\secret.png")
    for escape in escapes:
        with pytest.raises(BadImage, match="leaves|leads out"):
            inside(escape, [inner], False)
    for missing in ("b.png", "folder/none.png", "a" * 5000, "nul\0.png", "folder"):
        with pytest.raises(BadImage):
            inside(missing, [inner], False)
    with pytest.raises(BadImage, match="pass root="):
        to_rgb("a.png")
    # Data in memory may name absolute paths, still inside the given folder only.
    assert inside(inner / "a.png", [inner], True) == inner / "a.png"
    with pytest.raises(BadImage, match="leads out"):
        inside(outer, [inner], True)


@pytest.mark.parametrize(
    ("size", "target", "expected"),
    [
        ((20, 24), (16, 16), (20, 24, 0, 1, 16, 16)),
        ((30, 18), (16, 16), (30, 18, 5, 0, 16, 16)),
        ((16, 16), (16, 16), (16, 16, 0, 0, 16, 16)),
        ((8, 8), (16, 16), (8, 8, 0, 0, 16, 16)),
        ((40, 40), (16, 32), (40, 40, 8, 0, 16, 32)),
    ],
)
def test_fit_covers_crops_the_centre_and_tells_the_truth(
    size: tuple[int, int], target: tuple[int, int], expected: tuple[int, ...], picture: Picture
) -> None:
    cropped, sizes = fit(picture(*size), *target)
    assert (cropped.height, cropped.width) == target and sizes == expected


def test_fit_leaves_a_picture_of_the_right_size_alone(picture: Picture) -> None:
    image = picture(16, 16)
    assert np.array_equal(np.asarray(fit(image, 16, 16)[0]), np.asarray(image))
    pixels = to_pixels(Image.new("RGB", (2, 3), (0, 255, 51)))
    assert pixels.shape == (3, 3, 2)
    torch.testing.assert_close(pixels[:, 0, 0], torch.tensor([-1.0, 1.0, -0.6]))


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="only Linux lists a process's open files")
def test_a_bad_file_is_closed_at_once(tmp_path: Path, packed: Packed, picture: Picture) -> None:
    """Also while its error is still held: a pass over many damaged files runs out of handles otherwise."""
    files = {"cut.png": packed(picture(64, 64))[:3000], "huge.png": packed(Image.new("1", (300, 300)))}
    errors = []
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(BadImage) as caught:
            to_rgb(name, roots=[tmp_path], max_pixels=50_000)
        errors.append(caught.value)
    still_open = [
        link.readlink().name for link in Path("/proc/self/fd").iterdir() if link.is_symlink() and link.exists()
    ]
    assert len(errors) == 2 and not set(files) & set(still_open)
