"""An answered chat as token ids: which of them are the answer's own, and which lie in a phrase that is marked in it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mmalign.data.answer_records import Span
from mmalign.data.chats import WrittenAnswer


@dataclass(frozen=True, slots=True)
class AnsweredChat:
    """The prompt's and the answer's ids, up to the end token; supervised: the answer and its end token; marked: in a marked phrase."""

    ids: list[int]
    supervised: list[bool]
    marked: list[bool]


def read_answer(prompt: str, written: WrittenAnswer, marks: Sequence[Span], tokenizer: Any) -> AnsweredChat:
    """Tokenised as a whole, placeholders unexpanded; marks: characters of the answer. ValueError if it holds a control token."""
    whole = prompt + written.before + written.text + written.after
    first = len(prompt) + len(written.before)
    last = first + len(written.text)
    read = tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True)
    ids, places = list(read["input_ids"]), [_dark(whole, *place) for place in read["offset_mapping"]]
    special = {token for token, added in tokenizer.added_tokens_decoder.items() if added.special}
    own = [_meets(place, (first, last)) for place in places]
    if said := [
        tokenizer.convert_ids_to_tokens(token)
        for token, mine in zip(ids, own, strict=True)
        if mine and token in special
    ]:
        raise ValueError(f"the answer holds {said[0]!r}, a control token of the model's")
    behind = next((place for place, (start, _) in enumerate(places) if start >= last), len(ids))
    end = next((place for place in range(behind, len(ids)) if ids[place] in special), None)
    if end is None:
        # The template ends the turn with words, or nothing; generation ends with the end token.
        if tokenizer.eos_token_id is None:
            raise ValueError("neither the chat template nor the tokenizer ends a turn: set tokenizer.eos_token")
        end, ids[behind:], places[behind:], own[behind:] = behind, [tokenizer.eos_token_id], [(last, last)], [False]
    own[behind : end + 1] = [True] * (end + 1 - behind)
    spans = [(first + start - written.start, first + stop - written.start) for start, stop in marks]
    spans = [(max(start, first), min(stop, last)) for start, stop in spans]
    marked = [any(_meets(place, span) for span in spans) for place in places]
    return AnsweredChat(ids[: end + 1], own[: end + 1], marked[: end + 1])


def common_start(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens both begin with."""
    return next(
        (place for place, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other))
    )


def _dark(text: str, start: int, stop: int) -> Span:
    """A token's characters without the spaces at its start, which some tokenizers count and others do not."""
    return (stop - len(text[start:stop].lstrip()) if text[start:stop].strip() else start, stop)


def _meets(one: Span, other: Span) -> bool:
    return one[0] < other[1] and other[0] < one[1]
