"""The user attention on every picture family: nothing at zero, nothing for the dropped, what its formula says otherwise."""

import copy
from dataclasses import replace

import pytest
import torch
from tiny import tiny_pipeline
from torch import nn

from mmalign.denoisers import adapter_for
from mmalign.denoisers.user_attention import (
    UserAttentionConfig,
    add_user_attention,
    detached,
    load_user_attention,
    remove_user_attention,
    save_user_attention,
    user_attention,
    user_attention_off,
)

FAMILIES = ("sd", "sdxl", "sd3", "flux", "cascade")
WIDTH, TOKENS = 6, 3


def denoiser(kind="sd", **config):
    found = adapter_for(tiny_pipeline(kind))
    found.module.requires_grad_(False)
    add_user_attention(found.module, UserAttentionConfig(width=WIDTH, **config))
    return found


def started(found):
    """Away from the zeros at which W'_v starts."""
    with torch.no_grad():
        for parameter in user_attention(found.module).parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    return found


def call(found, weight=(1.0, 1.0), seed=0, user=None):
    generator = torch.Generator().manual_seed(seed)
    side = 64 if found.family == "stable-cascade" else 16
    channels, *size = found.latent_shape(side, side)
    x = torch.randn(2, channels, *size, generator=generator)
    told = found.with_sizes(
        found.encode_prompt(["a red shirt", "a blue bag"]), torch.tensor([[16, 16, 0, 0, 16, 16]] * 2)
    )
    if weight is not None:
        tokens = torch.randn(2, TOKENS, WIDTH, generator=generator) if user is None else user
        told = replace(told, user=tokens, user_weight=torch.tensor(weight))
    return found.predict(found.module, x, torch.tensor([100, 700]), told)


@pytest.mark.parametrize("kind", FAMILIES)
def test_starts_as_the_base_and_leaves_it_as_it_was(kind):
    found = adapter_for(tiny_pipeline(kind))
    before = call(found, weight=None)
    names = set(found.module.state_dict())
    add_user_attention(found.module, UserAttentionConfig(width=WIDTH))
    assert torch.equal(call(found), before)
    started(found)
    assert not torch.allclose(call(found), before)
    with user_attention_off(found.module):
        assert torch.equal(call(found), before)
    with detached(found.module):
        assert set(found.module.state_dict()) == names
    assert not torch.allclose(call(found), before)
    remove_user_attention(found.module)
    assert set(found.module.state_dict()) == names
    assert torch.equal(call(found, weight=None), before)


@pytest.mark.parametrize("kind", FAMILIES)
def test_a_row_of_weight_zero_is_the_bases_to_the_bit_and_only_that_row(kind):
    found = started(denoiser(kind))
    base, both, one = call(found, weight=None), call(found), call(found, weight=(0.0, 1.0))
    assert torch.equal(one[0], base[0])
    assert torch.equal(one[1], both[1])
    assert not torch.allclose(one[1], base[1])


@pytest.mark.parametrize("kind", FAMILIES)
def test_at_the_start_values_alone_have_a_gradient_and_nothing_else_is_trained(kind):
    found = denoiser(kind)
    call(found).square().sum().backward()
    for name, parameter in found.module.named_parameters():
        assert parameter.requires_grad == ("user_attention." in name)
        if ".value." in name:
            assert parameter.grad.abs().sum() > 0
        elif ".key." in name:
            assert not parameter.grad.any()


