"""Pictures of any sort to upright 8-bit RGB, safely; and the one resize and crop that training uses.

Colour profiles are not applied: bytes are taken as sRGB, as every published trainer does.
"""

from __future__ import annotations

import io
import struct
import threading
import warnings
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path, PureWindowsPath
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

if TYPE_CHECKING:
    from PIL import Image

MAX_PIXELS = 2**26
RESIZE_FILTER = "lanczos"
# No format that runs a program (EPS) or holds no pixels of its own.
FORMATS = ("JPEG", "PNG", "WEBP", "AVIF", "BMP", "GIF", "TIFF", "PPM", "JPEG2000")
# How files of these formats are called.
ENDINGS = frozenset("png jpg jpeg webp avif bmp gif tif tiff ppm jp2".split())
_loading = threading.Lock()
_DAMAGED = (OSError, SyntaxError, ValueError, EOFError, IndexError, OverflowError, struct.error, zlib.error)


class BadImage(ValueError):
    """A picture that cannot be used; the message is the reason, without its row."""


def to_rgb(
    value: Any, *, roots: Sequence[Path] = (), absolute: bool = False, max_pixels: int = MAX_PIXELS
) -> Image.Image:
    """Bytes, a PIL image, a path under one of `roots`, or datasets' {"bytes", "path"} → upright 8-bit RGB.

    Transparency is laid on white, 16-bit grey scaled, of an animation the first frame taken. Raises BadImage.
    """
    from PIL import Image

    if isinstance(value, Image.Image):
        # The first load of a lazily opened picture moves a file position, and two rows may share one object.
        with _loading:
            return loaded(value, max_pixels)
    # Closed here, not whenever the memory is collected: a pass over damaged files must not run out of handles.
    with opened(value, roots, absolute) as image:
        return loaded(image, max_pixels)


def fit(image: Image.Image, height: int, width: int) -> tuple[Image.Image, tuple[int, int, int, int, int, int]]:
    """Resize (Lanczos, aspect kept) until it just covers height × width, then crop the centre.

    With it the six numbers SDXL is conditioned on: original height and width, top and left of the crop in the resized
    picture, target height and width.
    """
    from PIL import Image

    resized = covering_size(image, height, width)
    top, left = (resized[0] - height) // 2, (resized[1] - width) // 2
    sizes = (image.height, image.width, top, left, height, width)
    if (image.height, image.width) != resized:
        image = image.resize((resized[1], resized[0]), Image.Resampling.LANCZOS)
    return image.crop((left, top, left + width, top + height)), sizes


def covering_size(image: Image.Image, height: int, width: int) -> tuple[int, int]:
    """The (height, width) to which `fit` resizes before it crops; BadImage where that would be out of all proportion."""
    scale = max(height / image.height, width / image.width)
    resized = max(height, round(image.height * scale)), max(width, round(image.width * scale))
    if resized[0] * resized[1] > MAX_PIXELS:
        raise BadImage(f"{image.width}×{image.height} is too long and thin to be cropped to {width}×{height}")
    return resized


def to_pixels(image: Image.Image) -> Float[Tensor, "3 H W"]:
    """8-bit RGB to float32 in [−1, 1]."""
    return torch.from_numpy(np.array(image)).movedim(-1, 0).float() / 127.5 - 1


def inside(text: str | Path, roots: Sequence[Path], absolute: bool, *, folders: bool = False) -> Path:
    """The file that a data set's path names, which must lie in one of the folders; no way out by .., / or a link.

    folders: a folder below one of them will do as well.
    """
    if not roots:
        raise BadImage(f"holds text or a path ({_quote(text)}) where a picture is expected; pass root=<its folder>")
    as_windows = PureWindowsPath(text)
    if ".." in as_windows.parts or (not absolute and (Path(text).is_absolute() or as_windows.anchor)):
        raise BadImage(f"path {_quote(text)} leaves the data set's folder: use a relative path without '..'")
    for root in roots:
        candidate = root / text
        try:
            resolved = candidate.resolve()
            found = resolved.is_file() or (folders and resolved.is_dir() and resolved != root.resolve())
        except (OSError, ValueError, RuntimeError) as error:
            # Without the folder, so that the same data say the same anywhere.
            reason = error.strerror if isinstance(error, OSError) and error.strerror else _short(error)
            raise BadImage(f"path {_quote(text)} cannot be read ({reason})") from error
        if not resolved.is_relative_to(root.resolve()):
            continue
        if found:
            return resolved
        folder = " is a folder (of frames? only video models read clips)" if resolved.is_dir() else ""
        raise BadImage(f"no such file: {_quote(text)}{folder}")
    raise BadImage(f"path {_quote(text)} leads out of the data set's folder; copy the file into it")


