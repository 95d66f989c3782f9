"""From an answer pair to token ids and media tensors, and from several to a batch.

encoded = encode_answers(source[row], processor, model.config)
batch = collate_answers([encoded, …], padding_token(processor))
model(**batch.inputs, **twice(batch.media))     # the media stand there once a prompt: torch.cat([v, v]) for two sides

The family's own processor reads the prompt, once; an answer is what the chat template writes behind it, up to the turn's end token.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from mmalign.data.answer_records import AnswerPair, Span, Turn
from mmalign.data.answered_chats import AnsweredChat, common_start, read_answer
from mmalign.data.chats import write_answer, write_prompt
from mmalign.data.placeholders import check_placeholders
from mmalign.data.prompt_tokens import check_keywords, check_media, read_prompt
from mmalign.data.records import BadRow, InvalidRow

_NEVER_CUT = "prompts are never cut: raise it, or take fewer frames (num_frames) or smaller pictures (processor_kwargs)"


@dataclass(frozen=True, slots=True, eq=False)
class AnswerTokens:
    """An answer's ids (A,); which of them are the answer's own or its end token, and which lie in a marked phrase: bool (A,)."""

    ids: Tensor
    supervised: Tensor
    marked: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class EncodedAnswers:
    """One row: the prompt's ids (P,) with its pictures' placeholders, and its one or two answers, the chosen one first.

    text: what else the processor tells of each token, by name (P,). media: its other tensors; the first axis counts pictures,
    clips, tiles or patches, so that rows concatenate. label: as in AnswerPair.
    """

    row: int
    prompt: Tensor
    answers: tuple[AnswerTokens, ...]
    text: dict[str, Tensor]
    media: dict[str, Tensor]
    label: float


@dataclass(frozen=True, slots=True, eq=False)
class AnswerBatch:
    """B rows with S answers each: all chosen ones first, then all rejected ones.

    inputs: input_ids, attention_mask and the tokens' other tensors, (S·B, T), prompt and answer, padded right. supervised, marked:
    bool (S·B, T), True at the place of the token itself. media: for the B prompts once. label: (B,).
    prompt_inputs: None, or, where prompts are shared, those of the B prompts (B, P), padded left; inputs then hold the answers alone.
    """

    rows: list[int]
    inputs: dict[str, Tensor]
    supervised: Tensor
    marked: Tensor
    media: dict[str, Tensor]
    label: Tensor
    prompt_inputs: dict[str, Tensor] | None = None

    def to(self, device: torch.device | str) -> AnswerBatch:
        """The same on another device."""

        def moved(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
            return {name: tensor.to(device) for name, tensor in tensors.items()}

        return AnswerBatch(
            self.rows,
            moved(self.inputs),
            self.supervised.to(device),
            self.marked.to(device),
            moved(self.media),
            self.label.to(device),
            None if self.prompt_inputs is None else moved(self.prompt_inputs),
        )


def padding_token(processor: Any) -> int:
    """The token to pad with: the tokenizer's own, which may be 0, else its end token; ValueError if it has neither."""
    tokenizer = getattr(processor, "tokenizer", processor)
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    raise ValueError("the tokenizer has neither a pad nor an end token: set tokenizer.pad_token")


def encode_answers(
    pair: AnswerPair,
    processor: Any,
    config: Any,
    *,
    max_length: int | None = None,
    truncate: Literal["answer"] | None = None,
    processor_kwargs: Mapping[str, Any] | None = None,
    template_kwargs: Mapping[str, Any] | None = None,
) -> EncodedAnswers:
    """A pair as the model reads it; InvalidRow says what of the row it cannot read.

    processor: the family's, or a tokenizer of a model that reads text only. config: the model's, by which placeholders are counted.
    max_length: tokens of prompt and answer together; a longer row is refused, or, with truncate="answer", loses its answer's end,
    but for a row of which nothing to learn from would be left: answers without a word, without their marked phrases, or alike.
    processor_kwargs, template_kwargs: for the processor (an image budget) and for its chat template.
    """
    _check_options(max_length, truncate)
    check_keywords(processor_kwargs or {})
    tokenizer, options = getattr(processor, "tokenizer", processor), template_kwargs or {}
    if not tokenizer.is_fast:
        raise ValueError(f"{type(tokenizer).__name__} tells no character offsets: load the fast tokenizer")
    prompt, (ids, text, media) = _read(pair.row, pair.prompt, processor, config, processor_kwargs or {}, options)
    named = (getattr(config, f"{kind}_token_id", None) for kind in ("image", "video"))
    placeholders = {token for token in named if token is not None}
    control = {token for token, added in tokenizer.added_tokens_decoder.items() if added.special} | placeholders
    read: list[AnsweredChat] = []
    for answer, marks, field in _sides(pair):
        with _refusing(pair.row, field):
            written = write_answer(pair.prompt, prompt, answer, processor, options)
            read.append(read_answer(prompt, written, marks or (), tokenizer, control))
    # A token that reaches over the border belongs to the answers; then the prompt ends before it, for both alike.
    alone = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    kept = min(common_start(alone, chat.ids) for chat in read)
    length = len(ids) - (len(alone) - kept)
    if ids[length - 1 :].tolist() != alone[kept - 1 :]:
        raise ValueError(f"{type(processor).__name__} adds tokens behind the prompt, where the answer should follow")
    told = _told(ids[:length], placeholders)
    with _refusing(pair.row, "prompt"):
        if max_length is not None and length >= max_length:
            raise ValueError(f"{told}: no room for an answer in max_length ({max_length}); {_NEVER_CUT}")
    answers: list[AnswerTokens] = []
    for chat, (_, _, field) in zip(read, _sides(pair), strict=True):
        masks = (torch.tensor(values[kept:]) for values in (chat.ids, chat.supervised, chat.marked))
        with _refusing(pair.row, field):
            answers.append(_fit(AnswerTokens(*masks), length, told, max_length, truncate))
            if len(answers) == 2 and torch.equal(answers[0].ids, answers[1].ids):
                raise ValueError(f"the same tokens as {pair.fields[0]}, as far as they are read")
    extras = {name: values[:length] for name, values in text.items()}
    return EncodedAnswers(pair.row, ids[:length], tuple(answers), extras, media, pair.label)


