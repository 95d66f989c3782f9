"""The playground's world: one garment, in one colour, on a background of another colour, in 32×32 pixels.

Everything a caption says is known when a picture is composed, and can be measured again from the pixels (`measure`).
Rows are keyed: row i of a stream is the same whichever rows are asked for with it.
"""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from mmalign.playground.photographs import GARMENTS, Photographs

SIZE = 32
COLOURS = ("red", "orange", "yellow", "green", "cyan", "blue", "purple", "pink")
HUES = torch.tensor([0.0, 28.0, 56.0, 125.0, 180.0, 225.0, 272.0, 322.0]) / 360.0
_TEMPLATES = (
    "a {colour} {garment} on a {background} background",
    "{article} {colour} {garment} on {background}",
    "a photo of {article} {colour} {garment} on a {background} background",
    "{colour} {garment}, {background} background",
    "a {background} background with {article} {colour} {garment} on it",
)
NUM_TEMPLATES = len(_TEMPLATES)
_BLOCK = 1000


@dataclass(frozen=True)
class Scenes:
    """What a batch of pictures shows. All (B,): indices into GARMENTS and COLOURS, sizes and positions in pixels."""

    garment: Int[Tensor, " B"]
    colour: Int[Tensor, " B"]
    background: Int[Tensor, " B"]
    template: Int[Tensor, " B"]
    hue_jitter: Float[Tensor, "B 2"]
    saturation: Float[Tensor, "B 2"]
    value: Float[Tensor, "B 2"]
    scale: Float[Tensor, " B"]
    shift: Float[Tensor, "B 2"]

    def __len__(self) -> int:
        return len(self.garment)

    def captions(self) -> list[str]:
        """One caption a picture, in the world's grammar."""
        return [
            caption(int(g), int(c), int(b), int(t))
            for g, c, b, t in zip(self.garment, self.colour, self.background, self.template, strict=True)
        ]


def caption(garment: int, colour: int, background: int, template: int = 0) -> str:
    """The caption of a garment in a colour on a background; `template` picks one of five wordings."""
    name = GARMENTS[garment]
    article = "a pair of" if name == "trousers" else "an" if COLOURS[colour] == "orange" else "a"
    text = _TEMPLATES[template].replace("a {colour}", "{article} {colour}")
    background_name = COLOURS[background]
    text = text.format(article=article, colour=COLOURS[colour], garment=name, background=background_name)
    return text.replace("a orange", "an orange")


def read_caption(text: str) -> tuple[int, int, int]:
    """(garment, colour, background) of a caption of this world; ValueError for any other text."""
    words = text.replace(",", " ").split()
    garments = [w for w in words if w in GARMENTS]
    colours = [(i, w) for i, w in enumerate(words) if w in COLOURS]
    if len(garments) != 1 or len(colours) != 2:
        raise ValueError(
            f"not a caption of the playground: {text!r} (say one garment and two colours: {caption(0, 0, 5)!r})"
        )
    place = words.index(garments[0])
    own = max((c for c in colours if c[0] < place), default=None)
    if own is None:
        raise ValueError(f"no colour stands before the garment in {text!r}")
    other = next(c for c in colours if c is not own)
    return GARMENTS.index(garments[0]), COLOURS.index(own[1]), COLOURS.index(other[1])


