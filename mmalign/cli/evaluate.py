"""`mmalign evaluate`: an aligned model against its base, with the same prompts and seeds, told by scorers with intervals."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmalign.cli.models import (
    ALIASES,
    best_device,
    check_negative,
    device_option,
    load_pipeline,
    long_prompt_option,
    model_options,
    negative_options,
    prompt_options,
    prompts_of,
    read_prompts,
    sampling_of,
    sampling_options,
)
from mmalign.cli.options import Command, Given, Option, UsageError, flag, number, whole
from mmalign.cli.users import class_for, user_of, user_options, users_of
from mmalign.scorer_names import SCORERS

if TYPE_CHECKING:
    from mmalign.evaluation import RetentionPlan

_FOR = "for whom the aligned side draws (models that PPD trained)"
_MODEL, _WHAT, _JUDGED, _ALSO = "the two models", "what is drawn", "who judges", "what else is asked and shown"
# Who judges what is drawn for the playground's own prompts.
_OWN_SCORERS = {"playground": ["judge-B", "playground"], "playground-scenes": ["scene-judge-B"]}
VERB = Command(
    prog="mmalign evaluate",
    description="Draws the same prompts and seeds with both models, scores every pair, and writes report.html and report.json.",
    example="mmalign evaluate --model playground --lora runs/smpo --prompts playground --trained-on playground",
    options=[
        *model_options(group=_MODEL, lora=True),
        *negative_options(group=_MODEL),
        long_prompt_option(group=_MODEL),
        Option(
            name="base",
            help="what it is compared with; with --lora: the same model without it",
            group=_MODEL,
            nullable=True,
        ),
        device_option(_MODEL),
        *user_options(group=_FOR),
        *prompt_options(_WHAT),
        Option(
            name="num_images_per_prompt",
            help="pairs of pictures a prompt",
            convert=whole,
            metavar="N",
            default=1,
            group=_WHAT,
        ),
        Option(
            name="output_dir", help="where pictures and report go", metavar="DIR", default="evaluation", group=_WHAT
        ),
        Option(
            name="scorers",
            help=f"{', '.join(SCORERS)}; for the playground's pictures also judge-A, judge-B, for its scenes scene-judge-A, "
            "scene-judge-B. The first that was not trained on makes the headline. none is the playground's judge B for its prompts "
            "(and, without scenes, its reward), else pickscore",
            metavar="NAME",
            many=True,
            group=_JUDGED,
            nullable=True,
        ),
        Option(
            name="trained_on",
            help="scorers that gave labels or rewards to the training",
            metavar="NAME",
            many=True,
            group=_JUDGED,
            nullable=True,
        ),
        Option(
            name="tie_margin",
            help="scores no further apart than this are a tie; one number for all scorers, whatever their units",
            convert=number,
            metavar="X",
            default=0.0,
            group=_JUDGED,
        ),
        Option(
            name="num_resamples",
            help="bootstrap resamples over prompts",
            convert=whole,
            metavar="N",
            default=2000,
            group=_JUDGED,
        ),
        Option(name="confidence", help="of the intervals", convert=number, metavar="X", default=0.95, group=_JUDGED),
        Option(
            name="lora_scales",
            help="also compare at these scales of the LoRA, 0 being the model without it: a plot of what each costs and buys",
            convert=number,
            metavar="X",
            many=True,
            group=_ALSO,
            nullable=True,
        ),
        Option(
            name="retention_prompts",
            help="prompts that the preferences did not ask about, on which the model must not get worse; as --prompts",
            metavar="FILE",
            group=_ALSO,
            nullable=True,
        ),
        Option(
            name="retention_tolerance",
            help="the loss of mean score on them that can be borne; say it before you look",
            convert=number,
            metavar="X",
            group=_ALSO,
            nullable=True,
        ),
        Option(
            name="retention_scorer",
            help="which of the scorers tells it; none is the first that was not trained on",
            metavar="NAME",
            group=_ALSO,
            nullable=True,
        ),
        Option(
            name="num_samples",
            help="pairs shown in the report, picked at random; the ones that can be judged blind",
            convert=whole,
            metavar="N",
            default=12,
            group=_ALSO,
        ),
        Option(
            name="history",
            help="history.json of the run, for curves; none is the one beside the LoRA",
            metavar="FILE",
            group=_ALSO,
            nullable=True,
        ),
        *sampling_options(),
    ],
    aliases=ALIASES,
)


def run(argv: Sequence[str]) -> int:
    """Compares, writes the report and prints its headline."""
    given = VERB.read(argv)
    if given is None:
        return 0
    check_negative(given)
    call, users = user_of(given), users_of(given)
    if given["base"] is None and given["lora"] is None and given["negative"] is None and not call:
        raise UsageError(
            "nothing to compare with: give --base, --lora or --negative, to compare the model with and without it, or --user"
        )
    if given["lora_scales"] and given["lora"] is None:
        raise UsageError("--lora-scales needs --lora: there is no LoRA to scale")
    if given["num_samples"] < 0:
        raise UsageError(f"--num-samples must be 0 or more, got {given['num_samples']}")
    prompts, plan = read_prompts(given), _retention(given)
    history = _history(given)
    names = given["scorers"] or _OWN_SCORERS.get(given["prompts"], ["pickscore"])

    from mmalign.evaluation import evaluate, result_lines, write_report

    device = best_device(given["device"])
    # A scorer that was trained on, or tells retention, stands in the report even if nobody listed it.
    also = [*(given["trained_on"] or []), *([plan.scorer] if plan and plan.scorer else [])]
    judges = _judges(names, also, device)
    if plan is not None and plan.scorer is not None:
        plan = replace(plan, scorer=judges[plan.scorer].name)
    options = {"lora": given["lora"], "negative": given["negative"], "device": device}
    aligned = load_pipeline(given, pipeline_class=class_for(users), **options)
    if users is not None:
        aligned.users = users
    result = evaluate(
        aligned,
        load_pipeline(given, model=given["base"] or given["model"], device=device),
        prompts,
        scorers=list({id(judge): judge for judge in judges.values()}.values()),
        output_dir=given["output_dir"],
        trained_on={judges[name].name for name in given["trained_on"] or []},
        num_images_per_prompt=given["num_images_per_prompt"],
        seed=given["seed"],
        **sampling_of(given),
        tie_margin=given["tie_margin"],
        num_resamples=given["num_resamples"],
        confidence=given["confidence"],
        lora_scales=given["lora_scales"] or (),
        retention_plan=plan,
        aligned_call=call,
    )
    files = write_report(result, given["output_dir"], history=history, num_samples=given["num_samples"])
    print("\n".join(result_lines(result)))
    print(f"report: {files.html}")
    return 0


def _retention(given: Given) -> RetentionPlan | None:
    """What was asked about retention; UsageError for half of it."""
    if given["retention_prompts"] is None:
        for name in ("retention_tolerance", "retention_scorer"):
            if given[name] is not None:
                raise UsageError(f"{flag(name)} belongs to --retention-prompts")
        return None
    if given["retention_tolerance"] is None:
        raise UsageError("--retention-prompts needs --retention-tolerance: how much of the mean score may be lost")
    from mmalign.evaluation import RetentionPlan

    # A split is one of a folder's; the other prompts may be a file.
    split = given["prompts_split"] if Path(given["retention_prompts"]).expanduser().is_dir() else None
    return RetentionPlan(
        prompts=prompts_of(given["retention_prompts"], split),
        tolerance=given["retention_tolerance"],
        scorer=given["retention_scorer"],
    )


def _judges(names: Sequence[str], also: Sequence[str], device: str) -> dict[str, Any]:
    """The scorers by the names they were given; `also` may call a listed one as the reports do ("aesthetic" for "aesthetic:FILE")."""
    found = {name: scorer_named(name, device) for name in names}
    known = {scorer.name: scorer for scorer in found.values()}
    for name in also:
        if name not in found:
            found[name] = known[name] if name in known else scorer_named(name, device)
    return found


def scorer_named(name: str, device: str) -> Any:
    """A scorer of the playground's judges or of `mmalign.rewards`."""
    if name.removeprefix("scene-") in ("judge-A", "judge-B"):
        from mmalign.playground import judges, scene_judges

        return (scene_judges if name.startswith("scene-") else judges).load("A" if name.endswith("A") else "B")
    from mmalign.rewards import scorer

    return scorer(name, device=device)


def _history(given: Given) -> list[dict[str, Any]]:
    path = Path(given["history"]).expanduser() if given["history"] else Path(given["lora"] or ".") / "history.json"
    if given["history"] is None and (given["lora"] is None or not path.is_file()):
        return []
    content = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(content, list) or not all(isinstance(entry, dict) for entry in content):
        raise ValueError(f"{path} is no history: it holds no list of mappings")
    return content
