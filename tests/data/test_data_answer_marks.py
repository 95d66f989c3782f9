"""Marked phrases: what tags say, what padding is, which tags cannot be read; and the words in which two answers differ."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmalign.data.answer_marks import BadMarks, differing_spans, parse_marks

WORDS = st.lists(st.sampled_from(["the", "red", "röt", "日本", "car's", "🚗", ",", "."]), max_size=8).map(" ".join)
TEXT = st.text(alphabet="ab é日🚗 ,.\n", max_size=30)


@st.composite
def marked(draw: st.DrawFn) -> tuple[str, list[tuple[int, int]]]:
    """A text and spans of it, in order and apart, whose ends are no white space."""
    text = draw(TEXT)
    borders = sorted(draw(st.lists(st.integers(0, len(text)), max_size=8)))
    spans = list(zip(borders[::2], borders[1::2], strict=False))
    return text, [(a, b) for a, b in spans if text[a:b].strip() == text[a:b] != ""]


def tag(text: str, spans: list[tuple[int, int]], pad: str = "") -> str:
    for start, stop in reversed(spans):
        text = f"{text[:start]}<MASK>{pad}{text[start:stop]}{pad}</MASK>{text[stop:]}"
    return text


@given(marked())
def test_tags_come_off_and_their_places_stay(case: tuple[str, list[tuple[int, int]]]) -> None:
    text, spans = case
    tagged = tag(text, spans)
    assert re.sub("</?MASK>", "", tagged) == text
    assert parse_marks(tagged) == parse_marks(tagged, text) == (text, tuple(spans))


@given(marked())
def test_padding_inside_tags_is_told_from_the_plain_answer(case: tuple[str, list[tuple[int, int]]]) -> None:
    text, spans = case
    read, found = parse_marks(tag(text, spans, pad=" "), text)
    assert read == text and [text[a:b] for a, b in found] == [text[a:b] for a, b in spans]


@given(TEXT, st.integers(0, 30))
def test_another_plain_answer_is_an_error(text: str, at: int) -> None:
    with pytest.raises(BadMarks, match="not the plain answer"):
        parse_marks("<MASK>x</MASK>" + text, "x" + text[:at] + "y" + text[at:])


@pytest.mark.parametrize(
    ("tagged", "text", "phrases"),
    [
        ("<MASK>Red</MASK> car", "Red car", ["Red"]),
        ("a car in <MASK>red</MASK>", "a car in red", ["red"]),
        ("(<MASK>red</MASK>)!", "(red)!", ["red"]),
        ("un<MASK>believ</MASK>able", "unbelievable", ["believ"]),
        ("un<MASK> believ </MASK>able", "un believ able", ["believ"]),
        ("<MASK>日本</MASK>語 <MASK>🚗é</MASK>", "日本語 🚗é", ["日本", "🚗é"]),
        ("a <MASK> correct </MASK> or <MASK> preferred </MASK> answer.", "a correct or preferred answer.", ["correct", "preferred"]),
        ("a <MASK> red </MASK>, <MASK>fast </MASK>car", "a red, fast car", ["red", "fast"]),
        ("<MASK>a </MASK><MASK> b</MASK>", "a b", ["a", "b"]),
        ("a<MASK></MASK> b", "a b", []),
        ("<MASK>two words</MASK>", "two words", ["two words"]),
        ("nothing", "nothing", []),
        ("", "", []),
    ],
)  # fmt: skip
def test_what_tags_mean_without_the_plain_answer(tagged: str, text: str, phrases: list[str]) -> None:
    read, spans = parse_marks(tagged)
    assert (read, [read[start:stop] for start, stop in spans]) == (text, phrases)


@pytest.mark.parametrize(
    ("tagged", "reason"),
    [
        ("<MASK>a <MASK>b</MASK></MASK>", "nested tags"),
        ("a</MASK>", "without a <MASK> before it"),
        ("<MASK>a</MASK></MASK>", "without a <MASK> before it"),
        ("a <MASK>b", "never closed"),
    ],
)
def test_tags_that_do_not_match_are_errors(tagged: str, reason: str) -> None:
    with pytest.raises(BadMarks, match=reason):
        parse_marks(tagged)


def test_many_empty_tags_take_no_time() -> None:
    """As many ways to read them as a regular expression would try one by one."""
    with pytest.raises(BadMarks):
        parse_marks("<MASK>  </MASK>" * 200, " " * 200 + "x")


def without(text: str, spans: tuple[tuple[int, int], ...]) -> str:
    """The text without these characters, and without white space."""
    for start, stop in reversed(spans):
        text = text[:start] + text[stop:]
    return "".join(text.split())


@given(WORDS, WORDS)
def test_words_that_differ_are_marked_and_no_others(chosen: str, rejected: str) -> None:
    for options in ({}, {"insertions": "skip"}, {"deletions": "skip"}):
        both = differing_spans(chosen, rejected, **options)
        for text, spans in zip((chosen, rejected), both, strict=True):
            assert all(0 <= start < stop <= len(text) for start, stop in spans)
            assert all(a[1] <= b[0] for a, b in zip(spans, spans[1:], strict=False))
            assert all(text[start:stop].strip() == text[start:stop] for start, stop in spans)
    # What is left when the marked words of the plain comparison go is the same on both sides.
    spans = differing_spans(chosen, rejected, insertions="skip")
    assert without(chosen, spans[0]) == without(rejected, spans[1])
    assert differing_spans(chosen, chosen) == ((), ())


def phrases(chosen: str, rejected: str, **options: str) -> tuple[list[str], list[str]]:
    one, other = differing_spans(chosen, rejected, **options)  # type: ignore[arg-type]
    return [chosen[a:b] for a, b in one], [rejected[a:b] for a, b in other]


def test_words_that_stand_on_one_side_only() -> None:
    assert phrases("The man opens a door.", "The woman opens the door.") == (["man", "a"], ["woman", "the"])
    assert phrases("a very red car", "a red car") == (["very"], ["a"])
    assert phrases("red car", "a red car") == (["red"], ["a"])
    assert phrases("a very red car", "a red car", insertions="skip") == (["very"], [])
    assert phrases("a very red car", "a red car", deletions="skip") == ([], ["a"])
    assert phrases("", "a car") == ([], ["a car"])
    assert phrases("it isn't a T-shirt", "it is a shirt") == (["isn't", "T-shirt"], ["is", "shirt"])
    assert phrases("वह लड़का है।", "वह लड़की है।") == (["लड़का"], ["लड़की"])
    assert phrases("un cafe\u0301 noir", "un cafe noir") == (["cafe\u0301"], ["cafe"])
    with pytest.raises(ValueError, match="insertions must be one of neighbour, skip, got 'mark'"):
        differing_spans("a", "b", insertions="mark")  # type: ignore[arg-type]


def test_long_answers_with_frequent_words_are_aligned() -> None:
    """difflib's guess at junk would drop every word that stands in more than 1 % of a text of 200 words."""
    words = ["the", "dog", "runs", "and"] * 100
    assert phrases(" ".join(words), " ".join([*words[:200], "cat", *words[201:]])) == (["the"], ["cat"])
