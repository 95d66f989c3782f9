"""The reward of scenes: what it is taught is true or false as claimed, and its pairs are judged by what they show."""

import re
from pathlib import Path

import numpy as np
import torch

from mmalign.playground import photographs, scene_judges, scene_prompts, scene_reward, scenes
from mmalign.rewards import scorer

CELLS = scenes.draw_scenes(photographs.load("test").labels, torch.arange(20), seed=3)


def test_a_changed_sentence_differs_in_the_one_thing_that_is_told() -> None:
    chosen = torch.randperm(80, generator=torch.Generator().manual_seed(0))[:60]
    true, _ = scene_reward.told(CELLS, chosen, np.random.default_rng(0))
    changed, what = scene_reward.told(CELLS, chosen, np.random.default_rng(0), changed=True)
    assert set(what) == {0, 1, 2, 3}
    for cell, was, now, which in zip(chosen.tolist(), true, changed, what, strict=True):
        (first,), (second,) = scenes.read_caption(was), scenes.read_caption(now)
        shown = (CELLS.garment[cell], CELLS.colour[cell], CELLS.background[cell])
        assert (first.garment, first.colour, first.background) == tuple(map(int, shown)) and first.place == cell % 4
        names = [
            name
            for name in ("garment", "colour", "background", "place")
            if getattr(first, name) != getattr(second, name)
        ]
        assert names == [("garment", "colour", "background", "place")[which]], (was, now)


def test_a_sentence_fits_the_scenes_that_show_it_where_it_says() -> None:
    chosen = torch.arange(0, 80, 3)
    fits = scene_reward._fits(CELLS, chosen)
    shown = torch.stack([CELLS.garment, CELLS.colour, CELLS.background], 1)
    for scene in range(20):
        for column, cell in enumerate(chosen.tolist()):
            here = torch.equal(shown[4 * scene + cell % 4], shown[cell])
            assert fits[scene, column] == here and (here or scene != cell // 4)


def test_every_word_is_one_token_and_every_sentence_fits() -> None:
    vocabulary = scene_reward.build_tokenizer()
    texts, _ = scene_reward.told(CELLS, torch.arange(80), np.random.default_rng(0))
    for text in [*texts, *(scenes.sentence(CELLS, cell, cell % 4) for cell in range(80))]:
        words = re.findall(r"[\w]+|[^\w\s]", text)
        assert len(vocabulary(text).input_ids) == len(words) + 2 <= scene_reward.MAX_LENGTH, text


def test_an_untrained_reward_sees_where_a_cell_lies() -> None:
    """Else training stops at the bag of what is shown: with embeddings of places as small as usual this is 1e-5."""
    model = scene_reward.build(scene_reward.build_tokenizer()).eval()
    pixels = scenes.compose(photographs.load("test"), torch.arange(20), CELLS) * 2 - 1
    exchanged = scenes.join(scenes.split(pixels).unflatten(0, (-1, 4))[:, [3, 1, 2, 0]].flatten(0, 1))
    with torch.no_grad():
        seen = [model.get_image_features(pixel_values=given).pooler_output for given in (pixels, exchanged)]
    assert float((1 - torch.cosine_similarity(*seen)).median()) > 1e-4


def test_preferred_scenes_show_more_of_their_captions() -> None:
    rows = scene_reward.preferences(60)
    assert rows[:5] == scene_reward.preferences(60)[:5]
    captions = [row["caption"] for row in rows]
    assert all(len(scenes.read_caption(text)) == 4 for text in captions)
    shares = [
        scene_judges.load("A").read([row[side] for row in rows], captions).by_picture() for side in ("jpg_0", "jpg_1")
    ]
    # Each sentence is true of one of the two: garment and colours of a cell are rarely shared.
    assert 0.9 < float((shares[0] + shares[1]).mean()) < 1.3
    label = torch.tensor([row["label_0"] for row in rows])
    clear = label != 0.5
    agrees = ((shares[0] - shares[1])[clear].sign() == (2 * label[clear] - 1)).float().mean()
    assert clear.float().mean() > 0.7 and float(agrees) > 0.6


def test_a_saved_reward_is_a_scorer_with_gradient_that_reads_pictures_as_they_are(tmp_path: Path) -> None:
    vocabulary = scene_reward.build_tokenizer()
    model = scene_reward.build(vocabulary)
    scene_reward.save(model, vocabulary, tmp_path)
    reward = scorer(f"denscore:{tmp_path}")
    pixels = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    prompts = scene_prompts.prompts().train[:2]
    scores = reward.score_pixels(pixels, prompts)
    scores.sum().backward()
    assert pixels.grad is not None and float(pixels.grad.abs().max()) > 0 and reward.count_truncated(prompts) == 0
    seen, read = scene_reward._embedded(model.eval(), vocabulary, pixels.detach() * 2 - 1, reward.segments(prompts[0]))
    torch.testing.assert_close(scores[0].detach(), (read @ seen[0]).mean().detach(), rtol=0, atol=1e-5)


def test_recoloured_cells_ask_for_what_the_split_asks_for_and_keep_their_garments() -> None:
    asked = {tuple(row) for row in scene_prompts._asked("train").tolist()}
    found = scene_prompts.recoloured(CELLS, "train", np.random.default_rng(0))
    triples = set(zip(found.garment.tolist(), found.colour.tolist(), found.background.tolist(), strict=True))
    assert torch.equal(found.garment, CELLS.garment) and triples <= asked and len(triples) > 40
