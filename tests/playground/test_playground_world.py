"""The world: what a caption says is what a picture shows, row by row, whoever asks."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mmalign.playground import judges, pairs, photographs, raters, world

TEST = photographs.load("test")


def scenes_of(rows: torch.Tensor, seed: int = 5) -> tuple[torch.Tensor, world.Scenes]:
    scenes = world.draw_scenes(TEST.labels, rows, seed=seed)
    return world.compose(TEST, rows, scenes), scenes


def test_every_caption_can_be_read_back() -> None:
    prompts = pairs.prompts()
    assert len(set(prompts.train) | set(prompts.test)) == 8 * 8 * 7 * world.NUM_TEMPLATES
    assert not set(prompts.train) & set(prompts.test)
    for garment in range(8):
        for colour in range(8):
            for background in set(range(8)) - {colour}:
                for template in range(world.NUM_TEMPLATES):
                    text = world.caption(garment, colour, background, template)
                    assert world.read_caption(text) == (garment, colour, background), text


def test_articles() -> None:
    assert world.caption(0, 1, 0) == "an orange t-shirt on a red background"
    assert world.caption(1, 0, 1) == "a pair of red trousers on an orange background"


@pytest.mark.parametrize(
    "text", ["", "a cat", "a red boot", "a boot on a red and blue background", "a red boot and a blue bag"]
)
def test_other_texts_are_refused_by_name(text: str) -> None:
    with pytest.raises(ValueError, match="playground|before the garment"):
        world.read_caption(text)


def test_no_text_asks_the_same_of_training_and_test() -> None:
    prompts = pairs.prompts()
    asked = [{world.read_caption(text) for text in part} for part in (prompts.train, prompts.test)]
    assert not asked[0] & asked[1]
    assert len(prompts.test) >= 500


def test_a_row_is_the_same_alone_and_among_others() -> None:
    together, _ = scenes_of(torch.tensor([3, 1700, 12]))
    for position, row in enumerate((3, 1700, 12)):
        alone, _ = scenes_of(torch.tensor([row]))
        assert torch.equal(alone[0], together[position])


@given(st.lists(st.floats(0, 1), min_size=3, max_size=3))
def test_hsv_round_trip(hsv: list[float]) -> None:
    hue, saturation, value = torch.tensor([hsv[0] * 0.999, 0.05 + 0.95 * hsv[1], 0.05 + 0.95 * hsv[2]]).unbind()
    back = world.rgb_to_hsv(world.hsv_to_rgb(hue, saturation, value))
    turn = (back[0] - hue).abs()
    assert min(turn, 1 - turn) < 1e-4
    torch.testing.assert_close(back[1], saturation, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(back[2], value)


def test_colours_are_measured_as_they_were_tinted() -> None:
    images, scenes = scenes_of(torch.arange(1000))
    seen = world.measure(images)
    assert (seen.colour == scenes.colour).float().mean() > 0.99
    assert (seen.background == scenes.background).float().mean() > 0.999
    assert images.min() >= 0 and images.max() <= 1


def test_a_grey_picture_has_no_colour() -> None:
    seen = world.measure(torch.full((1, 3, 32, 32), 0.5))
    assert (seen.background_distance == 0.5).all() and (seen.garment_share == 0).all()


def test_shipped_photographs_are_the_first_of_the_full_set(monkeypatch: pytest.MonkeyPatch) -> None:
    if photographs.full_set_folder() is None:
        pytest.skip("the full photograph set is not on this machine; the shipped part is all there is")
    full = photographs.load("train")
    monkeypatch.setattr(photographs, "full_set_folder", lambda: None)
    shipped = photographs.load("train")
    assert np.array_equal(shipped.images, full.images[: len(shipped)])
    assert np.array_equal(shipped.labels, full.labels[: len(shipped)])
    with pytest.raises(FileNotFoundError, match="dataset-fashion-mnist"):
        photographs.load("train", require_all=True)


def test_halves_share_no_photograph() -> None:
    a, b = TEST.half("A"), TEST.half("B")
    assert len(a) + len(b) == len(TEST)
    assert np.array_equal(np.sort(np.concatenate([a.labels, b.labels])), np.sort(TEST.labels))


def test_damage_of_zero_leaves_a_picture_alone() -> None:
    images, _ = scenes_of(torch.arange(64))
    harmed, level = judges.damaged(images, torch.Generator().manual_seed(0))
    untouched = level == 0
    assert 10 < untouched.sum() < 54
    torch.testing.assert_close(harmed[untouched], images[untouched], atol=2e-5, rtol=0)
    assert ((harmed - images).abs().mean((1, 2, 3))[level > 0.3] > 1e-4).all()


def test_raters_prefer_and_tie_as_told() -> None:
    rng = np.random.default_rng(0)
    better, worse = torch.full((4000,), 1.0), torch.zeros(4000)
    label = raters.compare(better, worse, rng)
    assert set(label.unique().tolist()) == {0.0, 0.5, 1.0}
    # P(felt > width) for a logistic of scale NOISE around a gap of 1.
    expected = 1 / (1 + np.exp((raters.TIE_WIDTH - 1) / raters.NOISE))
    assert abs((label == 1).float().mean().item() - expected) < 0.03
    assert len(raters.users()) >= 8
    assert len({user.favourite for user in raters.users()}) > 1
