"""Does alignment help, and which part of it? One table: every method against the base, told by judge B, with intervals.

    python benchmarks/playground_table.py run              # every missing cell, one after the other; stop and resume at will
    python benchmarks/playground_table.py run smpo dpo     # only the cells of these rows
    python benchmarks/playground_table.py table            # benchmarks/results/playground/table.md from the finished cells

A cell is (row, seed): it aligns the playground's base, draws every test prompt, and keeps judge B's score of every picture.
All settings stand in ROWS and in the methods' presets "playground", and were committed before the first cell was run.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from PIL import Image

import mmalign
from mmalign.data import load_pairs
from mmalign.denoisers import adapter_for
from mmalign.evaluation import generate, win_rate, win_rate_difference
from mmalign.files import write_file, write_json
from mmalign.playground import judges, measure, pairs, photographs, settings, world
from mmalign.training.config import PLAYGROUND
from mmalign.training.estimate import forward_equivalents

RESULTS = Path(__file__).parent / "results" / "playground"
SEEDS = (0, 1, 2)
STEPS = PLAYGROUND["max_steps"]
PICTURE_SEED = 7_000_000
NAMES = {"sft": "DiffusionSFT", "dpo": "DiffusionDPO", "inpo": "InPO", "smpo": "SmPO"}


@dataclass(frozen=True)
class Row:
    """One line of the table: a method, and what differs from its own settings.

    longer: as many steps as cost what SmPO's do. guidance: at which its pictures are drawn; None is the base's own, as everywhere else.
    """

    method: str
    changes: dict[str, Any] = field(default_factory=dict)
    longer: bool = False
    data: str = "playground"
    guidance: float | None = None


_BY_REWARD = {"scorer": "playground"}
_IN_TURN = {"inversion_landings": "in_turn", "inversion_model": "reference"}
ROWS: dict[str, Row] = {
    "sft": Row("sft"),
    # Its teachers were drawn with guidance: does it then need less of it?
    "sft, guidance 2": Row("sft", guidance=2.0),
    "dpo": Row("dpo"),
    "inpo": Row("inpo"),
    "smpo": Row("smpo"),
    "more base training, equal compute": Row("sft", longer=True, data="photographs"),
    "sft, equal compute": Row("sft", longer=True),
    "dpo, equal compute": Row("dpo", longer=True),
    "inpo, equal compute": Row("inpo", longer=True),
    # One axis at a time. The latents, from SmPO (renoise); its forward row is at the same time DPO with SmPO's smoothing.
    "smpo, forward": Row("smpo", {"latents": "forward"}),
    "smpo, 10 inversion steps": Row("smpo", {"inversion_steps": 10}),
    "smpo, ddim": Row("smpo", {"latents": "ddim"}),
    "inpo, eta 1": Row("inpo", {"inversion_eta": 1.0}),
    # At eta 1 the inversion is the forward process, but each side of a pair has a noise of its own. Is that the difference to DPO?
    "dpo, own noise": Row("dpo", {"share_noise": False}),
    "inpo, eta 1, shared noise": Row("inpo", {"inversion_eta": 1.0, "inversion_share_eta_noise": True}),
    # The comparison: from DPO (human; smoothed is above) and from SmPO (smoothed).
    "dpo, relabel": Row("dpo", {**_BY_REWARD, "comparison": "relabel"}),
    "dpo, bradley_terry": Row("dpo", {**_BY_REWARD, "comparison": "bradley_terry"}),
    "smpo, human": Row("smpo", {"comparison": "human", "scorer": None}),
    # The link, from DPO (sigmoid). IPO's gradient is not multiplied by beta and would drown in Adam's usual epsilon.
    "dpo, ipo": Row("dpo", {"loss_type": "ipo", "adam_epsilon": 1e-12}),
    "dpo, hinge": Row("dpo", {"loss_type": "hinge"}),
    # One inversion by the reference for all visits of a pair: as a later run meets it, and in one run that visits each pair four times.
    "smpo, in turn": Row("smpo", _IN_TURN),
    "smpo, 400 pairs": Row("smpo", data="400 pairs"),
    "smpo, 400 pairs, in turn": Row("smpo", _IN_TURN, data="400 pairs"),
    # What the released code computes, off-grid landings included.
    "smpo, official": Row("smpo", {"inversion_compat": "official-0.20", "inversion_steps": 10}),
}


def cell_path(row: str, seed: int) -> Path:
    """Where the result of a cell lies."""
    return RESULTS / f"{row.replace(', ', '-').replace(' ', '-')}-seed{seed}.json"


def run(row: str, seed: int) -> None:
    """Aligns, draws, scores, writes; does nothing where the cell is done."""
    path = cell_path(row, seed)
    if path.is_file():
        return
    start = time.perf_counter()
    spec = ROWS.get(row)
    pipe: Any
    changes: dict[str, Any] = {}
    metrics: dict[str, float] = {}
    if spec is None:
        pipe = mmalign.DiffusionSFTPipeline.from_pretrained("playground")
    else:
        pipe = getattr(mmalign, f"{NAMES[spec.method]}Pipeline").from_pretrained("playground")
        steps = round(STEPS * cost("smpo") / cost(spec.method)) if spec.longer else STEPS
        changes = {"max_steps": steps, "seed": seed, **spec.changes}
        data = DATA[spec.data]()
        with tempfile.TemporaryDirectory() as folder:
            options = {"preset": "playground", "save_strategy": "no", "report_to": "none", **changes}
            result = pipe.align(data, output_dir=folder, **options)
        metrics = {k: v for entry in result.history[-4:] for k, v in entry.items()}
    trained = time.perf_counter() - start
    first_seed, guidance = PICTURE_SEED + 1000 * seed, spec.guidance if spec else None
    seen = judged(pipe, pairs.prompts().test, first_seed=first_seed, judge="B", guidance=guidance)
    write_json(
        path,
        {
            "row": row,
            "seed": seed,
            "settings": changes,
            "seconds_training": round(trained, 1),
            "seconds_all": round(time.perf_counter() - start, 1),
            **seen,
            "metrics": metrics,
        },
    )


def judged(
    pipe: Any, prompts: list[str], *, first_seed: int, judge: photographs.Half, guidance: float | None = None
) -> dict[str, Any]:
    """Draws one picture a prompt and has a judge read them: how many show what was asked, how clean they are, every score."""
    images = generate(
        pipe,
        prompts,
        list(range(first_seed, first_seed + len(prompts))),
        num_inference_steps=settings.NUM_INFERENCE_STEPS,
        guidance_scale=measure.chosen_guidance() if guidance is None else guidance,
        batch_size=56,
    )
    reading = judges.load(judge).read(judges.to_tensor(images))
    matched = judges.match(reading, prompts)
    return {
        "all_three": round(float(matched.all.float().mean()), 4),
        "clean": round(float(reading.clean.mean()), 4),
        "scores": [round(float(score), 5) for score in judges.score(reading, matched)],
    }


@cache
def cost(method: str) -> float:
    """Forward passes over one side of a pair that a pair of one step costs, by arithmetic."""
    config = getattr(mmalign, f"{NAMES[method]}Config").preset("playground", output_dir="unused", use_cpu=True)
    schedule = adapter_for(mmalign.DiffusionSFTPipeline.from_pretrained("playground")).schedule
    sides = 2 if config.needs_pairs else 1
    return sides * forward_equivalents(schedule, config.inversion(), has_reference=config.needs_pairs)


def photograph_pairs(number: int) -> list[dict[str, Any]]:
    """Composed photographs that the base saw the likes of in its own training: the captioned one preferred to another one."""
    data = photographs.load("train")
    rows = torch.arange(number)
    scenes = world.draw_scenes(data.labels, rows, seed=601)
    composed = (world.compose(data, rows, scenes).movedim(1, -1) * 255).round().byte().numpy()
    pictures = [Image.fromarray(picture) for picture in composed]
    others = pictures[1:] + pictures[:1]
    return [
        {"prompt": text, "chosen": chosen, "rejected": rejected}
        for text, chosen, rejected in zip(scenes.captions(), pictures, others, strict=True)
    ]


def first_pairs(number: int) -> list[dict[str, Any]]:
    """The first of the playground's own pairs that a rater preferred one side of."""
    source = load_pairs("playground")
    decided = (record for record in map(source.__getitem__, range(len(source))) if record.label != 0.5)
    return [
        {"caption": r.prompt, "jpg_0": r.image_0, "jpg_1": r.image_1, "label_0": r.label, "label_1": 1 - r.label}
        for r in islice(decided, number)
    ]


