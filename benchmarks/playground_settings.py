"""Which learning rate, beta and number of steps suit the playground: a small grid, seen on training prompts by judge A only.

    python benchmarks/playground_settings.py run           # every missing cell; stop and resume at will
    python benchmarks/playground_settings.py run dpo-smoothed inpo-eta1
    python benchmarks/playground_settings.py table

What it showed was written into the methods' presets "playground" before the first cell of playground_table.py, which judge B tells on
held-out prompts, was run.
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from playground_table import NAMES, judged, photograph_pairs

import mmalign
from mmalign.evaluation import win_rate
from mmalign.files import write_file, write_json
from mmalign.playground import pairs, settings

RESULTS = Path(__file__).parent / "results" / "playground_settings"
NUM_PROMPTS = 280
PICTURE_SEED = 8_000_000
# Pairs that the base did not draw: a composed photograph that fits the prompt, preferred to one that does not.
OFF_POLICY = "photographs"


_AS_DPO: dict[str, Any] = {"learning_rate": 3e-4, "beta": 2000.0}
_FINE: dict[str, Any] = {**_AS_DPO, "inversion_steps": 10}
# Name of a cell → method and what differs from its own settings.
CELLS: dict[str, tuple[str, dict[str, Any]]] = {
    "base": ("dpo", {}),
    **{
        f"{method}-lr{rate:g}-beta{beta:g}": (method, {"learning_rate": rate, "beta": beta, **steps})
        for method, steps in (("dpo", {}), ("inpo", {"inversion_steps": 10}), ("smpo", {"inversion_steps": 10}))
        for rate in (1e-4, 3e-4, 1e-3)
        for beta in (500.0, 2000.0)
    },
    # Which part of a method moves the pictures.
    "dpo-smoothed": ("dpo", {**_AS_DPO, "comparison": "smoothed", "scorer": "playground"}),
    "smpo-human": ("smpo", {**_FINE, "comparison": "human", "scorer": None}),
    "smpo-official": ("smpo", {**_FINE, "inversion_compat": "official-0.20"}),
    "smpo-velocity": ("smpo", {**_FINE, "beta": 500.0, "loss_space": "velocity"}),
    "smpo-reference": ("smpo", {**_FINE, "inversion_model": "reference"}),
    **{f"{m}-N{n}": (m, {**_AS_DPO, "inversion_steps": n}) for m in ("smpo", "inpo") for n in (1, 2, 3, 5)},
    **{f"inpo-eta{eta:g}": ("inpo", {**_FINE, "inversion_eta": eta}) for eta in (0.0, 0.5, 1.0)},
    "smpo-N2-lr0.001": ("smpo", {**_AS_DPO, "inversion_steps": 2, "learning_rate": 1e-3}),
    f"dpo-{OFF_POLICY}": ("dpo", _AS_DPO),
    f"inpo-{OFF_POLICY}": ("inpo", _FINE),
}


def run(name: str) -> None:
    """Aligns ("base" does not), draws the training prompts, keeps judge A's scores; does nothing where the cell is done."""
    path = RESULTS / f"{name}.json"
    if path.is_file():
        return
    method, changes = CELLS[name]
    pipe: Any = getattr(mmalign, f"{NAMES[method]}Pipeline").from_pretrained("playground")
    metrics: dict[str, float] = {}
    if name != "base":
        data = photograph_pairs(1200) if name.endswith(OFF_POLICY) else "playground"
        with tempfile.TemporaryDirectory() as folder:
            options = {"preset": "playground", "save_strategy": "no", "report_to": "none", **changes}
            metrics = pipe.align(data, output_dir=folder, **options).metrics
    pool = pairs.prompts().train
    prompts = pool[:: len(pool) // NUM_PROMPTS][:NUM_PROMPTS]
    seen = judged(pipe, prompts, first_seed=PICTURE_SEED, judge="A")
    write_json(path, {"changes": changes, **seen, "metrics": metrics})


def table() -> str:
    """The finished cells as Markdown."""
    base = json.loads((RESULTS / "base.json").read_text())
    lines = [
        "| cell | win rate over base, judge A, training prompts | 95 % interval | all three right | clean |",
        "|---|---|---|---|---|",
    ]
    for name in CELLS:
        path = RESULTS / f"{name}.json"
        if not path.is_file():
            continue
        cell = json.loads(path.read_text())
        number = list(range(len(base["scores"])))
        rate = win_rate(cell["scores"], base["scores"], number, tie_margin=settings.TIE_MARGIN)
        lines.append(
            f"| {name} | {100 * rate.rate:.1f} % | {100 * rate.low:.1f} … {100 * rate.high:.1f} % "
            f"| {100 * cell['all_three']:.1f} % | {cell['clean']:.3f} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Runs cells or prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["run", "table"])
    parser.add_argument("cells", nargs="*", help="cells to run; all where none is named")
    args = parser.parse_args()
    if unknown := set(args.cells) - set(CELLS):
        parser.error(f"no such cell: {', '.join(unknown)}; cells are {', '.join(CELLS)}")
    if args.command == "run":
        for name in args.cells or CELLS:
            run(name)
    text = table()
    write_file(RESULTS / "table.md", text)
    print(text)


if __name__ == "__main__":
    main()
