"""Do answers get better? Models that see, aligned on pairs of their own mistakes: DPO, RRPO on clips; DPO, ln_pref, KTO on pictures.

    python benchmarks/answers.py choose                # settings, on held-out pictures and clips of their own, one seed
    python benchmarks/answers.py run --worlds video    # every missing cell; stop and resume at will
    python benchmarks/answers.py table                 # results/answers/table.md from the finished cells
    python benchmarks/answers.py known                 # results/answers/known.md: what the pairs have left to teach

A cell is (world, row, seed): it aligns the playground's model, asks every held-out question, and keeps what each answer is worth.
CHOSEN was filled with what `choose` had shown, and committed with everything else here, before the first cell was run.

Of the clips' pairs only those of TAUGHT kinds are trained on; how questions of the other kinds are answered then is retention.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch

from mmalign import LFM2VLPipeline, RRPOPipeline
from mmalign.data.answer_tokens import collate_answers, encode_answers, padding_token
from mmalign.data.questions import Question
from mmalign.evaluation import answer, compare_likelihoods, grade, paired_difference
from mmalign.evaluation.answer_grades import Graded, pairs
from mmalign.files import slug, write_file, write_json
from mmalign.likelihood.reference import make_reference
from mmalign.playground import answer_pairs, answer_questions, picture_questions
from mmalign.playground.answering import MAX_NEW_TOKENS
from mmalign.training.token_measurement import media_features, scores
from mmalign.training.token_pipeline import TokenPipeline

RESULTS = Path(__file__).parent / "results" / "answers"
SEEDS = (0, 1, 2)
STEPS, BATCH = 150, 16
# Rows of the held-out photographs: no photograph is in both.
ROWS, CHOICE_ROWS = range(400), range(500, 700)
TAUGHT = {"video": ("exists", "moves", "order", "way", "first", "describe"), "vision": picture_questions.KINDS}
TOLERANCE = 0.02


@dataclass(frozen=True)
class Method:
    """A loss, and the settings among which `choose` chose."""

    pipeline: type[TokenPipeline]
    options: dict[str, Any] = field(default_factory=dict)
    grid: dict[str, Sequence[float]] = field(default_factory=dict)

    def candidates(self) -> list[dict[str, Any]]:
        """Every combination of the grid."""
        return [dict(zip(self.grid, values, strict=True)) for values in product(*self.grid.values())]


_RATES = {"learning_rate": (3e-5, 1e-4, 3e-4)}
_DPO_RATES = {"learning_rate": (1e-4, 3e-4)}
_DPO = {**_DPO_RATES, "beta": (0.5, 2.0)}
_AND_SFT = {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 1.0]}
METHODS: dict[str, dict[str, Method]] = {
    "video": {
        "sft": Method(TokenPipeline, {"loss_type": "sft"}, _RATES),
        "dpo": Method(TokenPipeline, {}, _DPO),
        "dpo + sft": Method(TokenPipeline, _AND_SFT, _DPO),
        "rrpo": Method(RRPOPipeline, {}, {**_DPO, "alpha": (0.01, 0.1)}),
    },
    "vision": {
        "sft": Method(TokenPipeline, {"loss_type": "sft"}, _RATES),
        "dpo": Method(LFM2VLPipeline, {}, _DPO),
        "dpo + sft": Method(LFM2VLPipeline, _AND_SFT, _DPO),
        "ln_pref": Method(
            LFM2VLPipeline, {"loss_type": "ln_pref", "beta": 5.0}, {**_DPO_RATES, "ln_pref_lambda": (0.0, 1.0)}
        ),
        "kto": Method(LFM2VLPipeline, {"loss_type": "kto"}, {**_DPO_RATES, "beta": (0.1, 0.5)}),
    },
}
# Rows of other pairs (see answer_pairs.py).
OTHER_PAIRS: dict[str, tuple[str, Any]] = {
    "dpo, perturbed mistakes": ("dpo", "perturbed"),
    "dpo, clear mistakes": ("dpo", "clear"),
}
# The best of each method in choice.md.
CHOSEN: dict[str, dict[str, dict[str, Any]]] = {
    "video": {
        "sft": {"learning_rate": 1e-4},
        "dpo": {"learning_rate": 1e-4, "beta": 2.0},
        "dpo + sft": {"learning_rate": 1e-4, "beta": 0.5},
        "rrpo": {"learning_rate": 1e-4, "beta": 2.0, "alpha": 0.1},
    },
    "vision": {
        "sft": {"learning_rate": 1e-4},
        "dpo": {"learning_rate": 1e-4, "beta": 2.0},
        "dpo + sft": {"learning_rate": 1e-4, "beta": 0.5},
        "ln_pref": {"learning_rate": 1e-4, "ln_pref_lambda": 1.0},
        "kto": {"learning_rate": 1e-4, "beta": 0.5},
    },
}
# Of RRPO at its own settings: what is left out.
ABLATIONS = {
    "rrpo, whole answers": {"refined": False},
    "rrpo, no KL": {"alpha": 0.0},
    "rrpo, neither": {"refined": False, "alpha": 0.0},
}


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    method: Method
    options: dict[str, Any]
    mistakes: Any = "any"


def rows_of(world: str) -> dict[str, Row]:
    """The rows of a world's table."""
    rows = {name: Row(METHODS[world][name], chosen) for name, chosen in CHOSEN[world].items()}
    if world == "video":
        rrpo = rows["rrpo"]
        rows |= {name: Row(rrpo.method, rrpo.options | change) for name, change in ABLATIONS.items()}
    others = {
        name: replace(rows[origin], mistakes=kind) for name, (origin, kind) in OTHER_PAIRS.items() if origin in rows
    }
    return rows | others


