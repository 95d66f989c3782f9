"""What every training here sets otherwise than `transformers.TrainingArguments`, and refuses of it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from transformers import TrainingArguments

from mmalign.training.inherited import REFUSED, refuse_unsupported


@dataclass
class Arguments(TrainingArguments):
    """Shared by the configs of alignments and of reward models.

    train_split, eval_split   which split of a hub data set or of "playground"; "train" unless given
    """

    method: ClassVar[str]
    presets: ClassVar[dict[str, dict[str, Any]]] = {}
    # Options of transformers that would have no effect or a wrong one, with the reason.
    refused: ClassVar[Mapping[str, str]] = REFUSED

    train_split: str | None = None
    eval_split: str | None = None

    logging_steps: float = 10
    dataloader_drop_last: bool = True
    remove_unused_columns: bool | None = False
    logging_nan_inf_filter: bool = False
    optim: str = "adamw_torch"
    hub_strategy: str = "end"

    def __post_init__(self) -> None:
        refuse_unsupported(self, self.refused)
        super().__post_init__()
