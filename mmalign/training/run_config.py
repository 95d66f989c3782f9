"""The options that every run of a denoiser has, whatever it minimises: `transformers.TrainingArguments`, and ours around a network."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Self

from transformers import TrainingArguments

from mmalign.denoisers.long_prompts import LongPrompts
from mmalign.training.config_checks import check_choices, check_run
from mmalign.training.inherited import RUN_OPTIONS, refuse_unsupported
from mmalign.training.optimizers import check_optimizer

# Options of ours that change neither losses nor weights, or are told by the fingerprint of the data, so that they need not be compared
# between a checkpoint and the run that continues it.
_NOT_THE_RUN = frozenset(
    """
    train_split eval_split aspect_buckets cache_dir reference_cache scorer users validation_user validation_prompts validation_steps
    validation_seed
    validation_inference_steps validation_guidance_scale
    """.split()
)


@dataclass
class RunConfig(TrainingArguments):
    """Options shared by all methods; each has a config class of its own, which sets their defaults.

    prompt_dropout     share of rows whose prompt becomes empty
    train_split, eval_split   which split of a hub data set or of "playground"; "train" unless given
    num_frames         frames of a clip, sampled evenly from it; None is the model's own; for video models only
    resolution         pixels of the short side and of the centre crop; None is the model's own
    long_prompts       "segments": texts beyond CLIP's 77 positions are read sentence by sentence; "concatenate": naively, with every
                       segment's padding; None leaves it to the pipeline, which cuts them unless told otherwise
    long_prompts_tokens   embeddings that a prompt may then have
    long_prompts_pack  short sentences share a segment
    long_prompts_compat   "longalign": the released splitter, for the released weights
    ema_decay          keep a moving average of the trained weights (LoRA factors each for itself, which is not the average of their
                       products); it, not the last step's weights, is evaluated, drawn, saved at the end and left in the pipeline
    validation_*       pictures drawn from fixed prompts and seeds every `validation_steps` optimiser steps (0: never)
    """

    method: ClassVar[str] = "denoiser"
    # Whether a LoRA can be trained by it.
    takes_lora: ClassVar[bool] = True
    # What a row of the training data is called.
    unit: ClassVar[str] = "rows"
    presets: ClassVar[dict[str, dict[str, Any]]] = {}

    prompt_dropout: float = 0.2
    long_prompts: Literal["segments", "concatenate"] | None = None
    long_prompts_tokens: int = 240
    long_prompts_pack: bool = False
    long_prompts_compat: Literal["longalign"] | None = None
    ema_decay: float | None = None
    train_split: str | None = None
    eval_split: str | None = None
    num_frames: int | None = None
    resolution: int | None = None
    cache_dir: str | None = None

    validation_prompts: list[str] = field(default_factory=list)
    validation_steps: int = 0
    validation_seed: int = 0
    validation_inference_steps: int = 20
    validation_guidance_scale: float | None = None

    learning_rate: float = 1e-5
    lr_scheduler_type: str = "constant_with_warmup"
    per_device_train_batch_size: int = 4
    weight_decay: float = 1e-2
    logging_steps: float = 10
    save_steps: float = 100
    dataloader_drop_last: bool = True
    remove_unused_columns: bool | None = False
    logging_nan_inf_filter: bool = False
    optim: str = "adamw_torch"
    hub_strategy: str = "end"

    def __post_init__(self) -> None:
        if self.gradient_checkpointing is not None and self.activation_checkpointing is None:  # type: ignore[has-type]
            # transformers' new name for it; with it, its warning about the old one stays away.
            self.activation_checkpointing = self.gradient_checkpointing
        refuse_unsupported(self)
        super().__post_init__()
        check_choices(self)
        check_optimizer(self)
        check_run(self)
        self.long_prompt_reading()

    @property
    def place_model_on_device(self) -> bool:
        """False: the trainer moves the network itself, and back when training is over."""
        return False

    @property
    def rows_per_step(self) -> int:
        """Rows (pairs, prompts) of one optimiser step, over all processes."""
        return self.per_device_train_batch_size * self.gradient_accumulation_steps * self.world_size

    def default(self, name: str) -> Any:
        """The default of a field of ours in this method's config."""
        return type(self).__dataclass_fields__[name].default

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

    @property
    def order_seed(self) -> int:
        """What the order of the rows is drawn from."""
        return self.seed if self.data_seed is None else self.data_seed

    @classmethod
    def preset(cls, name: str, **options: Any) -> Self:
        """The settings `name`, published ("sd15", "sdxl") or chosen for the "playground", with `options` on top."""
        return cls(**cls.preset_options(name, options), **options)

    @classmethod
    def preset_options(cls, name: str, given: Mapping[str, Any]) -> dict[str, Any]:
        """What the preset adds to `given`: options that are not set there."""
        if name not in cls.presets:
            raise ValueError(f"{cls.__name__} has no preset {name!r}; it has {', '.join(sorted(cls.presets))}")
        return {option: value for option, value in cls.presets[name].items() if option not in given}

    def identity(self) -> dict[str, Any]:
        """Every option that a checkpoint's run and one that continues it must share, as JSON values."""
        own = [name for name in type(self).__dataclass_fields__ if name not in TrainingArguments.__dataclass_fields__]
        names = [name for name in own if name not in _NOT_THE_RUN] + list(RUN_OPTIONS)
        return {name: plain(getattr(self, name)) for name in names}

    def describe(self, num_processes: int = 1, *, elements: int | None = None) -> str:
        """What a run is, in a few lines: the method with `about`, the effective batch and learning rate, and what is kept at the end.

        `elements`: of one latent, for methods whose numbers depend on it.
        """
        batch = self.per_device_train_batch_size * self.gradient_accumulation_steps * num_processes
        lines = [
            f"{self.method}: {self.about()}",
            f"batch {batch} {self.unit} a step = {self.per_device_train_batch_size} × {self.gradient_accumulation_steps} accumulated × "
            f"{num_processes} process(es); effective learning rate {self.learning_rate:g} (the batch does not scale it), "
            f"{self._schedule()}",
            *self.details(elements),
        ]
        if self.long_prompts is not None:
            lines.append(
                f"prompts are read in {self.long_prompts} up to {self.long_prompts_tokens} tokens: draw with pipe.read_long_prompts(…)"
            )
        if self.ema_decay is not None:
            lines.append(
                f"evaluated, drawn and saved: the moving average of the trained weights, decay {self.ema_decay:g} (ema_decay), not "
                "those of the last step"
            )
        return "\n".join(lines)

    def sampling(self) -> dict[str, Any]:
        """What the pipeline's call is told for sample pictures, besides what every method has."""
        return {}

    def _schedule(self) -> str:
        warmup = f"{self.warmup_steps:g}" + (" of the steps" if 0 < self.warmup_steps < 1 else " steps")
        return f"{plain(self.lr_scheduler_type)}, warm-up {warmup}"

    @property
    def trained_on(self) -> str | None:
        """The scorer that a run learns from, which then cannot be its judge; None where there is none that scores other pictures."""
        return None

    @property
    def trains_negative(self) -> bool:
        """Whether what is trained is a negative side, to be guided away from, and no aligned model."""
        return False

    def about(self) -> str:
        """What is minimised, in a few words."""
        raise NotImplementedError

    def details(self, elements: int | None) -> list[str]:
        """Lines about a method's own options."""
        return []


def plain(value: Any) -> Any:
    """JSON values: enums by their value."""
    return getattr(value, "value", value)
