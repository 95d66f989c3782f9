"""The reference model as a strategy: the policy with its adapter or its user attention off, a frozen copy, or none at all."""

import copy
import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from mmalign.denoisers.adapters import adapter_layers
from mmalign.denoisers.parts import stored
from mmalign.denoisers.user_attention import detached, user_attention, user_attention_off

ReferenceKind = Literal["adapter", "users", "copy", "none"]


@dataclass(frozen=True, eq=False)
class Reference:
    """Where the reference's predictions come from; make_reference builds it.

    `module` is the frozen copy, or for "adapter" and "users" the policy whose other weights are the reference.
    """

    kind: ReferenceKind
    module: nn.Module | None

    @contextmanager
    def model(self, policy: nn.Module) -> Iterator[nn.Module]:
        """The module to call, in eval mode and under no_grad; whatever was switched is restored, also on exceptions.

        For "adapter" it is `policy` itself (or a wrapper of it, if that is what is passed) with its adapters off; for "users" it is
        `policy` with its user attention off, and its adapters, if it has any, as they are.
        """
        if self.module is None:
            raise ValueError("this run has no reference model (kind 'none'): its objective must be reference-free")
        with torch.no_grad():
            if self.kind == "copy":
                yield self.module
                return
            switched = user_attention_off if self.kind == "users" else _adapters_off
            with switched(policy), _eval_mode(policy):
                yield policy

    def fingerprint(self) -> str:
        """sha256 over names, shapes, dtypes and values of the reference's weights and buffers.

        The same for an adapter-off reference and a frozen copy of the same base, before and after training.
        """
        if self.module is None:
            return "none"
        digest = hashlib.sha256()
        for name, tensor in sorted(self._state(self.module).items()):
            digest.update(f"{name}:{tuple(tensor.shape)}:{tensor.dtype}".encode())
            for part in stored(tensor):
                flat = part.detach().cpu().contiguous().reshape(-1)
                digest.update(flat.view(torch.uint8).numpy().data)
        return digest.hexdigest()

    def _state(self, module: nn.Module) -> dict[str, Tensor]:
        if self.kind != "users":
            return base_state(module)
        with detached(module):
            return {name: value for name, value in module.state_dict().items() if isinstance(value, Tensor)}


def make_reference(
    module: nn.Module,
    ref_model: nn.Module | None = None,
    *,
    kind: Literal["auto", "adapter", "users", "copy", "none"] = "auto",
) -> Reference:
    """Choose the reference for a policy, before training starts.

    auto: ref_model, frozen, if given; the policy with its adapter off if it has one (a warm-started adapter is then not
    part of the reference); else a frozen copy. users: the policy with its user attention off. "none" for reference-free objectives.
    """
    if kind in ("none", "adapter", "users") and ref_model is not None:
        raise ValueError(f"kind={kind!r} does not use ref_model; leave one of them out")
    if kind == "none":
        return Reference("none", None)
    if kind == "users":
        _check_users(module)
        return Reference("users", module)
    if ref_model is not None:
        _check_separate(module, ref_model)
        return Reference("copy", ref_model.requires_grad_(False).eval())
    if kind == "adapter" or (kind == "auto" and adapter_layers(module)):
        _check_adapters(module)
        return Reference("adapter", module)
    return Reference("copy", copy.deepcopy(module).requires_grad_(False).eval())


def _check_separate(module: nn.Module, ref_model: nn.Module) -> None:
    shared = {p.data_ptr() for p in module.parameters()} & {p.data_ptr() for p in ref_model.parameters()}
    if shared:
        raise ValueError(
            f"ref_model shares {len(shared)} parameters with the policy and would be trained with it; "
            "pass a separate copy, or leave ref_model out to have one made"
        )


def _check_adapters(module: nn.Module) -> None:
    layers = adapter_layers(module)
    if not layers:
        raise ValueError(
            "kind='adapter' needs a policy with adapters: add_adapter(LoraConfig(…)) first, or kind='copy'"
        )
    active = {name for layer in layers for name in layer.active_adapters}
    if len(active) > 1:
        raise ValueError(
            f"adapters {', '.join(sorted(active))} are active together; switching all of them off would not give back "
            "the model that training starts from. Fuse those that are not trained (fuse_lora), or pass ref_model"
        )
    if any(getattr(layer, "merged", False) for layer in layers):
        raise ValueError("an adapter is merged into the base weights: unmerge it (unfuse_lora) before training")
    base = {id(value) for value in base_state(module, keep_vars=True).values()}
    trained = [name for name, p in module.named_parameters() if p.requires_grad and id(p) in base]
    if trained:
        raise ValueError(
            f"{len(trained)} base parameters require gradients ({trained[0]}, …), so that the policy with its "
            "adapters off would drift: freeze them, or use kind='copy'"
        )


def _check_users(module: nn.Module) -> None:
    branch = user_attention(module)
    if branch is None:
        raise ValueError("kind='users' needs a policy with a user attention to switch off: add_user_attention first")
    own = {id(parameter) for parameter in branch.parameters()}
    trained = [name for name, p in module.named_parameters() if p.requires_grad and id(p) not in own]
    if trained:
        raise ValueError(
            f"{len(trained)} parameters beside the user attention require gradients ({trained[0]}, …), so that the policy without its "
            "users would drift: freeze them"
        )


def base_state(module: nn.Module, keep_vars: bool = False) -> dict[str, Tensor]:
    """The state dict without adapters, under the names it has with no adapter injected."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    inside = []
    for name, layer in module.named_modules():
        if isinstance(layer, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
            prefix = f"{name}." if name else ""
            inside += [f"{prefix}{part}." for part in (*layer.adapter_layer_names, *layer.other_param_names)]
    state = {}
    for name, value in module.state_dict(keep_vars=keep_vars).items():
        if isinstance(value, Tensor) and not name.startswith(tuple(inside)):
            name = name.removeprefix("base_model.model.").replace(".base_layer.", ".").replace(".original_module.", ".")
            state[name] = value
    return state


@contextmanager
def _adapters_off(policy: nn.Module) -> Iterator[None]:
    layers = [layer for layer in adapter_layers(policy) if not layer.disable_adapters]
    if not layers:
        raise ValueError("the policy has no active adapter to switch off: the reference would be the policy itself")
    # peft's switch also flips requires_grad of the adapter weights; they are put back as they were.
    flags = [(p, p.requires_grad) for layer in layers for p in layer.parameters()]
    try:
        for layer in layers:
            layer.enable_adapters(False)
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


@contextmanager
def _eval_mode(module: nn.Module) -> Iterator[None]:
    training = [part for part in module.modules() if part.training]
    module.eval()
    try:
        yield
    finally:
        for part in training:
            part.training = True
