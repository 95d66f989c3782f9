"""`mmalign quickstart`: align, evaluate and report in one go, on the embedded playground unless told otherwise."""

from __future__ import annotations

from collections.abc import Sequence

from mmalign.cli.options import Command, Option, one_of, whole

_WHAT = "what is done"
VERB = Command(
    prog="mmalign quickstart",
    description="Aligns a model, draws what it draws before and after, has both judged, and writes a report. Without options: the "
    "playground, a few minutes on two CPU cores.",
    example="mmalign quickstart --output-dir runs/quickstart",
    options=[
        Option(
            name="method",
            help="which method",
            convert=one_of("smpo", "inpo", "dpo", "sft"),
            metavar="smpo|inpo|dpo|sft",
            default="smpo",
            group=_WHAT,
        ),
        Option(name="model", help="a Hub id, a diffusers folder, or playground", default="playground", group=_WHAT),
        Option(name="data", help="preference pairs, as in `mmalign train`", default="playground", group=_WHAT),
        Option(name="max_steps", help="optimiser steps", convert=whole, metavar="N", default=200, group=_WHAT),
        Option(
            name="num_prompts",
            help="prompts of the evaluation; none is what the quickstart suggests",
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
    """Runs it and prints where the report is."""
    given = VERB.read(argv)
    if given is None:
        return 0
    from mmalign.playground import quickstart

    options = {name: given[name] for name in ("method", "max_steps", "seed", "model", "data")}
    if given["num_prompts"] is not None:
        options["num_prompts"] = given["num_prompts"]
    report = quickstart.run(given["output_dir"], **options)
    print(f"report: {report}")
    return 0
