"""Two judges who look at a picture and say what it shows and how clean it is.

Judge A (a plain convolutional network) saw one half of the photographs, judge B (patches and depthwise convolutions) the other.
Raters look through A; win rates are told by B, and nothing is ever trained on B. Colours are not learned: they are measured.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Bool, Float
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from mmalign.playground import photographs, world
from mmalign.playground.fit import FitConfig, fit
from mmalign.playground.paths import JUDGES
from mmalign.playground.photographs import GARMENTS, Half

FIT = FitConfig(steps=2500, batch_size=64, learning_rate=2e-3, warmup=100, weight_decay=1e-2, ema=0.99, seed=13)
STREAM = {"A": 301, "B": 302}
HUE_TOLERANCE = 0.04
ASKED_WEIGHT = 4.0
CLEAN_WEIGHT = 1.5


@dataclass(frozen=True)
class Reading:
    """What a judge sees. `garment` (B, 8) probabilities, `clean` (B,) in [0, 1], `measured` colours and sizes."""

    garment: Float[Tensor, "B 8"]
    clean: Float[Tensor, " B"]
    measured: world.Measured


@dataclass(frozen=True)
class Match:
    """Whether pictures show what their captions ask: three yes-or-no answers, and `asked` in [0, 1], their mean probability."""

    garment: Bool[Tensor, " B"]
    colour: Bool[Tensor, " B"]
    background: Bool[Tensor, " B"]
    asked: Float[Tensor, " B"]

    @property
    def all(self) -> Bool[Tensor, " B"]:
        """All three are right."""
        return self.garment & self.colour & self.background


class Judge(nn.Module):
    """Reads pictures. A `Scorer` for evaluation: `score` is 4 · (shows what was asked) + 1.5 · (is clean and sharp)."""

    def __init__(self, name: Half) -> None:
        super().__init__()
        self.learned_from = name
        self.body = _plain_network() if name == "A" else _patch_network()

    @property
    def name(self) -> str:
        """The scorer's name in reports."""
        return f"judge-{self.learned_from}"

    @property
    def fingerprint(self) -> str:
        """sha256 of the weights."""
        digest = hashlib.sha256()
        for key, value in sorted(self.state_dict().items()):
            digest.update(key.encode() + value.contiguous().numpy().tobytes())
        return digest.hexdigest()

    def forward(self, images: Float[Tensor, "B 3 32 32"]) -> tuple[Float[Tensor, "B 8"], Float[Tensor, " B"]]:
        """Garment logits and the logit of being clean, for pictures with values in [0, 1]."""
        output = self.body(images * 2 - 1)
        return output[:, : len(GARMENTS)], output[:, len(GARMENTS)]

    @torch.no_grad()
    def read(self, images: Float[Tensor, "B 3 32 32"]) -> Reading:
        """Reads pictures with values in [0, 1], in parts of 256."""
        logits, clean = zip(*(self(part) for part in images.split(256)), strict=True)
        return Reading(torch.cat(logits).softmax(1), torch.cat(clean).sigmoid(), world.measure(images))

    def score(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> Float[Tensor, " N"]:
        """One score a picture; ValueError where a prompt is not of the playground's grammar."""
        reading = self.read(to_tensor(images))
        return score(reading, match(reading, prompts))


def to_tensor(images: Sequence[Image.Image]) -> Float[Tensor, "N 3 32 32"]:
    """RGB pictures of 32×32 pixels as one tensor with values in [0, 1]."""
    wrong = [i for i, image in enumerate(images) if image.size != (world.SIZE, world.SIZE)]
    if wrong:
        raise ValueError(f"picture {wrong[0]} is {images[wrong[0]].size}; the playground's judges read 32×32 pixels")
    return (
        torch.stack([torch.from_numpy(np.array(image.convert("RGB"))) for image in images]).movedim(-1, 1).float() / 255
    )


def match(reading: Reading, captions: Sequence[str]) -> Match:
    """Compares a reading with what the captions ask for."""
    asked = torch.tensor([world.read_caption(text) for text in captions])
    garment, colour, background = asked.unbind(1)
    seen = reading.measured
    probability = (
        reading.garment.gather(1, garment[:, None])
        + _hue_probability(seen.colour_distance).gather(1, colour[:, None])
        + _hue_probability(seen.background_distance).gather(1, background[:, None])
    )
    return Match(
        garment=reading.garment.argmax(1) == garment,
        colour=seen.colour == colour,
        background=seen.background == background,
        asked=probability[:, 0] / 3,
    )


def score(reading: Reading, matched: Match) -> Float[Tensor, " B"]:
    """4 · asked + 1.5 · clean."""
    return ASKED_WEIGHT * matched.asked + CLEAN_WEIGHT * reading.clean


def load(name: Half) -> Judge:
    """The judge that ships with the package."""
    judge = Judge(name)
    judge.load_state_dict(load_file(JUDGES / f"judge-{name}.safetensors"))
    return judge.eval()


def train(name: Half, checkpoint: Path | None = None) -> tuple[Judge, list[dict[str, float]]]:
    """Trains a judge on its half of the photographs: to name the garment, and to tell how far a picture was damaged."""
    data = photographs.load("train").half(name)
    torch.manual_seed(FIT.seed)
    judge = Judge(name)

    def loss_of(step: int, generator: torch.Generator) -> Tensor:
        rows = torch.arange(step * FIT.batch_size, (step + 1) * FIT.batch_size)
        scenes = world.draw_scenes(data.labels, rows, seed=STREAM[name])
        images, damage = damaged(world.compose(data, rows, scenes), generator)
        logits, clean = judge(images)
        known = (damage < 0.5).float()
        naming = F.cross_entropy(logits, scenes.garment, reduction="none") * known
        return naming.mean() + F.binary_cross_entropy_with_logits(clean, 1 - damage)

    curve = fit(judge, loss_of, FIT, checkpoint=checkpoint, name=f"judge {name}")
    return judge, curve


def save(judge: Judge, folder: Path = JUDGES) -> None:
    """Writes the weights where `load` finds them."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file({k: v.contiguous() for k, v in judge.state_dict().items()}, folder / f"{judge.name}.safetensors")


def damaged(images: Float[Tensor, "B 3 H W"], generator: torch.Generator) -> tuple[Tensor, Float[Tensor, " B"]]:
    """Pictures of which half are damaged, and how far (0 clean … 1 ruined): blurred, noisy, ghosted, torn or warped."""
    batch = len(images)
    level = torch.rand(batch, generator=generator) * (torch.rand(batch, generator=generator) < 0.6)
    kind = torch.randint(0, 5, (batch,), generator=generator)
    strength = level[:, None, None, None]
    blurred = F.avg_pool2d(F.pad(images, (2, 2, 2, 2), mode="reflect"), 5, stride=1)
    noise = torch.randn(images.shape, generator=generator)
    blotches = F.interpolate(torch.randn(batch, 3, 6, 6, generator=generator), size=images.shape[-2:], mode="bilinear")
    ghost = images.roll(1, dims=0)
    torn = images.roll(shifts=3, dims=-1)
    stripes = (
        (torch.rand(batch, 1, images.shape[-2] // 4, 1, generator=generator) < 0.5).float().repeat_interleave(4, dim=2)
    )
    warped = _warp(images, level, generator)
    choices = torch.stack(
        [
            images + strength * (blurred - images),
            images + strength * 0.25 * (0.5 * noise + blotches),
            images + 0.5 * strength * (ghost - images),
            images + strength * stripes * (torn - images),
            warped,
        ]
    )
    return choices[kind, torch.arange(batch)].clamp(0, 1), level


def _warp(images: Tensor, level: Tensor, generator: torch.Generator) -> Tensor:
    identity = torch.eye(2, 3).expand(len(images), 2, 3)
    grid = F.affine_grid(identity, list(images.shape), align_corners=False)
    coarse = torch.randn(len(images), 2, 5, 5, generator=generator)
    field = F.interpolate(coarse, size=images.shape[-2:], mode="bicubic").movedim(1, -1)
    return F.grid_sample(
        images, grid + 0.18 * level[:, None, None, None] * field, padding_mode="border", align_corners=False
    )


def _hue_probability(distance: Float[Tensor, "B 8"]) -> Float[Tensor, "B 8"]:
    return (-(distance / HUE_TOLERANCE).square()).softmax(1)


def _plain_network() -> nn.Module:
    def block(before: int, after: int) -> list[nn.Module]:
        return [
            nn.Conv2d(before, after, 3, padding=1),
            nn.GroupNorm(8, after),
            nn.SiLU(),
            nn.Conv2d(after, after, 3, stride=2, padding=1),
            nn.SiLU(),
        ]

    layers = [*block(3, 32), *block(32, 64), *block(64, 96), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(96, len(GARMENTS) + 1))


class _DepthwiseBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.spatial = nn.Conv2d(width, width, 5, padding=2, groups=width)
        self.norm = nn.GroupNorm(1, width)
        self.mix = nn.Sequential(nn.Conv2d(width, 3 * width, 1), nn.GELU(), nn.Conv2d(3 * width, width, 1))

    def forward(self, features: Tensor) -> Tensor:
        return features + self.mix(self.norm(self.spatial(features)))


def _patch_network(width: int = 96, depth: int = 4) -> nn.Module:
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.LayerNorm(width), nn.Linear(width, len(GARMENTS) + 1)]
    return nn.Sequential(
        nn.Conv2d(3, width, 6, stride=4, padding=1), *(_DepthwiseBlock(width) for _ in range(depth)), *head
    )
