"""From an answer pair to token ids and media tensors, and from several to a batch.

encoded = encode_answers(source[row], processor, model.config)
batch = collate_answers([encoded, …], padding_token(processor))
model(**batch.inputs, **twice(batch.media))     # the media stand there once a prompt: torch.cat([v, v]) for two sides

The family's own processor reads the prompt, once; an answer is what the chat template writes behind it, up to the turn's end token.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from mmalign.data.answer_records import AnswerPair, Picture, Turn, VideoClip
from mmalign.data.answered_chats import AnsweredChat, common_start, read_answer
from mmalign.data.chats import write_answer, write_prompt
from mmalign.data.placeholders import check_placeholders
from mmalign.data.records import BadRow, InvalidRow

_PER_TOKEN = ("mm_token_type_ids", "token_type_ids")
_OURS = {"text", "images", "videos", "video_metadata", "return_tensors", "add_special_tokens", "padding"}
_SAMPLING = {"do_sample_frames", "num_frames", "fps"}
_CUTTING = {"truncation", "max_length"}


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
    max_length: tokens of prompt and answer together; a longer row is refused, or, with truncate="answer", loses its answer's end.
    processor_kwargs, template_kwargs: for the processor (an image budget) and for its chat template.
    """
    _check_options(max_length, truncate, processor_kwargs or {})
    tokenizer = getattr(processor, "tokenizer", processor)
    if not tokenizer.is_fast:
        raise ValueError(f"{type(tokenizer).__name__} tells no character offsets: load the fast tokenizer")
    options = template_kwargs or {}
    sides = [(pair.chosen, pair.chosen_marks), (pair.rejected, pair.rejected_marks)]
    prompt, ids, text, media = _encoded(pair.row, pair.prompt, processor, config, processor_kwargs or {}, options)
    control = {token for token, added in tokenizer.added_tokens_decoder.items() if added.special}
    control |= {getattr(config, f"{kind}_token_id", None) for kind in ("image", "video")} - {None}
    read: list[AnsweredChat] = []
    for (answer, marks), field in zip(sides, pair.fields, strict=False):
        if answer is None:
            continue
        try:
            written = write_answer(pair.prompt, prompt, answer, processor, options)
            read.append(read_answer(prompt, written, marks or (), tokenizer, control))
        except ValueError as error:
            raise InvalidRow(BadRow(pair.row, field, str(error))) from error
    # A token that reaches over the border belongs to the answers; then the prompt ends before it, for both alike.
    alone = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    kept = min(common_start(alone, one.ids) for one in read)
    lost = len(alone) - kept
    if ids[len(ids) - lost - 1 :].tolist() != alone[kept - 1 :]:
        raise ValueError(
            f"{type(processor).__name__} adds tokens behind the prompt: its chat template and tokenizer disagree"
        )
    length = len(ids) - lost
    answers = []
    for one, field in zip(read, pair.fields, strict=False):
        tokens = AnswerTokens(*(torch.tensor(values[kept:]) for values in (one.ids, one.supervised, one.marked)))
        try:
            answers.append(_fit(tokens, length, max_length, truncate))
        except ValueError as error:
            raise InvalidRow(BadRow(pair.row, field, str(error))) from error
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
    _check_options(None, None, processor_kwargs or {})
    _, ids, text, media = _encoded(row, turns, processor, config, processor_kwargs or {}, template_kwargs or {})
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


def _check_options(max_length: int | None, truncate: str | None, processor_kwargs: Mapping[str, Any]) -> None:
    if truncate not in (None, "answer"):
        raise ValueError(
            f"truncate must be None or 'answer', got {truncate!r}: a prompt that is cut loses its pictures"
        )
    if truncate is not None and max_length is None:
        raise ValueError("truncate needs max_length")
    for names, instead in (
        (_OURS, "it is set here"),
        (_SAMPLING, "frames are sampled when the data is loaded: load_answers(…, num_frames=…)"),
        (_CUTTING, "use max_length and truncate of encode_answers"),
    ):
        if taken := sorted(names & processor_kwargs.keys()):
            raise ValueError(f"processor_kwargs cannot take {taken[0]!r}: {instead}")


