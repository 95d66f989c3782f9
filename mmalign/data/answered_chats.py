"""An answered chat as token ids: which of them are the answer's own, and which lie in a phrase that is marked in it."""

from __future__ import annotations

from collections.abc import Collection, Sequence
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


def read_answer(
    prompt: str, written: WrittenAnswer, marks: Sequence[Span], tokenizer: Any, control: Collection[int]
) -> AnsweredChat:
    """Tokenised as a whole, placeholders unexpanded; marks: characters of the answer.

    control: the ids that no answer may hold, and that end a turn; ValueError if the answer holds one.
    """
    whole = prompt + written.before + written.text + written.after
    first = len(prompt) + len(written.before)
    last = first + len(written.text)
    read = tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True)
    ids, places = list(read["input_ids"]), [_dark(whole, *place) for place in read["offset_mapping"]]
    # A space that the template sets before the answer is the model's to say; other words of its are not.
    own = [_meets(place, (first if written.before.strip() else len(prompt), last)) for place in places]
    for token, mine in zip(ids, own, strict=True):
        if mine and token in control:
            raise ValueError(
                f"the answer holds {tokenizer.convert_ids_to_tokens(token)!r}, a control token of the model"
            )
    behind = next((place for place, (start, _) in enumerate(places) if start >= last), len(ids))
    stop = next((place + 1 for place in range(behind, len(ids)) if ids[place] in control), None)
    if stop is None:
        # The template ends a turn with words or nothing; generation ends with the end token.
        if tokenizer.eos_token_id is None:
            raise ValueError("neither the chat template nor the tokenizer ends a turn: set tokenizer.eos_token")
        ids[behind:], stop = [tokenizer.eos_token_id], behind + 1
    shift = first - written.start
    spans = [(max(start + shift, first), min(end + shift, last)) for start, end in marks]
    marked = [any(_meets(place, span) for span in spans) for place in places[:behind]]
    ending = stop - behind
    return AnsweredChat(ids[:stop], own[:behind] + [True] * ending, marked + [False] * ending)


def common_start(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens both begin with."""
    return next(
        (place for place, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other))
    )


def _dark(text: str, start: int, stop: int) -> Span:
    """A token's characters without the spaces at its start, which some tokenizers count and others do not."""
    return (stop - len(text[start:stop].lstrip()) if text[start:stop].strip() else start, stop)


def _meets(one: Span, other: Span) -> bool:
    return max(one[0], other[0]) < min(one[1], other[1])