def content(value: Any) -> Any:
    """What datasets' {"bytes", "path"} holds; any other value as it is."""
    if isinstance(value, Mapping):
        return value.get("bytes") if value.get("bytes") is not None else value.get("path")
    return value


def opened(value: Any, roots: Sequence[Path], absolute: bool) -> Image.Image:
    """The picture file or bytes, opened and not decoded; the caller closes it. Raises BadImage."""
    from PIL import Image, UnidentifiedImageError

    value = content(value)
    if value is None:
        raise BadImage("no image (None)")
    if isinstance(value, str | Path):
        source: Any = inside(value, roots, absolute)
    elif isinstance(value, bytes | bytearray | memoryview):
        if not value:
            raise BadImage("no image (no bytes)")
        source = io.BytesIO(value)
    else:
        clip = " (a clip, which only video models read)" if isinstance(value, list | tuple) else ""
        raise BadImage(f"expected an image, its bytes or a path, got {type(value).__name__}{clip}")
    try:
        with warnings.catch_warnings():
            # Our own limit is told with row and field; Pillow's warning is not.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            return Image.open(source, formats=_known_formats())
    except Image.DecompressionBombError as error:
        raise BadImage(str(error)) from error
    except UnidentifiedImageError as error:
        # Its own message names an object in memory, which differs from run to run.
        raise BadImage(f"not an image of a known format ({', '.join(_known_formats())}), or damaged") from error
    except _DAMAGED as error:
        raise BadImage(f"damaged or truncated image ({_short(error)})") from error


def loaded(image: Image.Image, max_pixels: int) -> Image.Image:
    """The picture (of an animation, the frame that was sought) as upright RGB. Raises BadImage."""
    from PIL import ImageOps

    width, height = image.size
    if width * height > max_pixels:
        raise BadImage(f"{width}×{height} is more than {max_pixels} pixels, the limit: shrink it")
    with damage_told():
        image.load()
        return _flatten(ImageOps.exif_transpose(image))


@contextmanager
def damage_told() -> Iterator[None]:
    """What Pillow raises over a damaged picture, as a BadImage."""
    from PIL import Image

    try:
        yield
    except Image.DecompressionBombError as error:
        raise BadImage(str(error)) from error
    except BadImage:
        raise
    except _DAMAGED as error:
        raise BadImage(f"damaged or truncated image ({_short(error)})") from error


@cache
def _known_formats() -> tuple[str, ...]:
    """Those of our formats that this build of Pillow reads; it stumbles over the others."""
    from PIL import Image

    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def _flatten(image: Image.Image) -> Image.Image:
    """Any Pillow mode to RGB: 16-bit grey scaled to 8, transparency on white."""
    from PIL import Image

    if image.mode.startswith("I"):
        values = np.asarray(image)
        if values.min() < 0 or values.max() > 65535:
            raise ValueError("32-bit integer pixels have no defined range")
        return Image.fromarray(np.round(values / 257).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise ValueError("floating-point pixels have no defined range")
    if "A" in image.mode or "a" in image.mode or "transparency" in image.info:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    # A copy without the file's metadata, also where the mode is RGB already.
    return image.convert("RGB").copy()


def _quote(text: str | Path) -> str:
    shown = str(text)
    return repr(shown if len(shown) <= 80 else shown[:77] + "…")


def _short(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0][:120]
