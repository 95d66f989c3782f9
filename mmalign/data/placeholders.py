"""How many tokens a model makes of a prompt's pictures and clips, told from its config and the processor's tensors."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

Counts = dict[str, int]


def check_placeholders(ids: Tensor, media: Mapping[str, Tensor], config: Any) -> None:
    """ValueError unless the prompt's ids (P,) hold as many placeholders of each kind as the model will make features.

    A family that is not known here is not counted: its own forward refuses a wrong number, without naming the row.
    """
    expected = count_features(media, config)
    if expected is None:
        return
    for kind in ("image", "video"):
        token = getattr(config, f"{kind}_token_id", None)
        if token is None:
            continue
        found, wanted = int((ids == token).sum()), expected.get(kind, 0)
        if found != wanted:
            raise ValueError(
                f"{found} {kind} placeholders in the prompt, but the model makes {wanted} features of its media; "
                "processor and model disagree, the text itself holds a placeholder, or pictures and clips cannot stand together"
            )


def count_features(media: Mapping[str, Tensor], config: Any) -> Counts | None:
    """Kind ("image", "video") → features of all the media together; None of a family that is not known here."""
    match config.model_type:
        case "lfm2_vl":
            return _lfm2_vl(media, config.downsample_factor)
        case "qwen2_vl" | "qwen2_5_vl" | "qwen3_vl" | "qwen3_vl_moe":
            return _grids(media, config.vision_config.spatial_merge_size)
        case "smolvlm":
            return _tiles(media, _side(config.vision_config) ** 2 // config.scale_factor**2)
        case "internvl":
            return _tiles(media, int(_side(config.vision_config) * config.downsample_ratio) ** 2)
        case "llava_onevision" | "llava_next_video":
            return _llava(media, config)
    return None


def _side(vision: Any) -> int:
    """Patches along a side of what the vision tower sees at once."""
    size, patch = (
        value[0] if isinstance(value, (list, tuple)) else value for value in (vision.image_size, vision.patch_size)
    )
    return int(size // patch)


def _lfm2_vl(media: Mapping[str, Tensor], factor: int) -> Counts:
    if "pixel_values" not in media:
        return {}
    pixels, mask = media["pixel_values"].shape[:2], media["pixel_attention_mask"].shape
    if pixels != mask:
        raise ValueError(
            f"the image processor gave {pixels[1]} patches a tile and a mask for {mask[1]}: the picture went over "
            "max_image_tokens; set min_image_tokens below it"
        )
    return {
        "image": sum(
            math.ceil(rows / factor) * math.ceil(columns / factor) for rows, columns in media["spatial_shapes"].tolist()
        )
    }


def _grids(media: Mapping[str, Tensor], merge: int) -> Counts:
    grids = {kind: media[f"{kind}_grid_thw"] for kind in ("image", "video") if f"{kind}_grid_thw" in media}
    return {kind: int(grid.prod(dim=1).sum()) // merge**2 for kind, grid in grids.items()}


def _tiles(media: Mapping[str, Tensor], length: int) -> Counts:
    if "pixel_values" not in media:
        return {}
    return {"image": media["pixel_values"].shape[:-3].numel() * length}


def _llava(media: Mapping[str, Tensor], config: Any) -> Counts:
    side, onevision = _side(config.vision_config), config.model_type == "llava_onevision"
    counts = {}
    if "image_sizes" in media:
        sizes = media["image_sizes"].tolist()
        together = onevision and len(sizes) > 1
        # Several pictures are seen whole, each with a newline behind it; one alone, in tiles too.
        counts["image"] = sum(side**2 + (1 if together else _tiled(size, side, config)) for size in sizes)
    if "pixel_values_videos" in media:
        clips, frames = media["pixel_values_videos"].shape[:2]
        pooled = math.ceil(side / 2) if onevision else side // config.spatial_pool_stride
        counts["video"] = clips * (frames * pooled**2 + (1 if onevision else 0))
    return counts


def _tiled(size: list[int], side: int, config: Any) -> int:
    """Features of a picture's (height, width) tiles: without the padding, with a newline for each row."""
    from transformers.image_processing_utils import select_best_resolution

    height, width = (
        side * (length // config.vision_config.image_size)
        for length in select_best_resolution(size, config.image_grid_pinpoints)
    )
    if size[1] / size[0] > width / height:
        height -= 2 * ((height - int(round(size[0] * (width / size[1]), 7))) // 2)
    else:
        width -= 2 * ((width - int(round(size[1] * (height / size[0]), 7))) // 2)
    if config.model_type == "llava_onevision":
        largest = int(config.vision_aspect_ratio.removeprefix("anyres_max_"))
        ratio = math.sqrt(height * width / (largest * side**2))
        if ratio > 1.1:
            height, width = int(height // ratio), int(width // ratio)
    return height * (width + 1)
