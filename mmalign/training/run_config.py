"""The options that every run of a denoiser has, whatever it minimises: those of every alignment, and what prompts and pictures need."""

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from mmalign.denoisers.long_prompts import LongPrompts
from mmalign.training.align_config import AlignConfig
from mmalign.training.config_checks import check_run


@dataclass
class RunConfig(AlignConfig):
    """Options shared by all methods of denoisers, beside those of `AlignConfig`.

    prompt_dropout     share of rows whose prompt becomes empty
    num_frames         frames of a clip, sampled evenly from it; None is the model's own; for video models only
    resolution         pixels of the short side and of the centre crop; None is the model's own
    long_prompts       "segments": texts beyond CLIP's 77 positions are read sentence by sentence; "concatenate": naively, with every
                       segment's padding; None leaves it to the pipeline, which cuts them unless told otherwise
    long_prompts_tokens   embeddings that a prompt may then have
    long_prompts_pack  short sentences share a segment
    long_prompts_compat   "longalign": the released splitter, for the released weights
    validation_*       pictures drawn from fixed prompts and seeds every `validation_steps` optimiser steps (0: never)
    """

    method: ClassVar[str] = "denoiser"
    not_the_run: ClassVar[frozenset[str]] = AlignConfig.not_the_run | frozenset(
        """
        aspect_buckets scorer users validation_user validation_prompts validation_steps validation_seed validation_inference_steps
        validation_guidance_scale
        """.split()
    )

    prompt_dropout: float = 0.2
    long_prompts: Literal["segments", "concatenate"] | None = None
    long_prompts_tokens: int = 240
    long_prompts_pack: bool = False
    long_prompts_compat: Literal["longalign"] | None = None
    num_frames: int | None = None
    resolution: int | None = None

    validation_prompts: list[str] = field(default_factory=list)
    validation_steps: int = 0
    validation_seed: int = 0
    validation_inference_steps: int = 20
    validation_guidance_scale: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_run(self)
        self.long_prompt_reading()

    def long_prompt_reading(self) -> LongPrompts | None:
        """How long prompts are read; None leaves it to the pipeline."""
        if self.long_prompts is None:
            for name in ("long_prompts_tokens", "long_prompts_pack", "long_prompts_compat"):
                if getattr(self, name) != self.default(name):
                    raise ValueError(f"{name} has no effect without long_prompts")
            return None
        return LongPrompts(
            layout=self.long_prompts,
            max_tokens=self.long_prompts_tokens,
            pack=self.long_prompts_pack,
            compat=self.long_prompts_compat,
        )

    def reading(self) -> list[str]:
        """How long prompts are read, where they are."""
        if self.long_prompts is None:
            return []
        return [
            f"prompts are read in {self.long_prompts} up to {self.long_prompts_tokens} tokens: draw with pipe.read_long_prompts(…)"
        ]

    def sampling(self) -> dict[str, Any]:
        """What the pipeline's call is told for sample pictures, besides what every method has."""
        return {}

    @property
    def trained_on(self) -> str | None:
        """The scorer that a run learns from, which then cannot be its judge; None where there is none that scores other pictures."""
        return None

    @property
    def trains_negative(self) -> bool:
        """Whether what is trained is a negative side, to be guided away from, and no aligned model."""
        return False
