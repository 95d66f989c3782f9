"""The tiny models that see: their own classes and processors, read in training just as afterwards."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from mmalign.data.answer_records import Picture
from mmalign.playground import answer_base, answering, video_base, vision_base
from mmalign.playground.answer_worlds import questions_of, see
from mmalign.playground.chat import IGNORED, TEMPLATE
from mmalign.playground.questions import Question

BASES: dict[str, Any] = {"vision": vision_base, "video": video_base}


@pytest.fixture(scope="module", params=["vision", "video"])
def base(request: pytest.FixtureRequest) -> tuple[str, Any, Any]:
    module = BASES[request.param]
    processor = module.build_processor()
    return request.param, module.build(processor.tokenizer).eval(), processor


@torch.no_grad()
def test_training_reads_what_the_processor_and_the_models_own_forward_read(base: Any) -> None:
    name, model, processor = base
    module = BASES[name]
    rows = see(name, "test", [3, 4], seed=5)
    pixels = torch.stack([_pixels(seen.medium) for seen in rows])
    turn = Question("background", "what colour is the background?", "blue")
    ids, labels = module.dialogues(processor.tokenizer).batch([[turn], [turn]])
    hidden = answer_base.read(module.seeing(model), pixels, ids, ids != 0).last_hidden_state

    kind = "image" if name == "vision" else "video"
    messages = [
        {"role": "user", "content": [{"type": kind}, {"type": "text", "text": turn.text}]},
        {"role": "assistant", "content": turn.answer},
    ]
    text = processor.apply_chat_template(messages, tokenize=False)
    media = answering._media([seen.medium for seen in rows])
    inputs = processor(text=[text, text], return_tensors="pt", **media)
    assert torch.equal(inputs["input_ids"], ids)
    said = processor.tokenizer.decode(ids[0][labels[0] != IGNORED])
    assert said == "blue<|im_end|>"
    torch.testing.assert_close(model(**inputs).logits, model.lm_head(hidden), atol=2e-4, rtol=1e-3)


def test_the_summary_is_the_last_token_of_the_medium(base: Any) -> None:
    name, model, processor = base
    dialogues = BASES[name].dialogues(processor.tokenizer)
    ids, _ = dialogues.dialogue([Question("background", "what colour is the background?", "blue")])
    last = "<|image_end|>" if name == "vision" else "<video>"
    assert processor.tokenizer.decode(ids[dialogues.summary]) == last
    assert processor.tokenizer.decode(ids[dialogues.summary + 1]) == "what"


def test_every_word_of_the_world_is_one_token_and_other_text_is_kept(base: Any) -> None:
    name, _, processor = base
    tokenizer = processor.tokenizer
    question = questions_of(name).ask(see(name, "test", [0], seed=1)[0].shown, "describe", np.random.default_rng(0))
    words = question.answer.replace(",", "").split()
    assert [len(tokenizer(f" {word}").input_ids) for word in words] == [1] * len(words)
    other = "Žluťoučký kůň, 马! 3×"
    assert tokenizer.decode(tokenizer(other).input_ids) == other
    assert tokenizer.pad_token_id == 0


def test_small_enough_to_ship(base: Any) -> None:
    _, model, _ = base
    number = sum(parameter.numel() for parameter in model.parameters())
    assert number < 0.9e6 and 2 * number < 1.25e6


def test_training_resumes_and_learns(base: Any, tmp_path: Path) -> None:
    name, _, processor = base
    module = BASES[name]

    def run(steps: int, folder: Path) -> tuple[Any, list[dict[str, float]]]:
        model = module.build(processor.tokenizer)
        parts = module.seeing(model), module.training_world()
        short = replace(module.ANSWERS, steps=steps, batch_size=4, warmup=2, curve_every=1, save_every=3, ema=0.0)
        curve = answer_base.train_answers(*parts, module.dialogues(processor.tokenizer), short, folder / "answers.pt")
        return model, curve

    straight, curve = run(8, tmp_path / "straight")
    run(3, tmp_path / "stopped")
    resumed, again = run(8, tmp_path / "stopped")
    assert again == curve
    assert curve[-1]["loss"] < curve[0]["loss"]
    for one, other in zip(straight.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(one, other)


def test_saved_as_transformers_loads_it(base: Any, tmp_path: Path) -> None:
    name, model, processor = base
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    again, its = AutoModelForImageTextToText.from_pretrained(tmp_path), AutoProcessor.from_pretrained(tmp_path)
    assert type(again) is type(model) and type(its) is type(processor) and its.chat_template == TEMPLATE
    media = [seen.medium for seen in see(name, "test", [0, 1], seed=9)]
    texts = ["what colour is the background?", "describe it."]
    assert answering.answer(again, its, media, texts) == answering.answer(model, processor, media, texts)


def _pixels(medium: Any) -> torch.Tensor:
    frames = [medium.image] if isinstance(medium, Picture) else medium.frames
    stacked = torch.stack([torch.frombuffer(bytearray(frame.tobytes()), dtype=torch.uint8) for frame in frames])
    pixels = stacked.view(len(frames), 32, 32, 3).movedim(-1, 1).float() / 255
    return pixels[0] if isinstance(medium, Picture) else pixels
