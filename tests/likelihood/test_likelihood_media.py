"""Media encoded once, and prompts read once: the same numbers and gradients as rows that read everything for themselves."""

import copy
from typing import Any

import pytest
import torch
from tiny_vlm import KINDS, VIDEO_KINDS, clip, picture, tiny_vlm

from mmalign.data.answer_records import AnswerPair, Turn
from mmalign.data.answer_tokens import AnswerBatch, collate_answers, encode_answers, padding_token
from mmalign.likelihood.answers import hidden_states, score_answers, shared_prompt_states
from mmalign.likelihood.media import carries_gradient, encode_media
from mmalign.likelihood.token_head import check_head

ASKED = (
    ("user", "What is in the picture?", "A red bag.", "A blue shirt on a white background."),
    ("user", "Which way does it move? Look.", "It moves to the left, then it stops.", "To the right."),
)


def pairs(kind: str) -> list[AnswerPair]:
    """Two prompts, each with a medium of its own: clips where the family watches, else pictures of two sizes."""
    media = [clip(seed=0), clip(seed=1)] if kind in VIDEO_KINDS else [picture(40, 24), picture(100, 60)]
    return [
        AnswerPair(row, (Turn("user", (medium, question)),), chosen, rejected)
        for row, (medium, (_, question, chosen, rejected)) in enumerate(zip(media, ASKED, strict=True))
    ]


def batches(kind: str) -> tuple[Any, AnswerBatch, AnswerBatch, list[AnswerBatch]]:
    """The model, a joined batch, one with shared prompts, and every pair as a batch of its own."""
    model, processor = tiny_vlm(kind)
    encoded = [encode_answers(pair, processor, model.config) for pair in pairs(kind)]
    pad = padding_token(processor)
    alone = [collate_answers([one], pad) for one in encoded]
    return copy.deepcopy(model), collate_answers(encoded, pad), collate_answers(encoded, pad, shared_prompt=True), alone


def told(model: Any, batch: AnswerBatch, *, once: bool) -> torch.Tensor:
    """Sums of the answers' log-probabilities, in whole rows."""
    features = encode_media(model, batch.media) if once else None
    hidden = hidden_states(model, batch.inputs, batch.supervised, batch.media, features)
    return score_answers(model, hidden, batch.inputs["input_ids"], batch.supervised).log_prob.sum(1)


def gradients(model: Any, sums: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    (sums * torch.tensor([1.0, -0.5, -1.0, 2.0])).sum().backward()
    return {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}


def close(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    most = max(float(value.abs().max()) for value in theirs.values())
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, atol=2e-5 * most, rtol=0, msg=lambda text, n=name: f"{n}: {text}")


@pytest.mark.parametrize("kind", KINDS)
def test_media_encoded_once_say_what_media_encoded_for_every_answer_say(kind: str):
    model, joined, _, alone = batches(kind)
    once, every = told(model, joined, once=True), told(model, joined, once=False)
    torch.testing.assert_close(once, every, atol=1e-4, rtol=0)
    close(gradients(model, once), gradients(model, every))
    rows = [told(model, batch, once=False) for batch in alone]
    single = torch.stack([side for part in zip(*rows, strict=True) for side in part])
    torch.testing.assert_close(every, single, atol=1e-4, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_a_prompt_with_media_that_is_read_once_changes_nothing(kind: str):
    model, joined, shared, _ = batches(kind)
    assert shared.prompt_inputs is not None
    features = encode_media(model, shared.media)
    hidden = shared_prompt_states(model, shared.prompt_inputs, shared.inputs, shared.supervised, shared.media, features)
    once = score_answers(model, hidden, shared.inputs["input_ids"], shared.supervised).log_prob.sum(1)
    every = told(model, joined, once=False)
    torch.testing.assert_close(once, every, atol=1e-4, rtol=0)
    close(gradients(model, once), gradients(model, every))


@pytest.mark.parametrize("kind", KINDS)
def test_a_frozen_encoder_gives_features_that_both_models_can_share(kind: str):
    model, joined, *_ = batches(kind)
    assert carries_gradient(encode_media(model, joined.media))
    model.requires_grad_(False)
    assert not carries_gradient(encode_media(model, joined.media))


@pytest.mark.parametrize("kind", KINDS)
def test_the_head_is_the_models_own(kind: str):
    model, joined, *_ = batches(kind)
    media = {name: torch.cat([value, value]) for name, value in joined.media.items()}
    check_head(model, {**joined.inputs, **media})


@pytest.mark.parametrize("kind", KINDS)
def test_prompts_without_media_are_read_once_as_well_also_behind_some_with_media(kind: str):
    model, processor = copy.deepcopy(tiny_vlm(kind))
    pad = padding_token(processor)
    bare = [AnswerPair(row, (Turn("user", (text,)),), yes, no) for row, (_, text, yes, no) in enumerate(ASKED)]
    encoded = [encode_answers(pair, processor, model.config) for pair in bare]
    assert len({len(one.prompt) for one in encoded}) == 2
    joined, shared = (collate_answers(encoded, pad, shared_prompt=once) for once in (False, True))
    assert shared.prompt_inputs is not None

    def once() -> torch.Tensor:
        hidden = shared_prompt_states(model, shared.prompt_inputs, shared.inputs, shared.supervised, shared.media, {})
        return score_answers(model, hidden, shared.inputs["input_ids"], shared.supervised).log_prob.sum(1)

    with torch.no_grad():
        every = told(model, joined, once=False)
        torch.testing.assert_close(once(), every, atol=1e-4, rtol=0)
        told(model, batches(kind)[1], once=True)
        torch.testing.assert_close(once(), every, atol=1e-4, rtol=0)
