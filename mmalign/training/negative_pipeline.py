"""A pipeline that guides away from a negative side of its own: what every method shares that trains one."""

import copy
import inspect
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Any, Self

from mmalign.files import write_file
from mmalign.training.card import is_hub_id
from mmalign.training.loading import plain_class
from mmalign.training.negative import (
    COMPONENTS,
    NEGATIVE,
    Negative,
    become_negative,
    drawing,
    has_negative,
    load_negative,
    save_negative,
    unload_negative,
)
from mmalign.training.pipeline import AlignPipeline
from mmalign.training.weights import aligned_network

# Beside a saved pipeline.
_CARD = """---
library_name: diffusers
tags:
- mmalign
- self-npo
---
# A pipeline with a negative side

Plain diffusers loads this folder, and draws with plain guidance. What runs in the negative branch lies in `negative/`, as it acts
beside the merged weights, and mmalign draws with both:

```python
from mmalign import SelfNPOPipeline

pipe = SelfNPOPipeline.from_pretrained(FOLDER)
```
"""


class NegativePipeline(AlignPipeline):
    """A pipeline of any family whose negative branch has a side of its own: `align` trains one, `load_negative` loads one.

    With peft_config None `align` makes it a second network. What the pipeline draws with stays as it was.
    `guidance_scale` and everything else mean what they mean without it, and a step costs what it costs without it. At a guidance
    scale of 1 or less there is no negative branch, and it is never run.
    """

    negative = Negative()

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        plain = plain_class(cls)
        if plain is cls:
            return

        # Of the plain class's signature, by which a pipeline's kind is told.
        @wraps(plain.__call__)
        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            if not has_negative(self):
                return plain.__call__(self, *args, **kwargs)
            bound = inspect.signature(plain.__call__).bind(self, *args, **kwargs)
            bound.apply_defaults()
            with drawing(self, self.negative, bound):
                return plain.__call__(self, *args, **kwargs)

        cls.__call__ = call  # type: ignore[method-assign]

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike[str], **options: Any) -> Self:
        """As `AlignPipeline.from_pretrained`; the negative side that `save_pretrained` left there is loaded too."""
        pipe = super().from_pretrained(pretrained_model_name_or_path, **options)
        folder = Path(pretrained_model_name_or_path).expanduser()
        if is_hub_id(str(pretrained_model_name_or_path)):
            from huggingface_hub import snapshot_download

            wanted = [f"{NEGATIVE}/*", f"{NEGATIVE}/*/*"]
            folder = Path(snapshot_download(str(folder), revision=options.get("revision"), allow_patterns=wanted))
        if (folder / NEGATIVE).is_dir():
            pipe.load_negative(folder / NEGATIVE)
        return pipe

    @contextmanager
    def _being_trained(self, peft_config: Any) -> Iterator[None]:
        """What was trained becomes the negative side; what the pipeline draws with stays as it was."""
        if has_negative(self):
            raise ValueError("the pipeline has a negative side already: unload_negative() first")
        base = copy.deepcopy(aligned_network(self)[1]) if peft_config is None else None
        yield
        self.negative = become_negative(self, base)

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
        self.negative = load_negative(self, path, Negative(alpha, beta), base=base, allow_pickle=allow_pickle)

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
            write_file(folder / "README.md", _CARD)

    @classmethod
    def _get_signature_keys(cls, obj: Any) -> tuple[list[str], list[str]]:
        """As in diffusers, with the second network, so that it is moved and offloaded with the others."""
        expected, optional = super()._get_signature_keys(obj)  # type: ignore[misc]
        held = [] if isinstance(obj, type) else [name for name in COMPONENTS if name in obj.config]
        return sorted({*expected, *held}), optional
