"""Does LongAlign draw more of what long captions state than cutting or joining them does, and what does ω trade?

    python benchmarks/long_prompts.py reward     # trains the reward: a CLIP of scenes, made a Denscore; minutes
    python benchmarks/long_prompts.py choose     # learning rates, on training prompts by judge A
    python benchmarks/long_prompts.py run        # every missing cell, one training seed after the other; stop and resume at will
    python benchmarks/long_prompts.py table      # results/long_prompts/table.md and omega*.svg from the finished cells

A cell is (row, seed): it trains what the row needs, draws the test prompts, and keeps of every picture how many of each sentence's
three attributes judge B finds, how clean it calls it, and what the reward says. The reward saw neither judge B nor its photographs.
LEARNING_RATES was filled with what `choose` had shown, and committed with everything else here, before the first cell was run.
"""

import argparse
import json
import time
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from line_plot import line_plot
from PIL import Image

import mmalign
from mmalign.evaluation import Difference, generate, paired_difference
from mmalign.evaluation.intervals import as_clusters, mean_interval
from mmalign.files import slug, write_file, write_json
from mmalign.playground import measure, photographs, scene_judges, scene_prompts, scene_reward, scenes
from mmalign.rewards import CommonDirection, ReweightedScorer, scorer
from mmalign.training.denscore import DenscoreConfig, DenscoreTrainer

RESULTS = Path(__file__).parent / "results" / "long_prompts"
WORK = Path(__file__).parents[1] / "build" / "long_prompts"
REWARD, DIRECTION = WORK / "reward", WORK / "reward-v.safetensors"
SEEDS = (0, 1, 2)
OMEGAS = (0.0, 0.3, 1.0)
# Steps of stage reward, and the learning rate where it is not the chosen one: the second asks for overfitting.
LENGTHS: dict[int, float | None] = {30: None, 150: 1e-3}
STEPS = 10
PICTURE_SEED, CHOICE_SEED = 6_000_000, 5_000_000
NUM_SCENES, NUM_PROMPTS, NUM_SHORT, NUM_CHOICE, NUM_PREFERENCES = 1_000, 400, 64, 128, 2_000
SCENE_STREAM = 251

Stage = Literal["base", "supervised", "reward"]
CANDIDATES: dict[Stage, tuple[float, ...]] = {"supervised": (1e-4, 5e-4), "reward": (3e-4, 1e-3)}
LEARNING_RATES: dict[Stage, float] = {"supervised": 5e-4, "reward": 3e-4}
COMMON: dict[str, Any] = {
    "save_strategy": "no",
    "report_to": "none",
    "warmup_steps": 10,
    "cache_dir": str(WORK / "cache"),
}
SETTINGS: dict[Stage, dict[str, Any]] = {
    "supervised": {"stage": "supervised", "max_steps": 120, "per_device_train_batch_size": 16, "prompt_dropout": 0.1},
    "reward": {
        "scorer": f"clip:{REWARD}", "per_device_train_batch_size": 8, "rollout_steps": STEPS, "grad_steps": 5,
        "rollout_guidance_scale": 4.0, "grad_cond_only": True,
    },
}  # fmt: skip
DENSCORE: dict[str, Any] = {
    "max_steps": 200, "per_device_train_batch_size": 32, "gradient_accumulation_steps": 1, "learning_rate": 1e-4, "warmup_steps": 20,
    "save_strategy": "no", "report_to": "none",
}  # fmt: skip


@dataclass(frozen=True)
class Row:
    """How long prompts are read (None cuts them at 77 tokens), in training and in drawing, and what was trained.

    short: short prompts are drawn too. steps: of stage reward.
    """

    layout: Literal["segments", "concatenate"] | None
    stage: Stage = "base"
    omega: float = 1.0
    short: bool = False
    steps: int = 30


