"""`mmalign merge`: several fine-tuned models of one base as one."""

from __future__ import annotations

from collections.abc import Sequence

from mmalign.cli.options import Alias, Command, Option, number, one_of, whole

_WHAT, _HOW = "what is merged", "how"
_METHODS = ("soup", "task_arithmetic", "ties", "dare", "dare_ties", "della")
_EPILOG = """Methods (δ is what a model has beyond the base):
  soup             the weighted mean of the models; for runs of one recipe with other seeds or learning rates
  task_arithmetic  base + Σ weight · δ; for models that learned different things
  ties             keeps the largest entries of each δ, elects a sign per entry, averages those that agree; where δs contradict
  dare, dare_ties  drops entries of δ by chance and scales the others up; then the sum, or the election of ties
  della            as dare_ties, but small entries are dropped more often

None of them is best everywhere: merge in several ways, and evaluate each on data that decided nothing before.
"""

VERB = Command(
    prog="mmalign merge",
    description="Writes one model made of several that were trained from the same base, as a folder that plain transformers loads. "
    "Only one file of the result is in memory at a time. Config and tokenizer are the base's; merge.json tells what was done.",
    example="mmalign merge runs/dpo runs/ln-pref --base LiquidAI/LFM2-VL-450M --method ties --output merged",
    options=[
        Option(
            name="models",
            help="folders of runs, or folders or Hub ids of whole models; may stand first without --models",
            metavar="DIR",
            many=True,
            required=True,
            group=_WHAT,
        ),
        Option(
            name="base",
            help="folder or Hub id of what all of them were trained from; only a soup can do without",
            metavar="DIR",
            group=_WHAT,
            nullable=True,
        ),
        Option(name="output", help="a new folder", metavar="DIR", required=True, group=_WHAT),
        Option(
            name="method",
            help="see below",
            convert=one_of(*_METHODS),
            metavar="|".join(_METHODS),
            default="soup",
            group=_HOW,
        ),
        Option(
            name="weights",
            help="one number a model; none is 1/n where δs are summed, 1 where agreeing entries are averaged",
            convert=number,
            metavar="X",
            many=True,
            group=_HOW,
            nullable=True,
        ),
        Option(
            name="density",
            help="share of each δ that is kept; none is 0.2 for ties, 0.5 for dare, dare_ties and della",
            convert=number,
            metavar="X",
            group=_HOW,
            nullable=True,
        ),
        Option(
            name="epsilon",
            help="of della: how much likelier the largest entry of a row is kept than its smallest; none is 0.2",
            convert=number,
            metavar="X",
            group=_HOW,
            nullable=True,
        ),
        Option(name="seed", help="of what is dropped by chance", convert=whole, metavar="N", default=0, group=_HOW),
    ],
    aliases=[
        Alias("output_dir", "is output", lambda value: {"output": value}),
        Alias("base_model", "is base", lambda value: {"base": value}),
        Alias("merge_method", "is method", lambda value: {"method": value}),
    ],
    epilog=_EPILOG,
)


def run(argv: Sequence[str]) -> int:
    """Merges, and says where."""
    words = list(argv)
    given = VERB.read(["--models", *words] if words and not words[0].startswith("-") else words)
    if given is None:
        return 0
    from mmalign.training.model_merging import merge_models

    how = {name: given[name] for name in ("method", "weights", "density", "epsilon", "seed")}
    print(f"written: {merge_models(given['base'], given['models'], given['output'], **how)}")
    return 0
