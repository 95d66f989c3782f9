"""Rows in a batch are scored as each alone: neither padding, nor company, nor a shared prompt changes a log-prob."""

from typing import Any

import pytest
import torch
from tiny_vlm import KINDS, TEXT_KINDS, VIDEO_KINDS, clip, picture, tiny_vlm
from torch import Tensor

from mmalign.data.answer_records import AnswerPair, Turn
from mmalign.data.answer_tokens import (
    AnswerTokens,
    EncodedAnswers,
    collate_answers,
    encode_answers,
    padding_token,
)

ANSWERS = (("It is red.", "No."), ("Yes.", "The shirt is green and moves to the right."), ("A bag.", "A dress."))
TOLERANCE = {"rtol": 0, "atol": 5e-6}


def rows(kind: str) -> list[EncodedAnswers]:
    """Nothing, one picture and two pictures in three rows of different length; behind them, where it is read, a clip."""
    model, processor = tiny_vlm(kind)
    shown: list[Any] = (
        [(), (), ()] if kind in TEXT_KINDS else [(), (picture(100, 60),), (picture(), picture(30, 50, 1))]
    )
    shown += [(clip(seed=1),)] if kind in VIDEO_KINDS else []
    questions = ("What is there in the picture?", "Which?", "What colour is it, and why?", "What moves?")
    turns = [(Turn("user", (*media, asked)),) for media, asked in zip(shown, questions, strict=False)]
    return [
        encode_answers(
            AnswerPair(row, turn, *ANSWERS[row % 3], label=row / 4, chosen_marks=((0, 2),)), processor, model.config
        )
        for row, turn in enumerate(turns)
    ]


def twice(media: dict[str, Tensor], sides: int = 2) -> dict[str, Tensor]:
    return {name: torch.cat([values] * sides) for name, values in media.items()}


def supervised_logps(logits: Tensor, ids: Tensor, supervised: Tensor) -> list[Tensor]:
    """Of each row, the log-probs of its supervised tokens, in order."""
    logps = logits[:, :-1].float().log_softmax(-1).gather(2, ids[:, 1:, None]).squeeze(2)
    return [row[mask] for row, mask in zip(logps, supervised[:, 1:], strict=True)]


@torch.no_grad()
def alone(kind: str, item: EncodedAnswers) -> list[Tensor]:
    """The log-probs of each answer, in a forward of its own without any padding."""
    model, _ = tiny_vlm(kind)
    found = []
    for answer in item.answers:
        ids = torch.cat([item.prompt, answer.ids])[None]
        extras = {
            name: torch.cat([values, values.new_zeros(len(answer.ids))])[None] for name, values in item.text.items()
        }
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), **extras, **item.media).logits
        mask = torch.cat([torch.zeros(len(item.prompt), dtype=torch.bool), answer.supervised])[None]
        found += supervised_logps(logits, ids, mask)
    return found


@pytest.mark.parametrize("kind", KINDS + TEXT_KINDS)
def test_a_joined_batch_scores_each_row_as_alone(kind: str) -> None:
    model, processor = tiny_vlm(kind)
    items = rows(kind)
    batch = collate_answers(items, padding_token(processor))
    assert batch.rows == [item.row for item in items]
    assert batch.label.tolist() == [item.label for item in items]
    with torch.no_grad():
        logits = model(**batch.inputs, **twice(batch.media)).logits
    got = supervised_logps(logits, batch.inputs["input_ids"], batch.supervised)
    expected = [alone(kind, item) for item in items]
    sides = [answers[side] for side in range(2) for answers in expected]
    for ours, theirs in zip(got, sides, strict=True):
        torch.testing.assert_close(ours, theirs, **TOLERANCE)
    # The first two characters of the chosen answers are marked, and nothing of the rejected ones.
    assert (batch.marked.sum(1) > 0).tolist() == [True] * len(items) + [False] * len(items)


