"""How the playground's base is aligned and evaluated: fixed once, the same for every method unless the method is about it."""

from typing import Any

NUM_INFERENCE_STEPS = 20
TIE_MARGIN = 0.02

COMMON: dict[str, Any] = {
    "learning_rate": 1e-4,
    "per_device_train_batch_size": 16,
    "warmup_steps": 20,
    "beta": 2000.0,
    "logging_steps": 10,
    "save_steps": 100,
    "prompt_dropout": 0.1,
}
BY_METHOD: dict[str, dict[str, Any]] = {
    "smpo": {"scorer": "playground"},
    "inpo": {},
    "dpo": {},
    "sft": {},
}


def options(method: str, **changes: Any) -> dict[str, Any]:
    """Config options of a method in the playground, with `changes` on top."""
    chosen = {**COMMON, **BY_METHOD[method]}
    if method == "sft":
        chosen.pop("beta")
    return {**chosen, **changes}
