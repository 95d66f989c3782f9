"""Answer pairs become the tokens that the family's own processor makes of the whole chat, and say which rows cannot."""

import copy
import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_vlm import KINDS, MARKED, TEXT_KINDS, VIDEO_KINDS, clip, picture, tiny_tokenizer, tiny_vlm

from mmalign.data.answer_records import AnswerPair, Picture, Span, Turn, VideoClip
from mmalign.data.answer_tokens import EncodedAnswers, encode_answers, padding_token
from mmalign.data.records import InvalidRow

CHOSEN, REJECTED = "The bag is red, and it moves to the left.", "It is a green dress."
# What each processor returns of a picture and of a clip, besides the ids and their mask.
OF_A_PICTURE = {
    "lfm2_vl": {"pixel_values", "pixel_attention_mask", "spatial_shapes"},
    "llava_onevision": {"pixel_values", "image_sizes", "batch_num_images"},
    "llava_next_video": {"pixel_values", "image_sizes"},
    "qwen2_5_vl": {"mm_token_type_ids", "pixel_values", "image_grid_thw"},
    "qwen3_vl": {"mm_token_type_ids", "pixel_values", "image_grid_thw"},
    "smolvlm": {"pixel_values", "pixel_attention_mask"},
    "internvl": {"pixel_values"},
}
OF_A_CLIP = {
    "llava_onevision": {"pixel_values_videos"},
    "llava_next_video": {"pixel_values_videos"},
    "qwen2_5_vl": {"mm_token_type_ids", "pixel_values_videos", "video_grid_thw", "second_per_grid_ts"},
    "qwen3_vl": {"mm_token_type_ids", "pixel_values_videos", "video_grid_thw"},
    "smolvlm": {"pixel_values", "pixel_attention_mask"},
    "internvl": {"pixel_values"},
}


def pair(*media: Picture | VideoClip, chosen: str = CHOSEN, rejected: str | None = REJECTED, **more: Any) -> AnswerPair:
    turns = (Turn("system", ("Be brief.",)), Turn("user", (*media, "What is there?")))
    return AnswerPair(7, turns, chosen, rejected, **more)


def encode(kind: str, of: AnswerPair, **options: Any) -> EncodedAnswers:
    model, processor = tiny_vlm(kind)
    return encode_answers(of, processor, model.config, **options)


def media(shows: str) -> tuple[Picture | VideoClip, ...]:
    """Nothing, two pictures of different shape, or a clip."""
    return {"nothing": (), "pictures": (picture(), picture(30, 50)), "clip": (clip(),)}[shows]


def whole_chat(processor: Any, of: AnswerPair, answer: str, **asked: Any) -> Any:
    """The family's own reading of the answered chat, by the documented way."""
    form = {"Picture": "image", "VideoClip": "video"}

    def part(one: Any) -> dict[str, Any]:
        if isinstance(one, str):
            return {"type": "text", "text": one}
        name = form[type(one).__name__]
        return {"type": name, name: one.image if name == "image" else list(one.frames)}

    chat: list[dict[str, Any]] = [
        {"role": turn.role, "content": [part(one) for one in turn.parts]} for turn in of.prompt
    ]
    chat.append({"role": "assistant", "content": [part(answer)]})
    if not hasattr(processor, "tokenizer"):
        chat = [{"role": turn["role"], "content": turn["content"][0]["text"]} for turn in chat]
        return processor.apply_chat_template(chat, return_dict=True, return_tensors="pt", **asked)
    options: dict[str, Any] = {}
    clips = [one for one in of.media if isinstance(one, VideoClip)]
    if clips:
        about = [
            {"total_num_frames": 16, "fps": 8.0, "duration": 2.0, "frames_indices": list(one.indices)} for one in clips
        ]
        options = {"do_sample_frames": False, "video_metadata": about}
    return processor.apply_chat_template(
        chat, tokenize=True, return_dict=True, return_tensors="pt", processor_kwargs=options, **asked
    )


