"""What a picture costs LFM2-VL in tokens, before it is read, and how to make it cost less.

    ImageBudget(min_tokens=32, max_tokens=64, split=False).apply_to(processor)
    predicted_tokens(1000, 3000)  # 1011 under the default budget

A picture is read whole, at a size within the budget, or, if it is far too large for that, cut into tiles that cost 256 tokens
each whatever the budget, and read whole beside them.
"""

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Tiling:
    """The processor's other numbers. A token is a square of `patch · factor` pixels a side, a tile of `tile_size`."""

    patch: int = 16
    factor: int = 2
    tile_size: int = 512
    min_tiles: int = 2
    max_tiles: int = 10
    tolerance: float = 2.0
    thumbnail: bool = True

    @property
    def unit(self) -> int:
        """Pixels of a token's side."""
        return self.patch * self.factor

    @property
    def tile_tokens(self) -> int:
        """Tokens of a tile."""
        return math.ceil(self.tile_size // self.patch / self.factor) ** 2


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageBudget:
    """Between how many tokens a whole picture costs, and whether one that is far too large is cut into tiles as well."""

    min_tokens: int = 64
    max_tokens: int = 256
    split: bool = True

    def __post_init__(self) -> None:
        for name, kind in (("min_tokens", int), ("max_tokens", int), ("split", bool)):
            value = getattr(self, name)
            if type(value) is not kind:
                raise ValueError(
                    f"{name} must be {'a whole number' if kind is int else 'true or false'}, got {value!r}"
                )
        if not 1 <= self.min_tokens <= self.max_tokens:
            raise ValueError(f"min_tokens must lie between 1 and max_tokens={self.max_tokens}, got {self.min_tokens}")

    @property
    def trap(self) -> str:
        """Why this budget costs more than a larger one; empty where it does not.

        A picture is too large at twice max_tokens, so the fewer they are the sooner it is cut, and a tile costs 256.
        """
        if not self.split or self.max_tokens >= 128:
            return ""
        dear, usual = predicted_tokens(512, 512, self), predicted_tokens(512, 512)
        return (
            f"max_tokens={self.max_tokens} with split=True makes pictures dearer: one of 512×512 costs {dear} tokens, under the "
            f"default budget {usual}; set split=False"
        )

    def apply_to(self, processor: Any) -> None:
        """Makes the processor keep the budget from now on, and in what it saves; logs the trap where there is one."""
        if self.trap:
            _log.warning("%s", self.trap)
        images = processor.image_processor
        images.min_image_tokens, images.max_image_tokens = self.min_tokens, self.max_tokens
        images.do_image_splitting = self.split
        images.max_num_patches = _room(self, tiling_of(processor))


# As the documentation names them. It leaves splitting on, where the last two cost more than the first.
PRESETS = {
    "quality": ImageBudget(min_tokens=128, max_tokens=256),
    "balanced": ImageBudget(min_tokens=64, max_tokens=128, split=False),
    "fast": ImageBudget(min_tokens=32, max_tokens=64, split=False),
}


def read_budget(told: ImageBudget | str | Mapping[str, Any]) -> ImageBudget:
    """A budget from its name in PRESETS, or from its fields; ValueError for others."""
    if isinstance(told, ImageBudget):
        return told
    names = [field.name for field in fields(ImageBudget)]
    if isinstance(told, Mapping) and set(told) <= set(names):
        return ImageBudget(**told)
    if not isinstance(told, str) or told not in PRESETS:
        raise ValueError(f"image_budget must be one of {', '.join(PRESETS)}, or have {', '.join(names)}; got {told!r}")
    return PRESETS[told]


def budget_of(processor: Any, keywords: Mapping[str, Any] | None = None) -> ImageBudget:
    """The budget that a processor keeps, or that it has in a call with these keywords."""
    keywords = keywords or {}
    told = {**keywords, **(keywords.get("images_kwargs") or {})}
    names = {"min_tokens": "min_image_tokens", "max_tokens": "max_image_tokens", "split": "do_image_splitting"}
    return ImageBudget(
        **{field: told.get(name, getattr(processor.image_processor, name)) for field, name in names.items()}
    )


def tiling_of(processor: Any) -> Tiling:
    """The other numbers of a processor."""
    images = processor.image_processor
    return Tiling(
        patch=images.encoder_patch_size,
        factor=images.downsample_factor,
        tile_size=images.tile_size,
        min_tiles=images.min_tiles,
        max_tiles=images.max_tiles,
        tolerance=images.max_pixels_tolerance,
        thumbnail=images.use_thumbnail,
    )


def predicted_tokens(height: int, width: int, budget: ImageBudget | None = None, tiling: Tiling | None = None) -> int:
    """Image tokens that a picture of so many pixels becomes, without the marks around and between tiles.

    ValueError for a picture that the processor would read wrongly: its whole costs more than there is room for, which happens to
    strips, and where min_tokens is near max_tokens.
    """
    if height < 1 or width < 1:
        raise ValueError(f"a picture has at least 1×1 pixels, got {height}×{width}")
    budget, tiling = budget or ImageBudget(), tiling or Tiling()
    whole_height, whole_width = _whole_size(height, width, budget, tiling)
    whole = (whole_height // tiling.unit) * (whole_width // tiling.unit)
    is_cut = _is_cut(height, width, budget, tiling)
    tiles = math.prod(_grid(height, width, tiling)) if is_cut else 1
    if is_cut and tiles == 1 and whole != tiling.tile_tokens:
        raise ValueError(
            f"a picture of {height}×{width} pixels would be read as one tile of {tiling.tile_tokens} tokens and announced as {whole}: "
            "set the processor's min_tiles to 2"
        )
    room = _room(budget, tiling) // tiling.factor**2
    if (not is_cut or (tiles > 1 and tiling.thumbnail)) and whole > room:
        raise ValueError(
            f"a picture of {height}×{width} pixels would be read at {whole_height}×{whole_width}, {whole} tokens, and the processor "
            f"has room for {room}: cut it to a squarer shape, or lower min_tokens={budget.min_tokens}"
        )
    if tiles == 1:
        return whole
    return tiles * tiling.tile_tokens + (whole if tiling.thumbnail else 0)


def _room(budget: ImageBudget, tiling: Tiling) -> int:
    """Patches that the processor pads every picture and tile to."""
    tile = (tiling.tile_size // tiling.patch) ** 2 if budget.split else 0
    return max(budget.max_tokens * tiling.factor**2, tile)


def _whole_size(height: int, width: int, budget: ImageBudget, tiling: Tiling) -> tuple[int, int]:
    """Pixels at which the whole is read: multiples of a token's side, in about the picture's shape, within the budget."""
    unit = tiling.unit
    rows, columns = (max(1, round(side / unit)) for side in (height, width))
    if rows * columns > budget.max_tokens:
        shrink = math.sqrt(height * width / (budget.max_tokens * unit**2))
        rows, columns = (max(1, math.floor(side / shrink / unit)) for side in (height, width))
    elif rows * columns < budget.min_tokens:
        grow = math.sqrt(budget.min_tokens * unit**2 / (height * width))
        rows, columns = (math.ceil(side * grow / unit) for side in (height, width))
    return rows * unit, columns * unit


def _is_cut(height: int, width: int, budget: ImageBudget, tiling: Tiling) -> bool:
    if not budget.split or tiling.min_tiles == tiling.max_tiles == 1:
        return False
    # A side below half a token counts as one patch here, and as a token above.
    area = math.prod(max(tiling.patch, round(side / tiling.unit) * tiling.unit) for side in (height, width))
    return area > budget.max_tokens * tiling.unit**2 * tiling.tolerance


def _grid(height: int, width: int, tiling: Tiling) -> tuple[int, int]:
    """(columns, rows) of the grid whose shape is nearest; of equally near ones the largest that the picture fills half of."""
    sides = range(1, tiling.max_tiles + 1)
    grids = {(c, r) for c in sides for r in sides if tiling.min_tiles <= c * r <= tiling.max_tiles}
    best, nearest = (1, 1), math.inf
    for columns, rows in sorted(grids, key=math.prod):
        distance = abs(width / height - columns / rows)
        half_filled = height * width > 0.5 * columns * rows * tiling.tile_size**2
        if distance < nearest or (distance == nearest and half_filled):
            best, nearest = (columns, rows), distance
    return best