def measure(world: Any, line: Row | None, seed: int, rows: range) -> dict[str, Any]:
    """What every question's answer is worth; after a row's training, with KL and ranking on held-out pairs. None: the base."""
    started = time.perf_counter()
    pipe = aligned(world, line, seed)
    told: dict[str, Any] = {}
    if line is not None:
        reference = make_reference(pipe.model, kind="adapter")
        held_out = answer_pairs.load(world, "test", kinds=TAUGHT[world])
        found = compare_likelihoods(
            pipe.model, lambda: reference.model(pipe.model), pipe.processor, held_out, batch_size=BATCH, progress=False
        )
        assert found.ranking is not None
        told = {"kl": found.kl.value, "ranking": found.ranking.value}
    said = answers_of(pipe, world, rows)
    graded = grade(questions_of(world, rows), said)
    worth = "".join(str(int(one.score)) for one in graded)
    yes = "".join(str(int(text.startswith("yes"))) for text in said)
    return {**told, "worth": worth, "said_yes": yes, "seconds": round(time.perf_counter() - started, 1)}


def aligned(world: Any, line: Row | None, seed: int) -> TokenPipeline:
    """The world's model after a row's training; None: as it is."""
    name = f"playground-{world}"
    if line is None:
        return TokenPipeline.from_pretrained(name)
    pipe = line.method.pipeline.from_pretrained(name)
    with tempfile.TemporaryDirectory() as folder:
        pipe.align(
            answer_pairs.load(world, "train", mistakes=line.mistakes, kinds=TAUGHT[world]),
            output_dir=folder,
            max_steps=STEPS,
            per_device_train_batch_size=BATCH,
            gradient_checkpointing=False,
            warmup_steps=10,
            save_strategy="no",
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
            seed=seed,
            **line.method.options,
            **line.options,
        )
    return pipe


def answers_of(pipe: TokenPipeline, world: Any, rows: range) -> list[str]:
    """To every question about rows of a world, in order."""
    source = answer_questions.load(world, rows=rows)
    answers = answer(pipe, source, batch_size=64, max_new_tokens=MAX_NEW_TOKENS, progress=False)
    return [one.answer for one in answers.answers]


@torch.no_grad()
def known_table() -> str:
    """In how many pairs the base already gives the right answer more probability, seeing clearly as in training."""
    lines = [
        "Share of training pairs in which the base, seeing clearly as in training, already gives the right answer more probability "
        "than the wrong one, by the kind of question. Mistakes as in `mmalign.playground.answer_pairs.load`.",
        "",
        "| world | mistakes | pairs | descriptions | yes or no | others |",
        "|---|---|---|---|---|---|",
    ]
    for world, mistakes in product(METHODS, get_args(answer_pairs.Which)):
        pipe = TokenPipeline.from_pretrained(f"playground-{world}")
        source = answer_pairs.load(world, "train", mistakes=mistakes)  # type: ignore[arg-type]
        found: dict[str, list[bool]] = {"descriptions": [], "yes or no": [], "others": []}
        for start in range(0, len(source), BATCH):
            ones = [source[row] for row in range(start, min(start + BATCH, len(source)))]
            encoded = [encode_answers(pair, pipe.processor, pipe.model.config) for pair in ones]
            batch = collate_answers(encoded, padding_token(pipe.processor))
            told = scores(pipe.model, batch, media_features(pipe.model, batch)).log_prob.sum(1)
            for pair, chosen, rejected in zip(ones, *told.chunk(2), strict=True):
                sort = (
                    "yes or no" if pair.chosen in ("yes", "no") else "descriptions" if "," in pair.chosen else "others"
                )
                found[sort].append(bool(chosen > rejected))
        shares = [f"{100 * sum(values) / len(values):.1f} %" for values in found.values()]
        lines.append(f"| {world} | {mistakes} | {len(source)} | {' | '.join(shares)} |")
    return "\n".join(lines) + "\n"


