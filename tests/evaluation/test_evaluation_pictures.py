"""The side-by-side sheet, and the cheap statistics that show a model gaming its scorer."""

from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from mmalign.evaluation import moved_statistics, side_by_side
from mmalign.evaluation.grid import _font, fit, wrap
from mmalign.evaluation.image_statistics import STATISTICS, drift, side_statistics


def picture(size, colour="#c03020"):
    return Image.new("RGB", size, colour)


def test_small_pictures_are_enlarged_by_whole_factors_without_smoothing():
    noise = np.random.default_rng(0).integers(0, 256, size=(32, 32, 3), dtype=np.uint8)
    shown = fit(Image.fromarray(noise), 128)
    assert shown.size == (128, 128)
    assert np.array_equal(np.asarray(shown)[::4, ::4], noise)
    assert fit(picture((50, 25)), 128).size == (100, 50)
    assert fit(picture((1024, 512)), 512).size == (512, 256)


def test_every_picture_and_caption_is_on_the_sheet():
    rows = [[picture((32, 32), "#ff0000"), picture((32, 32), "#0000ff")] for _ in range(3)]
    sheet = side_by_side(rows, ["a red sneaker", "", "word " * 200], ["base", "aligned"])
    pixels = np.asarray(sheet).astype(int)
    red = (pixels == [255, 0, 0]).all(axis=-1).sum()
    blue = (pixels == [0, 0, 255]).all(axis=-1).sum()
    assert red == blue == 3 * 128 * 128
    assert (pixels.sum(axis=-1) < 200).sum() > 200, "captions are drawn in dark ink"
    assert sheet.width == 2 * 24 + 2 * 128 + 12


def test_several_rows_stand_beside_each_other():
    rows = [[picture((32, 32)), picture((32, 32))] for _ in range(5)]
    tall = side_by_side(rows, ["caption"] * 5, ["base", "aligned"])
    wide = side_by_side(rows, ["caption"] * 5, ["base", "aligned"], rows_per_line=3)
    assert wide.width > 2.5 * tall.width
    assert wide.height < 0.5 * tall.height


def test_captions_are_wrapped_and_cut_with_a_mark():
    font = _font(15)
    lines = wrap("a very long prompt " * 20, font, 200, 3)
    assert len(lines) == 3 and lines[-1].endswith("…")
    assert all(font.getlength(line) <= 200 for line in lines)
    unbroken = wrap("x" * 300, font, 200, 99)
    assert "".join(unbroken) == "x" * 300
    assert all(font.getlength(line) <= 200 for line in unbroken)
    assert wrap("", font, 200, 3) == [""]


def test_uneven_rows_are_refused():
    with pytest.raises(ValueError, match="Row 0 has 1 pictures"):
        side_by_side([[picture((8, 8))]], ["a"], ["base", "aligned"])
    with pytest.raises(ValueError, match="one caption for every row"):
        side_by_side([[picture((8, 8))]], [], ["base"])


def stored(folder, arrays):
    files = []
    for number, array in enumerate(arrays):
        files.append(folder / f"{number}.png")
        Image.fromarray(np.asarray(array, dtype=np.uint8)).save(files[-1])
    return files


def test_statistics_of_known_pictures(tmp_path):
    grey = np.full((32, 32, 3), 128)
    red = np.zeros((32, 32, 3))
    red[..., 0] = 255
    stripes = np.zeros((32, 32, 3))
    stripes[:, ::2] = 255
    found = side_statistics(stored(tmp_path, [grey, red, stripes]), ["a", "b", "c"])
    values, thumbnails = found.values, found.thumbnails
    assert set(values) == set(STATISTICS) - {"drift"}
    assert values["brightness"] == pytest.approx([128 / 255, 0.299, 0.5], abs=1e-6)
    assert values["saturation"] == pytest.approx([0, 1, 0])
    assert values["contrast"] == pytest.approx([0, 0, 0.5], abs=1e-6)
    assert values["edge density"] == pytest.approx([0, 0, 0.5])
    assert thumbnails.shape == (3, 16 * 16 * 3)
    distance = np.sqrt([np.mean((thumbnails[0] - other) ** 2) for other in thumbnails[1:]])
    assert values["diversity"][0] == pytest.approx(np.sqrt(np.mean(distance**2)))


