"""A second cross-attention beside a network's own, which reads who the picture is for (PPD, arXiv:2501.06655).

    Z = softmax(Q Kᵀ/√d) V + w · softmax(Q K'ᵀ/√d) V',   K' = W'_k n(u),   V' = W'_v n(u)

Q is the network's own, shared; the sum goes into the network's own output projection (IP-Adapter, arXiv:2308.06721); n normalises
every token without weights. W'_v starts at zero, so that the network starts as it was. Nothing has a bias, and w = 0 is exactly the
network without it. Shapes: B rows, U tokens of width D a user.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from mmalign.denoisers.conditioning import Conditioning
from mmalign.files import write_file, write_json

FOLDER = "user_attention"
_WEIGHTS, _CONFIG = "user_attention.safetensors", "config.json"
_NAME = "user_attention"
# diffusers hands this argument on to every attention of a network, and drops it without a word where a processor does not read it.
_ARGUMENT = "ip_hidden_states"
# The network's class → which attention layers read its text, by the end and the beginning of their names, and under which name its
# call takes what they are told; None where it takes nothing for them.
_SITES: dict[str, tuple[str, str, str | None]] = {
    "UNet2DConditionModel": (".attn2", "", "cross_attention_kwargs"),
    "SD3Transformer2DModel": (".attn", "transformer_blocks.", "joint_attention_kwargs"),
    "FluxTransformer2DModel": (".attn", "transformer_blocks.", "joint_attention_kwargs"),
    "StableCascadeUNet": (".attention", "", None),
}


@dataclass(frozen=True, kw_only=True)
class UserAttentionConfig:
    """width: D of the user's tokens. projection: width of one linear map that all layers share, None for none.

    rank: of low-rank W'_k and W'_v, None for whole ones. blocks: only attention layers with one of these words in their names.
    encoder: what made the tokens it learned to read (`UserEmbeddings.encoder`); empty where that is not known.
    """

    width: int
    projection: int | None = None
    rank: int | None = None
    blocks: tuple[str, ...] | None = None
    encoder: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("width", "projection", "rank"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} of the user attention must be at least 1, got {getattr(self, name)}")


@dataclass(frozen=True, eq=False)
class Users:
    """What a layer reads: tokens (B, U, P), normalised and projected, and how strongly each row reads them (B,)."""

    tokens: Float[Tensor, "B U P"]
    weight: Float[Tensor, " B"]


class UserAttention(nn.Module):
    """All that is added to a network: a layer for every one of its text attentions, and the map that they share.

    argument: under which name the network's call is told of the users; None where its layers look here for them, in `users`.
    """

    def __init__(self, config: UserAttentionConfig, sizes: dict[str, int], argument: str | None) -> None:
        super().__init__()
        self.config, self.argument, self.off = config, argument, False
        self.users: Users | None = None
        width = config.projection or config.width
        self.projection = nn.Linear(config.width, width, bias=False) if config.projection else nn.Identity()
        self.layers = nn.ModuleDict(
            {name.replace(".", "/"): _Layer(width, size, config.rank) for name, size in sizes.items()}
        )

    def read(self, tokens: Float[Tensor, "B U D"], weight: Float[Tensor, " B"]) -> Users:
        """Normalised and projected once for all layers, in the precision of the weights."""
        if tokens.ndim != 3 or tokens.shape[-1] != self.config.width or len(tokens) != len(weight):
            raise ValueError(
                f"the user attention reads tokens (B, U, {self.config.width}) and weights (B,), got {tuple(tokens.shape)} and "
                f"{tuple(weight.shape)}"
            )
        own = next(self.parameters())
        normalised = F.layer_norm(tokens.to(own.device, torch.float32), tokens.shape[-1:])
        return Users(self.projection(normalised.to(own.dtype)), weight.to(own.device))


class _Layer(nn.Module):
    def __init__(self, width: int, size: int, rank: int | None) -> None:
        super().__init__()
        self.key, self.value = _linear(width, size, rank), _linear(width, size, rank)
        nn.init.zeros_(list(self.value.parameters())[-1])


def _linear(width: int, size: int, rank: int | None) -> nn.Linear | nn.Sequential:
    if rank is None:
        return nn.Linear(width, size, bias=False)
    return nn.Sequential(nn.Linear(width, rank, bias=False), nn.Linear(rank, size, bias=False))


class _Processor:
    """The attention layer's own processor, with the user's part added to what enters the output projection.

    The query is taken where the layer makes it and the sum is made where the layer projects it, by hooks for the duration of a
    call: so that any processor serves (SDPA, xFormers, sliced), and a LoRA on either projection acts on both parts.
    """

    def __init__(self, base: Any, layer: _Layer, branch: UserAttention) -> None:
        self.base, self.layer, self.branch = base, layer, branch

    # diffusers looks at the names of the arguments to know what a processor reads.
    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Any = None,
        ip_hidden_states: Users | None = None,
    ) -> Any:
        others = {} if image_rotary_emb is None else {"image_rotary_emb": image_rotary_emb}
        arguments = {"encoder_hidden_states": encoder_hidden_states, "attention_mask": attention_mask, **others}
        users = ip_hidden_states or self.branch.users
        if users is None:
            return self.base(attn, hidden_states, **arguments)
        queries: list[Tensor] = []

        def take(module: nn.Module, inputs: Any, output: Tensor) -> None:
            queries.append(output)

        def add(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            if not queries:
                raise ValueError("the user attention needs the query by itself: call unfuse_qkv_projections() first")
            return (inputs[0] + self._attended(attn, queries.pop(), users).to(inputs[0].dtype), *inputs[1:])

        hooks = (attn.to_q.register_forward_hook(take), attn.to_out[0].register_forward_pre_hook(add))
        try:
            return self.base(attn, hidden_states, **arguments)
        finally:
            for hook in hooks:
                hook.remove()

    def _attended(self, attn: Any, query: Float[Tensor, "B N C"], users: Users) -> Float[Tensor, "B N C"]:
        """w · softmax(Q K'ᵀ/√d) V'."""
        query, key, value = (
            part.unflatten(-1, (attn.heads, -1)).transpose(1, 2)
            for part in (query, self.layer.key(users.tokens), self.layer.value(users.tokens))
        )
        if attn.norm_q is not None:
            query = attn.norm_q(query)
        found = F.scaled_dot_product_attention(query, key.to(query.dtype), value.to(query.dtype))
        return found.transpose(1, 2).flatten(2) * users.weight.to(found.dtype)[:, None, None]


def add_user_attention(network: nn.Module, config: UserAttentionConfig, *, seed: int = 0) -> UserAttention:
    """Puts the attention on the network, in float32, W'_k drawn from `seed`; ValueError for a network without known places for it."""
    if user_attention(network) is not None:
        raise ValueError("the network has a user attention already: remove_user_attention(network) first")
    sites, argument = _sites(network, config.blocks)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        branch = UserAttention(config, {name: attn.to_q.out_features for name, attn in sites.items()}, argument)
    network.add_module(_NAME, branch.to(next(network.parameters()).device))
    _attach(network, branch)
    return branch


def remove_user_attention(network: nn.Module) -> None:
    """Puts the network back as it was."""
    for attn in _carriers(network):
        attn.set_processor(attn.processor.base)
    network._modules.pop(_NAME, None)


def user_attention(network: nn.Module) -> UserAttention | None:
    """What `add_user_attention` put on the network, or None."""
    return network._modules.get(_NAME)  # type: ignore[return-value]


@contextmanager
def user_attention_off(network: nn.Module) -> Iterator[None]:
    """The network as it is without the user attention, whatever it is told of users."""
    branch = _present(network)
    before, branch.off = branch.off, True
    try:
        yield
    finally:
        branch.off = before


@contextmanager
def detached(network: nn.Module) -> Iterator[UserAttention]:
    """The network without any trace of its user attention, which is yielded, for those who copy or save it."""
    branch = _present(network)
    remove_user_attention(network)
    try:
        yield branch
    finally:
        network.add_module(_NAME, branch)
        _attach(network, branch)


@contextmanager
def users_told(network: nn.Module, conditioning: Conditioning) -> Iterator[dict[str, Any]]:
    """A block in which the network is called with the users, where there are any and the attention is on; yields keywords for it."""
    if conditioning.user is None or (branch := _present(network)).off:
        yield {}
        return
    assert conditioning.user_weight is not None
    with told(network, branch.read(conditioning.user, conditioning.user_weight)) as keywords:
        yield keywords


@contextmanager
def told(network: nn.Module, users: Users) -> Iterator[dict[str, Any]]:
    """A block in which the network is called with these users; yields keywords for the call."""
    branch: Any = _present(network)
    if branch.argument is not None:
        yield {branch.argument: {_ARGUMENT: users}}
        return
    checkpoint = network._gradient_checkpointing_func
    network._gradient_checkpointing_func = lambda block, *args: checkpoint(_Told(block, branch, users), *args)  # type: ignore[assignment, operator]
    branch.users = users
    try:
        yield {}
    finally:
        branch.users, network._gradient_checkpointing_func = None, checkpoint


@dataclass(frozen=True, eq=False)
class _Told:
    """A block that is told of the same users when it is computed again for its gradient, whoever else was drawn for in between."""

    block: nn.Module
    branch: UserAttention
    users: Users

    def __call__(self, *args: Any) -> Any:
        before, self.branch.users = self.branch.users, self.users
        try:
            return self.block(*args)
        finally:
            self.branch.users = before


def save_user_attention(branch: UserAttention, folder: Path) -> None:
    """Writes `folder`/user_attention: the weights as safetensors, and what they are."""
    from safetensors.torch import save

    state = {name: value.detach().cpu().contiguous() for name, value in branch.state_dict().items()}
    write_file(folder / FOLDER / _WEIGHTS, save(state))
    write_json(folder / FOLDER / _CONFIG, asdict(branch.config))


def load_user_attention(network: nn.Module, folder: Path) -> UserAttention:
    """Reads what `save_user_attention` wrote onto the network, adding it where there is none; ValueError where it does not fit."""
    from safetensors.torch import load_file

    place = folder / FOLDER
    if not (place / _WEIGHTS).is_file() or not (place / _CONFIG).is_file():
        raise ValueError(f"{folder} holds no {FOLDER}/ with {_WEIGHTS} and {_CONFIG}")
    fields = json.loads((place / _CONFIG).read_text(encoding="utf-8"))
    config = UserAttentionConfig(**fields | {"blocks": tuple(fields["blocks"]) if fields["blocks"] else None})
    present = user_attention(network)
    if present is not None and present.config != config:
        raise ValueError(f"{place} is a user attention of {config}, and the network has one of {present.config}")
    branch = present or add_user_attention(network, config)
    try:
        branch.load_state_dict(load_file(place / _WEIGHTS))
    except RuntimeError as error:
        if present is None:
            remove_user_attention(network)
        reason = str(error).splitlines()[-1].strip()
        raise ValueError(f"{place} does not fit this {type(network).__name__}: {reason}") from error
    return branch


def _present(network: nn.Module) -> UserAttention:
    branch = user_attention(network)
    if branch is None:
        raise ValueError("a user is named, but the network has no user attention: train one with PPD, or load one")
    return branch


def _attach(network: nn.Module, branch: UserAttention) -> None:
    modules = dict(network.named_modules())
    for name, layer in branch.layers.items():
        attn: Any = modules[name.replace("/", ".")]
        attn.set_processor(_Processor(attn.processor, layer, branch))  # type: ignore[arg-type]


def _carriers(network: nn.Module) -> list[Any]:
    return [part for part in network.modules() if isinstance(part.__dict__.get("processor"), _Processor)]


def _sites(network: nn.Module, blocks: Sequence[str] | None) -> tuple[dict[str, Any], str | None]:
    """The network's attention layers that read text, by name, and under which name its call takes what they are told."""
    kind = type(network).__name__
    if kind not in _SITES:
        raise ValueError(f"no place for a user attention in {kind} is known; it goes into {', '.join(_SITES)}")
    end, start, argument = _SITES[kind]
    found: dict[str, Any] = {
        name: part
        for name, part in network.named_modules()
        if name.endswith(end) and name.startswith(start) and (blocks is None or any(word in name for word in blocks))
    }
    if not found:
        raise ValueError(f"no text attention of {kind} has one of {', '.join(blocks or ())} in its name")
    if odd := next((name for name, attn in found.items() if isinstance(attn.processor, nn.Module)), None):
        raise ValueError(f"{odd} carries an adapter already (an IP-Adapter?): unload it first")
    return found, argument
