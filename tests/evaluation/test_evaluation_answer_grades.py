"""What counts as a right answer, of which kind of question, and how shares of them are told."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmalign.data.questions import Question
from mmalign.evaluation.answer_grades import accuracy, by_kind, choice, grade, grader_of, pairs, short_text, yes_or_no


def question(*right, row=0, cluster="a", **more):
    return Question(row, "What is it?", right, cluster, **more)


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ("Yes.", "yes"),
        ("no", "no"),
        ("NO, there is none", "no"),
        ("There is no bag.", "no"),
        ("Nothing. Yes.", None),
        ("... Yes.", "yes"),
        ("I know nothing about it", None),
        ("Yesterday it moved", None),
        ("", None),
        ("\n\nYes", "yes"),
        ("Yes, there is no doubt", "yes"),
    ],
)
def test_yes_and_no_are_whole_words_of_the_first_sentence(answer, said):
    for right in ("yes", "No"):
        expected = None if said is None else float(said == right.lower())
        assert yes_or_no(question(right), answer) == expected


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        ("C", "C"),
        ("c.", "C"),
        ("(C)", "C"),
        ("**C**", "C"),
        ("Answer: C", "C"),
        ("answer: (c)", "C"),
        ("The answer is C because it moves", "C"),
        ("The correct option is C.", "C"),
        ("Option A is right", "A"),
        ("The answer is A because it moves", "A"),
        ("C) to the left", "C"),
        ("C. to the left", "C"),
        ("C\nto the left", "C"),
        ("I think it is C.", "C"),
        ("It must be (B), not what it seems", "B"),
        ("Answer: C. It is not (B).", "C"),
        ("The shirt moves to the left", None),
        ("A red bag", None),
        ("Answer: A red bag", None),
        ("the answer is a red bag", None),
        ("I see a bag", None),
        ("Options are hard", None),
        ("The answers differ", None),
        ("(A) or (B)", None),
        ("A, or B.", None),
        ("", None),
    ],
)
def test_an_option_is_a_letter_that_is_named_as_one(answer, letter):
    for right in "ABC":
        assert choice(question(right), answer) == (None if letter is None else float(letter == right)), right


def test_the_release_s_defect_is_not_ours():
    # It takes the reply's first letter: "Answer: C" is A there, and "The…" is T.
    assert choice(question("C"), "Answer: C") == 1 and choice(question("A"), "Answer: C") == 0
    assert choice(question("T"), "The shirt") is None


def test_an_option_is_named_by_its_text_too_and_only_by_letters_that_there_are():
    asked = question("B", options=("a red bag", "A blue bag"))
    assert choice(asked, "The blue bag.") == 1 and choice(asked, "a red bag") == 0
    assert choice(question("a blue bag", options=asked.options), "B") == 1
    assert choice(asked, "D") is None and choice(asked, "Answer: D") is None


def test_options_that_differ_by_a_mark_are_told_apart():
    signs = question("5", options=("-5", "5"))
    assert [choice(signs, said) for said in ("B", "A", "5", "-5")] == [1, 0, 1, 0]
    named = question("C++", options=("C", "C++", "C#"))
    assert [choice(named, said) for said in ("B", "C++", "C#", "c++")] == [1, 1, 0, None]


def test_an_alphabet_is_no_limit_to_options():
    asked = question("x28", options=tuple(f"x{number}" for number in range(30)))
    assert [choice(asked, said) for said in ("x28", "x27", "B")] == [1, 0, 0]


@pytest.mark.parametrize(("said", "worth"), [("A", 1), ("B. No", 0), ("Yes, it is.", 1), ("no", 0), ("Maybe.", None)])
def test_where_yes_and_no_are_options_their_letters_are_read_too(said, worth):
    (graded,) = grade([question("Yes", options=("Yes", "No"))], [said])
    assert (graded.score, graded.readable) == (worth or 0, worth is not None)


@pytest.mark.parametrize(
    ("right", "said", "same"),
    [
        ("1.5", "15", False),
        ("1.5", "1.5.", True),
        ("-5", "5", False),
        ("-5", "\N{MINUS SIGN}5", True),
        (".5", "5", False),
        ("3:15", "315", False),
        ("1,000", "1000", True),
        ("1,5", "15", False),
        ("covid-19", "Covid19", True),
        ("A", "a.", True),
        ("A", "The", False),
    ],
)
def test_marks_of_a_number_and_an_article_alone_are_no_trimmings(right, said, same):
    assert short_text(question(right, "?"), said) == same


def test_short_texts_are_compared_without_case_punctuation_and_articles():
    asked = question("The red bag!", "a  purse")
    assert [short_text(asked, said) for said in ("red bag", "Purse.", "red bags", " ")] == [1, 1, 0, None]
    assert short_text(question("Überwurf"), "u\u0308berwurf") == 1


@pytest.mark.parametrize(
    ("asked", "grader"),
    [
        (question("Yes."), "yes-no"),
        (question("no"), "yes-no"),
        (question("B"), "choice"),
        (question("(B)"), "choice"),
        (question("red", options=("red", "blue")), "choice"),
        (question("b"), "text"),
        (question("red"), "text"),
        (question("yes", "yeah"), "text"),
        (question("yes\r\n"), "yes-no"),
    ],
)
def test_what_is_right_tells_the_grader(asked, grader):
    assert grader_of(asked) == grader
    assert grade([asked], [asked.right[0]])[0].score == 1


def test_a_callable_grades_and_what_it_cannot_read_is_wrong():
    graded = grade([question(), question()], ["long", "?"], lambda asked, said: None if said == "?" else 0.5)
    assert [(one.score, one.readable) for one in graded] == [(0.5, True), (0.0, False)]
    with pytest.raises(ValueError, match="gave 2 for row 0"):
        grade([question()], ["x"], lambda asked, said: 2)


@pytest.mark.parametrize(
    ("asked", "grader", "told"),
    [
        (question(row=3), "auto", "row 3, answer: nothing tells what is right"),
        (question(row=3), "text", "row 3, answer: nothing tells what is right"),
        (question("maybe", row=3), "yes-no", "row 3, answer: expected yes or no, got 'maybe'"),
        (question("red bag", row=3), "choice", "row 3, answer: expected the letter of an option"),
        (question("A", "B", row=3), "choice", "row 3, answer: expected one option, got 2"),
    ],
)
def test_a_question_that_no_grader_can_grade_is_named(asked, grader, told):
    for said in ("yes", ""):
        with pytest.raises(ValueError, match=re.escape(told)):
            grade([asked], [said], grader)


def asked_in_clusters(clusters):
    return [question("yes", row=row, cluster=cluster) for row, cluster in enumerate(clusters)]


def test_accuracy_counts_the_unreadable_as_wrong_and_the_questions_of_a_clip_as_one_draw():
    answers = ["yes"] * 60 + ["no"] * 30 + ["hm"] * 10
    apart = accuracy(grade(asked_in_clusters([str(row) for row in range(100)]), answers))
    together = accuracy(grade(asked_in_clusters([str(row // 10) for row in range(100)]), answers))
    assert apart.rate == together.rate == 0.6 and apart.unreadable == 10 and together.num_clusters == 10
    assert apart.low < 0.6 < apart.high and together.high - together.low > 2 * (apart.high - apart.low)


@given(st.lists(st.booleans(), min_size=2, max_size=12))
def test_a_pair_is_right_only_if_both_questions_are(right):
    asked = [question("yes", row=row, pair=str(row // 2)) for row in range(len(right) // 2 * 2)]
    graded = grade(asked, ["yes" if one else "no" for one in right[: len(asked)]])
    both = [a and b for a, b in zip(right[::2], right[1::2], strict=False)]
    assert [one.score for one in pairs(graded)] == [float(one) for one in both]


def test_a_pair_is_read_only_if_both_answers_are():
    asked = [question("yes", row=row, pair=str(row // 2)) for row in range(4)]
    assert [one.readable for one in pairs(grade(asked, ["yes", "hm", "no", "yes"]))] == [False, True]


def test_a_pair_of_one_is_named():
    with pytest.raises(ValueError, match="row 2, pair: no other question has 'x'"):
        pairs(grade([question("yes"), question("yes", row=2, pair="x")], ["yes", "yes"]))


def test_kinds_keep_their_order_and_questions_without_one_have_none():
    asked = [question("yes", kind=kind) for kind in ("colour", "", "way", "colour")]
    found = by_kind(grade(asked, ["yes", "yes", "no", "no"]))
    assert {kind: [one.score for one in ones] for kind, ones in found.items()} == {"colour": [1, 0], "way": [0]}
    assert list(found) == ["colour", "way"]
