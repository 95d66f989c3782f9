"""The reference: adapter off or frozen copy, bit for bit the base, untouched by training."""

import copy
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny import tiny_pipeline

from mmalign.likelihood import make_reference

LORA = LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False)


def inputs() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return dict(
        sample=torch.randn(2, 4, 8, 8, generator=generator),
        timestep=torch.tensor([3, 700]),
        encoder_hidden_states=torch.randn(2, 7, 16, generator=generator),
    )


def run(module: torch.nn.Module) -> torch.Tensor:
    return module(**inputs()).sample


@pytest.fixture
def base() -> Any:
    return tiny_pipeline("sd").unet.requires_grad_(False)


@pytest.fixture
def policy(base: Any) -> Any:
    unet = copy.deepcopy(base)
    unet.add_adapter(LORA)
    return unet


def flags(module: torch.nn.Module) -> dict[str, tuple[bool, bool]]:
    state = {f"{name}.": (part.training, False) for name, part in module.named_modules()}
    return state | {name: (p.requires_grad, p.grad is None) for name, p in module.named_parameters()}


def test_adapter_off_equals_the_base_bitwise_and_is_restored(base: Any, policy: Any) -> None:
    adapted, before = run(policy), flags(policy)
    reference = make_reference(policy)
    assert reference.kind == "adapter"
    with reference.model(policy) as ref:
        assert ref is policy
        assert torch.equal(run(ref), run(base))
    assert torch.equal(run(policy), adapted) and (adapted - run(base)).abs().max() > 1e-4
    assert flags(policy) == before


def test_everything_is_restored_after_an_exception(base: Any, policy: Any) -> None:
    policy.train()
    next(p for n, p in policy.named_parameters() if "lora_A" in n).requires_grad_(False)
    adapted, before = run(policy), flags(policy)
    with pytest.raises(RuntimeError, match="stop"), make_reference(policy).model(policy):
        raise RuntimeError("stop")
    assert flags(policy) == before and torch.equal(run(policy), adapted)
    assert torch.is_grad_enabled()


def test_the_reference_runs_in_eval_mode_without_gradients(policy: Any) -> None:
    policy.train()
    for reference in (make_reference(policy), make_reference(policy, kind="copy")):
        with reference.model(policy) as ref:
            assert not any(part.training for part in ref.modules())
            tracked = inputs() | dict(sample=inputs()["sample"].requires_grad_())
            assert not ref(**tracked).sample.requires_grad
        assert all(part.training for part in policy.modules())


def test_training_moves_the_policy_and_not_the_reference(base: Any, policy: Any) -> None:
    """The order of a real step: policy forward, reference forward, backward, update."""
    reference = make_reference(policy)
    fingerprint = reference.fingerprint()
    optimizer = torch.optim.SGD([p for p in policy.parameters() if p.requires_grad], lr=1.0)
    start = run(policy).detach()
    for _ in range(2):
        error = run(policy).square().mean()
        with reference.model(policy) as ref:
            target = run(ref)
        (error - target.square().mean()).backward()
        with_grad = {name for name, p in policy.named_parameters() if p.grad is not None}
        assert with_grad == {name for name, _ in policy.named_parameters() if "lora" in name}
        optimizer.step()
    assert (run(policy) - start).abs().max() > 1e-4
    with reference.model(policy) as ref:
        assert torch.equal(run(ref), run(base))
    assert reference.fingerprint() == fingerprint


def test_fingerprint_is_that_of_the_base_weights(base: Any, policy: Any) -> None:
    plain = make_reference(base).fingerprint()
    assert make_reference(policy).fingerprint() == plain
    assert make_reference(base, kind="copy").fingerprint() == plain
    assert make_reference(tiny_pipeline("sd", seed=1).unet).fingerprint() != plain
    assert make_reference(copy.deepcopy(base).bfloat16()).fingerprint() != plain
    nudged = copy.deepcopy(base)
    with torch.no_grad():
        list(nudged.parameters())[-1][-1] += 1e-6
    assert make_reference(nudged).fingerprint() != plain


def test_a_frozen_copy_stays_when_the_policy_is_trained(base: Any) -> None:
    base.requires_grad_(True)
    reference = make_reference(base)
    assert reference.kind == "copy" and reference.module is not base
    expected, fingerprint = run(base).detach(), reference.fingerprint()
    run(base).square().mean().backward()
    torch.optim.SGD(base.parameters(), lr=1.0).step()
    with reference.model(base) as ref:
        assert torch.equal(run(ref), expected) and not torch.equal(run(base), expected)
        assert not any(p.requires_grad for p in ref.parameters())
    assert reference.fingerprint() == fingerprint
    assert all(p.requires_grad for p in base.parameters())


def test_a_given_model_is_frozen_and_must_be_another_one(base: Any, policy: Any) -> None:
    other = tiny_pipeline("sd", seed=1).unet
    with make_reference(policy, other).model(policy) as ref:
        assert ref is other and not any(p.requires_grad for p in other.parameters())
    with pytest.raises(ValueError, match="shares .* parameters with the policy"):
        make_reference(base, base)
    with pytest.raises(ValueError, match="leave one of them out"):
        make_reference(policy, other, kind="adapter")


def test_no_reference_says_so(base: Any) -> None:
    reference = make_reference(base, kind="none")
    with pytest.raises(ValueError, match="reference-free"), reference.model(base):
        pass
    assert reference.fingerprint() == "none"


def test_peft_wrapped_modules_with_fully_trained_parts(base: Any) -> None:
    """get_peft_model with modules_to_save: the saved part's original is the reference's."""
    expected, plain = run(base), make_reference(base).fingerprint()
    config = LoraConfig(r=2, target_modules=["to_q"], modules_to_save=["conv_out"], init_lora_weights=False)
    wrapped = get_peft_model(copy.deepcopy(base), config)
    with torch.no_grad():
        wrapped.base_model.model.conv_out.modules_to_save["default"].weight.add_(0.5)
    before, adapted = flags(wrapped), run(wrapped)
    reference = make_reference(wrapped)
    with reference.model(wrapped) as ref:
        assert torch.equal(run(ref), expected)
    assert reference.fingerprint() == plain
    assert flags(wrapped) == before and torch.equal(run(wrapped), adapted) and not torch.equal(adapted, expected)


def test_a_wrapper_around_the_policy_may_be_passed(base: Any, policy: Any) -> None:
    class Thin(torch.nn.Module):
        def __init__(self, inner: torch.nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, **kwargs: torch.Tensor) -> Any:
            return self.inner(**kwargs)

    with make_reference(policy).model(Thin(policy)) as ref:
        assert isinstance(ref, Thin) and torch.equal(run(ref), run(base))


def test_policies_whose_adapter_off_is_not_the_starting_point_are_refused(base: Any, policy: Any) -> None:
    drifting = copy.deepcopy(policy)
    drifting.conv_in.requires_grad_(True)
    with pytest.raises(ValueError, match="base parameters require gradients"):
        make_reference(drifting)
    with pytest.raises(ValueError, match="needs a policy with adapters"):
        make_reference(base, kind="adapter")
    with pytest.raises(ValueError, match="no active adapter"), make_reference(policy).model(base):
        pass
    two = copy.deepcopy(policy)
    two.add_adapter(LORA, adapter_name="style")
    two.set_adapters(["default", "style"])
    with pytest.raises(ValueError, match="active together"):
        make_reference(two)
    merged = copy.deepcopy(policy)
    merged.fuse_lora()
    with pytest.raises(ValueError, match="merged"):
        make_reference(merged)