def test_adds_what_the_formula_says_before_the_output_projection():
    found = started(denoiser("sd"))
    name = next(name for name, part in found.module.named_modules() if name.endswith("attn2"))
    attn = found.module.get_submodule(name)
    layer = attn.processor.layer
    x, text = torch.randn(2, 5, attn.to_q.in_features), torch.randn(2, 4, attn.to_k.in_features)
    u, weight = torch.randn(2, TOKENS, WIDTH), torch.tensor([0.5, 2.0])
    users = user_attention(found.module).read(u, weight)

    def heads(part):
        return part.unflatten(-1, (attn.heads, -1)).transpose(1, 2)

    def attend(key, value):
        query = heads(attn.to_q(x))
        weights = (query @ heads(key).transpose(-1, -2) / query.shape[-1] ** 0.5).softmax(-1)
        return (weights @ heads(value)).transpose(1, 2).flatten(2)

    normal = (u - u.mean(-1, keepdim=True)) / (u.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()
    z = attend(attn.to_k(text), attn.to_v(text))
    z = z + weight[:, None, None] * attend(normal @ layer.key.weight.T, normal @ layer.value.weight.T)
    torch.testing.assert_close(attn(x, text, ip_hidden_states=users), attn.to_out[0](z), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", FAMILIES)
def test_checkpointing_recomputes_with_the_same_users(kind):
    found = started(denoiser(kind))
    gradients = []
    for checkpointed in (False, True):
        found.module.train(not found.has_own_dropout)
        if checkpointed:
            found.module.enable_gradient_checkpointing()
        output = call(found)
        # Another call between forward and backward must not reach into the recomputation.
        with torch.no_grad():
            call(found, weight=None)
            call(found, seed=5)
        found.module.zero_grad()
        output.square().sum().backward()
        gradients.append([p.grad.clone() for p in user_attention(found.module).parameters()])
    for plain, again in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, again)
    assert any(gradient.any() for gradient in gradients[0])


def test_a_lora_acts_beside_it_and_is_switched_by_itself():
    from peft import LoraConfig

    found = started(denoiser("sd"))
    base = call(found, weight=None)
    with_user = call(found)
    config = LoraConfig(r=2, target_modules=["to_q", "to_k", "to_v", "to_out.0"], init_lora_weights=False)
    found.module.add_adapter(config)
    assert not any("user_attention" in name for name, _ in found.module.named_parameters() if "lora" in name)
    both, lora = call(found), call(found, weight=None)
    assert not torch.allclose(both, with_user) and not torch.allclose(lora, base)
    assert torch.equal(call(found, weight=(0.0, 0.0)), lora)
    found.module.disable_adapters()
    assert torch.equal(call(found), with_user)


def test_the_shared_query_is_the_one_that_a_lora_makes():
    from peft import LoraConfig

    found = started(denoiser("sd"))
    found.module.add_adapter(LoraConfig(r=2, target_modules=["attn2.to_q"], init_lora_weights=False))
    with torch.no_grad():
        # Without values of its own the text attention adds nothing, and the query shows in the user's part alone.
        for name, part in found.module.named_modules():
            if name.endswith("attn2.to_v"):
                part.weight.zero_()
    on = call(found)
    found.module.disable_adapters()
    assert not torch.allclose(call(found), on)


@pytest.mark.parametrize("kind", ["sd", "cascade"])
@pytest.mark.parametrize("options", [{}, {"projection": 5}, {"rank": 2}, {"blocks": ("mid_block",)}])
def test_saved_and_loaded_it_draws_the_same(tmp_path, options, kind):
    if kind == "cascade" and "blocks" in options:
        options = {"blocks": ("up_blocks.0",)}
    found = started(denoiser(kind, **options))
    save_user_attention(user_attention(found.module), tmp_path)
    other = adapter_for(tiny_pipeline(kind))
    load_user_attention(other.module, tmp_path)
    assert torch.equal(call(other), call(found))
    if "blocks" in options:
        (word,) = options["blocks"]
        assert all(word.replace(".", "/") in name for name in user_attention(other.module).layers)


@pytest.mark.parametrize("kind", ["sd", "cascade"])
def test_a_copied_network_has_a_user_attention_of_its_own(kind):
    found = started(denoiser(kind))
    twin = copy.deepcopy(found.module)
    expected = call(found)
    with torch.no_grad():
        for parameter in user_attention(twin).parameters():
            parameter.zero_()
    assert torch.equal(call(found), expected)


def test_what_does_not_fit_is_refused(tmp_path):
    found = denoiser("sd")
    with pytest.raises(ValueError, match="already"):
        add_user_attention(found.module, UserAttentionConfig(width=WIDTH))
    with pytest.raises(ValueError, match="has no user attention"):
        call(adapter_for(tiny_pipeline("sd")))
    with pytest.raises(ValueError, match="no place for a user attention in CogVideoX"):
        add_user_attention(tiny_pipeline("cogvideox").transformer, UserAttentionConfig(width=WIDTH))
    with pytest.raises(ValueError, match="tokens"):
        call(found, user=torch.zeros(2, TOKENS, WIDTH + 1))
    with pytest.raises(ValueError, match="no text attention"):
        add_user_attention(tiny_pipeline("sd").unet, UserAttentionConfig(width=WIDTH, blocks=("nowhere",)))
    save_user_attention(user_attention(found.module), tmp_path)
    other = tiny_pipeline("sdxl").unet
    other.mid_block = nn.Identity()
    with pytest.raises(ValueError, match="does not fit"):
        load_user_attention(other, tmp_path)
    assert user_attention(other) is None
