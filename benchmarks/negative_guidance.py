"""Is guidance better with a negative side of its own, at the same number of network calls, alone and on top of SmPO?

    python benchmarks/negative_guidance.py choose     # candidates for the negative side, on training prompts by judge A
    python benchmarks/negative_guidance.py run        # every missing cell; stop and resume at will
    python benchmarks/negative_guidance.py table      # results/negative_guidance/table.md and sweep.svg from the finished cells

A cell is (positive side, negative side, guidance scale, seed): it draws every test prompt and keeps judge B's score of every picture.
NEGATIVES was filled with what `choose` had shown, and committed with everything else here, before the first cell was run.
"""

import argparse
import json
import shutil
import tempfile
from itertools import product
from pathlib import Path
from typing import Any

from line_plot import line_plot
from playground_table import judged

import mmalign
from mmalign.evaluation import Difference, win_rate, win_rate_difference
from mmalign.files import slug, write_file, write_json
from mmalign.playground import measure, pairs, settings

RESULTS = Path(__file__).parent / "results" / "negative_guidance"
WORK = Path("build") / "negative_guidance"
SEEDS = (0, 1, 2)
GUIDANCE_SCALES = (2.0, 4.0, 6.0)
PICTURE_SEED, CHOICE_SEED = 9_000_000, 8_000_000
NUM_CHOICE_PROMPTS = 280
# Method of a negative side, and what differs from its playground preset.
CANDIDATES: dict[str, tuple[str, dict[str, Any]]] = {
    **{f"self-npo, target guidance {g:g}": ("SelfNPO", {"target_guidance_scale": g}) for g in (-4.0, 0.0, 1.0)},
    "npo": ("DiffusionDPO", {"swap_pairs": True, "max_steps": 60}),
}
BETAS = (0.3, 1.0)
# Of the candidates, with how far the negative side goes: the best of each method in choice.md.
NEGATIVES: dict[str, tuple[str, float]] = {"self-npo": ("self-npo, target guidance -4", 0.3), "npo": ("npo", 1.0)}
POSITIVES = ("base", "smpo")


def train(method: str, changes: dict[str, Any], folder: Path, seed: int) -> None:
    """Leaves a LoRA in `folder`, as the method's playground preset makes it."""
    pipe = getattr(mmalign, f"{method}Pipeline").from_pretrained("playground")
    options = {"save_strategy": "no", "report_to": "none", "seed": seed, **changes}
    pipe.align("playground", output_dir=folder, preset="playground", **options)


def pipeline(positive: Path | None, negative: Path | None, beta: float = 1.0) -> Any:
    """The base with a LoRA for what it draws and one for its negative branch."""
    pipe = mmalign.SelfNPOPipeline.from_pretrained("playground")
    if positive is not None:
        pipe.load_lora_weights(positive)
    if negative is not None:
        pipe.load_negative(negative, beta=beta)
    return pipe


def choose() -> str:
    """Every candidate against plain guidance at the base's own guidance scale, on training prompts by judge A."""
    prompts = pairs.prompts().train[:NUM_CHOICE_PROMPTS]
    for name, spec in {"plain": None, **CANDIDATES}.items():
        paths = {beta: RESULTS / "choice" / f"{slug(name)}-beta{beta:g}.json" for beta in (BETAS if spec else (0.0,))}
        with tempfile.TemporaryDirectory() as folder:
            if spec is not None and not all(path.is_file() for path in paths.values()):
                train(*spec, Path(folder), seed=0)
            for beta, path in paths.items():
                if not path.is_file():
                    pipe = pipeline(None, None if spec is None else Path(folder), beta)
                    seen = judged(pipe, prompts, first_seed=CHOICE_SEED, judge="A")
                    write_json(path, {"name": name, "beta": beta, "settings": spec, **seen})
    cells = [json.loads(path.read_text()) for path in sorted((RESULTS / "choice").glob("*.json"))]
    plain = next(cell for cell in cells if cell["name"] == "plain")
    lines = [
        f"Win rates over plain guidance at {measure.chosen_guidance():g} by judge A, {len(prompts)} training prompts, one seed.",
        "",
        "| negative side | β | win rate | 95 % interval | all three | clean |",
        "|---|---|---|---|---|---|",
    ]
    for cell in cells:
        rate = win_rate(cell["scores"], plain["scores"], list(range(len(prompts))), tie_margin=settings.TIE_MARGIN)
        lines.append(
            f"| {cell['name']} | {cell['beta']:g} | {100 * rate.rate:.1f} % | {100 * rate.low:.1f} … {100 * rate.high:.1f} % | "
            f"{100 * cell['all_three']:.1f} % | {cell['clean']:.3f} |"
        )
    return "\n".join(lines) + "\n"


def run(positive: str, negative: str, guidance: float, seed: int, work_dir: Path) -> None:
    """Trains what a cell needs and has not got from another one, draws it, and writes what judge B saw."""
    seen = judged(
        sides(positive, negative, seed, work_dir),
        pairs.prompts().test,
        first_seed=PICTURE_SEED + 1000 * seed,
        judge="B",
        guidance=guidance,
    )
    about = {"positive": positive, "negative": negative, "guidance_scale": guidance, "seed": seed}
    write_json(cell_path(positive, negative, guidance, seed), {**about, **seen})


