"""`mmalign quickstart`: align, evaluate and report in one go, on the embedded playground unless told otherwise."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from pathlib import Path

from mmalign.cli import evaluate, train
from mmalign.cli.options import Command, Given, Option, UsageError, one_of, whole

_WHAT = "what is done"
# A second opinion for real models: SmPO's own reward is PickScore.
_REAL_SCORERS = ("clip:laion/CLIP-ViT-H-14-laion2B-s32B-b79K", "pickscore")
VERB = Command(
    prog="mmalign quickstart",
    description="Aligns a model, draws what it draws before and after, has both judged, and writes a report. Without options: the "
    "playground, a few minutes on two CPU cores.",
    example="mmalign quickstart --output-dir runs/quickstart",
    options=[
        Option(
            name="method",
            help="which method",
            convert=one_of(*train.ALIGNING),
            metavar="|".join(train.ALIGNING),
            default="smpo",
            group=_WHAT,
        ),
        Option(name="model", help="a Hub id, a diffusers folder, or playground", default="playground", group=_WHAT),
        Option(name="data", help="preference pairs, as in `mmalign train`", default="playground", group=_WHAT),
        Option(
            name="preset",
            help="published settings for a real model, as in `mmalign train`",
            convert=one_of("sd15", "sdxl"),
            metavar="sd15|sdxl",
            group=_WHAT,
            nullable=True,
        ),
        Option(name="prompts", help="prompts to evaluate a real model on", metavar="FILE", group=_WHAT, nullable=True),
        Option(
            name="max_steps",
            help="optimiser steps; none is 100 in the playground, else 200",
            convert=whole,
            metavar="N",
            group=_WHAT,
            nullable=True,
        ),
        Option(
            name="num_prompts",
            help="prompts of the evaluation; none is 500 in the playground, else all",
            convert=whole,
            metavar="N",
            group=_WHAT,
            nullable=True,
        ),
        Option(name="seed", help="of training and pictures", convert=whole, metavar="N", default=0, group=_WHAT),
        Option(name="output_dir", help="where everything goes", metavar="DIR", default="runs/quickstart", group=_WHAT),
    ],
)


def run(argv: Sequence[str]) -> int:
    """Runs it and says where everything is."""
    given = VERB.read(argv)
    if given is None:
        return 0
    if given["model"] == given["data"] == "playground":
        return _playground(given)
    if "playground" in (given["model"], given["data"]):
        raise UsageError(
            "the playground's model draws only what its pairs show: give both --model and --data, or neither"
        )
    return _real(given)


def _playground(given: Given) -> int:
    for name in ("preset", "prompts"):
        if given[name] is not None:
            raise UsageError(f"--{name} belongs to a real model (--model and --data); the playground has its own")
    from mmalign.evaluation import headline
    from mmalign.playground import quickstart

    options = {name: given[name] for name in ("max_steps", "num_prompts") if given[name] is not None}
    result, report = quickstart.run(given["output_dir"], method=given["method"], seed=given["seed"], **options)
    folder = Path(given["output_dir"])
    print(f"\n{headline(result)}\n")
    print(f"report       {report}")
    print(f"side by side {folder / 'side_by_side.png'}")
    print(f"LoRA         {folder / 'pytorch_lora_weights.safetensors'}")
    print(f'pipeline     DiffusionPipeline.from_pretrained("{folder / "pipeline"}")')
    return 0


def _real(given: Given) -> int:
    """The same as two verbs: `mmalign train`, then `mmalign evaluate`."""
    if given["prompts"] is None:
        raise UsageError("--prompts is missing: a file of prompts to evaluate on, which the pairs do not hold")
    folder, seed = Path(given["output_dir"]), str(given["seed"])
    words = {"--model": given["model"], "--data": given["data"], "--output-dir": str(folder), "--seed": seed}
    words |= {"--max-steps": str(given["max_steps"] or 200)}
    if given["preset"]:
        words |= {"--preset": given["preset"]}
    if code := train.run([given["method"], *chain(*words.items()), "--save-pipeline"]):
        return code
    words = {"--model": given["model"], "--lora": str(folder), "--prompts": given["prompts"], "--seed": seed}
    if given["num_prompts"] is not None:
        words |= {"--num-prompts": str(given["num_prompts"])}
    trained_on = ["--trained-on", "pickscore"] if given["method"] == "smpo" else []
    return evaluate.run(
        [*chain(*words.items()), "--scorers", *_REAL_SCORERS, *trained_on, "--output-dir", str(folder / "evaluation")]
    )