ROWS: dict[str, Row] = {
    "base, cut": Row(None, short=True),
    "base, joined": Row("concatenate"),
    "base, segments": Row("segments", short=True),
    "supervised, segments": Row("segments", "supervised", short=True),
    "supervised, joined": Row("concatenate", "supervised"),
    **{f"reward, omega {omega:g}": Row("segments", "reward", omega, short=omega == 0.3) for omega in OMEGAS},
    **{f"reward, 150 steps, omega {omega:g}": Row("segments", "reward", omega, steps=150) for omega in OMEGAS},
}
CONTRASTS = (
    ("base, joined", "base, cut"),
    ("base, segments", "base, cut"),
    ("base, segments", "base, joined"),
    ("supervised, segments", "base, segments"),
    ("supervised, segments", "supervised, joined"),
    ("supervised, joined", "base, joined"),
    *((f"reward, omega {omega:g}", "supervised, segments") for omega in OMEGAS),
    ("reward, omega 0.3", "reward, omega 0"),
    ("reward, omega 0.3", "reward, omega 1"),
    *((f"reward, 150 steps, omega {omega:g}", f"reward, omega {omega:g}") for omega in OMEGAS),
    ("reward, 150 steps, omega 0", "reward, 150 steps, omega 1"),
    ("reward, 150 steps, omega 0.3", "reward, 150 steps, omega 1"),
)
_OF_SHORT = (
    ("base, segments", "base, cut"),
    ("supervised, segments", "base, cut"),
    ("reward, omega 0.3", "base, cut"),
)


def train_reward() -> dict[str, Any]:
    """A CLIP of scenes, then a Denscore of it; leaves it with its common direction in WORK, and what it can do in reward.json."""
    started = WORK / "reward-clip"
    clip, vocabulary, curve = scene_reward.train(WORK / "reward-clip.pt")
    scene_reward.save(clip, vocabulary, started)
    told: dict[str, Any] = {"curve": curve[::5], "clip": scene_reward.measure(clip, vocabulary)}
    args = DenscoreConfig(output_dir=str(REWARD), **DENSCORE)
    trainer = DenscoreTrainer(model=started, args=args, train_dataset=scene_reward.preferences(NUM_PREFERENCES))
    trainer.train()
    trainer.save_model()
    told["accuracy"] = [entry["accuracy"] for entry in trainer.state.log_history if "accuracy" in entry]
    reward = scorer(f"clip:{REWARD}").in_segments()
    told["denscore"] = scene_reward.measure(reward.model, reward.tokenizer)
    captions = scene_prompts.prompts().train
    direction = CommonDirection.estimate(reward, captions)
    direction.save(DIRECTION)
    common = ReweightedScorer(reward, direction).commonness(captions[:500])
    return told | {
        "fingerprint": reward.fingerprint,
        "eta": [round(float(x), 3) for x in common.quantile(torch.tensor([0, 0.5, 1]))],
    }


def captioned_scenes() -> list[dict[str, Any]]:
    """Scenes of training photographs with four-sentence captions of what training prompts ask for, each preferred to another one."""
    data, rows = photographs.load("train"), torch.arange(NUM_SCENES)
    cells, rng = scenes.draw_scenes(data.labels, rows, seed=SCENE_STREAM), np.random.default_rng(SCENE_STREAM)
    cells = scene_prompts.recoloured(cells, "train", rng)
    pixels = (scenes.compose(data, rows, cells).movedim(1, -1) * 255).round().byte().numpy()
    pictures = [Image.fromarray(one) for one in pixels]
    captions = [scenes.caption(cells, row, rng) for row in range(NUM_SCENES)]
    return [
        {"prompt": text, "chosen": chosen, "rejected": other}
        for text, chosen, other in zip(captions, pictures, pictures[1:] + pictures[:1], strict=True)
    ]


