"""A prompt with its pictures and clips as the family's own processor reads it: token ids, what is told of each, and media tensors."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mmalign.data.answer_records import Picture, VideoClip

_PER_TOKEN = ("mm_token_type_ids", "token_type_ids")
_TAKEN = (
    (
        {"text", "images", "videos", "video_metadata", "return_tensors", "add_special_tokens", "padding"},
        "it is set here",
    ),
    (
        {"do_sample_frames", "num_frames", "fps"},
        "frames are sampled when the data is loaded: load_answers(…, num_frames=…)",
    ),
    ({"truncation", "max_length"}, "use max_length and truncate of encode_answers"),
)


def check_keywords(processor_kwargs: Mapping[str, Any]) -> None:
    """ValueError if the processor's options name what is decided here."""
    inner = [value for value in processor_kwargs.values() if isinstance(value, Mapping)]
    given = {name for options in (processor_kwargs, *inner) for name in options}
    for names, instead in _TAKEN:
        if taken := sorted(names & given):
            raise ValueError(f"processor_kwargs cannot take {taken[0]!r}: {instead}")


def check_media(media: Sequence[Picture | VideoClip], processor: Any) -> None:
    """ValueError if the processor, or the tokenizer in its place, reads no such media."""
    for medium in media:
        kind, reader = ("picture", "image_processor") if isinstance(medium, Picture) else ("clip", "video_processor")
        if not hasattr(processor, reader):
            raise ValueError(f"holds a {kind}, which {type(processor).__name__} cannot read")


def read_prompt(
    prompt: str, media: Sequence[Picture | VideoClip], processor: Any, processor_kwargs: Mapping[str, Any]
) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
    """Ids (P,); the tensors that go with the tokens (P,), by name; every other tensor that the processor returns, by name.

    ValueError where the processor cannot read them.
    """
    tokenizer = getattr(processor, "tokenizer", processor)
    # The processor may write into what it is given.
    keywords = copy.deepcopy(dict(processor_kwargs))
    # As apply_chat_template does: a tokenizer's template is complete, a processor's is if it writes the start token.
    if processor is tokenizer or (tokenizer.bos_token is not None and prompt.startswith(tokenizer.bos_token)):
        keywords["add_special_tokens"] = False
    if pictures := [medium.image for medium in media if isinstance(medium, Picture)]:
        keywords["images"] = [pictures]
    if clips := [medium for medium in media if isinstance(medium, VideoClip)]:
        keywords["videos"] = [list(clip.frames) for clip in clips]
        keywords["video_metadata"] = [_metadata(clip) for clip in clips]
        keywords["do_sample_frames"] = False
    try:
        out = dict(processor(text=[prompt], return_tensors="pt", **keywords))
    except RuntimeError as error:
        # Tiles of one picture that do not stack, as LFM2-VL's of a very long one.
        raise ValueError(f"{type(processor).__name__} cannot read its pictures and clips: {error}") from error
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
