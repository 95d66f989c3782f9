"""What a run says while it goes: a bar, one short line at every logged step, and one when it is over."""

import logging
from typing import Any

from transformers import TrainerCallback
from transformers.trainer_callback import ProgressCallback

from mmalign.training.estimate import duration

logger = logging.getLogger("mmalign")

# Metric → how the line calls it and shows it. Everything else is in `history.json` and goes to the loggers.
_SHOWN = {
    "loss": ("loss", ".4f"),
    "rewards/accuracies": ("accuracy", ".2f"),
    "rewards/margins": ("margin", ".3g"),
    "excess/chosen": ("excess chosen", ".2g"),
    "grad_norm": ("gradient", ".2g"),
    "learning_rate": ("lr", ".2g"),
    "pairs_per_second": ("pairs/s", ".3g"),
    "prompts_per_second": ("prompts/s", ".3g"),
    "rows_per_second": ("rows/s", ".3g"),
}


def line(logs: dict[str, Any], step: int, max_steps: int) -> str:
    """One logged entry in short: "step 20/200  loss 0.6921  accuracy 0.54 …"."""
    prefix = "eval_" if "eval_loss" in logs else ""
    parts = [f"{label} {logs[prefix + name]:{spec}}" for name, (label, spec) in _SHOWN.items() if prefix + name in logs]
    return "  ".join([f"{'evaluation at ' if prefix else ''}step {step}/{max_steps}", *parts])


def is_entry(logs: dict[str, Any]) -> bool:
    """Whether this is a logged step or an evaluation, not the summary of a run."""
    return "loss" in logs or "eval_loss" in logs


class Bar(ProgressCallback):
    """A bar over optimiser steps, with the short lines above it."""

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Writes the line above the bar."""
        if self.training_bar is not None and logs and is_entry(logs):
            self.training_bar.write(line(logs, state.global_step, state.max_steps))


class Lines(TrainerCallback):
    """The short lines alone, in the log, for runs without a bar."""

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Logs the line."""
        if state.is_world_process_zero and logs and is_entry(logs):
            logger.info(line(logs, state.global_step, state.max_steps))


class LastStep(TrainerCallback):
    """Logs the last step too, whatever `logging_steps` is, so that a run's history ends where the run did."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        """Asks for a log entry at the last step."""
        if state.global_step >= state.max_steps and args.logging_strategy != "no":
            control.should_log = True
        return control

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Says how it went, in one line."""
        if not state.is_world_process_zero or not state.log_history:
            return
        summary = state.log_history[-1]
        last: dict[str, Any] = next((entry for entry in reversed(state.log_history) if "loss" in entry), {})
        logger.info(
            "trained in %s: %s",
            duration(summary.get("train_runtime", 0)),
            line(last, state.global_step, state.max_steps),
        )
