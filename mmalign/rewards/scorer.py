"""What every scorer offers."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from jaxtyping import Float
from torch import Tensor

if TYPE_CHECKING:
    from PIL import Image


@runtime_checkable
class Scorer(Protocol):
    """Tells how well a picture suits its prompt, higher is better.

    name: how reports call it. fingerprint: changes whenever a score could change (weights, preprocessing, dtype).
    """

    @property
    def name(self) -> str: ...

    @property
    def fingerprint(self) -> str: ...

    def score(self, images: "Sequence[Image.Image]", prompts: Sequence[str]) -> Float[Tensor, " N"]: ...