@pytest.mark.parametrize("kind", KINDS + TEXT_KINDS)
def test_shared_prompts_with_the_answers_behind_them_score_as_alone(kind: str) -> None:
    model, processor = tiny_vlm(kind)
    items = rows(kind)
    batch = collate_answers(items, padding_token(processor), shared_prompt=True)
    assert batch.prompt_inputs is not None
    prompts = twice(batch.prompt_inputs)
    joined = {name: torch.cat([prompts[name], batch.inputs[name]], 1) for name in ("input_ids", "attention_mask")}
    for name in prompts.keys() - joined.keys():
        joined[name] = torch.cat([prompts[name], torch.zeros_like(batch.inputs["input_ids"])], 1)
    with torch.no_grad():
        logits = model(**joined, **twice(batch.media)).logits
    ahead = torch.zeros_like(prompts["input_ids"], dtype=torch.bool)
    got = supervised_logps(logits, joined["input_ids"], torch.cat([ahead, batch.supervised], 1))
    expected = [alone(kind, item) for item in items]
    for ours, theirs in zip(got, [answers[side] for side in range(2) for answers in expected], strict=True):
        torch.testing.assert_close(ours, theirs, **TOLERANCE)
    assert batch.inputs["input_ids"].shape == (2 * len(items), max(len(a.ids) for i in items for a in i.answers))


def test_rows_of_one_batch_hold_a_picture_each_once() -> None:
    items = rows("lfm2_vl")
    media = collate_answers(items, 0).media
    for name in items[1].media:
        assert torch.equal(media[name], torch.cat([items[1].media[name], items[2].media[name]]))


def item(row: int, answers: int = 2, frames: int = 4, **media: Tensor) -> EncodedAnswers:
    own = torch.ones(2, dtype=torch.bool)
    said = AnswerTokens(torch.tensor([0, 5]), own, ~own)
    media = media or {"pixel_values_videos": torch.ones(1, frames, 3, 2, 2)}
    return EncodedAnswers(row, torch.tensor([0, 3, 0]), (said,) * answers, {}, media, 1.0)


def test_masks_come_from_lengths_where_the_pad_token_is_a_word_too() -> None:
    long = item(0)
    short = EncodedAnswers(1, torch.tensor([3]), long.answers, {}, long.media, 0.0)
    batch = collate_answers([long, short], 0)
    assert batch.inputs["input_ids"][:2].tolist() == [[0, 3, 0, 0, 5], [3, 0, 5, 0, 0]]
    assert batch.inputs["attention_mask"][:2].tolist() == [[1] * 5, [1, 1, 1, 0, 0]]
    assert batch.supervised[:2].tolist() == [[False] * 3 + [True] * 2, [False] + [True] * 2 + [False] * 2]
    shared = collate_answers([long, short], 0, shared_prompt=True)
    assert shared.prompt_inputs is not None
    assert shared.prompt_inputs["attention_mask"].tolist() == [[1, 1, 1], [0, 0, 1]]
    assert shared.prompt_inputs["input_ids"].tolist() == [[0, 3, 0], [0, 0, 3]]


def test_single_answers_make_a_batch_of_one_side() -> None:
    batch = collate_answers([item(4, answers=1), item(9, answers=1)], 0)
    assert batch.rows == [4, 9]
    assert batch.inputs["input_ids"].shape == (2, 5)
    with pytest.raises(ValueError, match="a batch holds pairs or single answers"):
        collate_answers([item(0), item(1, answers=1)], 0)


def test_clips_of_different_lengths_cannot_share_a_batch() -> None:
    # The models would take zeros for frames.
    with pytest.raises(ValueError, match=r"rows 2 and 3 cannot share a batch: pixel_values_videos .*num_frames"):
        collate_answers([item(2), item(3, frames=6)], 0)


def test_a_batch_goes_to_a_device_whole() -> None:
    batch = collate_answers([item(0)], 0, shared_prompt=True)
    moved = batch.to("meta")
    tensors = [moved.supervised, moved.marked, moved.label, *moved.inputs.values(), *moved.media.values()]
    assert moved.prompt_inputs is not None
    assert all(tensor.is_meta for tensor in [*tensors, *moved.prompt_inputs.values()])
    assert moved.rows == batch.rows