def encode_prompt(
    turns: Sequence[Turn],
    row: int,
    processor: Any,
    config: Any,
    *,
    processor_kwargs: Mapping[str, Any] | None = None,
    template_kwargs: Mapping[str, Any] | None = None,
) -> EncodedAnswers:
    """A conversation that the model is to go on with, as an EncodedAnswers without answers; options as in encode_answers."""
    check_keywords(processor_kwargs or {})
    _, (ids, text, media) = _read(row, turns, processor, config, processor_kwargs or {}, template_kwargs or {})
    return EncodedAnswers(row, ids, (), text, media, 1.0)


def collate_prompts(items: Sequence[EncodedAnswers], pad_id: int) -> dict[str, Tensor]:
    """The prompts with their media as `model.generate` reads them, padded on the left."""
    return _padded_prompts(items, pad_id) | _joined_media(items)


def collate_answers(items: Sequence[EncodedAnswers], pad_id: int, *, shared_prompt: bool = False) -> AnswerBatch:
    """The rows as one batch; ValueError if pairs and single answers, or clips of different lengths, meet in it."""
    counts = {len(item.answers) for item in items}
    if len(counts) != 1:
        raise ValueError("a batch holds pairs or single answers, not both")
    answers = [(item, item.answers[side]) for side in range(counts.pop()) for item in items]
    ahead = [answer.ids.new_empty(0) if shared_prompt else item.prompt for item, answer in answers]
    nothing = [torch.zeros(len(prompt), dtype=torch.bool) for prompt in ahead]
    sequences = [torch.cat([prompt, answer.ids]) for prompt, (_, answer) in zip(ahead, answers, strict=True)]
    supervised, marked = (
        pad_sequence([torch.cat([none, mask]) for none, mask in zip(nothing, masks, strict=True)], batch_first=True)
        for masks in ([answer.supervised for _, answer in answers], [answer.marked for _, answer in answers])
    )
    inputs = _padded(sequences, pad_id, "right")
    prompts = None
    if shared_prompt:
        prompts = _padded_prompts(items, pad_id)
    else:
        inputs |= _padded_extras([(item, len(ids)) for (item, _), ids in zip(answers, sequences, strict=True)], "right")
    return AnswerBatch(
        [item.row for item in items],
        inputs,
        supervised,
        marked,
        _joined_media(items),
        torch.tensor([item.label for item in items]),
        prompts,
    )


def _read(
    row: int,
    turns: Sequence[Turn],
    processor: Any,
    config: Any,
    processor_kwargs: Mapping[str, Any],
    template_kwargs: Mapping[str, Any],
) -> tuple[str, tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]]:
    """The prompt as the template writes it, and what `read_prompt` makes of it; InvalidRow."""
    media = [medium for turn in turns for medium in turn.media]
    with _refusing(row, "prompt"):
        check_media(media, processor)
        prompt = write_prompt(turns, processor, template_kwargs)
        read = read_prompt(prompt, media, processor, processor_kwargs)
        check_placeholders(read[0], read[2], config)
    return prompt, read


@contextmanager
def _refusing(row: int, field: str) -> Iterator[None]:
    """What the family's processor or template cannot read is the row's fault, and named so."""
    try:
        yield
    except ValueError as error:
        # Advice to whoever calls the processor follows in further lines.
        raise InvalidRow(BadRow(row, field, (str(error) or type(error).__name__).splitlines()[0])) from error


