"""Perturbed clips: one block at the same place in every frame, and frames out of order as far as was asked."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from mmalign.data.perturb import LIGHT, perturb, shuffled


def _frames(number: int, width: int, height: int) -> list[Image.Image]:
    """Frame i is all (i, 0, 0), which no block is."""
    return [Image.new("RGB", (width, height), (at, 0, 0)) for at in range(number)]


@given(
    width=st.integers(16, 60),
    height=st.integers(16, 60),
    number=st.integers(1, 9),
    bounds=st.tuples(st.floats(0, 1), st.floats(0, 1)).map(sorted),
    shuffle=st.sampled_from(["none", "local", "global"]),
    seed=st.integers(0, 2**31),
)
def test_one_light_rectangle_within_bounds_at_one_place_in_every_frame(
    width: int, height: int, number: int, bounds: list[float], shuffle: str, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    frames = _frames(number, width, height)
    hidden = perturb(frames, area=tuple(bounds), shuffle=shuffle, generator=generator)
    masks = [(np.asarray(frame) == LIGHT).all(-1) for frame in hidden]
    assert all(np.array_equal(mask, masks[0]) for mask in masks)
    rows, columns = np.flatnonzero(masks[0].any(1)), np.flatnonzero(masks[0].any(0))
    assert masks[0].sum() == len(rows) * len(columns)
    # The block's sides are whole pixels.
    slack = 0.5 / min(width, height) + 0.5 / width + 1e-9
    assert bounds[0] - slack <= masks[0].mean() <= bounds[1] + slack
    if not masks[0].all():
        order = [int(np.asarray(frame)[~masks[0]][0, 0]) for frame in hidden]
        assert sorted(order) == list(range(number))
    assert all(np.asarray(frame).max() == at for at, frame in enumerate(frames)), (
        "the frames given are left as they were"
    )


@given(number=st.integers(1, 40), window=st.integers(0, 6), seed=st.integers(0, 2**31))
def test_a_local_shuffle_moves_no_frame_farther_than_its_window(number: int, window: int, seed: int) -> None:
    order = shuffled(number, "local", window=window, generator=torch.Generator().manual_seed(seed))
    assert sorted(order.tolist()) == list(range(number))
    assert (order - torch.arange(number)).abs().max() <= window


def test_a_local_shuffle_reaches_its_window_and_a_global_one_goes_beyond() -> None:
    generator = torch.Generator().manual_seed(0)
    places = torch.arange(20)

    def farthest(shuffle: str) -> int:
        orders = [shuffled(20, shuffle, window=3, generator=generator) for _ in range(200)]
        return max(int((order - places).abs().max()) for order in orders)

    assert farthest("local") == 3 and farthest("global") == 19 and farthest("none") == 0


def test_the_same_generator_gives_the_same_clip() -> None:
    once, again = (perturb(_frames(8, 32, 32), generator=torch.Generator().manual_seed(7)) for _ in range(2))
    assert [frame.tobytes() for frame in once] == [frame.tobytes() for frame in again]


@pytest.mark.parametrize("area", [(0.5, 0.25), (-0.1, 0.2), (0.3, 1.1)])
def test_bounds_that_no_share_keeps(area: tuple[float, float]) -> None:
    with pytest.raises(ValueError, match=r"two rising shares in \[0, 1\]"):
        perturb(_frames(2, 32, 32), area=area, generator=torch.Generator())


def test_shuffles_that_cannot_be() -> None:
    with pytest.raises(ValueError, match="none, local or global"):
        shuffled(4, "far", generator=torch.Generator())
    with pytest.raises(ValueError, match="window must not be negative, got -3"):
        shuffled(4, "local", window=-3, generator=torch.Generator())
