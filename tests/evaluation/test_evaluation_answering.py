"""Answers of tiny models in batches: the same as one by one, kept line by line, gone on with, and never mixed with others'."""

import copy
import json
from types import SimpleNamespace

import numpy as np
import pytest
from tiny_vlm import KINDS, TEXT_KINDS, VIDEO_KINDS, clip, picture, tiny_vlm

from mmalign.data.questions import load_questions
from mmalign.evaluation.answering import answer, read_answers
from mmalign.training.token_pipeline import TokenPipeline

WORDS = ("What is it?", "Which way does the shirt move? Left, or right?", "Is there a bag?", "Red?")


def rows(kind):
    """Questions of several lengths about pictures of several sizes, about clips, or about nothing."""
    made = [{"question": text, "kind": "x"} for text in WORDS]
    for at, row in enumerate(made):
        if kind in VIDEO_KINDS and at % 2:
            row["video"] = list(clip(seed=at).frames)
        elif kind in KINDS:
            row["image"] = picture(20 + 12 * at, 24, seed=at).image
    return made


def pipeline(kind="lfm2", seed=0):
    return TokenPipeline.from_parts(*tiny_vlm(kind, seed))


@pytest.mark.parametrize("kind", [*KINDS, *TEXT_KINDS])
def test_a_batch_gives_the_answers_that_each_question_gets_alone(kind):
    pipe, asked = pipeline(kind), load_questions(rows(kind))
    # Random models say one token again and again.
    options = {"max_new_tokens": 12, "progress": False, "no_repeat_ngram_size": 1}
    together, alone = (answer(pipe, asked, batch_size=size, **options).answers for size in (4, 1))
    assert together == alone and [one.row for one in together] == [0, 1, 2, 3]
    assert len({one.answer for one in together}) > 1


def test_an_answer_is_that_of_the_pipeline_itself():
    pipe, data = pipeline("qwen2_5_vl"), rows("qwen2_5_vl")
    told = answer(pipe, load_questions(data), max_new_tokens=8, progress=False).answers
    assert told[0].answer == pipe(WORDS[0], images=[data[0]["image"]], max_new_tokens=8)


def test_answers_are_greedy_whatever_the_model_s_own_settings_are():
    model, processor = (copy.deepcopy(part) for part in tiny_vlm("lfm2"))
    asked, options = load_questions(rows("lfm2")), {"max_new_tokens": 8, "progress": False, "no_repeat_ngram_size": 1}
    greedy = answer(TokenPipeline.from_parts(model, processor), asked, **options).answers
    model.generation_config.update(do_sample=True, temperature=9.0)
    assert answer(TokenPipeline.from_parts(model, processor), asked, **options).answers == greedy


def test_whether_an_answer_was_ended_is_told():
    model, processor = (copy.deepcopy(part) for part in tiny_vlm("lfm2"))
    pipe = TokenPipeline.from_parts(model, processor)
    first = answer(pipe, load_questions(rows("lfm2")), max_new_tokens=3, progress=False).answers
    assert not any(one.finished for one in first)
    # Whatever token this model says first now ends its answers.
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": WORDS[0]}], add_generation_prompt=True, return_dict=True, return_tensors="pt"
    )
    model.generation_config.eos_token_id = int(model(**inputs).logits[0, -1].argmax())
    ended = answer(pipe, load_questions(rows("lfm2")[:1]), max_new_tokens=3, progress=False).answers
    assert ended[0].finished
    # Or the caller says which token ends them.
    last, model.generation_config.eos_token_id = model.generation_config.eos_token_id, None
    told = answer(pipe, load_questions(rows("lfm2")[:1]), max_new_tokens=3, progress=False, eos_token_id=last).answers
    assert told == ended


class Counting:
    """A pipeline that counts the questions it is asked, and may stop before one of them."""

    def __init__(self, pipe, stop=None):
        self.processor, self.asked = pipe.processor, 0
        inner = pipe.model

        def generate(**inputs):
            if self.asked == stop:
                raise KeyboardInterrupt
            self.asked += len(inputs["input_ids"])
            return inner.generate(**inputs)

        self.model = SimpleNamespace(
            generate=generate,
            config=inner.config,
            device=inner.device,
            modules=inner.modules,
            generation_config=inner.generation_config,
        )


def test_a_stop_loses_one_batch_and_half_a_line_at_most(tmp_path):
    pipe, asked, path = pipeline(), load_questions(rows("lfm2")), tmp_path / "new" / "answers.jsonl"
    options = {"output": path, "batch_size": 2, "max_new_tokens": 6, "progress": False, "fingerprint": "m"}
    with pytest.raises(KeyboardInterrupt):
        answer(Counting(pipe, stop=2), asked, **options)
    assert path.read_bytes().count(b"\n") == 2
    with path.open("ab") as file:
        file.write(b'{"row": 2, "quest')
    counting = Counting(pipe)
    resumed = answer(counting, asked, **options)
    assert counting.asked == 2 and resumed == answer(pipe, asked, **options | {"output": None})
    assert read_answers(path) == resumed
    again = Counting(pipe)
    assert answer(again, asked, **options) == resumed and again.asked == 0
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["row"] for line in lines] == [0, 1, 2, 3] and lines[1]["question"] == WORDS[1]