def _sides(pair: AnswerPair) -> list[tuple[str, tuple[Span, ...] | None, str]]:
    """Each answer with its marks and its field, the chosen one first."""
    sides = [(pair.chosen, pair.chosen_marks, pair.fields[0])]
    return sides if pair.rejected is None else [*sides, (pair.rejected, pair.rejected_marks, pair.fields[1])]


def _check_options(max_length: int | None, truncate: str | None) -> None:
    if truncate not in (None, "answer"):
        raise ValueError(
            f"truncate must be None or 'answer', got {truncate!r}: a prompt that is cut loses its pictures"
        )
    if truncate is not None and max_length is None:
        raise ValueError("truncate needs max_length")
    if max_length is not None and max_length < 1:
        raise ValueError(f"max_length must be at least 1, got {max_length}")


def _told(prompt: Tensor, placeholders: Collection[int]) -> str:
    """How long a prompt is, and what of it media are."""
    media = sum(int((prompt == token).sum()) for token in placeholders)
    return f"{len(prompt)} tokens" + (f", {media} of them pictures and clips" if media else "")


def _fit(answer: AnswerTokens, prompt: int, told: str, max_length: int | None, truncate: str | None) -> AnswerTokens:
    if max_length is None or prompt + len(answer.ids) <= max_length:
        return answer
    said = f"prompt ({told}) and answer ({len(answer.ids)}) are longer than max_length ({max_length})"
    if truncate is None:
        raise ValueError(f"{said}; raise it, or set truncate='answer'")
    room = max_length - prompt
    cut = AnswerTokens(answer.ids[:room], answer.supervised[:room], answer.marked[:room])
    if not cut.supervised.any():
        raise ValueError(f"{said}, and no word of the answer would be left; {_NEVER_CUT}")
    if answer.marked.any() and not cut.marked.any():
        raise ValueError(f"{said}, and no marked phrase would be left; raise it")
    return cut


def _padded(sequences: list[Tensor], value: int, side: str) -> dict[str, Tensor]:
    """Ids padded with the token, and the mask of what is not padding: from lengths, for the token may be a word too."""
    mask = [torch.ones_like(ids) for ids in sequences]
    return {
        "input_ids": pad_sequence(sequences, batch_first=True, padding_value=value, padding_side=side),
        "attention_mask": pad_sequence(mask, batch_first=True, padding_side=side),
    }


def _padded_prompts(items: Sequence[EncodedAnswers], pad_id: int) -> dict[str, Tensor]:
    ids = _padded([item.prompt for item in items], pad_id, "left")
    return ids | _padded_extras([(item, len(item.prompt)) for item in items], "left")


def _padded_extras(rows: list[tuple[EncodedAnswers, int]], side: str) -> dict[str, Tensor]:
    """What is told of each token of the prompts: 0, which is text, behind them up to each row's length, and as padding."""
    return {
        name: pad_sequence(
            [
                torch.cat([item.text[name], item.text[name].new_zeros(length - len(item.prompt))])
                for item, length in rows
            ],
            batch_first=True,
            padding_side=side,
        )
        for name in dict.fromkeys(name for item, _ in rows for name in item.text)
    }


def media_sizes(item: EncodedAnswers) -> dict[str, tuple[int, ...]]:
    """What of the shapes of a row's media must be the same in rows that share a batch, by name."""
    return {name: tuple(tensor.shape[1 if _is_whole(name, tensor) else 2 :]) for name, tensor in item.media.items()}


def _is_whole(name: str, tensor: Tensor) -> bool:
    # Behind a picture's last tile or patch models take zeros for padding; behind a clip's last frame, for frames.
    return name == "pixel_values_videos" or tensor.ndim == 1


def _joined_media(items: Sequence[EncodedAnswers]) -> dict[str, Tensor]:
    names = dict.fromkeys(name for item in items for name in item.media)
    return {name: _joined(name, [item for item in items if name in item.media]) for name in names}


def _joined(name: str, items: Sequence[EncodedAnswers]) -> Tensor:
    tensors = [item.media[name] for item in items]
    if not _is_whole(name, tensors[0]):
        widest = max(tensor.shape[1] for tensor in tensors)
        tensors = [_widened(tensor, widest) for tensor in tensors]
    for item, tensor in zip(items, tensors, strict=True):
        if tensor.shape[1:] != tensors[0].shape[1:]:
            raise ValueError(
                f"rows {items[0].row} and {item.row} cannot share a batch: {name} of {tuple(tensors[0].shape[1:])} and "
                f"{tuple(tensor.shape[1:])}; clips need the same number of frames: load_answers(…, num_frames=…)"
            )
    return torch.cat(tensors)


def _widened(tensor: Tensor, width: int) -> Tensor:
    missing = tensor.new_zeros(tensor.shape[0], width - tensor.shape[1], *tensor.shape[2:])
    return torch.cat([tensor, missing], dim=1)
