"""The scene world: what a sentence says is true of its cell, captions are as long as they claim, and judges read cell by cell."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mmalign.playground import (
    photographs,
    scene_base,
    scene_gaze,
    scene_judges,
    scene_prompts,
    scene_text,
    scenes,
    world,
)

TEST = photographs.load("test")
MODELS = {"vae", "unet", "text_encoder", "tokenizer"}
PROMPTS = scene_prompts.prompts()
NUM_WORDINGS = len(scenes._WORDINGS)


def drawn(rows: torch.Tensor, seed: int = 5) -> tuple[torch.Tensor, world.Scenes]:
    cells = scenes.draw_scenes(TEST.labels, rows, seed=seed)
    return scenes.compose(TEST, rows, cells), cells


def to_pil(images: torch.Tensor) -> list:
    from torchvision.transforms.functional import to_pil_image

    return [to_pil_image(image) for image in images]


@given(
    st.integers(0, 7),
    st.integers(0, 7),
    st.integers(1, 7),
    st.integers(0, 3),
    st.integers(0, NUM_WORDINGS - 1),
    st.lists(st.booleans(), min_size=7, max_size=7),
)
def test_every_sentence_can_be_read_back(
    garment: int, colour: int, turn: int, place: int, wording: int, told: list[bool]
) -> None:
    cells = scenes.draw_scenes(TEST.labels, torch.tensor([0]), seed=1)
    background = (colour + turn) % 8
    asked = {"garment": garment, "colour": colour, "background": background}
    cells = replace(cells, **{name: torch.full((4,), index) for name, index in asked.items()})
    text = scenes.sentence(cells, place, wording, told)
    assert scenes.read_caption(text) == [scenes.Asked(place, garment, colour, background)], text
    assert text.endswith(".") and text.count(".") == 1 and text[0].isupper() and " a orange" not in text
    words = text.lower().replace(",", "").replace(".", "").split()
    for word, tell in zip(scenes.properties(cells, place), told, strict=True):
        assert word in words or not tell


def test_other_texts_are_refused_by_name() -> None:
    for text in (
        "",
        "a red boot on a blue background.",
        "Top left: a red boot.",
        "Top left: a boot on a blue background.",
    ):
        with pytest.raises(ValueError, match="no sentence of the playground's scenes") as caught:
            scenes.read_caption("Top left: a red bag on a pink background. " + text if text else text)
        assert "\n" not in str(caught.value)


def test_each_place_is_where_its_name_says() -> None:
    images, cells = drawn(torch.arange(3))
    alone = world.compose(TEST, torch.arange(12), cells).unflatten(0, (3, 4))
    corners = {"top left": (0, 0), "top right": (0, 32), "bottom left": (32, 0), "bottom right": (32, 32)}
    for number, place in enumerate(scenes.PLACES):
        y, x = corners[place]
        assert torch.equal(images[:, :, y : y + 32, x : x + 32], alone[:, number])
    assert torch.equal(scenes.join(scenes.split(images)), images)


def test_a_row_is_the_same_alone_and_among_others() -> None:
    together, _ = drawn(torch.tensor([3, 700, 12]))
    for position, row in enumerate((3, 700, 12)):
        alone, _ = drawn(torch.tensor([row]))
        assert torch.equal(alone[0], together[position])


def test_properties_are_true_of_the_pixels() -> None:
    rows = torch.arange(400)
    images, cells = drawn(rows)
    pixels, seen = scenes.split(images), world.measure(scenes.split(images))
    words = [scenes.properties(cells, cell) for cell in range(len(cells))]
    background = pixels[:, :, :2, :2].flatten(2).median(2).values
    _, vividness, light = world.rgb_to_hsv(background)
    far = (pixels - pixels[:, :, :1, :1]).norm(dim=1) > 0.2
    line = torch.arange(32.0)
    height = (far.any(2) * line).sum(1) / far.any(2).sum(1).clamp(min=1)
    side = (far.any(1) * line).sum(1) / far.any(1).sum(1).clamp(min=1)

    def mean(values: torch.Tensor, position: int, word: str) -> float:
        return float(values[torch.tensor([told[position] == word for told in words])].mean())

    size = [mean(seen.garment_share, 0, word) for word in ("small", "medium", "large")]
    assert size[0] < size[1] < size[2]
    of_background = [(told[3], told[4]) for told in words]
    assert of_background == [
        ("vivid" if v > 0.775 else "pale", "bright" if b > 0.825 else "dim")
        for v, b in zip(vividness.tolist(), light.tolist(), strict=True)
    ]
    heights = [mean(height, 5, word) for word in ("raised", "level", "lowered")]
    sides = [mean(side, 6, word) for word in ("leftwards", "centred", "rightwards")]
    # Pixel rows are counted from the top, columns from the left.
    assert heights[0] < heights[1] < heights[2] and sides[0] < sides[1] < sides[2]


def test_long_captions_name_two_garments_beyond_77_tokens() -> None:
    assert (len(PROMPTS.train), len(PROMPTS.test)) == (scene_prompts.NUM_TRAIN, scene_prompts.NUM_TEST)
    assert len(set(PROMPTS.train) | set(PROMPTS.test)) == scene_prompts.NUM_TRAIN + scene_prompts.NUM_TEST
    tokenizer = scene_text.build_tokenizer()
    lengths = [len(tokenizer(text, verbose=False).input_ids) for text in PROMPTS.test]
    assert min(lengths) > 110 and max(lengths) < 180
    for text in PROMPTS.test:
        assert sorted(one.place for one in scenes.read_caption(text)) == [0, 1, 2, 3]
        seen = tokenizer.decode(tokenizer(text, truncation=True).input_ids, skip_special_tokens=True)
        assert sum(garment in seen for garment in photographs.GARMENTS) <= 2, seen


def test_no_text_asks_a_cell_the_same_in_training_and_test() -> None:
    asked = [
        {(one.garment, one.colour, one.background) for text in part for one in scenes.read_caption(text)}
        for part in (PROMPTS.train, PROMPTS.test)
    ]
    assert asked[0] and asked[1] and not asked[0] & asked[1]


def test_what_the_base_was_trained_on_fits_into_77_tokens() -> None:
    rows = torch.arange(300)
    captions = scene_text.draw_captions(scenes.draw_scenes(TEST.labels, rows, seed=3), rows, seed=3)
    number = [len(scenes.read_caption(text)) for text in captions]
    assert set(number) == {1, 2} and 0.65 < np.mean(np.array(number) == 2) < 0.85
    assert max(len(scene_text.build_tokenizer()(text).input_ids) for text in captions) <= 77
    again = scene_text.draw_captions(scenes.draw_scenes(TEST.labels, rows[7:8], seed=3), rows[7:8], seed=3)
    assert again == captions[7:8]
    cells = scenes.draw_scenes(TEST.labels, rows[:1], seed=3)
    with pytest.raises(ValueError, match="not even the shortest wording fits"):
        scenes.short_caption(cells, 0, 2, np.random.default_rng(0), lambda text: False)


def test_a_judge_reads_the_cells_that_a_caption_names() -> None:
    rows = torch.arange(64)
    images, cells = drawn(rows)
    captions = [scenes.caption(cells, row, np.random.default_rng(row)) for row in range(64)]
    judge = scene_judges.load("B")
    shown = judge.read(to_pil(images), captions)
    assert shown.share() > 0.93 and len(shown.picture) == 4 * 64
    assert judge.read(to_pil(images.roll(1, 0)), captions).share() < 0.25
    # Only the left cells stay where they are named.
    mirrored = scenes.join(scenes.split(images)[torch.arange(256).view(-1, 4)[:, [0, 0, 2, 2]].flatten()])
    places = torch.tensor([one.place for text in captions for one in scenes.read_caption(text)])
    seen = judge.read(to_pil(mirrored), captions)
    assert torch.equal(seen.stated[places % 2 == 0], shown.stated[places % 2 == 0])
    assert seen.stated[places % 2 == 1].float().mean() < 0.25


def test_shares_are_means_over_pictures_and_over_sentences() -> None:
    stated = torch.tensor([[1, 1, 1], [1, 0, 0], [0, 0, 0]], dtype=torch.bool)
    shown = scene_judges.Shown(torch.tensor([0, 0, 1]), torch.tensor([0, 1, 0]), stated)
    assert shown.share() == pytest.approx(4 / 9)
    assert shown.by_picture().tolist() == pytest.approx([2 / 3, 0])
    assert shown.by_position().tolist() == pytest.approx([1 / 2, 1 / 3])
    images, cells = drawn(torch.arange(2))
    captions = [scenes.sentence(cells, 1, 0), scenes.caption(cells, 1, np.random.default_rng(0))]
    judge = scene_judges.load("A")
    assert torch.equal(judge.score(to_pil(images), captions), judge.read(to_pil(images), captions).by_picture())
    with pytest.raises(ValueError, match=r"picture 0 is \(32, 32\)"):
        judge.score(to_pil(scenes.split(images)), captions)


def test_what_is_told_of_a_place_is_what_its_latents_show() -> None:
    _, cells = drawn(torch.arange(2))
    told = scene_gaze.told_map([scenes.sentence(cells, 2, 1), ""], 16)
    assert told.shape == (2, 3, 16, 16) and (told[1] == -1).all()
    inside = torch.zeros(16, 16, dtype=torch.bool)
    inside[8:, :8] = True
    asked = torch.stack([cells.garment[2], cells.colour[2], cells.background[2]])
    assert (told[0, :, inside] == asked[:, None]).all() and (told[0, :, ~inside] == -1).all()


def test_a_place_looks_away_by_what_it_does_not_pay_its_own_sentence() -> None:
    captions = ["Top right: a red bag on a blue background. Bottom left: a pink boot on a green background.", ""]
    tokens = scene_text.tokens_of(captions)
    number = scene_text.sentence_numbers(tokens)
    assert set(number[0].tolist()) == {-1, 0, 1} and (number[1] == -1).all() and number[0, 0] == -1
    paid = torch.tensor([0.7, 0.2])
    gaze = torch.zeros(2, 16, 77)
    for sentence in (0, 1):
        own = (number[0] == sentence).float()
        gaze[0] += paid[sentence] * own / own.sum()
    # Of 4×4 positions, the four of the upper right cell are told of in sentence 0, the four of the lower left in sentence 1.
    expected = -paid.log().mean()
    torch.testing.assert_close(scene_gaze.looking_away([gaze, gaze], captions, tokens), expected)
    assert scene_gaze.where(16).view(4, 4).tolist() == [[0, 0, 1, 1], [0, 0, 1, 1], [2, 2, 3, 3], [2, 2, 3, 3]]
    gaze[0, scene_gaze.where(16) == 1] = (number[0] == 0).float() / (number[0] == 0).sum()
    torch.testing.assert_close(scene_gaze.looking_away([gaze], captions, tokens), -paid[1].log() / 2)


def test_what_is_watched_is_what_the_unet_computes() -> None:
    from diffusers import UNet2DConditionModel

    from mmalign.playground.paths import STABLE_DIFFUSION

    unet = UNet2DConditionModel.from_pretrained(STABLE_DIFFUSION / "unet", torch_dtype=torch.float32)
    torch.manual_seed(0)
    latents, text = torch.randn(2, 4, 16, 16), torch.randn(2, 77, 96)
    looking = unet.mid_block.attentions[0].transformer_blocks[0].attn2
    # With the same value in all channels of all heads, and their mean as output, attention returns the mean of that value by its gaze.
    with torch.no_grad():
        looking.to_v.weight.copy_(looking.to_v.weight[:1].expand_as(looking.to_v.weight))
        looking.to_out[0].weight.fill_(1 / 128)
        looking.to_out[0].bias.zero_()
    outputs: list[torch.Tensor] = []
    looking.register_forward_hook(lambda module, args, output: outputs.append(output))
    with torch.no_grad(), scene_gaze.watched(unet) as (features, askers, gazes):
        unet(latents, 3, text)
    shapes = [tuple(part[0].shape) for part in (features, askers, gazes)]
    assert shapes == [(2, 128, 16, 16), (2, 64, 128), (2, 64, 77)]
    assert (len(features), len(askers), len(gazes)) == (1, 3, 3)
    value = gazes[0] @ (text @ looking.to_v.weight[0])[..., None]
    torch.testing.assert_close(outputs[0], value.expand_as(outputs[0]))
    assert not unet.up_blocks[0]._forward_hooks


def test_all_stages_train_and_what_watches_stays_out_of_the_pipeline(monkeypatch: pytest.MonkeyPatch) -> None:
    from diffusers import UNet2DConditionModel

    from mmalign.playground.paths import STABLE_DIFFUSION
    from mmalign.training.loading import scene_vae

    monkeypatch.setattr(scene_base, "_BLOCK", 8)
    stages = tuple(replace(stage, steps=1, batch_size=4, curve_every=1) for stage in scene_base.STAGES)
    monkeypatch.setattr(scene_base, "STAGES", stages)
    unet = UNet2DConditionModel.from_pretrained(STABLE_DIFFUSION / "unet", torch_dtype=torch.float32)
    pipe, curve = scene_base.train(scene_vae(torch.float32), unet, scene_text.build_text_encoder())
    assert [(entry["stage"], entry["step"]) for entry in curve] == [(1, 1), (2, 1), (3, 1)]
    assert pipe.unet.config.sample_size == 16 and pipe.tokenizer.model_max_length == 77
    assert set(pipe.components) == {*MODELS, "scheduler", "safety_checker", "feature_extractor", "image_encoder"}
    assert not pipe.unet.up_blocks[0]._forward_hooks
