"""Aspect-ratio buckets: which shape a pair gets, and that its latents and sizes are true."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tiny import tiny_pipeline

from mmalign.data import BadRow, EncodedPairs, encode_pairs, load_pairs
from mmalign.data.buckets import Bucket, buckets_of, nearest
from mmalign.data.images import BadImage, fit, to_pixels
from mmalign.denoisers import Denoiser, adapter_for

Picture = Callable[..., Image.Image]
# (height, width) of the two pictures of each pair; at a resolution of 16 there are the shapes 20×12, 16×16 and 12×20.
SIZES = [
    ((40, 24), (30, 18)),
    ((24, 24), (16, 16)),
    ((18, 30), (22, 36)),
    ((24, 40), (24, 30)),
    ((16, 17), (17, 16)),
    ((60, 14), (20, 12)),
    ((20, 34), (12, 20)),
]
SHAPE_OF = [(20, 12), (16, 16), (12, 20), (12, 20), (16, 16), None, (12, 20)]


@pytest.fixture(scope="module", params=["sd", "sdxl"])
def denoiser(request: pytest.FixtureRequest) -> Denoiser:
    return adapter_for(tiny_pipeline(request.param))


@pytest.fixture
def pairs(picture: Picture) -> list[dict[str, Any]]:
    return [
        {"prompt": f"row {row}", "chosen": picture(*one, 2 * row), "rejected": picture(*other, 2 * row + 1)}
        for row, (one, other) in enumerate(SIZES)
    ]


@pytest.fixture
def encode(pairs: list[dict[str, Any]], denoiser: Denoiser, tmp_path: Path) -> Callable[..., EncodedPairs]:
    def call(**options: Any) -> EncodedPairs:
        given_: dict[str, Any] = {"resolution": 16, "cache_dir": tmp_path, "progress": False, "latent_mode": "mean"}
        return encode_pairs(load_pairs(pairs), denoiser, **(given_ | {"batch_size": 2} | options))

    return call


def family(factor: int, patch: int) -> Any:
    """What buckets_of asks a denoiser."""
    return SimpleNamespace(
        pixels_per_latent=factor,
        patch=patch,
        latent_shape=lambda height, width, frames: (4, height // factor, width // factor),
    )


def test_the_shapes_of_a_megapixel() -> None:
    tall = [(1344, 768), (1280, 832), (1152, 896), (1088, 960)]
    expected = [*tall, (1024, 1024), *[(w, h) for h, w in reversed(tall)]]
    assert [(shape.height, shape.width) for shape in buckets_of(family(8, 1), 1024, 1024)] == expected
    assert {shape.latent for shape in buckets_of(family(8, 2), 1024, 1024)} >= {(4, 168, 96), (4, 128, 128)}


@settings(deadline=None)
@given(st.integers(1, 20), st.integers(1, 20), st.sampled_from([1, 2, 4, 8]), st.sampled_from([1, 2]))
def test_shapes_have_about_one_area_and_can_be_read(high: int, wide: int, factor: int, patch: int) -> None:
    multiple = 8 * factor * patch
    height, width = high * multiple, wide * multiple
    shapes = buckets_of(family(factor, patch), height, width)
    assert (height, width) in [(shape.height, shape.width) for shape in shapes]
    for shape in shapes:
        assert shape.height % (factor * patch) == shape.width % (factor * patch) == 0
        if (shape.height, shape.width) != (height, width):
            assert max(shape.height, shape.width) <= 2 * min(shape.height, shape.width)
            # Half a step of the longer side at most, and the shorter one has at least four steps of 2 … 64 pixels.
            assert abs(shape.height * shape.width / (height * width) - 1) < 0.35


def test_a_pair_gets_the_shape_between_its_two(picture: Picture) -> None:
    shapes = buckets_of(family(8, 1), 1024, 1024)
    one, other = picture(10, 20), picture(20, 20)
    between = nearest(shapes, (one, other))
    # √2 lies nearer to 1280/832 than to 1152/896.
    assert (between.height, between.width) == (832, 1280)
    assert nearest(shapes, (other, one)) == between
    square = nearest(shapes, (picture(20, 30), picture(30, 20)))
    assert (square.height, square.width) == (1024, 1024)
    with pytest.raises(BadImage, match="50×10 would lose .* in the pair's shape 1344×768"):
        nearest(shapes, (picture(10, 50), picture(10, 21)))
    with pytest.raises(BadImage, match="differ too much"):
        nearest(shapes, (picture(10, 30), picture(30, 10)))


def test_both_sides_share_a_shape_and_keep_their_true_sizes(
    encode: Callable[..., EncodedPairs], pairs: list[dict[str, Any]], denoiser: Denoiser
) -> None:
    encoded = encode(aspect_buckets=True)
    good = [row for row, shape in enumerate(SHAPE_OF) if shape is not None]
    assert encoded.rows.tolist() == good and encoded.bucket is not None
    assert [encoded.shapes[place] for place in encoded.bucket] == [
        (4, h // 2, w // 2) for h, w in filter(None, SHAPE_OF)
    ]
    (bad,) = encoded.bad_rows
    assert (
        isinstance(bad, BadRow)
        and (bad.row, bad.field) == (5, "chosen and rejected")
        and "14×60 would lose" in bad.reason
    )
    for place, row in enumerate(good):
        at, shape = torch.tensor([place]), SHAPE_OF[row]
        assert shape is not None
        for side, name in enumerate(("chosen", "rejected")):
            cropped, sizes = fit(pairs[row][name], *shape)
            told = encoded.sizes(at, side)[0].tolist()
            assert told == list(sizes) and tuple(told[:2]) == SIZES[row][side] and tuple(told[4:]) == shape
            expected = denoiser.encode_image(to_pixels(cropped)[None])[0]
            torch.testing.assert_close(encoded.latents(at)[0, side], expected, rtol=1e-4, atol=1e-5)
    assert encoded.latents(torch.tensor([0])).shape == (1, 2, 4, 10, 6)
    assert encoded.latents(torch.tensor([2, 3, 5])).shape == (3, 2, 4, 6, 10)
    with pytest.raises(ValueError, match="latents of several shapes: .*ask for those of one bucket"):
        encoded.latents(torch.tensor([0, 1]))


def test_the_cache_knows_whether_it_has_buckets(encode: Callable[..., EncodedPairs]) -> None:
    plain, bucketed = encode(), encode(aspect_buckets=True)
    assert plain.key != bucketed.key and "aspect_buckets" not in plain.manifest.parts
    assert plain.bucket is None and len(plain) == 7 and plain.latents(torch.arange(7)).shape == (7, 2, 4, 8, 8)
    assert encode(aspect_buckets=True, batch_size=5, shard_rows=2).key == bucketed.key
    # Without buckets nothing of the key is new: these are its parts as they were before there were any.
    known = {
        "format",
        "source",
        "family",
        "empty_prompt",
        "resolution",
        "crop",
        "resize",
        "dtype",
        "latent_mode",
        "tiled",
        "seed",
    }
    assert known <= plain.manifest.parts.keys()
    assert all(part.startswith(("vae", "text_encoder", "tokenizer")) for part in plain.manifest.parts.keys() - known)


def test_batches_and_shards_change_no_latent(encode: Callable[..., EncodedPairs], tmp_path: Path) -> None:
    options: dict[str, Any] = {"aspect_buckets": True, "latent_mode": "sample"}
    one = encode(**options)
    other = encode(**options, cache_dir=tmp_path / "b", batch_size=1, shard_rows=2, workers=1)
    for place in range(len(one)):
        at = torch.tensor([place])
        torch.testing.assert_close(one.latents(at), other.latents(at), rtol=1e-4, atol=1e-5)
    assert torch.equal(one.bucket, other.bucket)


def test_one_shape_alone_is_as_without(picture: Picture, denoiser: Denoiser, tmp_path: Path) -> None:
    rows = [{"prompt": "x", "chosen": picture(20, 20, n), "rejected": picture(24, 24, n + 9)} for n in range(3)]
    options: dict[str, Any] = {"resolution": 16, "cache_dir": tmp_path, "progress": False}
    plain = encode_pairs(load_pairs(rows), denoiser, **options)
    bucketed = encode_pairs(load_pairs(rows), denoiser, aspect_buckets=True, **options)
    assert torch.equal(plain.latents(torch.arange(3)), bucketed.latents(torch.arange(3)))
    assert isinstance(buckets_of(denoiser, 16, 16)[0], Bucket)
    # So small that no other shape can be read.
    side = denoiser.pixels_per_latent * denoiser.patch
    assert len(buckets_of(denoiser, side, side)) == 1
    options["resolution"] = side
    plain = encode_pairs(load_pairs(rows), denoiser, **options)
    bucketed = encode_pairs(load_pairs(rows), denoiser, aspect_buckets=True, **options)
    assert torch.equal(plain.latents(torch.arange(3)), bucketed.latents(torch.arange(3))) and bucketed.bucket is None
