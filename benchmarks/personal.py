"""Does PPD draw for people it has never met? Four pairs of each of 560 new users, each asking one held-out prompt, told by judge B.

    python benchmarks/personal.py probe      # what four pairs can tell of a taste, and what is left of it in the tokens
    python benchmarks/personal.py choose     # settings, by judge A, on training prompts and users who have no other part
    python benchmarks/personal.py run        # every missing cell, one training seed after the other; stop and resume at will
    python benchmarks/personal.py table      # results/personal/table.md and interpolation.svg from the finished cells

Users are drawn from the law of the playground's raters, with tastes STRENGTH times as strong, look through judge A, and are as
unsure as the raters are. Training users compare the stored training pairs; new ones the stored test pairs, which no training saw. A
cell is (who draws, training seed): it draws every test prompt for a user of its own, and keeps how much this user likes the picture,
by their law as judge B reads it. CHOSEN was filled with what `choose` had shown, and committed with everything else here, before the
first cell was run.
"""

import argparse
import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from line_plot import line_plot
from torch import Tensor
from torch.nn import functional as F

import mmalign
from mmalign.data import PairSource, load_pairs
from mmalign.data.clip_users import ClipUserEncoder, clip_scorer
from mmalign.data.users import UserEmbeddings, embed_users
from mmalign.evaluation import paired_difference, win_rate
from mmalign.evaluation.generate import generate_batches
from mmalign.files import slug, write_file, write_json
from mmalign.playground import judges, measure, pairs, photographs, raters, settings

RESULTS = Path(__file__).parent / "results" / "personal"
SEEDS = (0, 1, 2)
PICTURE_SEED, END_SEED, CHOICE_SEED = 5_000_000, 5_500_000, 4_000_000
SHOTS = 4
STRENGTH = 4.0
# A training user's comparisons, of which ties are left out, and groups of four that may tell who they are.
NUM_TRAINING_USERS, COMPARISONS, GROUPS = 400, 20, 4
NUM_CHOICE_USERS = 280
TRAINING_TASTES, NEW_TASTES, CHOICE_TASTES = 7001, 7002, 7003
STEPS = {"max_steps": 240}
SAMPLING_STEPS = 10
CANDIDATES: dict[str, dict[str, Any]] = {
    "as dpo": {},
    "lr 1e-3": {"learning_rate": 1e-3},
    "lr 1e-3, beta 500": {"learning_rate": 1e-3, "beta": 500.0},
}
SCALES = (1.0, 2.0)
# Of the candidates, and how strongly users are read: what pleased new users best.
CHOSEN: tuple[str, float] | None = ("as dpo", 1.0)
# Who draws → for whom: nobody, the user, the user as someone with the same but milder tastes told them, or somebody else.
DRAWERS = {
    "base": "nobody",
    "dpo": "nobody",
    "ppd": "own",
    "ppd, told by milder tastes": "mild",
    "ppd, told of another user": "another",
}
# Interpolation: the users fondest of ATTRIBUTE, each with one who likes it least, and the prompts that each two ask.
ATTRIBUTE, NUM_ENDS, NUM_END_PROMPTS = "saturation", 20, 4
WEIGHTS = (0.0, 0.25, 0.5, 0.75, 1.0)


@dataclass(frozen=True, eq=False)
class People:
    """Users with their hidden tastes, and what they compared: stored pairs by row, and a label each."""

    tastes: dict[str, raters.Taste]
    source: PairSource
    rows: list[int]
    labels: list[float]


@cache
def people(number: int, seed: int, split: str, strength: float = STRENGTH) -> People:
    """`number` users, each of whom compared COMPARISONS of the stored pairs of a split."""
    tastes = {f"{seed}-{i}": stronger(taste, strength) for i, taste in enumerate(raters.users(number, seed))}
    reading, matched = seen(split)
    rng, half = np.random.default_rng(seed), len(matched.asked) // 2
    rows: list[int] = []
    labels: list[float] = []
    for taste in tastes.values():
        liking = raters.utility(taste, reading, matched)
        asked = rng.permutation(half)[:COMPARISONS]
        rows += asked.tolist()
        labels += raters.compare(liking[asked], liking[half + asked], rng).tolist()
    opinions = [
        (name, labels[place * COMPARISONS + i]) for place, name in enumerate(tastes) for i in range(COMPARISONS)
    ]
    source = load_pairs("playground", split=split).judged(
        rows, opinions, f"{number} users of {split}, tastes {strength:g}"
    )
    return People(tastes, source, rows, labels)


