"""Two models' answers compared: paired by question, told by kind and by pairs, and written down as a page that loads nothing."""

import json
import re
from dataclasses import replace

import pytest
from tiny_vlm import clip, picture

from mmalign.data.questions import Question, load_questions
from mmalign.evaluation.answer_evaluation import answer_retention, evaluate_answers
from mmalign.evaluation.answer_likelihood import AnswerLikelihoods, Estimate
from mmalign.evaluation.answer_report import answer_lines, headline, notes, picture_of, write_answer_report
from mmalign.evaluation.answering import Answered, AnswerFile
from mmalign.evaluation.report_parts import data_uri

NUMBER = 120


def questions(**more):
    return [
        Question(row, f"Is it {row}?", ("yes",), str(row // 2), kind="ab"[row % 2], pair=str(row // 2), **more)
        for row in range(NUMBER)
    ]


def answers(right, model="m", *, data="d", finished=True, number=NUMBER, **options):
    """`right`: whether row i is answered right; None for an answer that cannot be read."""
    words = {True: "Yes.", False: "No.", None: "Hm."}
    told = tuple(Answered(row, "", words[right(row)], finished) for row in range(number))
    return AnswerFile(told, model, data, {"max_new_tokens": 4, **options})


def compared(**more):
    """The aligned model gets kind b right more often."""
    ours, theirs = answers(lambda row: row % 2 == 1 or row % 4 == 0), answers(lambda row: row % 4 == 0, "base")
    return evaluate_answers(questions(), ours, theirs, **more)


def test_the_difference_is_paired_by_question_and_told_by_kind():
    found = compared()
    assert (found.overall.aligned.rate, found.overall.base.rate) == (0.75, 0.25)
    assert found.overall.difference.value == 0.5 and found.overall.shows_difference
    first, second = found.kinds
    assert (first.name, first.difference.value, first.p_corrected, first.shows_difference) == ("a", 0, 1, False)
    assert second.difference.value == 1 and second.shows_difference
    # Holm: the smaller of two p-values is doubled.
    assert second.p_corrected == pytest.approx(2 * second.difference.p_value)
    # A pair is right where both of its questions are: rows 4n and 4n + 1.
    assert (found.pairs.aligned.rate, found.pairs.base.rate, found.pairs.aligned.num_questions) == (0.5, 0, 60)
    assert headline(found).startswith("Aligned answers better than base: 75.0% (95% interval ")
    assert "the difference is +50.0 points" in headline(found)


def test_a_difference_is_shown_at_the_confidence_that_was_asked_for():
    ninety_five, ninety_nine = (compared(confidence=level).overall for level in (0.95, 0.99))
    assert replace(ninety_five, p_corrected=0.03).shows_difference
    assert not replace(ninety_nine, p_corrected=0.03).shows_difference


def test_one_model_is_graded_by_itself():
    found = evaluate_answers(questions(), answers(lambda row: True), aligned_label="LFM2")
    assert found.overall.base is None and found.overall.difference is None and not found.overall.shows_difference
    assert headline(found).startswith("LFM2 answers 100.0% (95% interval ") and found.overall.aligned.low < 1
    assert all(group.p_corrected is None for group in found.kinds)


def test_what_takes_weight_from_the_numbers_is_said():
    ours = answers(lambda row: None if row < 12 else True, finished=False)
    told = "\n".join(answer_lines(evaluate_answers(questions(), ours, ours)))
    assert (
        "10.0% of aligned's answers could not be read" in told
        and "100.0% of aligned's answers were cut after 4" in told
    )
    assert "same model fingerprint" in told and told.startswith("No difference is shown")


@pytest.mark.parametrize(
    ("theirs", "told"),
    [
        (answers(lambda row: True, data="other"), "different data"),
        (answers(lambda row: True, max_pixels=4), "different options"),
        (answers(lambda row: True, number=7), "do not belong to these 120 questions"),
    ],
)
def test_answers_that_may_not_be_compared_are_refused(theirs, told):
    with pytest.raises(ValueError, match=told):
        evaluate_answers(questions(), answers(lambda row: True), theirs)


@pytest.mark.parametrize(
    ("lost", "verdict"), [(lambda row: False, "kept"), (lambda row: row % 2 == 0, "lost"), (lambda row: row % 24 == 0, "undecided")]
)  # fmt: skip
def test_retention_goes_by_the_interval(lost, verdict):
    found = answer_retention(questions(), answers(lambda row: not lost(row)), answers(lambda row: True), tolerance=0.05)
    assert found.verdict == verdict and found.base.mean == 1


def few(word, model):
    return AnswerFile(tuple(Answered(row, "", word, True) for row in range(3)), model, "d", {"max_new_tokens": 4})


def test_three_questions_show_nothing_however_alike_they_come_out():
    asked = [Question(row, "?", ("yes",), str(row)) for row in range(3)]
    better = evaluate_answers(asked, few("yes", "m"), few("no", "base")).overall
    assert better.difference.value == 1 and better.difference.low < 0 and not better.shows_difference
    same = evaluate_answers(asked, few("yes", "m"), few("yes", "base")).overall.difference
    assert (same.value, same.p_value) == (0, 1) and same.low == pytest.approx(-same.high) and same.high > 0.2
    assert answer_retention(asked, few("yes", "m"), few("yes", "base"), tolerance=0.02).verdict == "undecided"
    with pytest.raises(ValueError, match="tolerance must be a number above zero, got 0"):
        answer_retention(asked, few("yes", "m"), few("yes", "base"), tolerance=0)


def test_the_page_loads_nothing_and_says_what_was_asked_for(tmp_path):
    hostile = "</style><script>alert(1)</script>\ud83d\x07"
    asked = [Question(row, hostile, (hostile,), str(row), kind=hostile) for row in range(30)]
    options = {"max_new_tokens": 4, "do_sample": False}
    ours = AnswerFile(tuple(Answered(row, "", hostile, True) for row in range(30)), "m", "d", options)
    theirs = AnswerFile(tuple(Answered(row, "", "?x", True) for row in range(30)), "n", "d", options)
    weighed = AnswerLikelihoods(Estimate(0.8, 0.7, 0.9, 50, 25, 0.95), Estimate(0.012, 0.01, 0.014, 50, 25, 0.95), ())
    kept = answer_retention(asked, theirs, ours, tolerance=0.1, grader="text")
    found = evaluate_answers(asked, theirs, ours, grader="text", likelihoods=weighed, retention=kept)
    page = write_answer_report(found, tmp_path).read_text(encoding="utf-8")
    assert "<script" not in page and not re.search(r'(src|href)="(?!data:)', page)
    for part in (
        "ranked as people do: 80.0% of 50",
        "per token: 0.0120",
        "Retention lost",
        "Unlearnt",
        ">p</th>",
        "<dd>no</dd>",
    ):
        assert part in page, part
    written = json.loads((tmp_path / "report.json").read_text())
    assert written["retention"]["verdict"] == "lost" and written["overall"]["difference"]["value"] == -1
    assert len(written["rows"]) == 30 and written["headline"] == headline(found)


def test_what_a_base_says_at_length_or_unreadably_is_told_as_well(tmp_path):
    ours, theirs = answers(lambda row: True), answers(lambda row: None if row < 30 else False, "n", finished=False)
    found = evaluate_answers(questions(), ours, theirs, base_label="old")
    told = "\n".join(answer_lines(found))
    assert "25.0% of old's answers could not be read" in told and "100.0% of old's answers were cut after 4" in told
    assert "of aligned's answers" not in told and not found.rows[0].base_finished
    page = write_answer_report(found, tmp_path).read_text()
    assert '0<span class="unit">old 30</span>' in page


def test_what_is_corrected_is_said_and_what_is_not():
    lines = answer_lines(compared())
    assert [("corrected p" in line, line.split()[0]) for line in lines[1:]] == [
        (True, "a"),
        (True, "b"),
        (False, "pairs"),
    ]
    assert any(line.endswith("those of all questions and of pairs are not.") for line in notes(compared()))


def test_a_single_prompt_and_answers_of_elsewhere_are_told_so():
    asked = [Question(row, "?", ("yes",), "one") for row in range(9)]
    told = AnswerFile(tuple(Answered(row, "", "yes", False) for row in range(9)), "m", "d", {})
    found = evaluate_answers(asked, told)
    assert any("a single prompt, which says nothing about others" in line for line in notes(found))
    assert "100.0% of aligned's answers were cut." in answer_lines(found)


def test_all_pictures_of_a_question_are_shown_and_the_frames_of_a_clip_apart(tmp_path):
    shown = [picture(24, 20, seed).image for seed in range(2)]
    source = load_questions(
        [
            {"question": "Two?", "images": shown, "answer": "yes"},
            {"question": "Moves?", "video": list(clip(6).frames), "answer": "yes"},
            {"question": "None?", "image": None, "answer": "yes"},
        ]
    )
    asked = [source[row] for row in range(3)]
    page = write_answer_report(evaluate_answers(asked, few("yes", "m")), tmp_path, picture=picture_of(source))
    cards = page.read_text().split('<figure class="pair">')[1:]
    assert [card.count("<img") for card in cards] == [2, 3, 0]
    assert all(f'src="{data_uri(image)}"' in cards[0] for image in shown)
    assert re.findall(r'title="([^"]*)"', cards[1]) == ["frame 1 of 6", "frame 4 of 6", "frame 6 of 6"]
    assert all(f'src="{data_uri(clip(6).frames[at])}"' in cards[1] for at in (0, 3, 5))
    assert "Of a clip the first, the middle and the last frame" in page.read_text()


def test_samples_are_picked_before_any_answer_is_looked_at(tmp_path):
    def shown(right):
        found = evaluate_answers(questions(), answers(right))
        page = write_answer_report(found, tmp_path, num_samples=5).read_text()
        return re.findall(r"Is it (\d+)\?", page)

    assert len(shown(lambda row: True)) == 5 and shown(lambda row: True) == shown(lambda row: row < 3)
