"""What a training point costs, in forward passes of the denoiser over it: counted in floating-point operations, not timed.

    python benchmarks/training_cost.py

Runs every method on the playground's Stable Diffusion and divides the operations of the whole run, inversions and reference included,
by those of one forward pass over the points that it trained on. The denoiser alone is counted: pictures and prompts are encoded before.
Beside it what the released code costs, by arithmetic on its grids (a backward pass for all weights counts two).
"""

import argparse
import json
import tempfile
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import TrainerCallback

import mmalign
from mmalign.data import load_pairs
from mmalign.files import write_file, write_json
from mmalign.likelihood.config import OFFICIAL_INVERSION
from mmalign.training.estimate import forward_equivalents
from mmalign.training.pipeline import default_lora

RESULTS = Path(__file__).parent / "results"
NAMES = {"dpo": "DiffusionDPO", "inpo": "InPO", "smpo": "SmPO"}
PAIRS, BATCH, STEPS = 16, 8, 10
# Visits of a pair in the runs that keep its path.
VISITS = 12

_BY_REFERENCE = {"inversion_model": "reference"}
_IN_TURN = {"inversion_landings": "in_turn", "num_train_epochs": VISITS}
# Name → options of a run, and whether an earlier run has filled the caches.
MODES: dict[str, tuple[dict[str, Any], bool]] = {
    "exact": ({"num_train_epochs": 6}, False),
    "every landing": ({"inversion_landings": "all", "num_train_epochs": 1}, False),
    f"in turn, by the policy, renewed every {VISITS // 2} visits": (
        {**_IN_TURN, "inversion_refresh": VISITS // 2 * PAIRS // BATCH},
        False,
    ),
    f"in turn, by the reference, {VISITS} visits": ({**_IN_TURN, **_BY_REFERENCE}, False),
    "in turn, by the reference, kept by an earlier run": ({**_IN_TURN, **_BY_REFERENCE, "num_train_epochs": 2}, True),
    "exact, reference kept by an earlier run": ({"reference_cache": True, "num_train_epochs": 1}, True),
}
# What the released code inverts with; Diffusion-DPO's does not invert.
OFFICIAL = {"dpo": None, "inpo": OFFICIAL_INVERSION["inpo"], "smpo": OFFICIAL_INVERSION["smpo-sdxl"]}


def modes_of(method: str) -> list[str]:
    """The modes that mean anything for a method: forward noise has no path, and the policy's paths no lasting reference error."""
    if method == "dpo":
        return ["exact", "exact, reference kept by an earlier run"]
    return [mode for mode in MODES if "reference kept" not in mode]


class FromSecondStep(TrainerCallback):
    """Counts what comes after the first step, in which a run computes a batch of what was kept again, to see that it is true."""

    def __init__(self) -> None:
        self.counter = FlopCounterMode(display=False)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Starts to count."""
        if state.global_step == 1:
            self.counter.__enter__()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Is done."""
        self.counter.__exit__(None, None, None)


def counted(method: str, options: dict[str, Any], cache_dir: str, *, lora: bool, from_second: bool = False) -> float:
    """Forward passes a point of one run."""
    late = FromSecondStep()
    with tempfile.TemporaryDirectory() as folder:
        given: dict[str, Any] = {
            "output_dir": folder,
            "cache_dir": cache_dir or folder,
            "per_device_train_batch_size": BATCH,
            "save_strategy": "no",
            "disable_tqdm": True,
            "use_cpu": True,
            **options,
        }
        if method == "smpo":
            given |= {"comparison": "human"}
        if method != "dpo":
            given |= {"inversion_steps": STEPS}
        trainer = getattr(mmalign, f"{NAMES[method]}Trainer")(
            model=getattr(mmalign, f"{NAMES[method]}Pipeline").from_pretrained("playground"),
            args=getattr(mmalign, f"{NAMES[method]}Config")(**given),
            train_dataset=first_pairs(),
            peft_config=default_lora() if lora else None,
            callbacks=[late] if from_second else None,
        )
        with FlopCounterMode(display=False) as forward:
            trainer.one_forward()()
        with nullcontext() if from_second else FlopCounterMode(display=False) as whole:
            trainer.train()
    run = late.counter if whole is None else whole
    landings = STEPS if options.get("inversion_landings") == "all" else 1
    return run.get_total_flops() / (forward.get_total_flops() * (trainer.state.global_step - from_second) * landings)


def first_pairs() -> list[dict[str, Any]]:
    """Some of the playground's own pairs."""
    records = map(load_pairs("playground").__getitem__, range(4 * PAIRS))
    decided = [r for r in records if r.label != 0.5][:PAIRS]
    sides = [(r.image_0, r.image_1) if r.label > 0.5 else (r.image_1, r.image_0) for r in decided]
    return [{"prompt": r.prompt, "chosen": a, "rejected": b} for r, (a, b) in zip(decided, sides, strict=True)]


def released(method: str) -> float:
    """Forward passes a point of the released code, which trains all weights."""
    from mmalign.denoisers import adapter_for

    schedule = adapter_for(mmalign.DiffusionDPOPipeline.from_pretrained("playground")).schedule
    return forward_equivalents(schedule, OFFICIAL[method], has_reference=True)


def row(method: str, mode: str) -> list[float]:
    """What a point costs with a LoRA and, for exact inversions, with all weights and in the released code."""
    options, filled = MODES[mode]
    with tempfile.TemporaryDirectory() as cache_dir:
        if filled:
            counted(method, {**options, "num_train_epochs": 1}, cache_dir, lora=True)
        found = [counted(method, options, cache_dir, lora=True, from_second=filled)]
    if mode == "exact":
        found += [counted(method, options, "", lora=False), released(method)]
    return [round(value, 2) for value in found]


def main() -> None:
    """Counts the rows that are missing in results/training_cost.json, and writes all of them as Markdown."""
    rows: dict[str, list[float]] = {}
    if (RESULTS / "training_cost.json").is_file():
        rows = json.loads((RESULTS / "training_cost.json").read_text())
    lines = ["| method | mode | LoRA | all weights | released code |", "|---|---|---|---|---|"]
    for method in NAMES:
        for mode in modes_of(method):
            if f"{method}, {mode}" not in rows:
                rows[f"{method}, {mode}"] = row(method, mode)
                write_json(RESULTS / "training_cost.json", rows)
            told = [f"{value:.2f}" for value in rows[f"{method}, {mode}"]] + ["", ""]
            lines.append(f"| {method} | {mode} | {' | '.join(told[:3])} |")
            print(lines[-1], flush=True)
    sizes = f"{PAIRS} pairs, batches of {BATCH}, {STEPS} inversion steps"
    head = f"Forward passes a training point: {sizes}, torch {torch.__version__}."
    write_file(RESULTS / "training_cost.md", "\n".join([head, "", *lines]) + "\n")


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    main()