def stronger(taste: raters.Taste, strength: float) -> raters.Taste:
    """The taste times `strength`, but for the favourite colour, which a prompt decides."""
    return replace(taste, **{name: strength * getattr(taste, name) for name in ("saturation", "brightness", "size")})


@cache
def stored(split: str) -> list[Any]:
    """The pictures of the stored pairs: first sides, then second ones."""
    records = list(load_pairs("playground", split=split))
    return [record.image_0 for record in records] + [record.image_1 for record in records]


@cache
def seen(split: str) -> tuple[judges.Reading, judges.Match]:
    """What judge A sees in them."""
    reading = judges.load("A").read(judges.to_tensor(stored(split)))
    return reading, judges.match(reading, load_pairs("playground", split=split).prompts() * 2)


def attributes(reading: judges.Reading) -> Tensor:
    """Saturation, brightness and size (B, 3), in the law's standard deviations."""
    shown = reading.measured
    return torch.stack([shown.saturation / 0.12, shown.brightness / 0.12, shown.garment_share / 0.1], 1)


def probe() -> str:
    """R² of a linear map from four pairs' tokens, normalised as the attention does, to tastes: of users it was not fitted on."""
    lines = [
        f"Share of the variance of users' tastes that a linear map, fitted on {NUM_TRAINING_USERS} others, tells from {SHOTS} pairs.",
        "",
        "| tastes | what is read of a picture | saturation | brightness | size |",
        "|---|---|---|---|---|",
    ]
    for strength in (1.0, STRENGTH):
        fitted, told = (
            people(number, seed, "train", strength)
            for number, seed in ((NUM_TRAINING_USERS, TRAINING_TASTES), (NUM_CHOICE_USERS, CHOICE_TASTES))
        )
        for name, features in readings().items():
            shares = explained(*_regression(fitted, features), *_regression(told, features))
            lines.append(f"| × {strength:g} | {name} | {' | '.join(f'{share:.2f}' for share in shares)} |")
    return "\n".join(lines) + "\n"


@cache
def readings() -> dict[str, Tensor]:
    """What may be read of the stored training pictures, (B, D) each: the truth, and what the reward's CLIP has in each layer."""
    scorer = clip_scorer("playground")
    parts = []
    with torch.no_grad():
        for start in range(0, len(stored("train")), 200):
            inputs = scorer.preprocess(stored("train")[start : start + 200])
            found = scorer.model.vision_model(pixel_values=inputs, output_hidden_states=True)
            parts.append([*(layer[:, 1:].mean(1) for layer in found.hidden_states), found.pooler_output])
    layers = [torch.cat(layer) for layer in zip(*parts, strict=True)]
    names = [
        *(f"patches after {k} of {len(layers) - 2} layers" for k in range(len(layers) - 1)),
        "class token at the end",
    ]
    return {"the tastes' own attributes": attributes(seen("train")[0]), **dict(zip(names, layers, strict=True))}


def _regression(who: People, features: Tensor) -> tuple[Tensor, Tensor]:
    """Mean tokens (N, D) of one group of every user, and tastes (N, 3)."""
    half, tokens = len(features) // 2, []
    difference = features[:half] - features[half:]
    for place in range(len(who.tastes)):
        own = slice(place * COMPARISONS, (place + 1) * COMPARISONS)
        decided = [
            (row, 2 * label - 1) for row, label in zip(who.rows[own], who.labels[own], strict=True) if label != 0.5
        ]
        rows, signs = zip(*decided[:SHOTS], strict=True)
        shots = torch.tensor(signs)[:, None] * difference[list(rows)]
        tokens.append(F.layer_norm(shots, shots.shape[-1:]).mean(0))
    wanted = [[taste.saturation, taste.brightness, taste.size] for taste in who.tastes.values()]
    return torch.stack(tokens).double(), torch.tensor(wanted).double()


def explained(x: Tensor, y: Tensor, other_x: Tensor, other_y: Tensor) -> list[float]:
    """R² on others of ridge regressions, the ridge chosen on the last quarter of those fitted."""
    cut = 3 * len(x) // 4
    tried = [(_unexplained(x[:cut], y[:cut], x[cut:], y[cut:], ridge).mean(), ridge) for ridge in (1, 10, 100, 1000)]
    return (1 - _unexplained(x, y, other_x, other_y, min(tried)[1])).tolist()


def _unexplained(x: Tensor, y: Tensor, other_x: Tensor, other_y: Tensor, ridge: float) -> Tensor:
    centre, spread, mean = x.mean(0), x.std(0), y.mean(0)
    x, other_x = ((part - centre) / spread for part in (x, other_x))
    weights = torch.linalg.solve(x.T @ x + ridge * torch.eye(x.shape[1]).double(), x.T @ (y - mean))
    return (other_x @ weights + mean - other_y).square().sum(0) / (other_y - mean).square().sum(0)