@pytest.mark.parametrize(
    ("kind", "shows"),
    [
        (kind, shows)
        for kind in KINDS
        for shows in ("nothing", "pictures", "clip")
        if shows != "clip" or kind in VIDEO_KINDS
    ],
)
def test_prompt_and_answer_are_what_the_processor_makes_of_the_whole_chat(kind: str, shows: str) -> None:
    row = pair(*media(shows))
    encoded = encode(kind, row)
    _, processor = tiny_vlm(kind)
    for answer, said in zip(encoded.answers, (CHOSEN, REJECTED), strict=True):
        whole = whole_chat(processor, row, said)
        ids = torch.cat([encoded.prompt, answer.ids]).tolist()
        theirs = whole["input_ids"][0].tolist()
        if kind == "llava_next_video":  # nothing in its template ends a turn
            assert ids.pop() == processor.tokenizer.eos_token_id
        assert theirs[: len(ids)] == ids
        assert processor.tokenizer.decode(theirs[len(ids) :]).strip() == ""
        assert encoded.media.keys() | encoded.text.keys() == whole.keys() - {"input_ids", "attention_mask"}
        for name, value in encoded.media.items():
            torch.testing.assert_close(value, whole[name], rtol=0, atol=0)
        for name, value in encoded.text.items():
            assert whole[name][0, : len(value)].tolist() == value.tolist()


@pytest.mark.parametrize("kind", TEXT_KINDS)
def test_a_model_that_only_reads_takes_its_tokenizer_for_a_processor(kind: str) -> None:
    encoded = encode(kind, pair())
    theirs = whole_chat(tiny_vlm(kind)[1], pair(), CHOSEN)["input_ids"][0].tolist()
    ids = torch.cat([encoded.prompt, encoded.answers[0].ids]).tolist()
    assert ids == theirs[: len(ids)]
    assert not encoded.media
    with pytest.raises(InvalidRow, match="row 7, prompt: holds a picture"):
        encode(kind, pair(picture()))


@pytest.mark.parametrize("kind", KINDS)
def test_everything_that_the_processor_returns_is_carried(kind: str) -> None:
    encoded = encode(kind, pair(picture()))
    assert encoded.media.keys() | encoded.text.keys() == OF_A_PICTURE[kind]
    assert all(len(values) == len(encoded.prompt) for values in encoded.text.values())
    if kind in VIDEO_KINDS:
        encoded = encode(kind, pair(clip()))
        assert encoded.media.keys() | encoded.text.keys() == OF_A_CLIP[kind]
    else:
        with pytest.raises(InvalidRow, match="row 7, prompt: holds a clip"):
            encode(kind, pair(clip()))


@pytest.mark.parametrize("kind", KINDS + TEXT_KINDS)
def test_the_answer_and_its_end_token_are_supervised_and_nothing_else(kind: str) -> None:
    encoded = encode(kind, pair())
    _, processor = tiny_vlm(kind)
    tokenizer = getattr(processor, "tokenizer", processor)
    for answer, said in zip(encoded.answers, (CHOSEN, REJECTED), strict=True):
        own = answer.ids[answer.supervised]
        assert own[-1] == tokenizer.eos_token_id
        assert tokenizer.decode(own[:-1]).strip() == said
        assert not answer.marked.any()


@pytest.mark.parametrize("kind", MARKED)
def test_templates_with_and_without_generation_marks_agree(kind: str) -> None:
    row = pair(*(() if kind in TEXT_KINDS else (picture(),)))
    encoded = encode(kind, row)
    model, processor = tiny_vlm(kind)
    whole = whole_chat(processor, row, CHOSEN, return_assistant_tokens_mask=True)
    theirs = torch.as_tensor(whole["assistant_masks"])[0].bool()
    ours = torch.cat([torch.zeros(len(encoded.prompt), dtype=torch.bool), encoded.answers[0].supervised])
    assert theirs[: len(ours)].tolist() == ours.tolist()
    assert not theirs[len(ours) :].any()
    plain = copy.deepcopy(processor)
    plain.chat_template = plain.chat_template.replace("{% generation %}", "").replace("{% endgeneration %}", "")
    assert plain.chat_template != processor.chat_template
    again = encode_answers(row, plain, model.config)
    assert again.answers[0].ids.tolist() == encoded.answers[0].ids.tolist()
    assert again.answers[0].supervised.tolist() == encoded.answers[0].supervised.tolist()


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("lfm2", "lfm2_v2_training"),
        ("lfm2_vl", "lfm2_2_5_vl"),
        ("qwen2_5_vl", "qwen2_5_vl_training"),
        ("qwen3_vl", "qwen3_vl_training"),
        ("smolvlm", "smolvlm_training"),
    ],
)
def test_published_templates_are_supervised_as_a_peer_marks_them(kind: str, name: str) -> None:
    peer = importlib.util.find_spec("trl")
    if peer is None or not peer.submodule_search_locations:
        pytest.skip("needs trl, which carries the published templates with its marks")
    model, processor = tiny_vlm(kind)
    published = copy.deepcopy(processor)
    published.chat_template = Path(peer.submodule_search_locations[0], "chat_templates", f"{name}.jinja").read_text()
    row = pair(*(() if kind in TEXT_KINDS else (picture(),)))
    encoded = encode_answers(row, published, model.config)
    whole = whole_chat(published, row, CHOSEN, return_assistant_tokens_mask=True)
    ids = torch.cat([encoded.prompt, encoded.answers[0].ids]).tolist()
    assert torch.as_tensor(whole["input_ids"])[0].tolist()[: len(ids)] == ids
    ours = [False] * len(encoded.prompt) + encoded.answers[0].supervised.tolist()
    assert torch.as_tensor(whole["assistant_masks"])[0].bool().tolist()[: len(ids)] == ours


