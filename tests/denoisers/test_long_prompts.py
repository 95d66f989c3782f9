"""Long prompts against a computation segment by segment, and in the pipelines' own calls."""

from typing import Any

import pytest
import torch
from tiny import tiny_pipeline

from mmalign.denoisers import adapter_for
from mmalign.denoisers.long_prompts import LongPrompts, long_prompts_of, read_long_prompts
from mmalign.denoisers.text_adapter import T5Tail, TextAdapter, load_adapter, save_adapter

SENTENCES = [f"A {colour} {thing} on a {other} background." for colour, thing, other in [
    ("red", "sneaker", "blue"), ("green", "bag", "white"), ("black", "shirt", "red"), ("blue", "dress", "green"),
    ("white", "sneaker", "black"), ("red", "bag", "green"), ("green", "shirt", "blue"),
]]  # fmt: skip
LONG = " ".join(SENTENCES)
CLIP_KINDS = ("sd", "sdxl", "sd3", "flux")
SIZE: dict[str, Any] = dict(height=16, width=16, num_inference_steps=2, output_type="np")


@pytest.fixture(scope="module")
def pipes() -> dict[str, Any]:
    return {kind: tiny_pipeline(kind) for kind in CLIP_KINDS}


@pytest.fixture
def sd(pipes: dict[str, Any]) -> Any:
    yield pipes["sd"]
    read_long_prompts(pipes["sd"], None)


def states_of(pipe: Any, text: str) -> torch.Tensor:
    """CLIP's states of one text alone, without any padding: start, words, end."""
    ids = pipe.tokenizer(text, return_tensors="pt", truncation=True).input_ids
    with torch.no_grad():
        return pipe.text_encoder(ids).last_hidden_state[0]


def empty_states(pipe: Any) -> torch.Tensor:
    ids = pipe.tokenizer("", padding="max_length", max_length=77, return_tensors="pt").input_ids
    with torch.no_grad():
        return pipe.text_encoder(ids).last_hidden_state[0]


def test_segments_keep_their_starts_and_words_and_the_rest_is_one_padding_vector(sd: Any) -> None:
    read_long_prompts(sd, LongPrompts())
    words = torch.cat([states_of(sd, sentence)[:-1] for sentence in SENTENCES])
    padding = empty_states(sd)[17:].mean(0, keepdim=True)
    embeds = adapter_for(sd).encode_prompt([LONG, ""]).prompt_embeds
    assert embeds.shape == (2, 240, 16) and len(words) > 77
    expected = torch.cat([words, padding.expand(240 - len(words), -1)])
    torch.testing.assert_close(embeds[0], expected, rtol=0, atol=1e-5)
    # The empty prompt is a start and nothing else.
    empty = torch.cat([empty_states(sd)[:1], padding.expand(239, -1)])
    torch.testing.assert_close(embeds[1], empty, rtol=0, atol=1e-5)


def test_the_number_of_kept_tokens_is_one_more_than_its_words_for_each_segment(sd: Any) -> None:
    read_long_prompts(sd, LongPrompts())
    encoder = long_prompts_of(sd).encoder
    for text in (LONG, "", "a red bag", "A bag. A shirt!", "sneaker " * 200):
        lengths = [len(sd.tokenizer(piece, add_special_tokens=False).input_ids) for piece in encoder.segments(text)]
        assert max(lengths) <= 75
        mask = encoder([text]).mask
        assert int(mask.sum()) == min(240, sum(1 + length for length in lengths)) == min(240, encoder.num_tokens(text))
        assert mask[0, : int(mask.sum())].all()


def test_compat_repeats_the_released_token_arithmetic(sd: Any) -> None:
    """Written as the released code does it: all segments in one batch, by ids, with its own cut at 77."""
    read_long_prompts(sd, LongPrompts(compat="longalign"))
    text = f"3.5 m of red. {'sneaker ' * 90}. Blue! white"
    pieces = ["3.", "5 m of red.", f" {'sneaker ' * 90}.", " Blue! white."]
    ids = sd.tokenizer(pieces, padding=True, truncation=True, max_length=77, return_tensors="pt").input_ids
    with torch.no_grad():
        states = sd.text_encoder(ids)[0].flatten(0, 1)
    kept = states[((ids != sd.tokenizer.pad_token_id) & (ids != sd.tokenizer.eos_token_id)).flatten()]
    padding = empty_states(sd)[-60:].mean(0, keepdim=True)
    expected = torch.cat([kept, padding.repeat(240 - len(kept), 1)])
    assert 76 in (ids != sd.tokenizer.eos_token_id).sum(1)
    torch.testing.assert_close(adapter_for(sd).encode_prompt([text]).prompt_embeds[0], expected, rtol=0, atol=1e-5)
    assert adapter_for(sd).count_truncated([text, LONG, "a bag"]) == 1


