"""Phrases of an answer that matter: read from <MASK>…</MASK> tags, or found by comparing two answers word by word."""

from __future__ import annotations

import re
from collections.abc import Iterable
from difflib import SequenceMatcher
from typing import Literal
from unicodedata import category

from mmalign.data.answer_records import Span

_TAG = re.compile(r"(</?MASK>)")
# A run of letters, digits and marks of one word, or any other sign by itself.
_WORD = re.compile(r"\w+(?:['’-]\w+)*|[^\w\s]")


class BadMarks(ValueError):
    """Tags that cannot be read; the message is the reason, without its row."""


def parse_marks(tagged: str, plain: str | None = None) -> tuple[str, tuple[Span, ...]]:
    """The text without its tags, and the characters [start, stop) between each pair of them, white space at their ends left off.

    Tags may be padded: "a <MASK> red </MASK>, car" is "a red, car". plain: the same text as it stands untagged, which tells what is
    padding; without it a space just inside a tag is, where neither a letter nor a digit stands outside. A pair of tags around nothing
    marks nothing. Raises BadMarks for nested, unclosed and unopened tags, and where `plain` is another text.
    """
    pieces = _pieces(tagged)
    if plain is None:
        plain = _untagged(pieces)
    # Where in `plain` the pieces so far may end, and the marks up to there: padding may be there or not.
    reached: dict[int, tuple[Span, ...]] = {0: ()}
    for at, piece in enumerate(pieces):
        further: dict[int, tuple[Span, ...]] = {}
        for start, spans in reached.items():
            for shown in _readings(piece) if at % 2 else [piece]:
                if plain.startswith(shown, start):
                    further.setdefault(start + len(shown), spans + _phrase(shown, start) if at % 2 else spans)
        reached = further
    if len(plain) not in reached:
        raise BadMarks(f"without its tags it is not the plain answer: {_where_apart(_untagged(pieces), plain)}")
    return plain, reached[len(plain)]


def differing_spans(
    chosen: str,
    rejected: str,
    *,
    insertions: Literal["neighbour", "skip"] = "neighbour",
    deletions: Literal["mark", "skip"] = "mark",
) -> tuple[tuple[Span, ...], tuple[Span, ...]]:
    """Characters [start, stop) of the words in which two answers differ, in each of them; equal texts have none.

    Words that stand on one side only are marked there (deletions="mark") or not ("skip"); on the other side, where nothing stands
    for them, the word before is marked (insertions="neighbour"; at the start the word after) or nothing is ("skip").
    """
    for name, value, known in (
        ("insertions", insertions, ("neighbour", "skip")),
        ("deletions", deletions, ("mark", "skip")),
    ):
        if value not in known:
            raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}")
    words = [_words(chosen), _words(rejected)]
    one, other = ([word for word, _ in side] for side in words)
    matcher = SequenceMatcher(None, one, other, autojunk=False)
    found: tuple[list[Span], list[Span]] = ([], [])
    for kind, *borders in matcher.get_opcodes():
        if kind == "equal":
            continue
        for side, (first, last) in enumerate((borders[:2], borders[2:])):
            if first == last and insertions == "neighbour" and words[side]:
                first, last = (first - 1, first) if first else (0, 1)
            elif first == last or (kind != "replace" and deletions == "skip"):
                continue
            found[side].append((words[side][first][1][0], words[side][last - 1][1][1]))
    return _joined(found[0]), _joined(found[1])


def tagged(text: str, spans: Iterable[Span]) -> str:
    """The text with <MASK>…</MASK> around these spans, in order; `parse_marks` reads it back."""
    told, at = "", 0
    for start, stop in spans:
        told += f"{text[at:start]}<MASK>{text[start:stop]}</MASK>"
        at = stop
    return told + text[at:]


def _words(text: str) -> list[tuple[str, Span]]:
    """Words and other signs with their places."""
    # Accents and vowel signs that are characters of their own are part of the word that they stand in.
    plain = "".join("a" if category(letter).startswith("M") else letter for letter in text)
    return [(text[slice(*match.span())], match.span()) for match in _WORD.finditer(plain)]


def _pieces(tagged: str) -> list[str]:
    """The text outside, inside, outside … of the tags, in turn."""
    pieces = _TAG.split(tagged)
    for number, tag in enumerate(pieces[1::2]):
        expected = "</MASK>" if number % 2 else "<MASK>"
        if tag != expected:
            trouble = "nested tags: <MASK> within <MASK>" if tag == "<MASK>" else "</MASK> without a <MASK> before it"
            raise BadMarks(trouble)
    if len(pieces) % 4 == 3:
        raise BadMarks("<MASK> is never closed")
    return pieces[::2]


def _readings(piece: str) -> list[str]:
    """The text between two tags, with and without a space of padding at either end."""
    shorter = piece.removeprefix(" ")
    return [piece, shorter, piece.removesuffix(" "), shorter.removesuffix(" ")]


def _phrase(shown: str, start: int) -> tuple[Span, ...]:
    """Where the phrase in the text between two tags stands, if the text holds one."""
    phrase = shown.strip()
    first = start + shown.find(phrase)
    return ((first, first + len(phrase)),) if phrase else ()


def _untagged(pieces: list[str]) -> str:
    """The text, padding left off."""
    told = ""
    for at, piece in enumerate(pieces):
        if at % 2 and piece.startswith(" ") and not told[-1:].isalnum():
            piece = piece[1:]
        if at % 2 and piece.endswith(" ") and not "".join(pieces[at + 1 :])[:1].isalnum():
            piece = piece[:-1]
        told += piece
    return told


def _where_apart(one: str, other: str) -> str:
    """The first place at which two texts part, with a little of both."""
    at = next((at for at, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
    return f"{one[at : at + 20]!r} and {other[at : at + 20]!r} from character {at}"


def _joined(spans: Iterable[Span]) -> tuple[Span, ...]:
    """Spans in order, those that overlap as one."""
    joined: list[Span] = []
    for start, stop in sorted(spans):
        if joined and start < joined[-1][1]:
            joined[-1] = (joined[-1][0], max(stop, joined[-1][1]))
        else:
            joined.append((start, stop))
    return tuple(joined)
