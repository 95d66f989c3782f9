"""Pictures and clips of a batch, encoded once, however many answers and models then read them."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from mmalign.likelihood.token_head import trunk_of

# What a processor returns → the modality as transformers' models call it, and their method that encodes it.
_ENCODED = {"pixel_values": "image", "pixel_values_videos": "video"}


def encode_media(model: nn.Module, media: Mapping[str, Tensor]) -> dict[str, Any] | None:
    """The features of a batch's media, to be handed to `media_inputs`; None where the model cannot be given features.

    They carry a gradient where the encoder or the projector is trained.
    """
    trunk = trunk_of(model)
    if "mm_encoder_outputs" not in inspect.signature(trunk.forward).parameters:
        return None
    features = {}
    for name, modality in _ENCODED.items():
        if name in media:
            encode = getattr(trunk, f"get_{modality}_features")
            read = {key: media[key] for key in inspect.signature(encode).parameters if key in media}
            features[modality] = encode(**read, return_dict=True)
    return features


def media_inputs(
    model: nn.Module, media: Mapping[str, Tensor], features: Mapping[str, Any] | None, *, copies: int
) -> dict[str, Any]:
    """Keyword arguments of the model's forward for `copies` blocks of rows, each of which reads the same media in the same order."""
    known = inspect.signature(trunk_of(model).forward).parameters
    repeated = {name: value if copies == 1 else torch.cat([value] * copies) for name, value in media.items()}
    if features is None:
        return dict(repeated)
    # Sizes and grids still tell where a token stands.
    rest = {name: value for name, value in repeated.items() if name in known and name not in _ENCODED}
    return rest | (
        {"mm_encoder_outputs": {name: _repeated(value, copies) for name, value in features.items()}} if features else {}
    )


def carries_gradient(features: Mapping[str, Any] | None) -> bool:
    """Whether the encoder that made them is trained, so that a reference needs its own."""
    return any(
        tensor.requires_grad for output in (features or {}).values() for tensor in _tensors(output.pooler_output)
    )


def _repeated(output: Any, copies: int) -> Any:
    made = copy.copy(output)
    made.pooler_output = _times(output.pooler_output, copies)
    if getattr(output, "deepstack_features", None) is not None:
        made.deepstack_features = [_times(layer, copies) for layer in output.deepstack_features]
    return made


def _times(value: Any, copies: int) -> Any:
    return torch.cat([value] * copies) if isinstance(value, Tensor) else cast(Any, type(value))([*value] * copies)


def _tensors(value: Any) -> list[Tensor]:
    return [value] if isinstance(value, Tensor) else list(value)
