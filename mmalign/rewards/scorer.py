"""What every scorer offers."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from jaxtyping import Float
from torch import Tensor

if TYPE_CHECKING:
    from PIL import Image


@runtime_checkable
class Scorer(Protocol):
    """Tells how well a picture suits its prompt; higher is better, and a picture's score is its own.

    name: how reports call it. fingerprint: changes whenever a score could change (weights, revision, preprocessing, dtype), for
    numbers of two fingerprints must not be compared. Whether a scorer was seen in training is not its own to say: the caller
    marks it by name.
    """

    @property
    def name(self) -> str: ...

    @property
    def fingerprint(self) -> str: ...

    def score(self, images: "Sequence[Image.Image]", prompts: Sequence[str]) -> Float[Tensor, " N"]: ...


@runtime_checkable
class PixelScorer(Protocol):
    """Scores pixels in [0, 1] with gradient to them, so that a network can be trained through it."""

    def score_pixels(self, pixels: Float[Tensor, "N 3 H W"], prompts: Sequence[str]) -> Float[Tensor, " N"]: ...