def trained(drawer: str, changes: Mapping[str, Any], seed: int) -> Any:
    """The base, aligned on what the training users compared; for PPD with their tokens beside it."""
    who = people(NUM_TRAINING_USERS, TRAINING_TASTES, "train")
    options: dict[str, Any] = {"save_strategy": "no", "report_to": "none", "seed": seed, **STEPS, **changes}
    with tempfile.TemporaryDirectory() as place:
        if drawer == "dpo":
            pipe: Any = mmalign.DiffusionDPOPipeline.from_pretrained("playground")
        else:
            pipe = mmalign.PPDPipeline.from_pretrained("playground")
            options["users"] = str(tokens_of(who, GROUPS).save(Path(place) / "users.safetensors"))
        pipe.align(who.source, output_dir=Path(place) / "run", preset="playground", **options)
    return pipe


@cache
def tokens_of(who: People, groups: int = 1) -> UserEmbeddings:
    """Every user's groups of four pairs, as `mmalign embed-users --encoder playground` reads them."""
    found = embed_users(
        who.source, ClipUserEncoder(clip_scorer("playground")), shots=SHOTS, per_user=groups, progress=False
    )
    assert len(found) == len(who.tastes)
    return found


def told(who: People, shift: int = 0) -> list[Tensor]:
    """The tokens of every user, in order, or of the one so many places further on."""
    own = [tokens_of(who).user(name) for name in who.tastes]
    return own[shift:] + own[:shift]


def drawn(
    pipe: Any, prompts: Sequence[str], first_seed: int, judge: photographs.Half, users: Any = None, **call: Any
) -> tuple[judges.Reading, judges.Match]:
    """One picture a prompt, for a user each where there are any, as a judge reads them. users: a list, or one for all."""
    images: list[Any] = []
    for start in range(0, len(prompts), 56):
        asked = prompts[start : start + 56]
        own = users[start : start + 56] if isinstance(users, list) else users
        for batch in generate_batches(
            pipe,
            asked,
            list(range(first_seed + start, first_seed + start + len(asked))),
            num_inference_steps=SAMPLING_STEPS,
            guidance_scale=measure.chosen_guidance(),
            batch_size=len(asked),
            progress=False,
            call={} if users is None else {"user": own, **call},
        ):
            images += batch
    reading = judges.load(judge).read(judges.to_tensor(images))
    return reading, judges.match(reading, prompts)


def liking(who: People, reading: judges.Reading, matched: judges.Match) -> list[float]:
    """How much user i likes picture i."""
    likings = torch.stack([raters.utility(taste, reading, matched) for taste in who.tastes.values()])
    return [round(value, 5) for value in likings.diagonal().tolist()]


