"""Pairs of a model's own mistakes: what is asked, what becomes a pair, what the file says, and that it can be trained on."""

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_vlm import clip, tiny_vlm

from mmalign.cli import main
from mmalign.data.answer_marks import parse_marks, tagged
from mmalign.data.answer_records import VideoClip
from mmalign.data.answers import load_answers
from mmalign.data.questions import Question, load_questions
from mmalign.data.records import InvalidRow
from mmalign.evaluation.answer_mistakes import (
    PerturbedQuestions,
    make_answer_pairs,
    model_judge,
    model_rewriter,
)
from mmalign.training.token_pipeline import TokenPipeline

RIGHT = ("It moves to the left, then it stops.", "It moves to the right.", "The bag is red.", "A shirt.")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Four clips, each a folder of frames, and questions about them; nobody knows the answer to a fifth."""
    rows = []
    for row, right in enumerate(RIGHT):
        (tmp_path / f"clip-{row}").mkdir()
        for at, frame in enumerate(clip(seed=row).frames):
            frame.save(tmp_path / f"clip-{row}" / f"{at}.png")
        video = {"frames": f"clip-{row}", "fps": 8.0}
        rows.append({"question": "What happens?", "video": video, "answer": right})
    rows.append({"question": "What else?", "video": rows[0]["video"]})
    (tmp_path / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


@pytest.fixture(scope="module")
def pipe() -> TokenPipeline:
    return TokenPipeline.from_parts(*copy.deepcopy(tiny_vlm("llava_onevision")))


def swapped(question: Question, right: str, said: str) -> str | None:
    """A rewriter that knows two mistakes."""
    return right.replace("left", "right").replace("red", "blue")


def wrong(question: Question, said: str) -> float | None:
    """Row 1 is right, all others are wrong."""
    return float(question.row == 1)


def make(pipe: TokenPipeline, folder: Path, **options: Any) -> tuple[Any, list[dict[str, Any]]]:
    given = {"judge": wrong, "rewrite": swapped, "max_new_tokens": 4, "progress": False} | options
    made = make_answer_pairs(pipe, load_questions(folder / "questions.jsonl"), folder / "pairs.jsonl", **given)
    return made, [json.loads(line) for line in made.path.read_text().splitlines()]


def test_wrong_answers_become_pairs_and_the_rest_is_counted(pipe: TokenPipeline, folder: Path):
    made, rows = make(pipe, folder)
    assert made.num_pairs == len(rows) == 2
    assert made.left_out == {"right": 1, "no other words": 1, "nothing known": 1}
    assert rows[0]["chosen"] == "It moves to the <MASK>left</MASK>, then it stops."
    assert rows[0]["rejected"] == "It moves to the <MASK>right</MASK>, then it stops."
    read = load_answers(made.path, num_frames=4)
    pair = read[1]
    assert (pair.chosen, pair.rejected) == ("The bag is red.", "The bag is blue.")
    assert [pair.chosen[a:b] for a, b in pair.chosen_marks or ()] == ["red"]
    (medium,) = pair.media
    assert isinstance(medium, VideoClip) and medium.frames_per_second == 8.0
    assert np.array_equal(np.asarray(medium.frames[0]), np.asarray(clip(seed=2).frames[0]))


def test_a_judge_that_cannot_read_an_answer_makes_no_pair(pipe: TokenPipeline, folder: Path):
    made, _ = make(pipe, folder, judge=lambda question, said: None)
    assert made.num_pairs == 0 and made.left_out["unreadable"] == 4


def test_without_a_rewriter_the_model_speaks_for_itself_and_that_is_told(
    pipe: TokenPipeline, folder: Path, caplog: pytest.LogCaptureFixture
):
    made, rows = make(pipe, folder, rewrite=None)
    assert made.num_pairs == 3 and "own words" in caplog.text
    answers = [json.loads(line) for line in (folder / "pairs.answers.jsonl").read_text().splitlines()]
    assert parse_marks(rows[0]["rejected"])[0] == answers[0]["answer"]


def test_what_the_model_sees_is_perturbed_by_seed_and_row_alone(folder: Path):
    questions = load_questions(folder / "questions.jsonl")

    def look(row: int, **options: Any) -> np.ndarray:
        given: dict[str, Any] = {"area": (0.25, 0.5), "shuffle": "none", "window": 2, "seed": 0} | options
        (medium,) = PerturbedQuestions(questions, **given).prompt(row)[0].media
        assert isinstance(medium, VideoClip)
        return np.stack([np.asarray(frame) for frame in medium.frames])

    clean = np.stack([np.asarray(frame) for frame in clip(seed=0).frames])
    hidden = (look(0) != clean).any(-1)
    assert 0.2 < hidden.mean() < 0.55 and (hidden == hidden[0]).mean() > 0.95
    assert (look(0) == look(0)).all() and (look(0) != look(0, seed=1)).any()
    assert (look(0, area=(0.0, 0.0)) == clean).all()
    one, other = (PerturbedQuestions(questions, (0.25, 0.5), "local", 2, seed).fingerprint() for seed in (0, 1))
    assert one != other != questions.fingerprint()


def test_media_that_the_file_could_not_name_are_refused(pipe: TokenPipeline, folder: Path):
    held = load_questions([{"question": "What?", "video": [*clip().frames], "answer": "A bag."}])
    inside = load_questions([{"question": "What?", "video": {"bytes": b"GIF89a", "path": "a.gif"}, "answer": "A bag."}])
    for questions in (held, inside):
        with pytest.raises(ValueError, match="row 0: its media are no files"):
            make_answer_pairs(pipe, questions, folder / "x.jsonl", judge=wrong, rewrite=swapped, max_new_tokens=1)
    elsewhere = folder / "deeper"
    with pytest.raises(ValueError, match="write the pairs into the folder of the media"):
        questions = load_questions(folder / "questions.jsonl")
        make_answer_pairs(pipe, questions, elsewhere / "x.jsonl", judge=wrong, rewrite=swapped, max_new_tokens=1)
    # Told before anything was asked.
    assert not elsewhere.exists() and not list(folder.glob("x.*"))
    with pytest.raises(ValueError, match=r"let its name end in \.jsonl"):
        make_answer_pairs(pipe, questions, folder / "x.json", judge=wrong, rewrite=swapped, max_new_tokens=1)
    gone = load_questions([{"question": "What?", "video": "gone.gif", "answer": "A bag."}], root=folder)
    with pytest.raises(InvalidRow, match="row 0, video: .*gone.gif"):
        make_answer_pairs(pipe, gone, folder / "x.jsonl", judge=wrong, rewrite=swapped, max_new_tokens=1)


def test_language_models_judge_and_rewrite_in_turns():
    asked: list[str] = []

    def model(replies: list[str]) -> Any:
        def reply(text: str) -> str:
            asked.append(text)
            return replies.pop(0)

        return reply

    question = Question(0, "What happens?", ("The bag is red.",), "c")
    rewrite = model_rewriter(model(["colour: blue", "The bag is blue."]))
    assert rewrite(question, "The bag is red.", "A blue bag") == "The bag is blue."
    assert "A blue bag" in asked[0] and "colour: blue" in asked[1] and "A blue bag" not in asked[1]
    assert model_rewriter(model(["None."]))(question, "The bag is red.", "It is red") is None
    judge = model_judge(model(["Yes, it does.", "no", "maybe", "**No**", "<think>Yes? Yes.</think>\nNo.", "<think>No"]))
    assert [judge(question, "x") for _ in range(6)] == [0.0, 1.0, None, 1.0, 1.0, None]
    thinking = ["<think>\nHm.\n</think>\n\ncolour", "Hm.</think>The bag is blue."]
    assert model_rewriter(model(thinking))(question, "The bag is red.", "A blue bag") == "The bag is blue."
    assert asked[-1].endswith("Mistakes:\ncolour\nSay the changed text and nothing else.")
    # A thought that was cut is neither a list of mistakes nor a text with them.
    for replies in (["<think>Well"], ["colour", "<think>Well"]):
        assert model_rewriter(model(replies))(question, "The bag is red.", "A blue bag") is None


def test_tags_are_read_back():
    text, spans = "Ein Bär, ein Bär.", ((4, 7), (13, 16))
    assert parse_marks(tagged(text, spans)) == (text, spans)
    assert tagged(text, ()) == text


def test_the_verb_makes_what_train_reads(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    model, processor = tiny_vlm("llava_onevision")
    model.save_pretrained(folder / "model")
    processor.save_pretrained(folder / "model")
    said = [
        "--model",
        str(folder / "model"),
        "--data",
        str(folder / "questions.jsonl"),
        "--output",
        str(folder / "p.jsonl"),
    ]
    assert main(["make-answer-pairs", *said, "--judge", "text", "--max-new-tokens", "4"]) == 0
    told = capsys.readouterr().out
    assert "4 pairs in" in told and "1 nothing known" in told and "mmalign train rrpo" in told
    assert len(load_answers(folder / "p.jsonl", num_frames=4)) == 4
    loaded: list[Any] = []

    class Asked(TokenPipeline):
        def __call__(self, prompt: Any, **options: Any) -> str:
            loaded.append((self, self.model.dtype, options["max_new_tokens"]))
            return "Yes." if prompt.startswith("A question") else "None."

    monkeypatch.setattr("mmalign.training.token_pipeline.TokenPipeline", Asked)
    words = [*said, "--judge", str(folder / "model"), "--rewriter", str(folder / "model"), "--max-new-tokens", "4"]
    (folder / "p.answers.jsonl").unlink()
    assert main(["make-answer-pairs", *words, "--dtype", "bfloat16"]) == 0
    told = capsys.readouterr().out
    assert "0 pairs in" in told and "4 no other words" in told and "train on them" not in told
    # One model judges and rewrites, in the precision that was asked for, and has room to think.
    assert loaded == [(loaded[0][0], torch.bfloat16, 1024)] * 8
