"""How much of what a caption states a picture of a scene shows: a judge reads each cell as a picture of the first world."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from PIL import Image
from torch import Tensor

from mmalign.playground import judges, scenes, world
from mmalign.playground.photographs import Half


@dataclass(frozen=True)
class Shown:
    """What pictures show of what their captions state, a row a sentence.

    `picture`: whose sentence it is; `position`: where it stands in its caption, from 0; `stated` (K, 3): whether the cell that it
    names shows its garment, its colour, its background.
    """

    picture: Int[Tensor, " K"]
    position: Int[Tensor, " K"]
    stated: Bool[Tensor, "K 3"]

    def share(self) -> float:
        """The share of all stated attributes that are shown."""
        return float(self.stated.float().mean())

    def by_picture(self) -> Float[Tensor, " N"]:
        """The share of each picture's stated attributes."""
        return _means(self.stated, self.picture)

    def by_position(self) -> Float[Tensor, " P"]:
        """The share among captions' first sentences, among their second ones, and so on."""
        return _means(self.stated, self.position)


@dataclass(frozen=True)
class SceneJudge:
    """A `Scorer` for evaluation: the share of what the prompt states that the picture shows, by one of the playground's judges."""

    judge: judges.Judge

    @property
    def name(self) -> str:
        """The scorer's name in reports."""
        return f"scene-{self.judge.name}"

    @property
    def fingerprint(self) -> str:
        """sha256 of the judge's weights."""
        return self.judge.fingerprint

    def score(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> Float[Tensor, " N"]:
        """One share a picture; ValueError where a prompt is not told in sentences of the scene world."""
        return self.read(images, prompts).by_picture()

    def read(self, images: Sequence[Image.Image], captions: Sequence[str]) -> Shown:
        """Looks at every cell that a picture's caption names."""
        asked = [(picture, scenes.read_caption(text)) for picture, text in enumerate(captions)]
        named = [(picture, position, one) for picture, said in asked for position, one in enumerate(said)]
        picture, position = (torch.tensor([row[i] for row in named]) for i in (0, 1))
        place = torch.tensor([one.place for _, _, one in named])
        cells = scenes.split(to_tensor(images))[picture * len(scenes.PLACES) + place]
        single = [world.caption(one.garment, one.colour, one.background) for _, _, one in named]
        matched = judges.match(self.judge.read(cells), single)
        return Shown(picture, position, torch.stack([matched.garment, matched.colour, matched.background], 1))


def load(name: Half) -> SceneJudge:
    """Judge A or B, looking at scenes."""
    return SceneJudge(judges.load(name))


def to_tensor(images: Sequence[Image.Image]) -> Float[Tensor, "N 3 64 64"]:
    """RGB pictures of scenes as one tensor with values in [0, 1]."""
    wrong = [i for i, image in enumerate(images) if image.size != (scenes.SIZE, scenes.SIZE)]
    if wrong:
        raise ValueError(f"picture {wrong[0]} is {images[wrong[0]].size}; scenes have 64×64 pixels")
    return (
        torch.stack([torch.from_numpy(np.array(image.convert("RGB"))) for image in images]).movedim(-1, 1).float() / 255
    )


def _means(stated: Bool[Tensor, "K 3"], group: Int[Tensor, " K"]) -> Float[Tensor, " G"]:
    count = group.bincount()
    return torch.zeros(len(count)).index_add(0, group, stated.float().mean(1)) / count
