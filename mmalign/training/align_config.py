"""The options that every alignment has, whatever model it trains: `transformers.TrainingArguments`, and ours around it."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Self

from transformers import TrainingArguments

from mmalign.training.arguments import Arguments
from mmalign.training.config_checks import check_alignment, check_choices
from mmalign.training.inherited import RUN_OPTIONS
from mmalign.training.optimizers import check_optimizer


@dataclass
class AlignConfig(Arguments):
    """Options shared by all methods of all kinds of models; each method has a config class of its own, which sets their defaults.

    ema_decay          keep a moving average of the trained weights (LoRA factors each for itself, which is not the average of their
                       products); it, not the last step's weights, is evaluated, drawn, saved at the end and left in the pipeline
    """

    method: ClassVar[str] = "alignment"
    # Whether a LoRA can be trained by it.
    takes_lora: ClassVar[bool] = True
    # What a row of the training data is called.
    unit: ClassVar[str] = "rows"
    # Options of ours that change neither losses nor weights, or are told by the fingerprint of the data, so that they need not be
    # compared between a checkpoint and the run that continues it.
    not_the_run: ClassVar[frozenset[str]] = frozenset({"train_split", "eval_split", "cache_dir", "reference_cache"})

    ema_decay: float | None = None
    cache_dir: str | None = None

    learning_rate: float = 1e-5
    lr_scheduler_type: str = "constant_with_warmup"
    per_device_train_batch_size: int = 4
    weight_decay: float = 1e-2
    save_steps: float = 100

    def __post_init__(self) -> None:
        if self.gradient_checkpointing is not None and self.activation_checkpointing is None:  # type: ignore[has-type]
            # transformers' new name for it; with it, its warning about the old one stays away.
            self.activation_checkpointing = self.gradient_checkpointing
        super().__post_init__()
        check_choices(self)
        check_optimizer(self)
        check_alignment(self)

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
        own = [field.name for field in fields(self) if field.name not in TrainingArguments.__dataclass_fields__]
        names = [name for name in own if name not in self.not_the_run] + list(RUN_OPTIONS)
        return {name: plain(getattr(self, name)) for name in names}

    def describe(self, num_processes: int = 1, *, elements: int | None = None) -> str:
        """What a run is, in a few lines: the method with `about`, the effective batch and learning rate, and what is kept at the end.

        `elements`: numbers in one sample, for methods whose options depend on it.
        """
        batch = self.per_device_train_batch_size * self.gradient_accumulation_steps * num_processes
        lines = [
            f"{self.method}: {self.about()}",
            f"batch {batch} {self.unit} a step = {self.per_device_train_batch_size} × {self.gradient_accumulation_steps} accumulated × "
            f"{num_processes} process(es); effective learning rate {self.learning_rate:g} (the batch does not scale it), "
            f"{self._schedule()}",
            *self.details(elements),
            *self.reading(),
        ]
        if self.ema_decay is not None:
            lines.append(
                f"evaluated, drawn and saved: the moving average of the trained weights, decay {self.ema_decay:g} (ema_decay), not "
                "those of the last step"
            )
        return "\n".join(lines)

    def _schedule(self) -> str:
        warmup = f"{self.warmup_steps:g}" + (" of the steps" if 0 < self.warmup_steps < 1 else " steps")
        return f"{plain(self.lr_scheduler_type)}, warm-up {warmup}"

    def about(self) -> str:
        """What is minimised, in a few words."""
        raise NotImplementedError

    def details(self, elements: int | None) -> list[str]:
        """Lines about a method's own options."""
        return []

    def reading(self) -> list[str]:
        """Lines about how rows are read."""
        return []


def plain(value: Any) -> Any:
    """JSON values: enums by their value."""
    return getattr(value, "value", value)