def pipeline(row: Row, seed: int, rates: dict[Stage, float] = LEARNING_RATES) -> tuple[Any, list[dict[str, float]]]:
    """The base as the row trains it, and the log of its last stage."""
    if row.stage == "reward":
        folder = supervised(row.layout, seed, rates["supervised"])
        pipe = mmalign.LongAlignPipeline.from_pretrained(folder)
        omega = {"omega": row.omega} | ({"direction": str(DIRECTION)} if row.omega < 1 else {})
        rate = LENGTHS[row.steps] or rates["reward"]
        return pipe, aligned(
            pipe, row, seed, rate, scene_prompts.prompts().train[:NUM_PROMPTS], max_steps=row.steps, **omega
        )
    place = supervised(row.layout, seed, rates["supervised"]) if row.stage == "supervised" else "playground-scenes"
    pipe = mmalign.LongAlignPipeline.from_pretrained(place)
    pipe.read_long_prompts(row.layout)
    return pipe, []


def supervised(layout: Any, seed: int, rate: float) -> Path:
    """The folder of the base after its supervised stage, trained if it is not there."""
    folder = WORK / f"supervised-{layout}-{rate:g}-seed{seed}"
    if not folder.is_dir():
        pipe = mmalign.LongAlignPipeline.from_pretrained("playground-scenes")
        log = aligned(pipe, Row(layout, "supervised"), seed, rate, captioned_scenes())
        write_json(folder.with_suffix(".json"), log)
        pipe.save_pretrained(folder)
    return folder


def aligned(pipe: Any, row: Row, seed: int, rate: float, data: Any, **options: Any) -> list[dict[str, float]]:
    """Trains `pipe` in one stage and returns its log; its own files stay in WORK."""
    options = COMMON | SETTINGS[row.stage] | options | {"long_prompts": row.layout, "learning_rate": rate, "seed": seed}
    return pipe.align(data, output_dir=WORK / "run", **options).history


def seen(pipe: Any, prompts: list[str], *, first_seed: int, judge: photographs.Half) -> dict[str, Any]:
    """Draws one picture a prompt: what the judge finds of each sentence, how clean and saturated its cells are, the reward's parts."""
    images = generate(
        pipe,
        prompts,
        list(range(first_seed, first_seed + len(prompts))),
        num_inference_steps=STEPS,
        guidance_scale=measure.chosen_guidance("scene-base"),
        batch_size=56,
    )
    reader = scene_judges.load(judge)
    shown = reader.read(images, prompts)
    cells = reader.judge.read(scenes.split(scene_judges.to_tensor(images)))
    text, style = rewarded(images, prompts)
    return {
        "found": shown.stated.sum(1).view(len(prompts), -1).tolist(),
        "clean": _rounded(cells.clean.view(-1, 4).mean(1)),
        "saturation": _rounded(cells.measured.saturation.view(-1, 4).mean(1)),
        "reward_text": _rounded(text),
        "reward_style": _rounded(style),
    }


@torch.no_grad()
def rewarded(images: list[Image.Image], prompts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """The text-relevant and the text-irrelevant part of the training reward, which add up to it at ω = 1."""
    reward = _reward()
    parts = [
        reward.parts(reward.preprocess(images[start : start + 64]), prompts[start : start + 64])
        for start in range(0, len(images), 64)
    ]
    return torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts])


@cache
def _reward() -> ReweightedScorer:
    return ReweightedScorer(scorer(f"clip:{REWARD}").in_segments(), CommonDirection.load(DIRECTION))


def choose() -> str:
    """Learning rates by judge A, on training prompts that no run sees; the reward's after the better of the supervised ones."""
    prompts = scene_prompts.prompts().train[-NUM_CHOICE:]
    found: dict[tuple[str, float], dict[str, Any]] = {}
    best = dict(LEARNING_RATES)
    for stage, rates in ({"base": (0.0,)} | CANDIDATES).items():
        for rate in rates:
            path = RESULTS / "choice" / f"{stage}-{rate:g}.json"
            if not path.is_file():
                pipe, log = pipeline(Row("segments", stage, 0.3), 0, {**best, stage: rate})
                write_json(path, {"log": log[-3:], **seen(pipe, prompts, first_seed=CHOICE_SEED, judge="A")})
            found[stage, rate] = json.loads(path.read_text())
        best[stage] = max(rates, key=lambda rate: np.mean(found[stage, rate]["found"]))
    lines = [
        f"Read in segments, ω 0.3, by judge A on {NUM_CHOICE} training prompts, one seed.",
        "",
        "| stage | learning rate | share of what is stated | clean | reward, text | reward, style |",
        "|---|---|---|---|---|---|",
    ]
    for (stage, rate), cell in found.items():
        values = [f"{np.mean(cell[name]):.4f}" for name in ("clean", "reward_text", "reward_style")]
        lines.append(f"| {stage} | {rate:g} | {100 * np.mean(cell['found']) / 3:.1f} % | {' | '.join(values)} |")
    return "\n".join(lines) + "\n"


