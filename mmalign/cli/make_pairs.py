"""`mmalign make-pairs`: preference pairs from one's own prompts, drawn by a model and judged by a scorer."""

from __future__ import annotations

from collections.abc import Sequence

from mmalign.cli.evaluate import scorer_named
from mmalign.cli.models import (
    ALIASES,
    best_device,
    device_option,
    load_pipeline,
    model_options,
    prompt_options,
    read_prompts,
    sampling_of,
    sampling_options,
)
from mmalign.cli.options import Command, Option, number, whole
from mmalign.scorer_names import SCORERS

_MODEL, _WHAT = "the model", "which pairs"
VERB = Command(
    prog="mmalign make-pairs",
    description="Draws several pictures a prompt, scores them, and writes the best and the worst of each prompt as a pair: a folder "
    "that `mmalign train` reads. Stopped and started again, it draws what is missing. The scorer's taste is then what training "
    "teaches: evaluate with another one.",
    example="mmalign make-pairs --model stabilityai/stable-diffusion-xl-base-1.0 --prompts prompts.txt --scorer hpsv2.1",
    options=[
        *model_options(group=_MODEL, lora=True),
        device_option(_MODEL),
        *prompt_options(_WHAT),
        Option(
            name="scorer",
            help=", ".join(SCORERS),
            metavar="NAME",
            required=True,
            group=_WHAT,
        ),
        Option(
            name="images_per_prompt",
            help="how many pictures the best and the worst are picked from",
            convert=whole,
            metavar="K",
            default=4,
            group=_WHAT,
        ),
        Option(
            name="min_margin",
            help="no pair where best and worst score lie no further apart, in the scorer's own unit",
            convert=number,
            metavar="X",
            default=0.0,
            group=_WHAT,
        ),
        Option(name="output_dir", help="where pairs and pictures go", metavar="DIR", default="my-pairs", group=_WHAT),
        *sampling_options(),
    ],
    aliases=ALIASES,
)


def run(argv: Sequence[str]) -> int:
    """Draws, scores, pairs, and says how many."""
    given = VERB.read(argv)
    if given is None:
        return 0
    prompts = read_prompts(given)
    from mmalign.evaluation import make_pairs

    # The scorer before the model, so that a misspelt name is told at once.
    judge = scorer_named(given["scorer"], best_device(given["device"]))
    made = make_pairs(
        load_pipeline(given, lora=given["lora"]),
        prompts,
        judge,
        output_dir=given["output_dir"],
        num_images_per_prompt=given["images_per_prompt"],
        min_margin=given["min_margin"],
        seed=given["seed"],
        **sampling_of(given),
    )
    print(f"{made.num_pairs} pairs in {made.folder}/metadata.jsonl; {made.num_left_out} prompts gave none")
    print(f"train on them: mmalign train dpo --model {given['model']} --data {made.folder}")
    return 0