@pytest.mark.parametrize(
    ("said", "phrase", "marked"),
    [
        ("The bag is red.", "The", ["The"]),
        ("The bag is red.", "red", [" red"]),
        ("The bag is red.", "bag ", [" bag"]),
        ("The bag is red.", "red.", [" red", "."]),
        ("It moves to the left, then.", "left", [" left"]),
        ("The colour is red", "colour is red", [" colour", " is", " red"]),
        # " background" is one token, of which the phrase is the middle.
        ("a background here", "ground", [" background"]),
        ("a café is red", "é", None),
        ("日本の bag", "本", None),
    ],
)
def test_a_marked_phrase_becomes_the_tokens_that_touch_it(said: str, phrase: str, marked: list[str] | None) -> None:
    start = said.index(phrase)
    row = pair(chosen=said, chosen_marks=((start, start + len(phrase)),))
    answer = encode("lfm2", row).answers[0]
    tokenizer = tiny_vlm("lfm2")[1]
    ids = answer.ids[answer.marked]
    if marked is None:  # spelled in bytes: all the bytes of the phrase, and no other
        assert tokenizer.decode(ids) == phrase
        assert len(ids) == len(phrase.encode())
    else:
        assert [tokenizer.decode(token) for token in ids] == marked
    assert not (answer.marked & ~answer.supervised).any()


@settings(max_examples=50)
@given(said=st.text("abe rd.é日\n", min_size=1, max_size=24), ends=st.tuples(st.integers(0, 24), st.integers(0, 24)))
def test_marks_agree_with_a_count_of_bytes(said: str, ends: tuple[int, int]) -> None:
    start, stop = sorted(min(end, len(said)) for end in ends)
    answer = encode("lfm2", pair(chosen=said, chosen_marks=((start, stop),))).answers[0]
    assert answer.marked.tolist() == [*marks_by_bytes(said, (start, stop), answer.ids[:-1].tolist()), False]


def marks_by_bytes(said: str, span: Span, ids: list[int]) -> list[bool]:
    """Whether a token holds a byte of a marked character, spaces at its start apart."""
    from tokenizers.pre_tokenizers import ByteLevel

    tokenizer = tiny_vlm("lfm2")[1]
    # One letter of the byte alphabet is one byte of the text.
    assert set("".join(tokenizer.convert_ids_to_tokens(ids))) <= set(ByteLevel.alphabet())
    owners = [place for place, letter in enumerate(said) for _ in letter.encode()]
    found, at = [], 0
    for token in tokenizer.convert_ids_to_tokens(ids):
        characters = owners[at : at + len(token)]
        at += len(token)
        while characters and said[characters[0]].isspace() and not "".join(said[c] for c in characters).isspace():
            characters = characters[1:]
        found.append(any(span[0] <= character < span[1] for character in characters))
    assert at == len(owners)
    return found


def test_a_clip_keeps_its_times() -> None:
    encoded = encode("qwen3_vl", pair(clip()))
    text = tiny_vlm("qwen3_vl")[1].tokenizer.decode(encoded.prompt)
    # Frames 0 and 4, then 8 and 12, of 8 a second, two to a patch.
    assert "<0.2 seconds>" in text
    assert "<1.2 seconds>" in text
    # Two frames a second were kept, and a patch holds two.
    assert encode("qwen2_5_vl", pair(clip())).media["second_per_grid_ts"].tolist() == [1.0]


