"""`mmalign probe negative`: what a negative side knows of rejected pictures, and what guidance away from it does."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from mmalign.cli.models import (
    ALIASES,
    check_negative,
    device_option,
    guidance_of,
    load_pipeline,
    model_options,
    negative_options,
)
from mmalign.cli.options import Command, Option, UsageError, number, switch, whole

_MODEL, _MEASURED = "the model", "what is measured"
_EPILOG = """How to read the tables:
  prefers the rejected picture   share of pairs whose rejected side the network finds likelier, against the base, than the preferred one
                  (95 % interval over prompts). Of the negative side well above 50 %: it knows what people dislike. "merged" is with
                  --lora mixed in as it is drawn with, by --negative-alpha and --negative-beta; the positive side is below 50 %
  noise           quarters of the schedule, from little noise to much
  cosine          of the two branches' predictions, the positive one's with the prompt, the negative one's without. Far below that of
                  plain guidance the branches do not belong together, and guidance is incoherent: lower --negative-beta
  spread          standard deviation of the guided prediction over that of plain guidance; well above 1 pictures burn: guide less
No picture is drawn: whether it pays is for `mmalign evaluate --negative`.
"""
VERB = Command(
    prog="mmalign probe negative",
    description="Measures a negative side on preference pairs, alone and mixed with the positive side; writes negative.json.",
    example="mmalign probe negative --model playground --negative runs/self-npo --data playground --data-split test",
    options=[
        *model_options(group=_MODEL, lora=True),
        *negative_options(group=_MODEL),
        device_option(_MODEL),
        Option(name="data", help="preference pairs, as of `mmalign train dpo`", required=True, group=_MEASURED),
        Option(name="data_split", help="which split; none is train", metavar="NAME", group=_MEASURED, nullable=True),
        Option(
            name="output_dir",
            help="negative.json goes here",
            metavar="DIR",
            default="runs/probe-negative",
            group=_MEASURED,
        ),
        Option(
            name="guidance_scale",
            help="the one that is drawn with; none is 7.5, or its own with --model playground or playground-scenes",
            convert=number,
            metavar="X",
            group=_MEASURED,
            nullable=True,
        ),
        Option(name="max_pairs", help="at most so many", convert=whole, metavar="N", default=512, group=_MEASURED),
        Option(
            name="draws",
            help="timesteps and noises at which each of them is measured",
            convert=whole,
            metavar="N",
            default=4,
            group=_MEASURED,
        ),
        Option(name="seed", help="what those are drawn from", convert=whole, metavar="N", default=0, group=_MEASURED),
        Option(name="batch_size", help="pairs at once", convert=whole, metavar="N", default=8, group=_MEASURED),
        Option(
            name="resolution",
            help="pixels of the short side and of the crop; none is the model's own",
            convert=whole,
            metavar="N",
            group=_MEASURED,
            nullable=True,
        ),
        Option(
            name="num_frames",
            help="frames of a clip; none is the video model's own",
            convert=whole,
            metavar="N",
            group=_MEASURED,
            nullable=True,
        ),
        Option(name="progress", help="show a bar", convert=switch, default=True, hidden=True, group=_MEASURED),
    ],
    aliases=ALIASES,
    epilog=_EPILOG,
)


def run(argv: Sequence[str]) -> int:
    """Measures, prints both tables, and says where the numbers are."""
    given = VERB.read(argv)
    if given is None:
        return 0
    check_negative(given)
    if given["negative"] is None:
        raise UsageError("nothing to measure: give --negative")
    if given["lora"] is None and given["negative_alpha"] != 1:
        raise UsageError("--negative-alpha acts on --lora, and there is none")
    from mmalign import SelfNPOPipeline
    from mmalign.training.negative_probe import probe_negative

    # By itself the negative side has nothing that α could keep.
    unmixed = replace(given, values=given.values | {"negative_alpha": 1.0})
    merged = None
    if given["lora"] is not None:
        merged = load_pipeline(given, SelfNPOPipeline, lora=given["lora"], negative=given["negative"])
    found = probe_negative(
        load_pipeline(unmixed, SelfNPOPipeline, negative=given["negative"]),
        given["data"],
        merged=merged,
        guidance_scale=guidance_of(given),
        split=given["data_split"],
        **{
            name: given[name]
            for name in ("draws", "max_pairs", "batch_size", "seed", "progress", "resolution", "num_frames")
        },
    )
    print(f"\n{found.table()}\n\nevery number: {found.save(given['output_dir'])}")
    return 0