def sides(positive: str, negative: str, seed: int, work_dir: Path) -> Any:
    """The pipeline of a cell; its LoRAs stay in `work_dir`."""
    recipe, beta = NEGATIVES.get(negative, ("plain", 1.0))
    recipes = {"smpo": ("SmPO", {}), **CANDIDATES}
    folders: list[Path | None] = []
    for name in (positive, recipe):
        folder = work_dir / f"seed{seed}" / slug(name) if name in recipes else None
        if folder is not None and not folder.is_dir():
            part = folder.with_suffix(".part")
            shutil.rmtree(part, ignore_errors=True)
            train(*recipes[name], part, seed)
            part.rename(folder)
        folders.append(folder)
    return pipeline(*folders, beta)


def cells() -> list[tuple[str, str, float]]:
    """Positive side, negative side and guidance scale of every cell, those at the base's own guidance first."""
    scales = sorted(GUIDANCE_SCALES, key=lambda scale: scale != measure.chosen_guidance())
    return [(p, n, scale) for scale in scales for p in POSITIVES for n in ("plain", *NEGATIVES)]


def cell_path(positive: str, negative: str, guidance: float, seed: int) -> Path:
    """Where the result of a cell lies."""
    return RESULTS / f"{slug(f'{positive} {negative}')}-g{guidance:g}-seed{seed}.json"


def table() -> str:
    """Win rates over the plain base at its own guidance scale, and what the negative side adds at each scale."""
    done = {
        (cell, seed): json.loads(path.read_text())
        for cell in cells()
        for seed in SEEDS
        if (path := cell_path(*cell, seed)).is_file()
    }
    origin = ("base", "plain", measure.chosen_guidance())
    lines = [
        f"Win rates by judge B over the base with plain guidance at {measure.chosen_guidance():g}, and what the negative side adds to "
        "them at the same guidance scale and seeds, in points.",
        "",
        "| positive | negative | guidance | win rate | added by the negative side | seeds | all three | clean |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for cell in sorted(cells()):
        seeds = [seed for seed in SEEDS if (cell, seed) in done and (origin, seed) in done]
        if not seeds:
            continue
        ours, base, clusters = _scores(done, cell, seeds), _scores(done, origin, seeds), _clusters(done, cell, seeds)
        rate = win_rate(ours, base, clusters, tie_margin=settings.TIE_MARGIN)
        gain = _gain(done, cell, origin)
        added = "" if gain is None else f"{100 * gain.value:+.1f} ({100 * gain.low:+.1f} … {100 * gain.high:+.1f})"
        shown, clean = (sum(done[cell, seed][name] for seed in seeds) / len(seeds) for name in ("all_three", "clean"))
        told = f"{100 * rate.rate:.1f} % ({100 * rate.low:.1f} … {100 * rate.high:.1f})"
        parts = (*cell[:2], f"{cell[2]:g}", told, added, len(seeds), f"{100 * shown:.1f} %", f"{clean:.3f}")
        lines.append(f"| {' | '.join(map(str, parts))} |")
    return "\n".join(lines) + "\n"


def sweep_svg() -> str:
    """The win rates of the table against the guidance scale, a line a pair of sides."""
    points: dict[str, list[tuple[float, float]]] = {}
    for row in table().splitlines()[4:]:
        positive, negative, scale, told, *_ = (part.strip() for part in row.strip("|").split("|"))
        points.setdefault(f"{positive}, {negative}", []).append((float(scale), float(told.split()[0])))
    return line_plot(points, "guidance scale", heights="{:.0f} %")


def _gain(done: dict[Any, Any], cell: tuple[str, str, float], origin: tuple[str, str, float]) -> Difference | None:
    plain = (cell[0], "plain", cell[2])
    seeds = [s for s in SEEDS if all((c, s) in done for c in (cell, plain, origin))]
    if cell == plain or not seeds:
        return None
    return win_rate_difference(
        _scores(done, cell, seeds),
        _scores(done, plain, seeds),
        _scores(done, origin, seeds),
        _clusters(done, cell, seeds),
        tie_margin=settings.TIE_MARGIN,
    )


def _scores(done: dict[Any, Any], cell: tuple[str, str, float], seeds: list[int]) -> list[float]:
    return [score for seed in seeds for score in done[cell, seed]["scores"]]


def _clusters(done: dict[Any, Any], cell: tuple[str, str, float], seeds: list[int]) -> list[int]:
    return [prompt for seed in seeds for prompt in range(len(done[cell, seed]["scores"]))]


def main() -> None:
    """Chooses, runs cells, or prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["choose", "run", "table"])
    parser.add_argument("--seeds", type=int, nargs="*", default=SEEDS)
    parser.add_argument("--guidance", type=float, nargs="*", default=GUIDANCE_SCALES, help="of the cells to run")
    parser.add_argument("--work-dir", type=Path, default=WORK, help="where LoRAs are kept")
    args = parser.parse_args()
    if args.command == "choose":
        text, file = choose(), "choice.md"
    else:
        for cell, seed in product(cells(), args.seeds) if args.command == "run" else ():
            if cell[2] in args.guidance and not cell_path(*cell, seed).is_file():
                run(*cell, seed, args.work_dir)
        text, file = table(), "table.md"
        write_file(RESULTS / "sweep.svg", sweep_svg())
    write_file(RESULTS / file, text)
    print(text)


if __name__ == "__main__":
    main()