def test_the_second_tokenizers_padding_is_told_by_the_mask_and_not_by_its_id(pipes: dict[str, Any]) -> None:
    """SDXL's pads with the id of "!": a prompt that holds one keeps it."""
    pipe = pipes["sdxl"]
    read_long_prompts(pipe, LongPrompts())
    try:
        encoded = long_prompts_of(pipe).encoder(["a red bag !", "a red bag"])
        assert encoded.mask.sum(1).tolist() == [5, 4]
        plain = tiny_pipeline("sdxl")
        embeds, _, pooled, _ = plain.encode_prompt(["a red bag !"], do_classifier_free_guidance=False)
        torch.testing.assert_close(encoded.embeds[0, :5], embeds[0, :5], rtol=0, atol=1e-5)
        torch.testing.assert_close(encoded.pooled[:1], pooled, rtol=0, atol=1e-5)
    finally:
        read_long_prompts(pipe, None)


@pytest.mark.parametrize("kind", CLIP_KINDS)
def test_every_pipeline_draws_by_what_stands_beyond_token_77(pipes: dict[str, Any], kind: str) -> None:
    pipe, denoiser = pipes[kind], adapter_for(pipes[kind])
    changed = LONG.replace(SENTENCES[-1], "A black dress on a white background.")

    def differs(**options: Any) -> bool:
        pictures = [
            pipe(text, generator=torch.Generator().manual_seed(0), **SIZE, **options).images for text in (LONG, changed)
        ]
        return bool(abs(pictures[0] - pictures[1]).max() > 1e-6)

    t5 = kind in ("sd3", "flux")
    assert denoiser.count_truncated([LONG, "a bag"]) == (0 if t5 else 1) and differs() == t5
    read_long_prompts(pipe, LongPrompts())
    try:
        assert denoiser.count_truncated([LONG, "a bag"]) == 0 and differs()
        # CLIP's own part tells the two apart, without T5.
        ours, other = (long_prompts_of(pipe).encoder([text]) for text in (LONG, changed))
        assert not torch.allclose(ours.embeds, other.embeds) and (
            kind == "sd" or not torch.equal(ours.pooled, other.pooled)
        )
        four = pipe([LONG, "a bag"], num_images_per_prompt=2, generator=_generators(4), **SIZE).images
        one = pipe("a bag", generator=_generators(4)[2], **SIZE).images
        torch.testing.assert_close(torch.from_numpy(four[2]), torch.from_numpy(one[0]), rtol=0, atol=1e-4)
    finally:
        read_long_prompts(pipe, None)
    assert not differs() or t5


def _generators(number: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in range(number)]


def test_a_negative_prompt_is_read_in_segments_too(sd: Any) -> None:
    read_long_prompts(sd, LongPrompts())
    _, negative = sd.encode_prompt(["a bag"], "cpu", 1, True, negative_prompt=LONG)
    torch.testing.assert_close(negative, adapter_for(sd).encode_prompt([LONG]).prompt_embeds)
    with pytest.raises(ValueError, match="1 prompts and 2 negative prompts"):
        sd.encode_prompt(["a bag"], "cpu", 1, True, negative_prompt=["x", "y"])


def test_sdxl_without_a_negative_prompt_keeps_its_zeros(pipes: dict[str, Any]) -> None:
    pipe = pipes["sdxl"]
    read_long_prompts(pipe, LongPrompts())
    try:
        _, negative, _, pooled = pipe.encode_prompt(["a bag"], negative_prompt=None)
        assert negative.shape == (1, 240, 32) and not negative.any() and not pooled.any()
        with pytest.raises(ValueError, match="prompt_2 has no effect"):
            pipe("a bag", prompt_2="a shirt", **SIZE)
    finally:
        read_long_prompts(pipe, None)


def test_naive_concatenation_keeps_all_positions_of_every_segment(sd: Any) -> None:
    read_long_prompts(sd, LongPrompts(layout="concatenate", pack=True))
    encoder = long_prompts_of(sd).encoder
    embeds, pieces = adapter_for(sd).encode_prompt([LONG]).prompt_embeds[0], encoder.segments(LONG)
    assert embeds.shape == (308, 16) and len(pieces) == 2
    for place, piece in enumerate([*pieces, "", ""]):
        ids = sd.tokenizer(piece, padding="max_length", max_length=77, return_tensors="pt").input_ids
        with torch.no_grad():
            expected = sd.text_encoder(ids).last_hidden_state[0]
        torch.testing.assert_close(embeds[77 * place : 77 * (place + 1)], expected, rtol=0, atol=1e-5)
    assert adapter_for(sd).count_truncated([LONG, LONG * 5]) == 1