def run(row: str, seed: int) -> None:
    """Trains, draws, reads, writes; does nothing where the cell is done."""
    path, spec = cell_path(row, seed), ROWS[row]
    if path.is_file():
        return
    start = time.perf_counter()
    pipe, log = pipeline(spec, seed)
    trained = time.perf_counter() - start
    first = PICTURE_SEED + 1000 * seed
    told = {
        name: seen(pipe, prompts, first_seed=first, judge="B")
        for name, prompts in asked().items()
        if name == "long" or spec.short
    }
    spent = {"seconds_training": round(trained, 1), "seconds_all": round(time.perf_counter() - start, 1)}
    write_json(path, {"row": row, "seed": seed, "log": log, **spent, **told})


@cache
def asked() -> dict[str, list[str]]:
    """Held-out prompts: long ones, and short ones as the base was trained on."""
    short = {name: scene_prompts.short_prompts("test", NUM_SHORT, n) for n, name in ((1, "one"), (2, "two"))}
    return {"long": scene_prompts.prompts().test, **short}


def cell_path(row: str, seed: int) -> Path:
    """Where the result of a cell lies."""
    return RESULTS / f"{slug(row)}-seed{seed}.json"


def table() -> str:
    """The finished cells as Markdown: shares by judge B with intervals over prompts, then paired differences, then short prompts."""
    done = {
        row: {seed: json.loads(path.read_text()) for seed in SEEDS if (path := cell_path(row, seed)).is_file()}
        for row in ROWS
    }
    lines = [
        "Share of all stated attributes (garment, colour, background of four cells) that judge B finds; "
        f"{len(asked()['long'])} held-out prompts of four sentences, {STEPS} steps, guidance "
        f"{measure.chosen_guidance('scene-base'):g}. Intervals over prompts, 95 %. "
        "Reward: the cosine that stage reward trains on, taken apart (× 100).",
        "",
        "| row | share | interval | by seed | sentences 1 … 4 | clean | saturation | reward, text | reward, style |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row, cells in done.items():
        if cells:
            lines.append(_line(row, [cell["long"] for cell in cells.values()]))
    lines += ["", "| difference | points | interval |", "|---|---|---|"]
    lines += [_difference(done, *pair, "long") for pair in CONTRASTS]
    for name, number in (("one", 1), ("two", 2)):
        lines += [
            "",
            f"Prompts of {name} sentence{'s' * (number > 1)}, {NUM_SHORT} of them, which fit in 77 tokens:",
            "",
        ]
        lines += ["| row or difference | share or points | interval |", "|---|---|---|"]
        for row, cells in done.items():
            if ROWS[row].short and cells:
                shares, clusters = _shares([cell[name] for cell in cells.values()])
                lines.append(f"| {row} | {100 * np.mean(shares):.1f} % | {_interval(shares, clusters)} |")
        lines += [_difference(done, *pair, name) for pair in _OF_SHORT]
    return "\n".join(line for line in lines if line is not None) + "\n"


def omega_svg(steps: int) -> str:
    """What each ω changes against the supervised model: judge B's share, and the reward's parts (× 100), means over seeds."""
    values: dict[str, list[tuple[float, float]]] = {}
    for omega in OMEGAS:
        row = next(
            name for name, spec in ROWS.items() if (spec.stage, spec.omega, spec.steps) == ("reward", omega, steps)
        )
        paths = [(cell_path(row, s), cell_path("supervised, segments", s)) for s in SEEDS]
        cells = [
            [json.loads(path.read_text())["long"] for path in pair] for pair in paths if all(p.is_file() for p in pair)
        ]
        for name, of in _PLOTTED.items() if cells else ():
            change = np.mean([of(after) - of(before) for after, before in cells])
            values.setdefault(name, []).append((omega, 100 * float(change)))
    return line_plot(values, "ω; change against stage supervised, points", heights="{:+.1f}", zero=True)


_PLOTTED = {
    "judge B: share of what is stated": lambda cell: np.mean(cell["found"]) / 3,
    "judge B: clean": lambda cell: np.mean(cell["clean"]),
    "reward at ω 1": lambda cell: np.mean(cell["reward_text"]) + np.mean(cell["reward_style"]),
    "reward, text part": lambda cell: np.mean(cell["reward_text"]),
    "reward, style part": lambda cell: np.mean(cell["reward_style"]),
}


def _line(row: str, cells: list[Any]) -> str:
    shares, clusters = _shares(cells)
    sentences = np.mean([cell["found"] for cell in cells], axis=(0, 1)) / 3
    clean, saturation, text, style = (
        np.mean([cell[name] for cell in cells]) for name in ("clean", "saturation", "reward_text", "reward_style")
    )
    parts = (
        row,
        f"{100 * np.mean(shares):.1f} %",
        _interval(shares, clusters),
        ", ".join(f"{100 * np.mean(cell['found']) / 3:.1f}" for cell in cells),
        ", ".join(f"{100 * share:.0f}" for share in sentences),
        f"{clean:.3f}",
        f"{saturation:.3f}",
        f"{100 * text:.2f}",
        f"{100 * style:.2f}",
    )
    return f"| {' | '.join(parts)} |"


def _difference(done: dict[str, Any], first: str, second: str, prompts: str) -> Any:
    seeds = [seed for seed in SEEDS if seed in done[first] and seed in done[second]]
    if not seeds:
        return None
    ours, clusters = _shares([done[first][seed][prompts] for seed in seeds])
    theirs, _ = _shares([done[second][seed][prompts] for seed in seeds])
    gap: Difference = paired_difference(ours, theirs, clusters)
    return f"| {first} − {second} | {100 * gap.value:+.1f} | {100 * gap.low:+.1f} … {100 * gap.high:+.1f} |"


def _shares(cells: list[Any]) -> tuple[list[float], list[int]]:
    """Every picture's share of what its prompt states, and its prompt's number."""
    shares = [float(np.mean(found)) / 3 for cell in cells for found in cell["found"]]
    return shares, [prompt for cell in cells for prompt in range(len(cell["found"]))]


def _interval(shares: list[float], clusters: list[int]) -> str:
    groups = as_clusters(clusters, len(shares))
    found = mean_interval(np.array(shares), groups, num_resamples=2000, confidence=0.95, seed=0)
    return f"{100 * found.low:.1f} … {100 * found.high:.1f}"


def _rounded(values: torch.Tensor) -> list[float]:
    return [round(float(value), 4) for value in values]


def main() -> None:
    """Trains the reward, chooses, runs cells, or prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["reward", "choose", "run", "table"])
    parser.add_argument("--seeds", type=int, nargs="*", default=SEEDS)
    parser.add_argument("--rows", nargs="*", choices=ROWS, default=list(ROWS))
    args = parser.parse_args()
    if args.command == "reward" or not DIRECTION.is_file() and args.command != "table":
        write_json(RESULTS / "reward.json", train_reward())
    if args.command == "reward":
        print((RESULTS / "reward.json").read_text())
        return
    if args.command == "choose":
        text, file = choose(), "choice.md"
    else:
        for seed in args.seeds if args.command == "run" else ():
            for row in args.rows:
                run(row, seed)
        text, file = table(), "table.md"
        for steps in LENGTHS:
            write_file(RESULTS / f"omega-{steps}.svg", omega_svg(steps))
    write_file(RESULTS / file, text)
    print(text)


if __name__ == "__main__":
    main()