def questions_of(world: Any, rows: range) -> list[Question]:
    """What was asked, in order."""
    source = answer_questions.load(world, rows=rows)
    return [source[row] for row in range(len(source))]


def choose(worlds: Sequence[str]) -> None:
    """Every candidate of every method, on rows that the table does not use. The best has most right answers and pairs together."""
    for world in worlds:
        for name, method in {"base": None, **METHODS[world]}.items():
            for options in [{}] if method is None else method.candidates():
                values = [f"{value:g}" for value in options.values()]
                path = RESULTS / "choice" / f"{'-'.join([world, slug(name), *values])}.json"
                if not path.is_file():
                    found = measure(world, method and Row(method, options), 0, CHOICE_ROWS)
                    write_json(path, {"world": world, "row": name, "options": options, **found})


def choice_table() -> str:
    """Right answers of every candidate."""
    cells = [json.loads(path.read_text()) for path in sorted((RESULTS / "choice").glob("*.json"))]
    lines = [
        f"Right answers to questions of the kinds that are trained on, about {len(CHOICE_ROWS)} held-out pictures or clips that the "
        f"table does not use; one seed, {STEPS} steps of {BATCH} pairs.",
        "",
        "| world | row | settings | right answers | hallucination pairs | other kinds | KL | ranking |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for world in METHODS:
        sheet = Sheet(world, questions_of(world, CHOICE_ROWS))
        for cell in (cell for cell in cells if cell["world"] == world):
            shares = [sheet.share(cell, part) for part in ("taught", "pairs", "others")]
            measured = [f"{cell[name]:.3f}" if name in cell else "" for name in ("kl", "ranking")]
            lines.append(f"| {' | '.join([world, cell['row'], _told(cell['options']), *shares, *measured])} |")
    return "\n".join(lines) + "\n"


class Sheet:
    """A world's questions, by which a cell's answers are counted: of taught kinds, hallucination pairs of them, the others."""

    def __init__(self, world: str, questions: Sequence[Question]) -> None:
        self.questions = questions
        self.taught = [question.kind in TAUGHT[world] for question in questions]

    def worth(self, cell: dict[str, Any], part: str) -> tuple[np.ndarray, list[str]]:
        """What the answers of a part are worth, and which picture or clip each is about."""
        graded = [Graded(q, "", float(worth), True) for q, worth in zip(self.questions, cell["worth"], strict=True)]
        ones = [one for one, taught in zip(graded, self.taught, strict=True) if taught == (part != "others")]
        ones = pairs(ones) if part == "pairs" else ones
        return np.array([one.score for one in ones]), [one.question.cluster for one in ones]

    def share(self, cell: dict[str, Any], part: str) -> str:
        """The mean, for a table."""
        worth, _ = self.worth(cell, part)
        return f"{100 * worth.mean():.1f} %" if len(worth) else ""

    def difference(self, ours: Sequence[dict[str, Any]], theirs: Sequence[dict[str, Any]], part: str) -> Any:
        """Of two rows, seed by seed; None where nothing was asked."""
        sides = [np.concatenate([self.worth(cell, part)[0] for cell in cells]) for cells in (ours, theirs)]
        clusters = self.worth(ours[0], part)[1] * len(ours)
        return paired_difference(*sides, clusters) if clusters else None

    def yes_share(self, cell: dict[str, Any]) -> float:
        """How often questions that are answered by yes or no are answered by yes; half the time would be right."""
        said = [yes == "1" for yes, q in zip(cell["said_yes"], self.questions, strict=True) if q.pair is not None]
        return sum(said) / len(said)


def cell_path(world: str, name: str, seed: int) -> Path:
    """Where the result of a cell lies."""
    return RESULTS / f"{slug(f'{world} {name}')}-seed{seed}.json"


def run(worlds: Sequence[str], seeds: Sequence[int]) -> None:
    """Every missing cell of these seeds; the base has one."""
    for world in worlds:
        cells = [("base", None, 0), *((name, line, seed) for seed in seeds for name, line in rows_of(world).items())]
        for name, line, seed in cells:
            if not cell_path(world, name, seed).is_file():
                about = {"world": world, "row": name, "seed": seed, "options": line and line.options}
                write_json(cell_path(world, name, seed), {**about, **measure(world, line, seed, ROWS)})


def table() -> str:
    """Every row beside its base, and RRPO beside DPO and its ablations."""
    lines = [
        f"Models of the playground, aligned on pairs of their own mistakes: {STEPS} steps of {BATCH} pairs, LoRA of rank 16. Questions "
        f"about {len(ROWS)} held-out pictures or clips; differences in points, with intervals of 95 % over pictures or clips, training "
        "seeds together. A hallucination pair is right if both of its questions are. KL from the base, nats a token, and ranking "
        "(share of pairs whose preferred answer gained more) on held-out pairs.",
    ]
    for world in METHODS:
        sheet, done = Sheet(world, questions_of(world, ROWS)), _done(world)
        if "base" not in done:
            continue
        (base,) = done["base"]
        columns = ["right answers", "over the base", "hallucination pairs", "over the base"]
        columns += ["other kinds", "over the base", "retention"] if world == "video" else []
        columns += ["says yes", "KL", "ranking", "seeds"]
        lines += ["", f"**{world}**", "", f"| row | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
        for name, cells in done.items():
            parts = [name]
            for part in ("taught", "pairs", *(["others"] if world == "video" else [])):
                found = sheet.difference(cells, [base] * len(cells), part)
                share = sum(sheet.worth(cell, part)[0].mean() for cell in cells) / len(cells)
                parts += [f"{100 * share:.1f} %", "" if name == "base" else _points(found)]
            if world == "video":
                parts.append("" if name == "base" else _kept(found))
            parts.append(f"{100 * sum(map(sheet.yes_share, cells)) / len(cells):.1f} %")
            parts += [
                f"{sum(c[k] for c in cells) / len(cells):.3f}" if k in cells[0] else "" for k in ("kl", "ranking")
            ]
            lines.append(f"| {' | '.join([*parts, str(len(cells))])} |")
        lines += _versus(sheet, done)
    return "\n".join(lines) + "\n"


def _versus(sheet: Sheet, done: dict[str, list[dict[str, Any]]]) -> list[str]:
    """RRPO − another row, for the rows of which both have all seeds."""
    others = [name for name in done if name not in ("base", "rrpo")]
    if "rrpo" not in done:
        return []
    lines = ["", "| RRPO minus | right answers | hallucination pairs | other kinds |", "|---|---|---|---|"]
    for name in others:
        if len(done[name]) == len(done["rrpo"]):
            told = [_points(sheet.difference(done["rrpo"], done[name], part)) for part in ("taught", "pairs", "others")]
            lines.append(f"| {' | '.join([name, *told])} |")
    return lines


def _done(world: str) -> dict[str, list[dict[str, Any]]]:
    found = {}
    for name in ("base", *rows_of(world)):
        paths = [path for seed in SEEDS if (path := cell_path(world, name, seed)).is_file()]
        if paths:
            found[name] = [json.loads(path.read_text()) for path in paths]
    return found


def _points(found: Any) -> str:
    return "" if found is None else f"{100 * found.value:+.1f} ({100 * found.low:+.1f} … {100 * found.high:+.1f})"


def _kept(found: Any) -> str:
    return "kept" if found.low > -TOLERANCE else "lost" if found.high < -TOLERANCE else "undecided"


def _told(options: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value:g}" for name, value in options.items())


def main() -> None:
    """Chooses, runs cells, or prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["choose", "run", "table", "known"])
    parser.add_argument("--worlds", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--seeds", nargs="+", type=int, choices=SEEDS, default=SEEDS, help="of the cells to run")
    args = parser.parse_args()
    if args.command == "choose":
        choose(args.worlds)
        text, file = choice_table(), "choice.md"
    elif args.command == "known":
        text, file = known_table(), "known.md"
    else:
        if args.command == "run":
            run(args.worlds, args.seeds)
        text, file = table(), "table.md"
    write_file(RESULTS / file, text)
    print(text)


if __name__ == "__main__":
    main()
