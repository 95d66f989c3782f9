"""What a training point costs, in forward passes of the denoiser over it: counted in floating-point operations, not timed.

    python benchmarks/training_cost.py

Runs every method on the playground's Stable Diffusion and divides the operations of the whole run, inversions and reference included,
by those of one forward pass over the points that it trained on. The denoiser alone is counted: pictures and prompts are encoded before.
Beside it what the released code costs, by arithmetic on its grids (a backward pass for all weights counts two).
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

import mmalign
from mmalign.data import load_pairs
from mmalign.files import write_file
from mmalign.likelihood.config import OFFICIAL_INVERSION
from mmalign.training.estimate import forward_equivalents
from mmalign.training.pipeline import default_lora

RESULTS = Path(__file__).parent / "results" / "training_cost.md"
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


def counted(method: str, options: dict[str, Any], cache_dir: str, *, lora: bool) -> float:
    """Forward passes a point of one run."""
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
        )
        with FlopCounterMode(display=False) as forward:
            trainer.one_forward()()
        with FlopCounterMode(display=False) as run:
            trainer.train()
    landings = STEPS if options.get("inversion_landings") == "all" else 1
    points = trainer.state.global_step * BATCH * landings
    return run.get_total_flops() / (forward.get_total_flops() * points / BATCH)


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


def table() -> str:
    """Every method and mode, as Markdown."""
    lines = ["| method | mode | LoRA | all weights | released code |", "|---|---|---|---|---|"]
    for method in NAMES:
        for mode in modes_of(method):
            options, filled = MODES[mode]
            with tempfile.TemporaryDirectory() as cache_dir:
                if filled:
                    counted(method, {**options, "num_train_epochs": 1}, cache_dir, lora=True)
                lora = counted(method, options, cache_dir, lora=True)
            whole, official = "", ""
            if mode == "exact":
                whole, official = f"{counted(method, options, '', lora=False):.2f}", f"{released(method):.1f}"
            lines.append(f"| {method} | {mode} | {lora:.2f} | {whole} | {official} |")
            print(lines[-1], flush=True)
    sizes = f"{PAIRS} pairs, batches of {BATCH}, {STEPS} inversion steps"
    return "\n".join([f"Forward passes a training point: {sizes}, torch {torch.__version__}.", "", *lines]) + "\n"


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    write_file(RESULTS, table())