@pytest.mark.parametrize(
    ("kind", "part", "field", "value"),
    [
        ("lfm2_vl", None, "downsample_factor", 4),
        ("llava_onevision", "vision_config", "patch_size", 8),
        ("llava_next_video", "vision_config", "patch_size", 8),
        ("qwen2_5_vl", "vision_config", "spatial_merge_size", 1),
        ("qwen3_vl", "vision_config", "spatial_merge_size", 1),
        ("smolvlm", None, "scale_factor", 1),
        ("internvl", None, "downsample_ratio", 1.0),
    ],
)
def test_a_processor_that_counts_otherwise_than_the_model_is_named(
    kind: str, part: str | None, field: str, value: Any
) -> None:
    model, processor = tiny_vlm(kind)
    config = copy.deepcopy(model.config)
    setattr(config if part is None else getattr(config, part), field, value)
    for shown in (picture(), clip()) if kind in VIDEO_KINDS else (picture(),):
        with pytest.raises(
            InvalidRow, match=r"row 7, prompt: \d+ (image|video) placeholders in the prompt, but .* \d+ features"
        ):
            encode_answers(pair(shown), processor, config)


def test_a_picture_that_onevision_shrinks_is_counted_as_its_processor_does() -> None:
    model, processor = tiny_vlm("llava_onevision")
    small, config = copy.deepcopy(processor), copy.deepcopy(model.config)
    small.vision_aspect_ratio = config.vision_aspect_ratio = "anyres_max_1"
    row = pair(picture(100, 60))
    assert len(encode_answers(row, small, config).prompt) < len(encode("llava_onevision", row).prompt)


@pytest.mark.parametrize("kind", KINDS)
def test_a_placeholder_in_the_text_is_named_where_it_stands(kind: str) -> None:
    processor = tiny_vlm(kind)[1]
    token = processor.image_token
    turns = (Turn("user", (f"What is {token} there?",)),)
    with pytest.raises(InvalidRow, match="row 7, prompt: "):
        encode(kind, AnswerPair(7, turns, CHOSEN, REJECTED))
    with pytest.raises(InvalidRow, match="row 7, bad: the answer holds .*, a control token"):
        encode(kind, pair(picture(), rejected=f"A {token}.", fields=("good", "bad")))


def test_a_mask_that_is_shorter_than_the_pixels_is_named() -> None:
    model, processor = tiny_vlm("lfm2_vl")
    narrow = copy.deepcopy(processor)
    narrow.image_processor.min_image_tokens = narrow.image_processor.max_image_tokens = 16
    with pytest.raises(InvalidRow, match="row 7, prompt: .* went over max_image_tokens"):
        encode_answers(pair(picture(40, 24)), narrow, model.config)


def test_an_answer_is_cut_only_when_asked_and_only_at_its_end() -> None:
    whole = encode("lfm2_vl", pair(picture()))
    prompt, longest = len(whole.prompt), max(len(answer.ids) for answer in whole.answers)
    assert torch.equal(
        encode("lfm2_vl", pair(picture()), max_length=prompt + longest).answers[0].ids, whole.answers[0].ids
    )
    seen = int((whole.prompt == tiny_vlm("lfm2_vl")[1].image_token_id).sum())
    said = rf"{prompt} tokens, {seen} of them pictures and clips"
    with pytest.raises(
        InvalidRow, match=rf"row 7, chosen: prompt \({said}\) and answer \({longest}\) are longer than max_length"
    ):
        encode("lfm2_vl", pair(picture()), max_length=prompt + longest - 1)
    cut = encode("lfm2_vl", pair(picture()), max_length=prompt + 3, truncate="answer")
    assert torch.equal(cut.prompt, whole.prompt)
    for answer, full in zip(cut.answers, whole.answers, strict=True):
        assert answer.ids.tolist() == full.ids[:3].tolist()
        assert answer.supervised.tolist() == full.supervised[:3].tolist()
    for length in (prompt, prompt - 4, 20, 1):  # would cut the question, then its picture
        for truncate in (None, "answer"):
            with pytest.raises(InvalidRow, match=rf"row 7, prompt: {said}: no room .*; prompts are never cut"):
                encode("lfm2_vl", pair(picture()), max_length=length, truncate=truncate)
    with pytest.raises(ValueError, match="truncate must be None or 'answer', got 'keep_end'"):
        encode("lfm2_vl", pair(picture()), max_length=100, truncate="keep_end")
    with pytest.raises(ValueError, match="truncate needs max_length"):
        encode("lfm2_vl", pair(), truncate="answer")
    with pytest.raises(ValueError, match="max_length must be at least 1, got 0"):
        encode("lfm2_vl", pair(), max_length=0)


