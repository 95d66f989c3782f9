"""`mmalign train-reward`: a CLIP that compares pictures of long prompts segment by segment, made of preference pairs."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mmalign.cli.fields import options_of
from mmalign.cli.options import Command, Option, switch
from mmalign.cli.terminal import rank_prefix
from mmalign.cli.train import PAIRS, resume_from

_DATA = "model and data"


def make_command(config_class: Any) -> Command:
    """The options of the verb."""
    from mmalign.training.inherited import REFUSED

    own = [
        Option(
            name="model",
            help="a CLIP in transformers' layout, with safetensors weights: a Hub id or folder",
            required=True,
            group=_DATA,
        ),
        Option(name="data", help=PAIRS, required=True, group=_DATA),
        Option(name="eval_data", help="held-out pairs for --eval-strategy steps", group=_DATA, nullable=True),
        Option(
            name="output_dir",
            help="checkpoints and the trained CLIP go here",
            metavar="DIR",
            default="runs/reward",
            group=_DATA,
        ),
        Option(
            name="overwrite",
            help="remove the checkpoints of an earlier run there first",
            convert=switch,
            default=False,
            group=_DATA,
        ),
    ]
    without = {option.name for option in own} | {"local_rank"}
    return Command(
        prog="mmalign train-reward",
        description="Trains a CLIP to say which of two pictures suits a prompt better, sentence by sentence: LongAlign's Denscore "
        "(arXiv:2410.11817). The result is the scorer denscore:FOLDER.",
        example="mmalign train-reward --model laion/CLIP-ViT-H-14-laion2B-s32B-b79K --data my-pairs/ --output-dir runs/denscore",
        options=[*own, *options_of(config_class, refused=REFUSED, without=without)],
    )


def run(argv: Sequence[str]) -> int:
    """Trains, saves, and says how the result is used."""
    from transformers.trainer_utils import get_last_checkpoint

    from mmalign.training.denscore import DenscoreConfig, DenscoreTrainer

    given = make_command(DenscoreConfig).read(argv)
    if given is None:
        return 0
    folder, resume = Path(given["output_dir"]), resume_from(given)
    if str(resume).lower() in ("latest", "true"):
        resume = get_last_checkpoint(str(folder)) if folder.is_dir() else None
    fields = {item.name for item in dataclasses.fields(DenscoreConfig)} - {"resume_from_checkpoint"}
    args = DenscoreConfig(**given.chosen(fields) | {"output_dir": str(folder)})
    trainer = DenscoreTrainer(
        model=given["model"], args=args, train_dataset=given["data"], eval_dataset=given["eval_data"]
    )
    trainer.train(resume_from_checkpoint=resume)
    trainer.save_model()
    if not rank_prefix():
        print(f"{folder} holds the scorer denscore:{folder}: mmalign train longalign --scorer denscore:{folder} …")
    return 0
