"""Self-NPO and Diffusion-NPO: guidance away from a network that was trained towards what people do not want.

    ε = ε_neg(x, c⁻) + g · (ε_pos(x, c) − ε_neg(x, c⁻)),   θ_neg = θ + α·(θ_pos − θ) + β·(θ_npo − θ)

Diffusion-NPO (Wang et al., ICLR 2025, arXiv:2505.11245) trains θ_npo by preference optimisation on swapped pairs; Self-NPO
(arXiv:2505.11777) needs no pairs: the model learns from its own truncated predictions.
"""

import inspect
import os
from functools import wraps
from pathlib import Path
from typing import Any, Self

from mmalign.training.loading import plain_class
from mmalign.training.negative import (
    COMPONENTS,
    NEGATIVE,
    Negative,
    drawing,
    has_negative,
    load_negative,
    save_negative,
    unload_negative,
)
from mmalign.training.pipeline import AlignPipeline


class SelfNPOPipeline(AlignPipeline):
    """A pipeline of any family whose negative branch has a side of its own: `load_negative(…)`, then draw as ever.

    `guidance_scale` and everything else mean what they mean without it, and a step costs what it costs without it. At a guidance
    scale of 1 or less there is no negative branch, and it is never run.
    """

    negative = Negative()

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        plain = plain_class(cls)
        if plain is cls:
            return

        @wraps(plain.__call__)
        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            if not has_negative(self):
                return plain.__call__(self, *args, **kwargs)
            bound = inspect.signature(plain.__call__).bind(self, *args, **kwargs)
            bound.apply_defaults()
            with drawing(self, self.negative, bound):
                return plain.__call__(self, *args, **kwargs)

        cls.__call__ = call

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike[str], **options: Any) -> Self:
        """As `AlignPipeline.from_pretrained`; the negative side that `save_pretrained` left in the folder is loaded too."""
        pipe = super().from_pretrained(pretrained_model_name_or_path, **options)
        folder = Path(pretrained_model_name_or_path).expanduser() / NEGATIVE
        if folder.is_dir():
            pipe.load_negative(folder)
        return pipe

    def load_negative(
        self,
        path: str | os.PathLike[str],
        *,
        alpha: float = 1.0,
        beta: float = 1.0,
        base: Any = None,
        allow_pickle: bool = False,
    ) -> None:
        """Loads a negative side: a LoRA (diffusers, peft, kohya) or a whole network, from a folder, a file or the Hub.

        A LoRA shares the pipeline's network. A whole network becomes a second one, `negative_unet` or `negative_transformer`; load what
        aligned the positive side before it.

        alpha: how much of the positive side's own alignment the negative branch keeps; 0 is the base's.
        beta: how much of the negative offset it takes; 0 with alpha 1 is plain guidance.
        base: with a whole network on a pipeline whose whole network was aligned: what both were trained from.
        allow_pickle: also read state dicts in .bin, .ckpt, .pth and .pt, as tensors only.
        """
        self.negative = load_negative(self, path, alpha=alpha, beta=beta, base=base, allow_pickle=allow_pickle)

    def set_negative(self, *, alpha: float = 1.0, beta: float = 1.0) -> None:
        """Other weights for a negative LoRA; ValueError for a whole network, which is mixed when it is loaded."""
        if not has_negative(self) or self.negative.positive is not None:
            raise ValueError("alpha and beta are set of a negative LoRA: load one, or pass them to load_negative")
        self.negative = Negative(alpha, beta)

    def unload_negative(self) -> None:
        """Back to plain guidance."""
        unload_negative(self)
        self.negative = Negative()

    def _save_more(self, folder: Path) -> None:
        if has_negative(self):
            save_negative(self, self.negative, folder / NEGATIVE)

    @classmethod
    def _get_signature_keys(cls, obj: Any) -> tuple[list[str], list[str]]:
        """As in diffusers, with the second network, so that it is moved and offloaded with the others."""
        expected, optional = super()._get_signature_keys(obj)  # type: ignore[misc]
        held = [] if isinstance(obj, type) else [name for name in COMPONENTS if name in obj.config]
        return sorted({*expected, *held}), optional