DATA: dict[str, Callable[[], Any]] = {
    "playground": lambda: "playground",
    "400 pairs": lambda: first_pairs(400),
    "photographs": lambda: photograph_pairs(4000),
}


def table() -> str:
    """The finished cells as Markdown: win rate against the base over all seeds, clustered by prompt."""
    prompts = pairs.prompts().test
    base = {seed: _read("base", seed) for seed in SEEDS}
    done = {row: {seed: _read(row, seed) for seed in SEEDS} for row in ROWS}
    lines = [
        "| row | win rate over base, judge B | 95 % interval over prompts | by training seed | steps | all three as asked | clean |",
        "|---|---|---|---|---|---|---|",
    ]
    lines.append(_line("base", "50.0 %", "", "", [cell for cell in base.values() if cell]))
    for row, cells in done.items():
        ready = [seed for seed in SEEDS if cells[seed] and base[seed]]
        if not ready:
            continue
        ours, theirs, clusters = _stacked(cells, base, ready, len(prompts))
        rate = win_rate(ours, theirs, clusters, tie_margin=settings.TIE_MARGIN)
        interval = f"{100 * rate.low:.1f} … {100 * rate.high:.1f} %"
        each = [_rate_of_seed(cells, base, seed, len(prompts)) for seed in ready]
        lines.append(_line(row, f"{100 * rate.rate:.1f} %", interval, ", ".join(each), [cells[s] for s in ready]))
    lines += ["", *_contrasts(done, base, len(prompts))]
    return "\n".join(lines) + "\n"