def choose() -> str:
    """Every candidate at every scale, for choice users on training prompts by judge A, with one training seed."""
    who = people(NUM_CHOICE_USERS, CHOICE_TASTES, "train")
    prompts = pairs.prompts().train[:NUM_CHOICE_USERS]
    cells: dict[tuple[str, float], Any] = {}
    for name in ("base", "dpo", *CANDIDATES):
        scales = SCALES if name in CANDIDATES else (0.0,)
        paths = {scale: RESULTS / "choice" / f"{slug(name)}-scale{scale:g}.json" for scale in scales}
        pipe = (
            None if all(path.is_file() for path in paths.values()) else drawer(name, CANDIDATES.get(name, {}), seed=0)
        )
        for scale, path in paths.items():
            if not path.is_file():
                found = {"name": name, "scale": scale}
                for key, shift in {"own": 0, "another": NUM_CHOICE_USERS // 2}.items() if scale else (("own", 0),):
                    told_of = {"users": told(who, shift), "user_scale": scale} if scale else {}
                    found[key] = liking(who, *drawn(pipe, prompts, CHOICE_SEED, "A", **told_of))
                write_json(path, found)
            cells[name, scale] = json.loads(path.read_text())
    lines = [
        f"How often {NUM_CHOICE_USERS} users like what is drawn for them better, by judge A on training prompts, one training seed.",
        "",
        "| drawn by | scale | than the base's | than DPO's | than what is drawn for another |",
        "|---|---|---|---|---|",
    ]
    base, dpo = cells["base", 0.0]["own"], cells["dpo", 0.0]["own"]
    for (name, scale), cell in cells.items():
        own = cell["own"]
        rates = [rated(own, base), rated(own, dpo), rated(own, cell["another"]) if scale else ""]
        lines.append(f"| {' | '.join((name, f'{scale:g}' if scale else '', *rates))} |")
    return "\n".join(lines) + "\n"


def drawer(name: str, changes: Mapping[str, Any], seed: int) -> Any:
    """Who draws: the base as it is, or aligned."""
    return mmalign.PPDPipeline.from_pretrained("playground") if name == "base" else trained(name, changes, seed)


def run(seed: int) -> None:
    """Trains what the seed's missing cells need, and draws them."""
    if CHOSEN is None:
        raise SystemExit("CHOSEN is empty: fill it with what `choose` shows, and commit it before the first cell")
    name, scale = CHOSEN
    prompts = pairs.prompts().test
    new = people(len(prompts), NEW_TASTES, "test")
    users = {
        "nobody": {},
        "own": {"users": told(new), "user_scale": scale},
        "mild": {"users": told(people(len(prompts), NEW_TASTES, "test", 1.0)), "user_scale": scale},
        "another": {"users": told(new, len(prompts) // 2), "user_scale": scale},
    }
    pipes: dict[str, Any] = {}
    for cell, whom in DRAWERS.items():
        if not cell_path(cell, seed).is_file():
            kind = cell.partition(",")[0]
            pipes[kind] = pipes.get(kind) or drawer(kind, CANDIDATES[name] if kind == "ppd" else {}, seed)
            reading, matched = drawn(pipes[kind], prompts, PICTURE_SEED + 1000 * seed, "B", **users[whom])
            write_json(
                cell_path(cell, seed),
                {
                    "drawn by": cell,
                    "seed": seed,
                    "settings": {**STEPS, **(CANDIDATES[name] if kind == "ppd" else {})},
                    "all_three": round(float(matched.all.float().mean()), 4),
                    "clean": round(float(reading.clean.mean()), 4),
                    "scores": [round(float(score), 5) for score in judges.score(reading, matched)],
                    "liking": liking(new, reading, matched),
                    "mild": liking(people(len(prompts), NEW_TASTES, "test", 1.0), reading, matched),
                },
            )
    path = RESULTS / f"interpolation-seed{seed}.json"
    if not path.is_file():
        pipe = pipes.get("ppd") or drawer("ppd", CANDIDATES[name], seed)
        write_json(path, {mix: between(pipe, new, mix, scale, seed) for mix in ("tokens", "scores")})


def between(pipe: Any, who: People, mix: str, scale: float, seed: int) -> dict[str, list[float]]:
    """ATTRIBUTE of every picture by the fonder user's weight: users at the two ends of the taste, mixed."""
    order = sorted(who.tastes, key=lambda name: getattr(who.tastes[name], ATTRIBUTE))
    asked = pairs.prompts().test[:: len(pairs.prompts().test) // NUM_END_PROMPTS][:NUM_END_PROMPTS]
    pipe.users = tokens_of(who)
    found: dict[str, list[float]] = {}
    for weight in WEIGHTS:
        values: list[float] = []
        for place in range(NUM_ENDS):
            shares = {order[-1 - place]: weight, order[place]: 1 - weight}
            user = {name: share for name, share in shares.items() if share}
            first_seed = END_SEED + 10_000 * seed + 100 * place
            reading, _ = drawn(pipe, asked, first_seed, "B", user, user_scale=scale, user_mix=mix)
            values += getattr(reading.measured, ATTRIBUTE).tolist()
        found[f"{weight:g}"] = [round(value, 5) for value in values]
    return found


def cell_path(cell: str, seed: int) -> Path:
    """Where the result of a cell lies."""
    return RESULTS / f"{slug(cell)}-seed{seed}.json"


def rated(ours: Sequence[float], theirs: Sequence[float], seeds: int = 1) -> str:
    """The win rate with its interval; a user's rows, one a training seed, are one draw."""
    clusters = list(range(len(ours) // seeds)) * seeds
    rate = win_rate(ours, theirs, clusters, tie_margin=settings.TIE_MARGIN)
    return f"{100 * rate.rate:.1f} % ({100 * rate.low:.1f} … {100 * rate.high:.1f})"


CONTRASTS = (
    ("dpo", "base", "liking"),
    ("ppd", "base", "liking"),
    ("ppd", "dpo", "liking"),
    ("ppd", "ppd, told of another user", "liking"),
    ("ppd, told of another user", "base", "liking"),
    ("ppd, told of another user", "dpo", "liking"),
    ("ppd, told by milder tastes", "base", "mild"),
    ("ppd, told by milder tastes", "dpo", "mild"),
    ("ppd, told by milder tastes", "ppd, told of another user", "mild"),
    ("ppd", "dpo", "scores"),
)
LIKED = {
    "liking": "by this user",
    "mild": f"by a user with the same taste, {STRENGTH:g} times milder",
    "scores": "by what all users share",
}


def table() -> str:
    """Every contrast over all seeds and by seed; then what lies between two users."""
    done = {
        (cell, seed): json.loads(path.read_text())
        for cell in DRAWERS
        for seed in SEEDS
        if (path := cell_path(cell, seed)).is_file()
    }
    lines = [
        f"How often a picture is liked better than another one of the same prompt and seed: {len(pairs.prompts().test)} held-out "
        "prompts, each asked by a new user who is told by four pairs; by judge B; intervals over users.",
        "",
        "| drawn by | against | liked | win rate | by training seed |",
        "|---|---|---|---|---|",
    ]
    for first, second, key in CONTRASTS:
        seeds = [seed for seed in SEEDS if (first, seed) in done and (second, seed) in done]
        if seeds:
            ours, theirs = ([done[cell, seed][key] for seed in seeds] for cell in (first, second))
            each = ", ".join(rated(a, b).partition(" ")[0] for a, b in zip(ours, theirs, strict=True))
            told_rate = rated(sum(ours, []), sum(theirs, []), len(seeds))
            lines.append(f"| {first} | {second} | {LIKED[key]} | {told_rate} | {each} |")
    lines += ["", "| drawn by | all three as asked | clean |", "|---|---|---|"]
    for cell in DRAWERS:
        if found := [done[cell, seed] for seed in SEEDS if (cell, seed) in done]:
            shown, clean = (sum(one[name] for one in found) / len(found) for name in ("all_three", "clean"))
            lines.append(f"| {cell} | {100 * shown:.1f} % | {clean:.3f} |")
    return "\n".join([*lines, "", *_interpolated()]) + "\n"


def _interpolated() -> list[str]:
    lines = [
        f"Mean {ATTRIBUTE} between two new users, {NUM_ENDS} pairs of them from the two ends of the taste, and how much it rises "
        "from one weight to the next; intervals over pairs of users.",
        "",
        f"| mixed in | {' | '.join(f'w = {weight:g}' for weight in WEIGHTS)} |",
        f"|{'---|' * (len(WEIGHTS) + 1)}",
    ]
    for mix, values in _between().items():
        clusters = [row // NUM_END_PROMPTS for row in range(NUM_ENDS * NUM_END_PROMPTS)] * (
            len(values[0]) // (NUM_ENDS * NUM_END_PROMPTS)
        )
        parts = [f"{np.mean(values[0]):.3f}"]
        for before, after in zip(values, values[1:], strict=False):
            rise = paired_difference(after, before, clusters)
            parts.append(f"{np.mean(after):.3f} ({rise.value:+.3f}: {rise.low:+.3f} … {rise.high:+.3f})")
        lines.append(f"| {mix} | {' | '.join(parts)} |")
    return lines


def _between() -> dict[str, list[list[float]]]:
    """Mixed in what → by weight, the values of all finished seeds."""
    cells = [json.loads(p.read_text()) for s in SEEDS if (p := RESULTS / f"interpolation-seed{s}.json").is_file()]
    if not cells:
        return {}
    return {mix: [[v for cell in cells for v in cell[mix][f"{weight:g}"]] for weight in WEIGHTS] for mix in cells[0]}


def interpolation_svg() -> str:
    """Mean ATTRIBUTE against the weight of the fonder user, a line a way of mixing."""
    lines = {
        f"in the {mix}": [(weight, float(np.mean(part))) for weight, part in zip(WEIGHTS, values, strict=True)]
        for mix, values in _between().items()
    }
    return line_plot(lines, f"weight of the user fonder of {ATTRIBUTE}", heights="{:.3f}")


def main() -> None:
    """Probes, chooses, runs cells, or prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["probe", "choose", "run", "table"])
    parser.add_argument("--seeds", type=int, nargs="*", default=SEEDS)
    args = parser.parse_args()
    if args.command in ("probe", "choose"):
        text, file = (probe(), "probe.md") if args.command == "probe" else (choose(), "choice.md")
    else:
        for seed in args.seeds if args.command == "run" else ():
            run(seed)
        text, file = table(), "table.md"
        write_file(RESULTS / "interpolation.svg", interpolation_svg())
    write_file(RESULTS / file, text)
    print(text)


if __name__ == "__main__":
    main()