def test_near_duplicates_count_between_prompts_only(tmp_path):
    grey, nearly, other = np.full((32, 32, 3), 128), np.full((32, 32, 3), 130), np.full((32, 32, 3), 200)
    files = stored(tmp_path, [grey, nearly, other])
    assert side_statistics(files, ["a", "b", "c"]).values["near-duplicates"].tolist() == [1, 1, 0]
    assert side_statistics(files, ["a", "a", "c"]).values["near-duplicates"].tolist() == [0, 0, 0]


def test_diversity_within_a_prompt_is_the_distance_between_its_own_pictures(tmp_path):
    levels = (0, 51, 153, 255)
    files = stored(tmp_path, [np.full((32, 32, 3), level) for level in levels])
    values = side_statistics(files, ["a", "a", "a", "b"]).values
    within = values["diversity within a prompt"]
    assert within[:3] == pytest.approx(np.sqrt([(0.2**2 + 0.6**2) / 2, (0.2**2 + 0.4**2) / 2, (0.6**2 + 0.4**2) / 2]))
    assert np.isnan(within[3]), "a prompt with one picture has none"
    assert values["diversity"] == pytest.approx([1, 0.8, 0.4, np.sqrt((1 + 0.8**2 + 0.4**2) / 3)])
    assert np.isnan(side_statistics(files, ["a"] * 4).values["diversity"]).all()


def test_what_moved_is_pointed_out_in_words(make_result):
    base = np.random.default_rng(0).integers(60, 140, size=40)
    darker = make_result([(level, level + 60 + level % 3) for level in base])
    by_name = {statistic.name: statistic for statistic in darker.statistics}
    brightness = by_name["brightness"]
    assert brightness.base_spread == pytest.approx(np.std((0.299 - 0.587) * base / 255))
    line = next(
        line for line in moved_statistics(darker) if line.startswith("Pictures became darker: \N{MINUS SIGN}0.0")
    )
    size = abs(brightness.difference.value) / brightness.base_spread
    assert line.endswith(f", {size:.2g} times the base's standard deviation.")
    assert not replace(brightness, base_spread=brightness.base_spread * size * 4.01).moved
    assert replace(brightness, base_spread=brightness.base_spread * size * 3.99).moved
    assert not replace(brightness, difference=replace(brightness.difference, low=-1.0, high=1.0)).moved
    assert "diversity within a prompt" not in by_name and not by_name["drift"].moved
    noise = np.random.default_rng(1).integers(-40, 41, size=40)
    assert (
        moved_statistics(make_result([(level, level + shift) for level, shift in zip(base, noise, strict=True)])) == []
    )


def test_what_differs_by_rounding_only_has_not_moved(make_result):
    flat = make_result([(100 + row % 3, 100 + row % 3) for row in range(30)])
    contrast = next(statistic for statistic in flat.statistics if statistic.name == "contrast")
    assert contrast.base_spread == 0
    difference = replace(contrast.difference, value=2e-17, low=1e-17, high=3e-17)
    assert not replace(contrast, difference=difference).moved
    assert replace(contrast, difference=replace(difference, value=0.1, low=0.05, high=0.2)).moved


def test_new_near_duplicates_are_pointed_out_although_the_base_has_no_spread(make_result):
    result = make_result([(8 * row, 100) for row in range(30)])
    assert any(line.startswith("Pictures became more often near-duplicates") for line in moved_statistics(result))


def test_drift_is_zero_for_the_same_pictures_and_known_for_shifted_ones():
    base = np.random.default_rng(0).random((4, 12))
    assert drift(base, base).tolist() == [0] * 4
    assert drift(base, base + 0.25) == pytest.approx([0.25] * 4)
