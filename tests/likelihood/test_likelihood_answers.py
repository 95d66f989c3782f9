"""Answers' log-probabilities: padding, shared prompts, weights of tokens."""

import pytest
import torch
import transformers
from torch import nn

from mmalign import losses
from mmalign.likelihood.answers import (
    hidden_states,
    pair_log_probs,
    score_answers,
    shared_prompt_states,
    token_weights,
)

V = 41
KINDS = ("Lfm2", "Gemma3", "Qwen2", "Lfm2Moe")


def text_model(kind: str) -> nn.Module:
    sizes = dict(vocab_size=V, hidden_size=16, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2)
    conv = dict(layer_types=["conv", "full_attention", "conv"])
    made = {
        "Lfm2": conv | dict(block_multiple_of=2),
        "Lfm2Moe": conv
        | dict(
            moe_intermediate_size=16,
            num_experts=4,
            num_experts_per_tok=2,
            num_dense_layers=1,
            experts_implementation="eager",
        ),
        "Gemma3": dict(
            head_dim=8, sliding_window=4, layer_types=["sliding_attention", "full_attention"] * 2, num_hidden_layers=4
        ),
        "Qwen2": {},
    }[kind]
    torch.manual_seed(0)
    config = getattr(transformers, "Gemma3TextConfig" if kind == "Gemma3" else f"{kind}Config")
    model = getattr(transformers, f"{kind}ForCausalLM")(config(**sizes | dict(num_key_value_heads=1) | made)).double()
    for parameter in model.parameters():
        parameter.data.normal_(std=0.2)
    return model.eval()


def batch() -> tuple[list[torch.Tensor], list[list[torch.Tensor]]]:
    """Two prompts, and the chosen and the rejected answers to them."""
    draw = torch.Generator().manual_seed(1)
    prompts = [torch.randint(3, V, (length,), generator=draw) for length in (7, 4)]
    answers = [[torch.randint(3, V, (length,), generator=draw) for length in lengths] for lengths in ((5, 1), (3, 6))]
    return prompts, answers


def padded(rows: list[torch.Tensor], side: str) -> dict[str, torch.Tensor]:
    length = max(map(len, rows))
    ids, mask = torch.zeros(len(rows), length, dtype=torch.long), torch.zeros(len(rows), length, dtype=torch.long)
    for row, values in enumerate(rows):
        where = slice(0, len(values)) if side == "right" else slice(length - len(values), length)
        ids[row, where], mask[row, where] = values, 1
    return {"input_ids": ids, "attention_mask": mask}


def joined() -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    prompts, answers = batch()
    inputs = padded([torch.cat([p, a]) for side in answers for p, a in zip(prompts, side, strict=True)], "right")
    starts = torch.tensor([len(p) for _ in answers for p in prompts])
    supervised = (torch.arange(inputs["input_ids"].shape[1]) >= starts[:, None]) & inputs["attention_mask"].bool()
    return inputs, supervised


def row_by_row(model: nn.Module) -> torch.Tensor:
    """Sums of log-probabilities of the four answers, each in a plain pass of its own."""
    prompts, answers = batch()
    told = []
    for side in answers:
        for prompt, answer in zip(prompts, side, strict=True):
            logits = model(input_ids=torch.cat([prompt, answer])[None]).logits[0].log_softmax(-1)
            told.append(logits[torch.arange(len(prompt) - 1, len(prompt) + len(answer) - 1), answer].sum())
    return torch.stack(told)


@pytest.mark.parametrize("kind", KINDS)
def test_a_padded_batch_says_what_single_rows_say(kind: str):
    model = text_model(kind)
    inputs, supervised = joined()
    hidden = hidden_states(model, inputs, supervised, {}, None)
    scores = score_answers(model, hidden, inputs["input_ids"], supervised)
    torch.testing.assert_close(scores.log_prob.sum(1), row_by_row(model), atol=1e-9, rtol=0)
    assert (scores.log_prob[~supervised] == 0).all()


@pytest.mark.parametrize("kind", KINDS)
def test_a_prompt_that_is_read_once_changes_neither_values_nor_gradients(kind: str):
    model = text_model(kind)
    prompts, answers = batch()
    behind = padded([answer for side in answers for answer in side], "right")
    counted = behind["attention_mask"].bool()
    pull = torch.tensor([1.0, -0.5, -1.0, 2.0], dtype=torch.float64)

    def gradients(total: torch.Tensor) -> list[torch.Tensor]:
        return list(torch.autograd.grad((pull * total).sum(), list(model.parameters()), allow_unused=True))

    hidden = shared_prompt_states(model, padded(prompts, "left"), behind, counted, {}, None)
    once = score_answers(model, hidden, behind["input_ids"], counted).log_prob.sum(1)
    alone = row_by_row(model)
    torch.testing.assert_close(once, alone, atol=1e-9, rtol=0)
    for ours, theirs in zip(gradients(once), gradients(alone), strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            # Their norms are float32 inside.
            torch.testing.assert_close(ours, theirs, atol=1e-6 * max(1.0, float(theirs.abs().max())), rtol=0)


def test_weights_of_tokens_in_closed_form():
    counted = torch.tensor([[0, 1, 1, 1, 1], [0, 0, 1, 0, 0], [1, 1, 0, 0, 0], [0, 1, 1, 1, 0]]).bool()
    assert (token_weights(counted) == counted.float()).all()
    assert token_weights(counted, "mean").sum(1).tolist() == [1, 1, 1, 1]
    # The first pair's answers have 4 and 2 tokens, the second's 1 and 3.
    expected = torch.tensor([[0, 1, 1, 0.25, 0.25], [0, 0, 1, 0, 0], [1, 1, 0, 0, 0], [0, 1, 0.25, 0.25, 0]])
    assert (token_weights(counted, "ld", ld_alpha=0.25) == expected).all()
    assert (token_weights(counted, "ld", ld_alpha=1.0) == counted.float()).all()
    with pytest.raises(ValueError, match="ld_alpha"):
        token_weights(counted, "ld")


def test_pairs_keep_their_sides_and_lengths():
    policy = torch.arange(8.0).view(4, 2)
    logps = pair_log_probs(policy, torch.zeros(4, 2), torch.tensor([[1.0, 1], [1, 0], [0, 1], [1, 1]]))
    assert logps.policy_chosen.tolist() == [1, 2] and logps.policy_rejected.tolist() == [5, 13]
    assert logps.chosen_length is not None and logps.rejected_length is not None
    assert logps.chosen_length.tolist() == [2, 1] and logps.rejected_length.tolist() == [1, 2]
    assert losses.compute("sigmoid", logps, beta=0.1).shape == (2,)


def test_an_answer_without_tokens_weighs_nothing():
    counted = torch.zeros(2, 3, dtype=torch.bool)
    assert token_weights(counted, "mean").sum() == 0
