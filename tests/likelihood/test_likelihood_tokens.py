"""Chunked token scores against plain ones, for heads that scale, cap and do neither."""

import math

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from mmalign.likelihood.token_head import TokenHead, check_head, head_of, trunk_of
from mmalign.likelihood.tokens import score_tokens

V, D = 37, 8


def head(seed: int = 0, dtype: torch.dtype = torch.float64, **options: float) -> TokenHead:
    torch.manual_seed(seed)
    return TokenHead(nn.Linear(D, V, bias=False).to(dtype), **options)


def three_logits(masked: bool = False) -> TokenHead:
    """A head whose logits are the hidden state; masked: the last is −∞."""
    made = nn.Linear(3, 3).requires_grad_(False)
    made.weight.copy_(torch.eye(3))
    made.bias.copy_(torch.tensor([0, 0, -torch.inf if masked else 0]))
    return TokenHead(made)


def plain(hidden: torch.Tensor, labels: torch.Tensor, told: TokenHead, expected: torch.Tensor):
    logp = told(hidden).log_softmax(-1)
    kl = (expected.softmax(-1) * (expected.log_softmax(-1) - logp)).sum(-1)
    return logp[torch.arange(len(labels)), labels], kl, -(logp.exp() * logp).sum(-1)


@settings(max_examples=25, deadline=None)
@given(
    number=st.integers(0, 12),
    chunk=st.integers(1, 13),
    multiplier=st.sampled_from([1.0, 0.3]),
    cap=st.sampled_from([None, 5.0]),
    trained=st.booleans(),
)
def test_chunks_change_neither_scores_nor_gradients(
    number: int, chunk: int, multiplier: float, cap: float | None, trained: bool
):
    told, other = head(1, multiplier=multiplier, cap=cap), head(2)
    hidden = torch.randn(number, D, dtype=torch.float64, generator=torch.manual_seed(3), requires_grad=True)
    labels = torch.randint(V, (number,))
    reference = torch.randn(number, D, dtype=torch.float64)
    weight = told.module.weight.requires_grad_(trained)
    found = score_tokens(hidden, labels, told, reference=(reference, other), entropy=True, chunk_bytes=4 * V * chunk)
    expected = plain(hidden, labels, told, other(reference).detach())
    for ours, theirs in zip((found.log_prob, found.kl, found.entropy), expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=0)
    pull = torch.linspace(-1, 2, number, dtype=torch.float64)
    wanted = (hidden, weight) if trained else (hidden,)
    ours = torch.autograd.grad((found.log_prob * pull - 0.7 * found.kl).sum(), wanted)
    theirs = torch.autograd.grad((expected[0] * pull - 0.7 * expected[1]).sum(), wanted)
    for one, two in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, two, atol=1e-12, rtol=0)


def test_scores_of_half_precision_are_those_of_its_numbers_in_float32():
    told = head(1, torch.bfloat16)
    hidden, labels = torch.randn(50, D).bfloat16(), torch.randint(V, (50,))
    found = score_tokens(hidden, labels, told, reference=(hidden, told), entropy=True)
    assert found.log_prob.dtype == torch.float32
    logits = told.module(hidden).float()
    torch.testing.assert_close(found.log_prob, logits.log_softmax(-1)[torch.arange(50), labels], atol=1e-6, rtol=0)
    assert found.kl is not None and found.kl.abs().max() < 1e-6


@pytest.mark.parametrize("gap", [40.0, 120.0, 1e4])
def test_a_token_that_the_reference_finds_impossible_keeps_everything_finite(gap: float):
    told, hidden = three_logits(), torch.zeros(1, 3, requires_grad=True)
    reference = torch.tensor([[0.0, 0.0, -gap]])
    found = score_tokens(hidden, torch.tensor([2]), told, reference=(reference, told))
    assert found.kl is not None
    (found.kl + found.log_prob).sum().backward()
    torch.testing.assert_close(found.kl.detach(), torch.tensor([math.log(3 / 2)]))
    assert hidden.grad is not None and hidden.grad.isfinite().all()
    back = score_tokens(reference, torch.tensor([2]), told, reference=(hidden.detach(), told))
    assert back.kl is not None and back.kl.isfinite().all() and back.log_prob.item() == pytest.approx(-gap, rel=0.02)