def test_a_cut_row_of_which_nothing_can_be_learnt_is_named() -> None:
    row = pair(
        chosen="The bag is red.", rejected="The bag is blue.", chosen_marks=((11, 14),), rejected_marks=((4, 7),)
    )
    cut: dict[str, Any] = {"max_length": len(encode("lfm2", row).prompt) + 3, "truncate": "answer"}
    with pytest.raises(InvalidRow, match="row 7, chosen: .* and no marked phrase would be left"):
        encode("lfm2", row, **cut)
    unmarked = pair(chosen=row.chosen, rejected=row.rejected)
    with pytest.raises(InvalidRow, match="row 7, rejected: the same tokens as chosen"):
        encode("lfm2", unmarked, **cut)
    cut["max_length"] += 1
    told = encode("lfm2", row, **cut)
    assert [tiny_vlm("lfm2")[1].decode(answer.ids[answer.marked]) for answer in told.answers] == [" red", " bag"]


def test_answers_that_the_template_makes_equal_are_named() -> None:
    model, tokenizer = tiny_vlm("lfm2")
    stripping = copy.deepcopy(tokenizer)
    stripping.chat_template = stripping.chat_template.replace("message['content'] -}}", "message['content'] | trim -}}")
    with pytest.raises(InvalidRow, match="row 7, rejected: the same tokens as chosen"):
        encode_answers(pair(chosen="A bag.", rejected="A bag. "), stripping, model.config)


def test_a_picture_that_makes_a_processor_fail_is_named() -> None:
    with pytest.raises(
        InvalidRow, match="row 7, prompt: Lfm2VlProcessor cannot read its pictures and clips: "
    ) as caught:
        encode("lfm2_vl", pair(picture(3000, 8)))
    assert "\n" not in str(caught.value)
    # transformers gives advice in further lines.
    with pytest.raises(InvalidRow, match="row 7, prompt: ") as caught:
        encode("llava_onevision", pair(clip(4), clip(2)))
    assert "\n" not in str(caught.value)


def test_options_reach_the_processor_and_stay_as_they_were() -> None:
    options = {"images_kwargs": {"min_image_tokens": 2, "max_image_tokens": 4, "do_image_splitting": False}}
    kept = copy.deepcopy(options)
    few = encode("lfm2_vl", pair(picture(100, 60)), processor_kwargs=options)
    many = encode("lfm2_vl", pair(picture(100, 60)))
    image = tiny_vlm("lfm2_vl")[0].config.image_token_id
    assert (few.prompt == image).sum() <= 4 < (many.prompt == image).sum()
    assert options == kept
    for name, instead in (("num_frames", "load_answers"), ("max_length", "truncate"), ("images", "set here")):
        with pytest.raises(ValueError, match=f"processor_kwargs cannot take '{name}': .*{instead}"):
            encode("lfm2_vl", pair(), processor_kwargs={name: 1})
    with pytest.raises(ValueError, match="processor_kwargs cannot take 'truncation'"):
        encode("lfm2_vl", pair(), processor_kwargs={"text_kwargs": {"truncation": True}})


def test_a_token_over_the_border_belongs_to_the_answers() -> None:
    tokenizer = tiny_tokenizer()
    # " red" is one token; the prompt ends with its space.
    tokenizer.chat_template = (
        "{%- for message in messages -%}{{- message['role'] + ': ' + message['content'] + '\n' -}}{%- endfor -%}"
        "{%- if add_generation_prompt -%}{{- 'assistant: ' -}}{%- endif -%}"
    )
    row = pair(chosen="red", rejected="42", chosen_marks=((0, 3),))
    encoded = encode_answers(row, tokenizer, tiny_vlm("lfm2")[0].config)
    for answer, said in zip(encoded.answers, ("red", "42"), strict=True):
        text = tokenizer.apply_chat_template(
            [
                *({"role": turn.role, "content": turn.parts[0]} for turn in row.prompt),
                {"role": "assistant", "content": said},
            ],
            tokenize=False,
        )
        ids = tokenizer(text.rstrip("\n"), add_special_tokens=False)["input_ids"]
        assert [*encoded.prompt.tolist(), *answer.ids.tolist()] == [*ids, tokenizer.eos_token_id]
    assert tokenizer.decode(encoded.prompt).endswith("assistant:")
    assert encoded.answers[0].marked.tolist() == [True, False]
    # The space before "42" is a token of its own, and the template's.
    assert encoded.answers[1].supervised.tolist() == [False, True, True, True]
    with pytest.raises(InvalidRow, match="row 7, rejected: .*, and no word of the answer would be left"):
        only_the_space = {"max_length": len(encoded.prompt) + 1, "truncate": "answer"}
        encode_answers(row, tokenizer, tiny_vlm("lfm2")[0].config, **only_the_space)
    turned = encode_answers(pair(chosen="42", rejected="red"), tokenizer, tiny_vlm("lfm2")[0].config)
    assert torch.equal(turned.prompt, encoded.prompt)
    assert [answer.ids.tolist() for answer in turned.answers] == [
        answer.ids.tolist() for answer in encoded.answers[::-1]
    ]


