"""A long text as segments that a short-sighted text encoder reads whole: sentences, cut where one is too long, packed if asked.

Joining two sentences costs nothing but room, and cutting inside one costs its sense: where a full stop may end a sentence or not
("approx. 3 m", "the U.S. flag"), the text is left whole.
"""

import re
from collections.abc import Callable, Sequence

# CLIP's 77 positions less start and end.
SEGMENT_TOKENS = 75

_CLOSING = "\"'”’»)\\]}」』）"
# Marks of scripts that set no space behind them end a sentence anywhere, others only before a space or the line's end.
_FREE_MARKS = "。！？｡…؟۔।॥။។᙮።፧"
_ENDS = re.compile(rf"[{_FREE_MARKS}]+[{_CLOSING}]*|[.!?]+[{_CLOSING}]*(?=\s|$)|[!?]+[{_CLOSING}]*(?=[^\W\d_])|\n+")
_CLAUSE_ENDS = tuple(",;:，、；：،؛—–")
_ABBREVIATIONS = frozenset(
    """
    approx appr ca cf dr ed eds e.g eg etc fig figs ft hr i.e ie jr lb lbs mr mrs ms mt nos oz p pp prof rev sen sgt sq sr st vol vs
    resp incl
    """.split()
)
_PUBLISHED_ENDS = re.compile(r'"!|\.|\?|;"')


def split_sentences(text: str) -> list[str]:
    """The sentences of a text in any script, stripped, with their marks; [""] for blank text.

    Not split: decimals (3.5), initials and abbreviations (U.S., approx.), and a full stop without a space behind it.
    """
    sentences, start = [], 0
    for end in _ENDS.finditer(text):
        if end[0].startswith(".") and _stays(text[start : end.start()], end[0], text[end.end() :]):
            continue
        sentences.append(text[start : end.end()].strip())
        start = end.end()
    sentences.append(text[start:].strip())
    return [sentence for sentence in sentences if sentence] or [""]


def published_segments(text: str) -> list[str]:
    """LongAlign's released splitter: at every full stop and question mark, at `"!` and `;"`; each piece then ends in a full stop."""
    text = text.replace("\n\n", "").strip()
    return [f"{piece}." for piece in _PUBLISHED_ENDS.split(text) if piece] or [text]


def segments(
    text: str,
    count: Callable[[str], int],
    *,
    limit: int = SEGMENT_TOKENS,
    pack: bool = False,
    compat: str | None = None,
) -> list[str]:
    """`text` in order as segments of at most `limit` tokens, by `count`, which tells a text's tokens without start and end.

    pack: neighbours share a segment while they fit. compat="longalign": `published_segments`, which may be too long.
    """
    if compat is not None:
        return published_segments(text)
    pieces = [piece for sentence in split_sentences(text) for piece in _cut(sentence, count, limit)]
    return _packed(pieces, count, limit) if pack else pieces


def _stays(before: str, mark: str, after: str) -> bool:
    """Whether a full stop behind `before` is part of a word."""
    if len(mark.rstrip("\"'”’»)]}」』）")) > 1 or not after.strip():
        return False
    word = re.split(r"[\s(\[{\"'“‘«]", before)[-1].lower()
    return len(word) == 1 and word.isalpha() or word in _ABBREVIATIONS or bool(re.fullmatch(r"(\w\.)+\w", word))


def _cut(sentence: str, count: Callable[[str], int], limit: int) -> list[str]:
    """The sentence in pieces that fit: after a clause if that fills half of one, else after a word, in a word only if it must be."""
    pieces = []
    while count(sentence) > limit:
        words = [match.end() for match in re.finditer(r"\S+", sentence)]
        end = _longest(sentence, words, count, limit)
        if end is None:
            # One word, or a script without spaces.
            end = _longest(sentence, range(1, len(sentence) + 1), count, limit) or 1
        clauses = [place for place in range(1, end + 1) if sentence[place - 1] in _CLAUSE_ENDS]
        if clauses and 2 * count(sentence[: clauses[-1]]) >= limit:
            end = clauses[-1]
        pieces.append(sentence[:end].strip())
        sentence = sentence[end:].strip()
    return [*pieces, sentence] if sentence or not pieces else pieces


def _longest(text: str, ends: Sequence[int], count: Callable[[str], int], limit: int) -> int | None:
    """The last of `ends` up to which the text fits, by bisection; None if not even the first does."""
    low, high = 0, len(ends)
    while low < high:
        middle = (low + high) // 2
        low, high = (middle + 1, high) if count(text[: ends[middle]]) <= limit else (low, middle)
    return ends[low - 1] if low else None


def _packed(pieces: list[str], count: Callable[[str], int], limit: int) -> list[str]:
    packed = pieces[:1]
    for piece in pieces[1:]:
        joined = f"{packed[-1]} {piece}"
        if count(joined) <= limit:
            packed[-1] = joined
        else:
            packed.append(piece)
    return packed
