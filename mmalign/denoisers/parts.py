"""A pipeline's parts: which of them have weights and how these are stored; eval mode, or no bar, for a while."""

import inspect
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

# Under which name a pipeline holds the network that is aligned.
ALIGNED = ("unet", "transformer", "prior")
# Networks whose pipelines make one call on a batch [positive…, negative…]; all others lay it out the other way round.
CONDITIONAL_FIRST = ("StableCascadeUNet",)


def networks(pipe: Any) -> dict[str, nn.Module]:
    """The parts of a pipeline that have weights, by name."""
    return {name: part for name, part in pipe.components.items() if isinstance(part, nn.Module)}


def stored(tensor: Tensor) -> list[Tensor]:
    """The plain tensors that hold a tensor's values: itself, or numbers and scales of a quantised one."""
    if not is_traceable_wrapper_subclass(tensor):
        return [tensor]
    return [part for name in tensor.__tensor_flatten__()[0] for part in stored(getattr(tensor, name))]


def is_quantized(module: nn.Module) -> bool:
    """Whether some weights are stored as small whole numbers, by whatever library, and cannot be trained."""
    return any(not p.is_floating_point() or is_traceable_wrapper_subclass(p) for p in module.parameters())


@contextmanager
def evaluating(parts: Iterable[nn.Module]) -> Iterator[None]:
    """`parts` in eval mode; afterwards every module is in the mode it was in."""
    training = [module for part in parts for module in part.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def frozen(network: nn.Module) -> Iterator[None]:
    """No gradients for its weights; afterwards as before."""
    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


@contextmanager
def bar_hidden(pipe: Any) -> Iterator[None]:
    """The pipeline without its bar over sampling steps; afterwards the caller's choice stands again."""
    before: dict[str, Any] = dict(vars(pipe).get("_progress_bar_config", {}))
    pipe.set_progress_bar_config(**{**before, "disable": True})
    try:
        yield
    finally:
        pipe.set_progress_bar_config(**before)


def latent_channels(vae: Any) -> int:
    """Channels of a VAE's latents; Wan's config calls them z_dim."""
    config = vae.config
    return config["z_dim"] if "z_dim" in config else config["latent_channels"]


def draws_clips(pipe: Any) -> bool:
    """Whether a pipeline draws clips, not pictures: its call asks for their number of frames."""
    return "num_frames" in inspect.signature(type(pipe).__call__).parameters
