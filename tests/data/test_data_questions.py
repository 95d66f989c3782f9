"""Questions from rows of their own and from preference data: what is asked, what is right, which belong together."""

import re

import pytest
from tiny_vlm import clip, picture

from mmalign.data.questions import load_questions
from mmalign.data.records import InvalidRow


def test_a_question_tells_what_is_right_and_what_it_is_about():
    asked = load_questions(
        [
            {
                "question": "<image>\nWhat is it?",
                "answer": "a bag",
                "image": picture().image,
                "kind": "what",
                "pair": 3,
            },
            {"question": "Red?", "answer": ["yes", "yeah"], "image": None, "options": ["yes", "no"]},
        ]
    )
    first, second = asked[0], asked[1]
    assert (first.text, first.right, first.kind, first.pair, first.options) == (
        "What is it?",
        ("a bag",),
        "what",
        "3",
        (),
    )
    assert (second.right, second.kind, second.pair, second.options) == (("yes", "yeah"), "", None, ("yes", "no"))
    turns = asked.prompt(0)
    assert turns[-1].media[0].image.size == picture().image.size and "What is it?" in turns[-1].parts


def test_questions_about_the_same_media_stand_together():
    one, other = picture(seed=1).image, picture(seed=2).image
    asked = load_questions([{"question": f"{row}?", "image": image} for row, image in enumerate((one, one, other))])
    assert asked[0].cluster == asked[1].cluster != asked[2].cluster
    plain = load_questions([{"prompt": "a?"}, {"prompt": "a?"}, {"prompt": "b?"}])
    assert plain[0].cluster == plain[1].cluster != plain[2].cluster


def test_a_chat_and_a_clip_are_read_with_the_frames_that_are_wanted():
    chat = [
        {"role": "user", "content": [{"type": "video"}, {"type": "text", "text": "Left?"}]},
        {"role": "assistant", "content": "Yes."},
        {"role": "user", "content": "And then?"},
    ]
    asked = load_questions([{"prompt": chat, "video": list(clip(8).frames)}], num_frames=2)
    assert asked[0].text == "And then?" and asked[0].right == ()
    assert len(asked.prompt(0)[0].media[0].frames) == 2 and len(asked.prompt(0)) == 3
    # In clips' data <image> marks a clip, as LLaVA has it.
    llava = load_questions([{"question": "<image>\nLeft?", "video": list(clip().frames)}])
    assert len(llava.prompt(0)[0].media) == 1


@pytest.mark.parametrize(
    ("row", "right"),
    [
        ({"prompt": "q", "chosen": "good", "rejected": "bad"}, ("good",)),
        ({"prompt": "q", "chosen": "x", "rejected": "y", "chosen_votes": 1, "rejected_votes": 1}, ()),
        ({"prompt": "q", "completion": "liked", "label": True}, ("liked",)),
        ({"prompt": "q", "completion": "hated", "label": False}, ()),
        ({"question": "q", "answer": "truth", "pred": "error"}, ("truth",)),
    ],
)
def test_of_preference_data_the_preferred_answer_is_right(row, right):
    asked = load_questions([row | {"kind": "k"}])[0]
    assert (asked.right, asked.text, asked.kind) == (right, "q", "k")


def test_parquet_is_read_as_lists_are(tmp_path):
    datasets = pytest.importorskip("datasets")
    items = [{"question": "a?", "answer": "x", "kind": "k", "pair": "p", "more": 1}, {"question": "b?", "answer": "y"}]
    datasets.Dataset.from_list(items).to_parquet(tmp_path / "q.parquet")
    read, plain = load_questions(tmp_path / "q.parquet"), load_questions(items)
    assert [read[row] for row in range(2)] == [plain[row] for row in range(2)]


def test_the_fingerprint_knows_every_answer_and_the_frames():
    items = [{"question": "a?", "answer": "x"}, {"question": "b?", "answer": "y"}]
    first = load_questions(items).fingerprint()
    assert first == load_questions([dict(item) for item in items]).fingerprint()
    others = (
        load_questions([items[0], {"question": "b?", "answer": "z"}]),
        load_questions(items, max_rows=1),
        load_questions(items, num_frames=2),
    )
    assert len({first, *(other.fingerprint() for other in others)}) == 4


@pytest.mark.parametrize(
    ("rows", "told"),
    [
        ([{"text": "a"}], "columns text: questions stand in one column, question or prompt"),
        ([{"question": "a", "prompt": "a"}], "both question and prompt"),
        ([], "no rows"),
    ],
)
def test_what_holds_no_questions_is_refused(rows, told):
    with pytest.raises(ValueError, match=re.escape(told)):
        load_questions(rows)


def test_options_reach_the_source_or_are_refused():
    source = load_questions([{"question": "a"}, {"question": "b"}], max_rows=1)
    assert len(source) == 1 and load_questions(source) is source
    for options in ({"max_rows": 1}, {"num_frames": 2}, {"fps": 2.0}, {"split": "test"}):
        with pytest.raises(ValueError, match="does not apply to a QuestionSource"):
            load_questions(source, **options)


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ({"question": "a", "answer": 3}, "row 0, answer: expected a text, or several"),
        ({"question": "a", "answer": " "}, "row 0, answer: expected a text"),
        ({"question": "a", "options": []}, "row 0, options: expected a text"),
        ({"question": "<image>a"}, "1 image placeholder(s)"),
        ({"question": [{"role": "user", "content": [{"type": "image"}]}], "video": "x"}, "1 image placeholder(s)"),
        ({"question": None}, "row 0, question: expected text"),
        ({"question": "a", "kind": 1.5}, "row 0, kind: expected text"),
        ({"question": " "}, "row 0, question: a turn of 'user' is empty"),
        ({"prompt": [{"role": "assistant", "content": "a"}]}, "ends with the turn of 'assistant'"),
    ],
)
def test_a_row_that_cannot_be_asked_names_its_column(row, told):
    with pytest.raises(InvalidRow, match=re.escape(told)):
        load_questions([row])[0]
