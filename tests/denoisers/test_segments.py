"""Where a long text is cut: by hand, in several scripts, and what must hold for any text."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmalign.denoisers.segments import published_segments, segments, split_sentences


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("A 3.5 m wall at the U.S. park. It is old.", ["A 3.5 m wall at the U.S. park.", "It is old."]),
        ("Mr. Smith, approx. 2 m tall, e.g. here. Then", ["Mr. Smith, approx. 2 m tall, e.g. here.", "Then"]),
        ("A bag!The shoe?Yes... no", ["A bag!", "The shoe?", "Yes...", "no"]),
        ('He said "Go." She (too!) went.', ['He said "Go."', "She (too!)", "went."]),
        ("红色的鞋子。「蓝色的包。」然后", ["红色的鞋子。", "「蓝色的包。」", "然后"]),
        ("यह लाल है। वह नीला है", ["यह लाल है।", "वह नीला है"]),
        ("هل هو أحمر؟ نعم۔ لا", ["هل هو أحمر؟", "نعم۔", "لا"]),
        ("one\ntwo.\n\nthree", ["one", "two.", "three"]),
        ("example.com/a.b and v1.2.3", ["example.com/a.b and v1.2.3"]),
        ("It ends etc.", ["It ends etc."]),
        ("", [""]),
        (" \n ", [""]),
    ],
)
def test_sentences_end_where_a_reader_ends_them(text: str, expected: list[str]) -> None:
    assert split_sentences(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("3.5 meters at U.S. park", ["3.", "5 meters at U.", "S.", " park."]),
        ("", [""]),
        ("\n\n", [""]),
        ("Red? Blue! Green; end.", ["Red.", " Blue! Green; end."]),
        ('He said "Go"! Then "stop;" now', ['He said "Go.', ' Then "stop.', " now."]),
        ("One.\n\nTwo.", ["One.", "Two."]),
        ("...", ["..."]),
    ],
)
def test_the_released_splitter_is_repeated_with_its_faults(text: str, expected: list[str]) -> None:
    assert published_segments(text) == expected
    assert segments(text, len, compat="longalign") == expected


def words(text: str) -> int:
    return len(text.split())


def test_a_long_sentence_is_cut_at_a_clause_then_at_a_word_then_anywhere() -> None:
    assert segments("a b c, d e f g h i", words, limit=5) == ["a b c,", "d e f g h", "i"]
    # A clause that would fill less than half of a segment is not worth a cut.
    assert segments("a, b c d e f g", words, limit=5) == ["a, b c d e", "f g"]
    assert segments("abcdefgh", len, limit=3) == ["abc", "def", "gh"]


def test_short_sentences_are_packed_only_while_they_fit() -> None:
    text = "aa bb. cc dd. ee ff gg. hh"
    assert segments(text, words, limit=5) == ["aa bb.", "cc dd.", "ee ff gg.", "hh"]
    assert segments(text, words, limit=5, pack=True) == ["aa bb. cc dd.", "ee ff gg. hh"]


@given(st.text(alphabet="ab .,!?。\n\"'Ué5", max_size=80), st.integers(1, 9), st.booleans())
def test_every_character_is_kept_in_order_and_every_segment_fits(text: str, limit: int, pack: bool) -> None:
    pieces = segments(text, len, limit=limit, pack=pack)
    assert "".join("".join(pieces).split()) == "".join(text.split())
    assert all(len(piece) <= limit for piece in pieces) and pieces
    assert all(pieces) or pieces == [""]