def _encoded(
    row: int,
    turns: Sequence[Turn],
    processor: Any,
    config: Any,
    processor_kwargs: Mapping[str, Any],
    template_kwargs: Mapping[str, Any],
) -> tuple[str, Tensor, dict[str, Tensor], dict[str, Tensor]]:
    """The prompt as the template writes it, its ids, what else is told of each token, and its media; InvalidRow."""
    media = [medium for turn in turns for medium in turn.media]
    try:
        _check_media(media, processor)
        prompt = write_prompt(turns, processor, template_kwargs)
        ids, text, tensors = _read_prompt(media, prompt, processor, processor_kwargs)
        check_placeholders(ids, tensors, config)
    except ValueError as error:
        raise InvalidRow(BadRow(row, "prompt", str(error))) from error
    return prompt, ids, text, tensors


def _check_media(media: Sequence[Picture | VideoClip], processor: Any) -> None:
    for medium in media:
        kind, reader = ("picture", "image_processor") if isinstance(medium, Picture) else ("clip", "video_processor")
        if not hasattr(processor, reader):
            raise ValueError(f"holds a {kind}, which {type(processor).__name__} cannot read")


def _read_prompt(
    media: Sequence[Picture | VideoClip], prompt: str, processor: Any, options: Mapping[str, Any]
) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
    tokenizer = getattr(processor, "tokenizer", processor)
    # The processor may write into what it is given.
    keywords = copy.deepcopy(dict(options))
    # As apply_chat_template does: a tokenizer's template is complete, a processor's is if it writes the start token.
    if processor is tokenizer or (tokenizer.bos_token is not None and prompt.startswith(tokenizer.bos_token)):
        keywords["add_special_tokens"] = False
    if pictures := [medium.image for medium in media if isinstance(medium, Picture)]:
        keywords["images"] = [pictures]
    if clips := [medium for medium in media if isinstance(medium, VideoClip)]:
        keywords["videos"] = [list(clip.frames) for clip in clips]
        keywords["video_metadata"] = [_metadata(clip) for clip in clips]
        keywords["do_sample_frames"] = False
    out = dict(processor(text=[prompt], return_tensors="pt", **keywords))
    ids = out.pop("input_ids")[0]
    out.pop("attention_mask", None)
    text = {name: out.pop(name)[0] for name in _PER_TOKEN if name in out}
    return ids, text, {name: torch.as_tensor(value) for name, value in out.items()}


def _metadata(clip: VideoClip) -> dict[str, Any]:
    return {
        "total_num_frames": clip.total_frames,
        "fps": clip.frames_per_second,
        "duration": clip.total_frames / clip.frames_per_second,
        "width": clip.frames[0].width,
        "height": clip.frames[0].height,
        "frames_indices": list(clip.indices),
    }


def _fit(answer: AnswerTokens, prompt: int, max_length: int | None, truncate: str | None) -> AnswerTokens:
    length = prompt + len(answer.ids)
    if max_length is None or length <= max_length:
        return answer
    said = f"prompt ({prompt} tokens) and answer ({len(answer.ids)}) are longer than max_length ({max_length})"
    if truncate is None:
        raise ValueError(f"{said}; raise it, or set truncate='answer'")
    room = max(max_length - prompt, 0)
    if not answer.supervised[:room].any():
        raise ValueError(
            f"{said} without the answer: the prompt and its media are never cut; raise it, or make the media smaller"
        )
    return AnswerTokens(answer.ids[:room], answer.supervised[:room], answer.marked[:room])


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
        for name in rows[0][0].text
    }


def _joined_media(items: Sequence[EncodedAnswers]) -> dict[str, Tensor]:
    names = dict.fromkeys(name for item in items for name in item.media)
    return {name: _joined(name, [item for item in items if name in item.media]) for name in names}


def _joined(name: str, items: Sequence[EncodedAnswers]) -> Tensor:
    tensors = [item.media[name] for item in items]
    if name != "pixel_values_videos" and tensors[0].ndim > 1:
        # Behind a picture's last tile or patch models take zeros for padding; behind a clip's last frame, for frames.
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