def test_t5_stands_behind_clip_in_the_null_prompt_as_in_any_other(sd: Any) -> None:
    tail = tiny_tail()
    read_long_prompts(sd, LongPrompts(), tail)
    embeds, null = sd.encode_prompt([LONG], "cpu", 1, True)
    assert embeds.shape == null.shape == (1, 480, 16)
    padding = empty_states(sd)[17:].mean(0, keepdim=True)
    ids = tail.tokenizer("", padding="max_length", max_length=240, return_tensors="pt").input_ids
    with torch.no_grad():
        t5 = tail.adapter(tail.encoder(ids).last_hidden_state)
    expected = torch.cat([empty_states(sd)[:1], padding.expand(239, -1), t5[0]])
    torch.testing.assert_close(null[0], expected, rtol=0, atol=1e-5)
    assert not torch.allclose(embeds[0, 240:], null[0, 240:])


def tiny_tail() -> T5Tail:
    flux = tiny_pipeline("flux")
    torch.manual_seed(0)
    return T5Tail(flux.tokenizer_2, flux.text_encoder_2, TextAdapter(32, 24, 16).eval())


def test_the_adapter_has_the_released_size_layout_and_arithmetic(tmp_path: Any) -> None:
    assert sum(p.numel() for p in TextAdapter().parameters()) == 21_254_528
    adapter = TextAdapter(6, 5, 4).eval()
    save_adapter(adapter, tmp_path)
    loaded = load_adapter(tmp_path)
    x = torch.randn(2, 3, 6, generator=torch.Generator().manual_seed(1))
    assert torch.equal(adapter(x), loaded(x)) and adapter(x).shape == (2, 3, 4)
    names = {
        f"{layer}.{part}"
        for layer in ("ff1.net.0.proj", "ff1.net.2", "ff2.net.0.proj", "ff2.net.2", "norm1", "norm2")
        for part in ("weight", "bias")
    }
    assert set(adapter.state_dict()) == names
    state = adapter.state_dict()

    def layer(x: torch.Tensor, name: str, norm: str, width: int) -> torch.Tensor:
        x = torch.nn.functional.layer_norm(x, (width,), state[f"{norm}.weight"], state[f"{norm}.bias"])
        both = x @ state[f"{name}.net.0.proj.weight"].T + state[f"{name}.net.0.proj.bias"]
        value, gate = both[..., : 4 * width], both[..., 4 * width :]
        gated = value * gate * 0.5 * (1 + torch.erf(gate / 2**0.5))
        return gated @ state[f"{name}.net.2.weight"].T + state[f"{name}.net.2.bias"]

    torch.testing.assert_close(adapter(x), layer(layer(x, "ff1", "norm1", 6), "ff2", "norm2", 5), rtol=0, atol=1e-5)
    (tmp_path / "config.json").write_text('{"in_dim": 7, "int_dim": 5, "out_dim": 4}')
    with pytest.raises(ValueError, match="does not fit: size mismatch"):
        load_adapter(tmp_path)
    with pytest.raises(ValueError, match="holds no config.json"):
        load_adapter(tmp_path / "elsewhere")


def test_families_without_a_clip_and_senseless_settings_are_refused() -> None:
    with pytest.raises(ValueError, match="cogvideox reads prompts by T5 alone"):
        read_long_prompts(tiny_pipeline("cogvideox"), LongPrompts())
    for wrong in ({"layout": "x"}, {"max_tokens": 76}, {"compat": "x"}, {"compat": "longalign", "pack": True}):
        with pytest.raises(ValueError, match="layout|max_tokens|compat"):
            LongPrompts(**wrong)


def test_encoded_pairs_know_how_their_prompts_were_read(sd: Any) -> None:
    from mmalign.data.latents import _key_parts

    class Source:
        fingerprint, num_frames = "x", None

    keys = []
    tail = tiny_tail()
    for config, behind in ((None, None), (LongPrompts(), None), (LongPrompts(pack=True), None), (LongPrompts(), tail)):
        read_long_prompts(sd, config, behind)
        keys.append(repr(_key_parts(Source(), adapter_for(sd), 16, 16, torch.float32, "mean", 0)))
    assert len(set(keys)) == 4
