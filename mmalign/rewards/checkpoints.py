"""Published weight files: found, read without running what is in them, and fitted to a network key by key."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mmalign.files import absence_explained


def hub_file(repo: str, filename: str, name: str) -> Path:
    """A file of a Hub repository, downloaded once. `name`: of the scorer, for the error."""
    from huggingface_hub import hf_hub_download

    remedy = f"run `hf download {repo} {filename} --local-dir .` where the Hub is reached, and ask for '{name}:<file>'"
    with absence_explained(remedy):
        return Path(hf_hub_download(repo, filename))


def read_checkpoint(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a .safetensors file, or of a PyTorch file with or without a "state_dict" around them."""
    path = Path(path).expanduser()
    if not path.is_file():
        raise ValueError(f"{path} is no file: give the path of the downloaded weights")
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(path)
    try:
        content: Any = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} holds more than tensors, and reading it could run code: save its state dict as .safetensors"
        ) from error
    state = content.get("state_dict", content) if isinstance(content, dict) else content
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"{path} holds no state dict: save the tensors by name, as .safetensors or with torch.save")
    return state


def shape_of(state: dict[str, Tensor], key: str, what: str) -> torch.Size:
    """The shape of one of the tensors, from which sizes of the network are read."""
    if key not in state:
        raise ValueError(f"not the weights of {what}: {key} is missing; give the published file")
    return state[key].shape


def part_of(state: dict[str, Tensor], prefix: str, what: str) -> dict[str, Tensor]:
    """The tensors whose names begin so, without this beginning."""
    part = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    if not part:
        raise ValueError(f"not the weights of {what}: nothing in it is called {prefix}…; give the published file")
    return part


def fitted(make: Callable[[], Any], state: dict[str, Tensor], what: str) -> Any:
    """The network that `make` builds, with these weights; drawing random ones first would take longer than reading the file."""
    from accelerate import init_empty_weights

    with init_empty_weights():
        module = make()
    fit_weights(module, state, what)
    return module


def fit_weights(module: nn.Module, state: dict[str, Tensor], what: str) -> None:
    """Put the tensors in place of the module's weights (which may be on "meta"), each in its own dtype, none left out."""
    expected = module.state_dict()
    missing, surplus = sorted(expected.keys() - state.keys()), sorted(state.keys() - expected.keys())
    if missing or surplus:
        odd = f"{missing[0]} is missing" if missing else f"{surplus[0]} is not part of it"
        raise ValueError(
            f"not the weights of {what}: {odd} ({len(missing)} missing, {len(surplus)} too many); give the published file"
        )
    wrong = [key for key in expected if expected[key].shape != state[key].shape]
    if wrong:
        shapes = f"{tuple(state[wrong[0]].shape)} for {tuple(expected[wrong[0]].shape)}"
        raise ValueError(f"not the weights of {what}: {wrong[0]} has shape {shapes}; give the published file")
    module.load_state_dict(state, assign=True)


def linear_head(state: dict[str, Tensor], what: str) -> nn.Sequential:
    """The head of the aesthetic predictor and of ImageReward from its tensors: five linear layers, nothing between.

    Dropout stood between them in training, hence the numbers 0, 2, 4, 6, 7 under "layers."; variants with ReLU have
    others and are refused.
    """
    names = ("0", "2", "4", "6", "7")
    weights = [state[f"layers.{name}.weight"] for name in names if f"layers.{name}.weight" in state]
    head = nn.Sequential()
    for name, weight in zip(names, weights, strict=False):
        head.add_module(name, nn.Linear(weight.shape[1], weight.shape[0]))
    if len(head) < len(names):
        raise ValueError(
            f"not the weights of {what}: it has five linear layers, found {len(head)}; give the published file"
        )
    fit_weights(head, {key.removeprefix("layers."): value for key, value in state.items()}, what)
    return head.float()
