"""Users by LLaVA-OneVision, tiny and random: the layout of the prompt, one tile a picture, and whose states become tokens."""

import pytest
import torch
from PIL import Image
from tiny import tiny_tokenizer

from mmalign.data.users import Shot
from mmalign.data.vlm_users import VlmUserEncoder, prompt_of, squared

# As published, this template puts pictures before all text.
TEMPLATE = (
    "{% for m in messages %}{% for c in m['content'] if c['type'] == 'image' %}{{ '<image>' }}{% endfor %}"
    "{% for c in m['content'] if c['type'] == 'text' %}{{ c['text'] }}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}{{ ' a' }}{% endif %}"
)
LAYERS, WIDTH, SIDE, PATCH = 3, 16, 8, 4


@pytest.fixture(scope="module")
def parts():
    from transformers import (
        LlavaOnevisionConfig,
        LlavaOnevisionForConditionalGeneration,
        LlavaOnevisionImageProcessor,
        LlavaOnevisionProcessor,
        LlavaOnevisionVideoProcessor,
        Qwen2Config,
        SiglipVisionConfig,
    )

    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>", "<video>"]})
    tokenizer.model_max_length = 10**6
    grid = [[SIDE, SIDE], [SIDE, 2 * SIDE]]
    config = LlavaOnevisionConfig(
        vision_config=SiglipVisionConfig(
            hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=SIDE, patch_size=PATCH,
            vision_use_head=False,
        ),
        text_config=Qwen2Config(
            vocab_size=len(tokenizer), hidden_size=WIDTH, intermediate_size=32, num_hidden_layers=LAYERS, num_attention_heads=2,
            num_key_value_heads=1, max_position_embeddings=4096, eos_token_id=tokenizer.eos_token_id,
            bos_token_id=tokenizer.bos_token_id, pad_token_id=tokenizer.pad_token_id,
        ),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        video_token_index=tokenizer.convert_tokens_to_ids("<video>"),
        image_grid_pinpoints=grid,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlavaOnevisionForConditionalGeneration(config).eval()
    processor = LlavaOnevisionProcessor(
        image_processor=LlavaOnevisionImageProcessor(size={"height": SIDE, "width": SIDE}, image_grid_pinpoints=grid),
        tokenizer=tokenizer,
        video_processor=LlavaOnevisionVideoProcessor(size={"height": SIDE, "width": SIDE}),
        num_image_tokens=(SIDE // PATCH) ** 2,
        vision_feature_select_strategy="full",
        chat_template=TEMPLATE,
    )
    return model, processor


def shots(number=2):
    colours = ("red", "blue", "green", "white")
    return [
        Shot("a shirt", Image.new("RGB", (20, 12), colours[2 * i]), Image.new("RGB", (9, 30), colours[2 * i + 1]))
        for i in range(number)
    ]


def encoder(parts, **options):
    return VlmUserEncoder(*parts, name="tiny", **{"max_new_tokens": 5} | options)


def test_every_pair_stands_in_its_order_with_the_preferred_picture_first():
    text = prompt_of(["a shirt", "a <image> bag"], "<image>")
    marks = [
        "2 pairs",
        "Pair 1",
        "a shirt",
        "<image> Chosen",
        "<image> Picture left",
        "Pair 2",
        "bag",
        "1. For every pair",
    ]
    places = [text.index(mark) for mark in marks]
    assert places == sorted(places)
    assert text.count("<image>") == 4
    assert text.count("Differences: ...") == 2 and text.endswith("Profile: ...")


def test_pictures_stand_in_the_text_each_as_one_square_tile(parts):
    made = encoder(parts)
    inputs = made._inputs(shots())
    assert inputs["pixel_values"].shape == (4, 1, 3, SIDE, SIDE)
    # Four patches and a newline for every picture, each run by itself.
    is_image = inputs["input_ids"][0] == parts[0].config.image_token_id
    starts = is_image & ~torch.cat([torch.tensor([False]), is_image[:-1]])
    assert starts.sum() == 4 and is_image.sum() == 4 * 5


def test_a_picture_is_padded_to_a_square_and_not_cut():
    wide = squared(Image.new("RGB", (20, 12), "red"), (0.5, 0.5, 0.5))
    assert wide.size == (20, 20)
    assert wide.getpixel((0, 0)) == (128, 128, 128) and wide.getpixel((0, 10)) == (255, 0, 0)
    assert sum(wide.getpixel((3, y)) == (255, 0, 0) for y in range(20)) == 12


@torch.no_grad()
def test_tokens_are_the_states_from_which_the_last_token_was_written(parts):
    made = encoder(parts)
    profile = made.encode(shots())
    inputs = made._inputs(shots())
    ids = inputs["input_ids"]
    written = parts[0].generate(**inputs, do_sample=False, max_new_tokens=5)[0, ids.shape[1] :]
    assert len(written) == 5 and profile.stopped == "length"
    whole = {**inputs, "input_ids": torch.cat([ids, written[None, :-1]], 1)}
    whole["attention_mask"] = torch.ones_like(whole["input_ids"])
    states = parts[0](**whole, output_hidden_states=True).hidden_states
    expected = torch.stack([layer[0, -1] for layer in states])
    assert profile.tokens.shape == (LAYERS + 1, WIDTH)
    torch.testing.assert_close(profile.tokens, expected, rtol=1e-3, atol=1e-4)
    again = made.encode(shots())
    assert torch.equal(again.tokens, profile.tokens) and again.text == profile.text
    assert not torch.allclose(
        made.encode([Shot(s.prompt, s.rejected, s.preferred) for s in shots()]).tokens, profile.tokens
    )


def test_layers_are_chosen_and_told(parts):
    every = encoder(parts).encode(shots()).tokens
    assert torch.equal(encoder(parts, layers="last").encode(shots()).tokens, every[-1:])
    assert torch.equal(encoder(parts, layers=[0, -2]).encode(shots()).tokens, every[[0, -2]])
    assert encoder(parts, layers="last").made_by["layers"] == "last"
    with pytest.raises(ValueError, match="layers"):
        encoder(parts, layers="some")
    with pytest.raises(ValueError, match="of a model with 4"):
        encoder(parts, layers=[9]).encode(shots())


def test_a_text_that_ends_by_itself_says_so(parts):
    model, _ = parts
    made = encoder(parts)
    inputs = made._inputs(shots())
    second = int(model.generate(**inputs, do_sample=False, max_new_tokens=2)[0, -1])
    before = model.generation_config.eos_token_id
    model.generation_config.eos_token_id = [second]
    try:
        assert made.encode(shots()).stopped == "end"
    finally:
        model.generation_config.eos_token_id = before
