"""Drawing for users: what a network reads in each of a sampler's calls, and several users mixed in what it predicts.

    ε = ε(c, ∅) + Σ_i w_i · (ε(c, u_i) − ε(c, ∅))

Mixed in the tokens instead, u = Σ w_i u_i, one call is enough.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mmalign.denoisers.parts import CONDITIONAL_FIRST
from mmalign.denoisers.user_attention import told, user_attention


@dataclass(frozen=True, eq=False)
class UserMix:
    """Users of N pictures: tokens (N, U, D) with a weight each.

    by_scores: the weights are those of the formula above, each user read in full; otherwise there is one part, and its weight is how
    strongly the tokens are read.
    """

    parts: Sequence[tuple[Float[Tensor, "N U D"], float]]
    by_scores: bool


@contextmanager
def reading(network: nn.Module, mix: UserMix) -> Iterator[None]:
    """The network told of the users in every call: of N rows, or of 2N, of which the unconditional half has no user."""
    branch = user_attention(network)
    if branch is None:
        raise ValueError("a user is named, but the network has no user attention: train one with PPD, or load one")
    plain, own = network.forward, network.__dict__.get("forward")

    def with_user(tokens: Tensor, weight: float, args: Any, options: dict[str, Any]) -> Any:
        rows = len(_sample(args, options))
        weights = torch.full((len(tokens),), weight)
        if rows == 2 * len(tokens):
            halves = [torch.zeros_like(weights), weights]
            if type(network).__name__ in CONDITIONAL_FIRST:
                halves.reverse()
            tokens, weights = torch.cat([tokens, tokens]), torch.cat(halves)
        elif rows != len(tokens):
            raise ValueError(
                f"the sampler calls the network with {rows} rows for {len(tokens)} pictures, which users cannot be told to"
            )
        with told(network, branch.read(tokens, weights)) as added:
            merged = {name: {**(options.get(name) or {}), **value} for name, value in added.items()}
            return plain(*args, **options | merged)

    def forward(*args: Any, **options: Any) -> Any:
        if not mix.by_scores:
            return with_user(*mix.parts[0], args, options)
        base = _prediction(plain(*args, **options))
        moved = base
        for tokens, weight in mix.parts:
            moved = moved + weight * (_prediction(with_user(tokens, 1.0, args, options)) - base)
        return (moved,)

    network.forward = forward
    try:
        yield
    finally:
        if own is None:
            del network.forward
        else:
            network.forward = own


def _sample(args: tuple[Any, ...], options: dict[str, Any]) -> Tensor:
    """What is denoised, as the families' calls name it."""
    return args[0] if args else options["sample" if "sample" in options else "hidden_states"]


def _prediction(output: Any) -> Tensor:
    if not isinstance(output, tuple):
        raise ValueError("users are mixed in what samplers of diffusers ask for, return_dict=False")
    return output[0]
