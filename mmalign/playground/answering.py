"""Asks a model about pictures or clips, through its own processor, and counts what it gets right."""

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from mmalign.data.answer_records import Picture, VideoClip
from mmalign.playground import answer_worlds
from mmalign.playground.answer_worlds import WorldName
from mmalign.playground.photographs import Split
from mmalign.playground.questions import YES, Question, is_right

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


def load(folder: Path) -> tuple[Any, Any]:
    """A model that answers and its processor, in full precision."""
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    return model.eval(), AutoProcessor.from_pretrained(folder)


def held_out(
    model: Any, processor: Any, world: WorldName, *, number: int = 200, split: Split = "test"
) -> dict[str, Any]:
    """Shares of right answers on one question of every kind about each of `number` rows, and of hallucination pairs.

    Yes and no are asked for equally often. A hallucination pair is right if both of its questions are; `yes_share`: how often they are
    answered by yes, where half the time would be right.
    """
    questions = answer_worlds.questions_of(world)
    seed = answer_worlds.EVALUATION_STREAM[world]
    asked: list[tuple[Any, Question]] = []
    pairs: list[tuple[Any, Question]] = []
    for row, seen in enumerate(answer_worlds.see(world, split, range(number), seed=seed)):
        rng = np.random.default_rng([seed, row])
        kinds = questions.kinds_of(seen.shown)
        asked += [(seen.medium, questions.ask(seen.shown, kind, rng, true=bool(rng.integers(2)))) for kind in kinds]
        for kind in kinds:
            if kind in questions.YES_OR_NO:
                pairs += [(seen.medium, one) for one in questions.hallucination_pair(seen.shown, kind, rng)]

    def ask(posed: Sequence[tuple[Any, Question]]) -> list[str]:
        return answer(model, processor, [medium for medium, _ in posed], [question.text for _, question in posed])

    said, paired = ask(asked), ask(pairs)
    right = [is_right(question, text) for (_, question), text in zip(asked, said, strict=True)]
    kinds_asked = [question.kind for _, question in asked]
    both = [is_right(question, text) for (_, question), text in zip(pairs, paired, strict=True)]
    yes = [text.startswith(YES) for text in paired]
    return {
        "rows": number,
        "questions": len(asked),
        "accuracy": _share(right),
        "by_kind": by_kind(kinds_asked, right),
        "hallucination_pairs": _share([a and b for a, b in zip(both[::2], both[1::2], strict=True)]),
        "yes_share": _share(yes),
    }


def by_kind(kinds: Sequence[str], right: Sequence[bool]) -> dict[str, float]:
    """Shares of right answers by kind of question."""
    found: defaultdict[str, list[bool]] = defaultdict(list)
    for kind, one in zip(kinds, right, strict=True):
        found[kind].append(one)
    return {kind: _share(ones) for kind, ones in found.items()}


def _share(ones: Sequence[bool]) -> float:
    return round(sum(ones) / len(ones), 4)
