"""Where a network looks while it draws a scene, and what that is worth in training its base: nothing of this is in the trained base."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from mmalign.playground import scene_text, scenes


@contextmanager
def watched(unet: UNet2DConditionModel) -> Iterator[tuple[list[Tensor], list[Tensor], list[Tensor]]]:
    """Three lists that a forward pass fills: features (B, C, H, W) of the first upward block, and of each layer of that block and the
    middle one that looks at text: what looks (B, H·W, C), and where to, a mean over heads (B, H·W, 77)."""
    features: list[Tensor] = []
    askers: list[Tensor] = []
    gazes: list[Tensor] = []

    def record(attention: Any, args: tuple[Tensor], options: dict[str, Any], output: Tensor) -> None:
        hidden, text = args[0] if args else options["hidden_states"], options["encoder_hidden_states"]
        query = attention.to_q(hidden).unflatten(2, (attention.heads, -1)).transpose(1, 2)
        key = attention.to_k(text).unflatten(2, (attention.heads, -1)).transpose(1, 2)
        askers.append(hidden)
        gazes.append((query @ key.mT * attention.scale).softmax(-1).mean(1))

    blocks = (unet.mid_block, unet.up_blocks[0])
    looking = [module for block in blocks for name, module in block.named_modules() if name.endswith("attn2")]
    hooks = [module.register_forward_hook(record, with_kwargs=True) for module in looking]
    hooks.append(unet.up_blocks[0].register_forward_hook(lambda *called: features.append(called[-1])))
    try:
        yield features, askers, gazes
    finally:
        for hook in hooks:
            hook.remove()


def looking_away(gazes: list[Tensor], captions: list[str], tokens: Tensor) -> Tensor:
    """−log of the attention that places of told cells pay to the sentence about them; the mean over places and layers."""
    number = scene_text.sentence_numbers(tokens)
    place = torch.full_like(number, -1)
    for row, text in enumerate(captions):
        for position, one in enumerate(scenes.read_caption(text) if text else ()):
            place[row, number[row] == position] = one.place
    losses = []
    for gaze in gazes:
        own = place[:, None, :] == where(gaze.shape[1])[None, :, None]
        paid = (gaze * own).sum(2)
        losses.append(-paid[own.any(2)].clamp(min=1e-6).log().mean())
    return torch.stack(losses).mean()


def where(number: int) -> Tensor:
    """(number,): for each of that many positions of a square picture, row by row, the cell in which it lies."""
    half = int(number**0.5) // 2
    return scenes.join(torch.arange(len(scenes.PLACES))[:, None, None, None].expand(-1, 1, half, half)).flatten()


def told_map(captions: list[str], side: int) -> Tensor:
    """(B, 3, side, side): what each place of a picture shows by its caption (garment, colour, background); −1 in untold cells."""
    told = torch.full((len(captions), len(scenes.PLACES), 3), -1)
    for row, text in enumerate(captions):
        for one in scenes.read_caption(text) if text else ():
            told[row, one.place] = torch.tensor([one.garment, one.colour, one.background])
    return scenes.join(told.flatten(0, 1)[..., None, None].expand(-1, -1, side // 2, side // 2))
