"""Rows of answers as a batch, and which of its tokens are words of the prompts."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor

from mmalign.data.answer_tokens import AnswerBatch, EncodedAnswers, collate_answers


@dataclass(frozen=True)
class Collator:
    """Rows as a batch: {"row": numbers, "batch": AnswerBatch}, and with `mismatched` each prompt with the next row's answer."""

    pad_id: int
    shared_prompt: bool = False
    mismatched: bool = False

    def __call__(self, items: list[dict[str, Any]]) -> dict[str, Any]:
        encoded: list[EncodedAnswers] = [item["encoded"] for item in items]
        batch = collate_answers(encoded, self.pad_id, shared_prompt=self.shared_prompt)
        found: dict[str, Any] = {"row": [item["row"] for item in items], "batch": batch}
        if self.mismatched:
            others = [*encoded[1:], encoded[0]]
            mixed = [replace(one, answers=other.answers[:1]) for one, other in zip(encoded, others, strict=True)]
            found["mismatched"] = collate_answers(mixed, self.pad_id, shared_prompt=self.shared_prompt)
        return found


def text_of_prompts(batch: AnswerBatch, placeholders: set[int]) -> Bool[Tensor, "R T"]:
    """Where the words of the prompts stand: no padding, no first token, no place of a picture, nothing behind the answers (S·B, T)."""
    ids, told = batch.inputs["input_ids"], batch.inputs["attention_mask"].bool().clone()
    told[:, 0] = False
    for token in placeholders:
        told &= ids != token
    if (kinds := batch.inputs.get("mm_token_type_ids")) is not None:
        told &= kinds == 0
    first = batch.supervised.int().argmax(1, keepdim=True)
    return told & (torch.arange(ids.shape[1], device=ids.device) < first)


def placeholders_of(processor: Any) -> set[int]:
    """The tokens that stand for pictures, clips and sound."""
    found = {getattr(processor, f"{kind}_token_id", None) for kind in ("image", "video", "audio")}
    return {token for token in found if token is not None}