def test_a_masked_vocabulary_adds_nothing_to_the_divergence():
    told, hidden = three_logits(masked=True), torch.tensor([[0.0, 1.0, 0.0]], requires_grad=True)
    found = score_tokens(hidden, torch.tensor([0]), told, reference=(torch.tensor([[1.0, 0.0, 0.0]]), told))
    assert found.kl is not None and found.kl.item() == pytest.approx(math.tanh(0.5))
    found.kl.sum().backward()
    assert hidden.grad is not None
    torch.testing.assert_close(hidden.grad[0, :2].sum(), torch.tensor(0.0))


def text_model(kind: str) -> nn.Module:
    sizes = dict(vocab_size=V, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
    made = {
        "Lfm2": dict(num_key_value_heads=1, layer_types=["conv", "full_attention"], block_multiple_of=2),
        "Gemma2": dict(num_key_value_heads=1, head_dim=8, final_logit_softcapping=0.5),
        "Granite": dict(num_key_value_heads=1, logits_scaling=3.0),
        "Cohere": dict(num_key_value_heads=1, logit_scale=0.25, pad_token_id=0, bos_token_id=1, eos_token_id=2),
        "Qwen2": dict(num_key_value_heads=1),
    }[kind]
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**sizes, **made)
    model = getattr(transformers, f"{kind}ForCausalLM")(config)
    for parameter in model.parameters():
        parameter.data.normal_(std=0.3)
    return model.eval()


@pytest.mark.parametrize("kind", ["Lfm2", "Gemma2", "Granite", "Cohere", "Qwen2"])
def test_the_head_is_the_models_own(kind: str):
    model, ids = text_model(kind), torch.randint(3, V, (2, 9))
    check_head(model, {"input_ids": ids})
    own = model(input_ids=ids).logits
    ours = head_of(model)(trunk_of(model)(input_ids=ids).last_hidden_state)
    torch.testing.assert_close(ours, own.float(), atol=1e-5, rtol=1e-5)


def test_a_head_that_does_more_is_refused():
    model, ids = text_model("Qwen2"), torch.randint(3, V, (1, 5))
    model.register_forward_hook(lambda _, __, output: output.__setitem__("logits", output.logits * 1.5))
    with pytest.raises(ValueError, match="Qwen2ForCausalLM"):
        check_head(model, {"input_ids": ids})


@pytest.mark.parametrize("trained", [False, True])
def test_scores_and_gradients_are_those_of_trls_chunked_head(trained: bool):
    trl = pytest.importorskip("trl.kernels")
    told = head(4, torch.float32, multiplier=0.5, cap=2.0)
    weight = told.module.weight.requires_grad_(trained)
    hidden, labels, pull = torch.randn(19, D, requires_grad=True), torch.randint(V, (19,)), torch.randn(19)
    found = score_tokens(hidden, labels, told, entropy=True, chunk_bytes=4 * V * 5)
    theirs, spread, *_ = trl.ChunkedLogProbFunction.apply(hidden, weight, None, labels, 1.0, 16, 2.0, 0.5, ("entropy",))
    torch.testing.assert_close(found.log_prob, theirs)
    torch.testing.assert_close(found.entropy, spread.detach())
    wanted = (hidden, weight) if trained else (hidden,)
    for one, two in zip(
        torch.autograd.grad((found.log_prob * pull).sum(), wanted),
        torch.autograd.grad((theirs * pull).sum(), wanted),
        strict=True,
    ):
        torch.testing.assert_close(one, two, atol=1e-5, rtol=1e-4)