def test_a_file_of_something_else_is_not_touched(tmp_path):
    """Neither its last line, which lacks its line's end, nor all of it."""
    pipe, asked, path = pipeline(), load_questions(rows("lfm2")), tmp_path / "notes.txt"
    for content in (b"first\nwithout an end", b'[{"question": "What?"}]', b'{"row": 1, "text": "mine"}', b"\xff\xfe"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="line 1 was not written by mmalign answer"):
            answer(pipe, asked, output=path, max_new_tokens=2, progress=False, fingerprint="m")
        assert path.read_bytes() == content


def test_what_an_editor_does_to_a_file_of_answers_does_no_harm(tmp_path):
    pipe, asked, path = pipeline(), load_questions(rows("lfm2")), tmp_path / "answers.jsonl"
    options = {"output": path, "max_new_tokens": 4, "progress": False, "fingerprint": "m"}
    whole = answer(pipe, asked, **options)
    three = b"\r\n".join(path.read_bytes().splitlines()[:3])
    path.write_bytes(b"\xef\xbb\xbf" + three)
    counting = Counting(pipe)
    assert answer(counting, asked, **options) == whole == read_answers(path) and counting.asked == 1
    with path.open("ab") as file:
        file.write(b'{"row": 2, "quest')
    assert read_answers(path) == whole


def test_a_full_disk_leaves_whole_lines(tmp_path):
    resource = pytest.importorskip("resource")
    pipe, asked, path = pipeline(), load_questions(rows("lfm2")), tmp_path / "answers.jsonl"
    options = {"output": path, "batch_size": 2, "max_new_tokens": 4, "progress": False, "fingerprint": "m"}
    whole = answer(pipe, asked, **options)
    lines = path.read_bytes().splitlines(keepends=True)
    path.unlink()
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    # There is room for the first two answers, and for half of the third.
    resource.setrlimit(resource.RLIMIT_FSIZE, (sum(map(len, lines[:2])) + len(lines[2]) // 2, before[1]))
    try:
        with pytest.raises(OSError):
            answer(pipe, asked, **options)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert path.read_bytes() == b"".join(lines[:2])
    assert answer(pipe, asked, **options) == whole


def test_settings_of_generation_make_another_model_and_what_cannot_be_written_down_is_refused(tmp_path):
    model, processor = (copy.deepcopy(part) for part in tiny_vlm("lfm2"))
    pipe, asked, path = (
        TokenPipeline.from_parts(model, processor),
        load_questions(rows("lfm2")),
        tmp_path / "answers.jsonl",
    )
    options = {"output": path, "max_new_tokens": 4, "progress": False}
    answer(pipe, asked, **options)
    model.generation_config.repetition_penalty = 5.0
    with pytest.raises(ValueError, match="other model"):
        answer(pipe, asked, **options)
    with pytest.raises(ValueError, match="logits_processor: .* cannot be kept with the answers"):
        answer(pipe, asked, logits_processor=[len], max_new_tokens=4)
    assert answer(pipe, asked, max_new_tokens=np.int64(1), progress=False).options["max_new_tokens"] == 1


def test_answers_of_another_model_other_data_or_other_options_are_not_mixed(tmp_path):
    pipe, asked, path = pipeline(), load_questions(rows("lfm2")), tmp_path / "answers.jsonl"
    options = {"output": path, "max_new_tokens": 4, "progress": False}
    answer(pipe, asked, **options)
    before = path.read_bytes()
    with pytest.raises(ValueError, match="line 1: an answer with other model than"):
        answer(pipeline(seed=1), asked, **options)
    with pytest.raises(ValueError, match="other data than"):
        answer(pipe, load_questions(rows("lfm2")[:3]), **options)
    with pytest.raises(ValueError, match="other options than"):
        answer(pipe, asked, **options | {"max_new_tokens": 5})
    assert path.read_bytes() == before
    path.write_text('{"row": 0}\n')
    with pytest.raises(ValueError, match="line 1 was not written by mmalign answer"):
        answer(pipe, asked, **options)


def test_a_lora_makes_another_model(tmp_path):
    from peft import LoraConfig

    model, processor = (copy.deepcopy(part) for part in tiny_vlm("lfm2"))
    pipe, asked, path = (
        TokenPipeline.from_parts(model, processor),
        load_questions(rows("lfm2")),
        tmp_path / "answers.jsonl",
    )
    model.add_adapter(LoraConfig(r=2, target_modules=["q_proj"]))
    options = {"output": path, "max_new_tokens": 4, "progress": False}
    answer(pipe, asked, **options)
    model.disable_adapters()
    with pytest.raises(ValueError, match="other model"):
        answer(pipe, asked, **options)