def draw_scenes(labels: np.ndarray, rows: Int[Tensor, " B"], *, seed: int) -> Scenes:
    """The scenes of `rows` of the endless stream `seed`; row i shows photograph i modulo their number."""
    garment = torch.as_tensor(labels[np.asarray(rows) % len(labels)], dtype=torch.long)
    draws = torch.stack([_uniforms(seed, int(row) // _BLOCK)[int(row) % _BLOCK] for row in rows])
    colour = (draws[:, 0] * len(COLOURS)).long()
    background = (colour + 1 + (draws[:, 1] * (len(COLOURS) - 1)).long()) % len(COLOURS)
    return Scenes(
        garment=garment,
        colour=colour,
        background=background,
        template=(draws[:, 2] * NUM_TEMPLATES).long(),
        hue_jitter=(draws[:, 3:5] - 0.5) * (10 / 360),
        saturation=0.55 + 0.45 * draws[:, 5:7],
        value=0.65 + 0.35 * draws[:, 7:9],
        scale=21.0 + 9.0 * draws[:, 9],
        shift=(draws[:, 10:12] - 0.5) * 4.0,
    )


_uniform_blocks: dict[tuple[int, int], Tensor] = {}


def _uniforms(seed: int, block: int) -> Tensor:
    if (seed, block) not in _uniform_blocks:
        if len(_uniform_blocks) > 512:
            _uniform_blocks.clear()
        generator = np.random.default_rng([seed, block])
        _uniform_blocks[seed, block] = torch.from_numpy(generator.random((_BLOCK, 12), dtype=np.float32))
    return _uniform_blocks[seed, block]


def compose(photographs: Photographs, rows: Int[Tensor, " B"], scenes: Scenes) -> Float[Tensor, "B 3 32 32"]:
    """Tints the photographs and places them on their backgrounds; values in [0, 1]."""
    grey = torch.from_numpy(photographs.images[np.asarray(rows) % len(photographs)]).float()[:, None] / 255
    zoom = SIZE / scenes.scale
    theta = torch.zeros(len(scenes), 2, 3)
    theta[:, 0, 0] = theta[:, 1, 1] = zoom
    theta[:, :, 2] = scenes.shift * zoom[:, None] * 2 / SIZE
    grid = torch.nn.functional.affine_grid(theta, [len(scenes), 1, SIZE, SIZE], align_corners=False)
    grey = torch.nn.functional.grid_sample(grey, grid, align_corners=False)
    hue = HUES[torch.stack([scenes.colour, scenes.background], 1)] + scenes.hue_jitter
    tint = hsv_to_rgb(hue, scenes.saturation, scenes.value)[..., None, None]
    opacity = (grey * 6).clamp(max=1)
    return opacity * tint[:, 0] * (0.3 + 0.7 * grey) + (1 - opacity) * tint[:, 1]


def hsv_to_rgb(hue: Tensor, saturation: Tensor, value: Tensor) -> Tensor:
    """Hue (turns), saturation and value in [0, 1], any shape (…) → RGB (…, 3)."""
    k = (torch.tensor([5.0, 3.0, 1.0]) + hue[..., None] * 6) % 6
    ramp = torch.minimum(k, 4 - k).clamp(0, 1)
    return value[..., None] * (1 - saturation[..., None] * ramp)


def rgb_to_hsv(rgb: Float[Tensor, "*S 3"]) -> tuple[Tensor, Tensor, Tensor]:
    """The inverse of `hsv_to_rgb`; hue is 0 for greys."""
    value, low = rgb.max(-1).values, rgb.min(-1).values
    chroma = (value - low).clamp(min=1e-6)
    red, green, blue = rgb.unbind(-1)
    sextant = torch.where(
        value == red,
        ((green - blue) / chroma) % 6,
        torch.where(value == green, (blue - red) / chroma + 2, (red - green) / chroma + 4),
    )
    grey = value - low < 1e-6
    return torch.where(grey, 0.0, sextant / 6), torch.where(grey, 0.0, (value - low) / value.clamp(min=1e-6)), value


@dataclass(frozen=True)
class Measured:
    """What the pixels show. `colour_distance` and `background_distance` (B, 8): hue distance (turns) to each named colour."""

    colour_distance: Float[Tensor, "B 8"]
    background_distance: Float[Tensor, "B 8"]
    saturation: Float[Tensor, " B"]
    brightness: Float[Tensor, " B"]
    garment_share: Float[Tensor, " B"]

    @property
    def colour(self) -> Int[Tensor, " B"]:
        """The nearest named colour of the garment."""
        return self.colour_distance.argmin(1)

    @property
    def background(self) -> Int[Tensor, " B"]:
        """The nearest named colour of the background."""
        return self.background_distance.argmin(1)


def measure(images: Float[Tensor, "B 3 H W"]) -> Measured:
    """Colours, saturation, brightness and garment size of pictures with values in [0, 1].

    The background is the median of a two-pixel frame; what lies far from it is garment. Shading scales a tint without turning
    its hue, so the hue of the garment's mean colour is the hue it was tinted with.
    """
    frame = torch.cat(
        [
            images[:, :, :2].flatten(2),
            images[:, :, -2:].flatten(2),
            images[:, :, :, :2].flatten(2),
            images[:, :, :, -2:].flatten(2),
        ],
        dim=2,
    )
    background = frame.median(2).values
    distance = (images - background[:, :, None, None]).norm(dim=1)
    weight = (distance - 0.2).clamp(min=0)
    garment = (images * weight[:, None]).sum((2, 3)) / weight.sum((1, 2)).clamp(min=1e-6)[:, None]
    _, saturation, _ = rgb_to_hsv(images.movedim(1, -1))
    return Measured(
        colour_distance=_hue_distance(garment),
        background_distance=_hue_distance(background),
        saturation=saturation.mean((1, 2)),
        brightness=images.mean((1, 2, 3)),
        garment_share=(distance > 0.2).float().mean((1, 2)),
    )


def _hue_distance(rgb: Float[Tensor, "B 3"]) -> Float[Tensor, "B 8"]:
    hue, saturation, _ = rgb_to_hsv(rgb)
    turn = (hue[:, None] - HUES[None]).abs()
    distance = torch.minimum(turn, 1 - turn)
    return torch.where(saturation[:, None] < 0.12, torch.full_like(distance, 0.5), distance)