def test_a_processor_that_ends_the_prompt_is_refused() -> None:
    """No row's fault: every answer would stand behind an end token."""
    from tokenizers.processors import TemplateProcessing

    model, processor = tiny_vlm("qwen2_5_vl")
    ending, end = copy.deepcopy(processor), processor.tokenizer.eos_token
    special = [(end, processor.tokenizer.eos_token_id)]
    ending.tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=f"$A {end}", special_tokens=special)
    with pytest.raises(ValueError, match="Qwen2_5_VLProcessor adds tokens behind the prompt") as caught:
        encode_answers(pair(picture()), ending, model.config)
    assert not isinstance(caught.value, InvalidRow)


def test_a_tokenizer_s_template_is_complete() -> None:
    """As its apply_chat_template takes it: nothing is set before."""
    from tokenizers.processors import TemplateProcessing

    model, tokenizer = tiny_vlm("lfm2")
    starting, start = copy.deepcopy(tokenizer), tokenizer.bos_token
    special = [(start, tokenizer.bos_token_id)]
    starting.backend_tokenizer.post_processor = TemplateProcessing(single=f"{start} $A", special_tokens=special)
    starting.chat_template = tokenizer.chat_template.replace("{{- bos_token -}}", "")
    assert starting("x")["input_ids"][0] == tokenizer.bos_token_id
    ids = encode_answers(pair(), starting, model.config).prompt.tolist()
    assert [tokenizer.bos_token_id, *ids] == encode("lfm2", pair()).prompt.tolist()


def test_marks_move_with_an_answer_that_the_template_strips() -> None:
    model, tokenizer = tiny_vlm("lfm2")
    stripping = copy.deepcopy(tokenizer)
    stripping.chat_template = stripping.chat_template.replace("message['content'] -}}", "message['content'] | trim -}}")
    row = pair(chosen="  The red bag ", chosen_marks=((6, 9),))
    answer = encode_answers(row, stripping, model.config).answers[0]
    assert stripping.decode(answer.ids[answer.supervised]) == "The red bag<|im_end|>"
    assert stripping.decode(answer.ids[answer.marked]) == " red"


def test_templates_that_change_prompt_or_answer_are_named() -> None:
    model, tokenizer = tiny_vlm("lfm2")
    changed = copy.deepcopy(tokenizer)
    changed.chat_template = tokenizer.chat_template.replace(
        "<|im_start|>assistant\\n'",
        "<|im_start|>assistant\\n' + ('<think>\\n' if enable_thinking is not defined or enable_thinking else '')",
    )
    with pytest.raises(InvalidRow, match="row 7, chosen: .* template_kwargs={'enable_thinking': False}"):
        encode_answers(pair(), changed, model.config)
    there = encode_answers(pair(), changed, model.config, template_kwargs={"enable_thinking": False})
    assert there.answers[0].ids.tolist() == encode("lfm2", pair()).answers[0].ids.tolist()
    changed.chat_template = tokenizer.chat_template.replace("message['content'] -}}", "message['content'] | upper -}}")
    with pytest.raises(InvalidRow, match="row 7, chosen: the chat template changes the answer's words"):
        encode_answers(pair(), changed, model.config)
    changed.chat_template = "{{ raise_exception('no system turns') }}"
    with pytest.raises(InvalidRow, match="row 7, prompt: the chat template refuses the conversation: no system turns"):
        encode_answers(pair(), changed, model.config)


def test_token_0_pads_where_it_is_the_pad_token() -> None:
    tokenizer = copy.deepcopy(tiny_vlm("lfm2")[1])
    assert padding_token(tokenizer) == padding_token(tiny_vlm("lfm2_vl")[1]) == 0
    tokenizer.pad_token = None
    assert padding_token(tokenizer) == tokenizer.eos_token_id
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="set tokenizer.pad_token"):
        padding_token(tokenizer)
