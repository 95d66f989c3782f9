"""`mmalign probe METHOD`: short runs at a few learning rates, what they did to held-out pairs, and the command to train with."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from mmalign.cli import launch, probe_negative, train
from mmalign.cli.models import load_pipeline
from mmalign.cli.options import Alias, Command, Given, Option, UsageError, config_path, number, read_yaml, switch, whole
from mmalign.cli.terminal import command, without_options

_CANNOT = {
    "sft": "sft compares nothing, so there is nothing to probe",
    "self-npo": "self-npo compares nothing, so there is nothing to probe",
    "diffusion-npo": "diffusion-npo compares nothing, so there is nothing to probe",
    "longalign": "longalign compares nothing, so there is nothing to probe",
    "ppd": "ppd reads its users from the pairs, and the pairs that a probe holds out would be missed there",
    **dict.fromkeys(train.ANSWERING, "a probe draws timesteps of denoisers, and a model that answers has none"),
}
METHODS = [name for name in train.METHODS if name not in _CANNOT]
_GRID = "the probe"
_OWN = [
    Option(
        name="learning_rates",
        help="which to try; none is five around --learning-rate (or the preset's), each three times the one before",
        convert=number,
        metavar="X",
        many=True,
        group=_GRID,
        nullable=True,
    ),
    Option(name="steps", help="optimiser steps of each run", convert=whole, metavar="N", default=50, group=_GRID),
    Option(
        name="held_out",
        help="share of the prompts that no run trains on and all are measured on",
        convert=number,
        metavar="X",
        default=0.2,
        group=_GRID,
    ),
    Option(
        name="max_held_out",
        help="at most so many of their pairs are measured",
        convert=whole,
        metavar="N",
        default=512,
        group=_GRID,
    ),
    Option(
        name="draws",
        help="timesteps and noises at which each of them is measured",
        convert=whole,
        metavar="N",
        default=4,
        group=_GRID,
    ),
    Option(
        name="forget",
        help="run everything anew, whatever probe.json in --output-dir already tells",
        convert=switch,
        default=False,
        group=_GRID,
    ),
]
_HELP = """usage: mmalign probe METHOD [options]

Trains a few steps at each of several learning rates, always from the same start, measures what that did to preference pairs it held
out, and advises a learning rate and a beta, with the reason. The model is not changed and nothing is saved but probe.json.
METHOD is {methods}.

  mmalign probe dpo --model playground --data playground
  mmalign probe smpo --model stabilityai/stable-diffusion-xl-base-1.0 --data my-pairs/ --preset sdxl --gradient-accumulation-steps 16

Options of a method:  mmalign probe dpo --help
A negative side:      mmalign probe negative --help
"""
_EPILOG = """How to read the table (held-out pairs, but for the last two columns):
  accuracy        share of pairs that policy against reference ranks as the label does (mean over the draws), 95 % interval over prompts
  margin          by how much it does: mean of strength × (log-ratio of the winner − log-ratio of the loser), not scaled by beta
  saturation      share of the link's slope that pairs have lost at the beta of the runs; --beta-saturation is what is aimed at (20 %)
  beta            the one with the saturation that is aimed at
  winner's error  of the policy over the reference: above 0 the winner's likelihood falls
  price           log-likelihood that the winner lost for each unit of margin; above 1 the margin is bought with the winner;
                  – where no margin was gained
  gradient        median norm before clipping
  spikes          steps whose loss was over twice the first step's
All other options are those of `mmalign train`; they stand in the command that is printed last. Encoded pairs are kept for that run.
It is a rule of thumb: it sees no picture, and a longer run drifts further than a short one.
"""


def run(argv: Sequence[str]) -> int:
    """Probes, prints the table, the advice and the command; 1 where no learning rate was sound."""
    if argv[:1] == ["negative"]:
        return probe_negative.run(argv[1:])
    method, words = train.method_of(list(argv), "probe")
    if method is None:
        print(_HELP.format(methods=", ".join(METHODS)), end="")
        return 0
    if method not in METHODS:
        raise UsageError(f"{_CANNOT[method]}; the methods are {', '.join(METHODS)}")
    file = read_yaml(config_path(words))
    module, prefix, _ = train.METHODS[method]
    pipelines = import_module(module)
    typed: set[str] = set()
    given = make_command(method, getattr(pipelines, f"{prefix}Config"), typed).read(words, file)
    if given is None:
        return 0
    return _probe(method, getattr(pipelines, f"{prefix}Pipeline"), given, words, typed)


def make_command(method: str, config_class: Any, typed: set[str]) -> Command:
    """The options of `mmalign train METHOD` with those of a probe; `typed` receives what stood there before a preset came in."""
    like = train.make_command(method, config_class)

    def complete(given: Given) -> Given:
        typed.update(given.explicit)
        return like.complete(given)

    output = Option(
        name="output_dir", help="probe.json goes here", metavar="DIR", default=f"runs/probe-{method}", group=_GRID
    )
    without = {"output_dir", "overwrite", "scale_lr", "resume_from_checkpoint", "save_pipeline", *launch.NAMES}
    several = "a probe runs on one process; multiply --gradient-accumulation-steps by their number instead"
    return Command(
        prog=f"mmalign probe {method}",
        description="Which learning rate and beta: short runs from one start, measured on pairs that they did not see.",
        example=f"mmalign probe {method} --model playground --data playground",
        options=[*_OWN, output, *(option for option in like.options if option.name not in without)],
        aliases=[*like.aliases, *(Alias(name, several) for name in launch.NAMES)],
        epilog=_EPILOG,
        complete=complete,
    )


def _probe(method: str, pipeline_class: Any, given: Given, words: list[str], typed: set[str]) -> int:
    from mmalign.training.probe import FILE, probe
    from mmalign.training.probe_advice import CANNOT_KNOW, table

    folder = Path(given["output_dir"])
    if given["forget"]:
        (folder / FILE).unlink(missing_ok=True)
    fields = {item.name for item in dataclasses.fields(pipeline_class.config_class)} - {"output_dir"}
    options = given.chosen(fields)
    if train.is_opened_here(given):
        options["train_split"] = None
    found = probe(
        load_pipeline(given, pipeline_class, device="cpu"),
        train.source_of(given),
        output_dir=folder,
        learning_rates=given["learning_rates"],
        steps=given["steps"],
        held_out=given["held_out"],
        max_held_out=given["max_held_out"],
        draws=given["draws"],
        peft_config=train.lora_of(given),
        **options,
    )
    advice = found.advice
    print("\n" + table(advice.readings) + "\n")
    print("\n".join([*advice.reasons, CANNOT_KNOW, f"every number: {found.path}"]))
    if advice.learning_rate is None:
        return 1
    print("\nnext:\n  " + train_command(method, words, typed, advice))
    return 0


def train_command(method: str, words: list[str], typed: set[str], advice: Any) -> str:
    """`mmalign train` with what was typed, less the probe's own options, and the advised settings; a beta that was typed stays."""
    own = [option.name for option in _OWN]
    dropped = [*own, "output_dir", "learning_rate", "lr"]
    settings = ["--learning-rate", f"{advice.learning_rate:g}"]
    if "beta" not in typed:
        dropped += ["beta_saturation", "beta_calibration_steps"]
        settings += [] if advice.beta is None else ["--beta", f"{advice.beta:g}"]
    kept = without_options(words, dropped)
    return command("mmalign", "train", method, *kept, *settings)