CONTRASTS = (
    ("smpo", "dpo"),
    ("inpo", "dpo"),
    ("smpo", "inpo"),
    ("smpo", "dpo, equal compute"),
    ("smpo, forward", "smpo"),
    ("smpo, forward", "dpo"),
    ("inpo, eta 1", "inpo"),
    ("dpo, own noise", "dpo"),
    ("inpo, eta 1, shared noise", "inpo, eta 1"),
    ("smpo", "smpo, 10 inversion steps"),
    ("smpo, official", "smpo, 10 inversion steps"),
    ("smpo, in turn", "smpo"),
    ("smpo, 400 pairs, in turn", "smpo, 400 pairs"),
)


def _contrasts(done: dict[str, Any], base: dict[int, Any], number: int) -> list[str]:
    lines = ["| contrast | difference of win rates, points | 95 % interval |", "|---|---|---|"]
    for first, second in CONTRASTS:
        ready = [s for s in SEEDS if done[first][s] and done[second][s] and base[s]]
        if ready:
            a, reference, clusters = _stacked(done[first], base, ready, number)
            b, _, _ = _stacked(done[second], base, ready, number)
            gap = win_rate_difference(a, b, reference, clusters, tie_margin=settings.TIE_MARGIN)
            lines.append(
                f"| {first} − {second} | {100 * gap.value:+.1f} | {100 * gap.low:+.1f} … {100 * gap.high:+.1f} |"
            )
    return lines


def _stacked(cells: dict[int, Any], base: dict[int, Any], seeds: list[int], number: int) -> tuple[list, list, list]:
    ours = [score for seed in seeds for score in cells[seed]["scores"]]
    theirs = [score for seed in seeds for score in base[seed]["scores"]]
    return ours, theirs, [prompt for _ in seeds for prompt in range(number)]


def _rate_of_seed(cells: dict[int, Any], base: dict[int, Any], seed: int, number: int) -> str:
    rate = win_rate(*_stacked(cells, base, [seed], number), tie_margin=settings.TIE_MARGIN).rate
    return f"{100 * rate:.1f}"


def _line(row: str, rate: str, interval: str, by_seed: str, cells: list[Any]) -> str:
    def mean(name: str) -> float:
        return sum(cell[name] for cell in cells) / len(cells) if cells else float("nan")

    steps = cells[0]["settings"].get("max_steps", "") if cells else ""
    parts = (row, rate, interval, by_seed, steps, f"{100 * mean('all_three'):.1f} %", f"{mean('clean'):.3f}")
    return f"| {' | '.join(map(str, parts))} |"


def _read(row: str, seed: int) -> Any:
    path = cell_path(row, seed)
    return json.loads(path.read_text()) if path.is_file() else None


def main() -> None:
    """Runs cells or prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["run", "table"])
    parser.add_argument("rows", nargs="*", help="rows to run; all where none is named")
    args = parser.parse_args()
    if unknown := set(args.rows) - {"base", *ROWS}:
        parser.error(f"no such row: {', '.join(unknown)}; rows are base, {', '.join(ROWS)}")
    if args.command == "run":
        for seed in SEEDS:
            for row in args.rows or ["base", *ROWS]:
                run(row, seed)
    text = table()
    write_file(RESULTS / "table.md", text)
    print(text)


if __name__ == "__main__":
    main()
