"""Asks a model about pictures or clips, through its own processor, and counts what it gets right."""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from mmalign import evaluation
from mmalign.data.answer_records import Picture, VideoClip
from mmalign.playground import answer_questions
from mmalign.playground.answer_worlds import WorldName
from mmalign.playground.questions import YES
from mmalign.training.token_pipeline import TokenPipeline

MAX_NEW_TOKENS = 24


@torch.no_grad()
def answer(
    model: Any, processor: Any, media: Sequence[Picture | VideoClip], texts: Sequence[str], *, batch_size: int = 64
) -> list[str]:
    """The most likely answer to each text about the picture or clip beside it."""
    answers = []
    for at in range(0, len(texts), batch_size):
        part = media[at : at + batch_size]
        kind = "image" if isinstance(part[0], Picture) else "video"
        prompts = [
            processor.apply_chat_template(
                [{"role": "user", "content": [{"type": kind}, {"type": "text", "text": text}]}],
                add_generation_prompt=True,
                tokenize=False,
            )
            for text in texts[at : at + batch_size]
        ]
        inputs = processor(text=prompts, padding=True, padding_side="left", return_tensors="pt", **_media(part))
        written = model.generate(
            **inputs, do_sample=False, max_new_tokens=MAX_NEW_TOKENS, pad_token_id=processor.tokenizer.pad_token_id
        )
        answers += processor.tokenizer.batch_decode(
            written[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True
        )
    return answers


def _media(part: Sequence[Any]) -> dict[str, Any]:
    if isinstance(part[0], Picture):
        return {"images": [[medium.image] for medium in part]}
    clips = [np.stack([np.asarray(frame) for frame in clip.frames]) for clip in part]
    metadata = [
        {"fps": clip.frames_per_second, "total_num_frames": clip.total_frames, "frames_indices": list(clip.indices)}
        for clip in part
    ]
    return {"videos": clips, "video_metadata": metadata, "do_sample_frames": False}


def held_out(pipe: TokenPipeline, world: WorldName, *, rows: Sequence[int] = answer_questions.ROWS) -> dict[str, Any]:
    """Shares of right answers to held-out questions about rows of the world, by kind, and of hallucination pairs.

    `yes_share`: how often what is answered by yes or no is answered by yes; half the time would be right.
    """
    source = answer_questions.load(world, rows=rows)
    questions = [source[row] for row in range(len(source))]
    answers = evaluation.answer(pipe, source, batch_size=64, max_new_tokens=MAX_NEW_TOKENS)
    found = evaluation.evaluate_answers(questions, answers)
    assert found.pairs is not None
    paired = [one.aligned.startswith(YES) for one in found.rows if one.question.pair is not None]
    return {
        "rows": len(rows),
        "questions": len(questions),
        "accuracy": round(found.overall.aligned.rate, 4),
        "by_kind": {kind.name: round(kind.aligned.rate, 4) for kind in found.kinds},
        "hallucination_pairs": round(found.pairs.aligned.rate, 4),
        "yes_share": _share(paired),
    }


def by_kind(kinds: Sequence[str], right: Sequence[bool]) -> dict[str, float]:
    """Shares of right answers by kind of question."""
    found: defaultdict[str, list[bool]] = defaultdict(list)
    for kind, one in zip(kinds, right, strict=True):
        found[kind].append(one)
    return {kind: _share(ones) for kind, ones in found.items()}


def _share(ones: Sequence[bool]) -> float:
    return round(sum(ones) / len(ones), 4)
