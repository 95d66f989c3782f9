"""`mmalign train METHOD`: one run of a method, from the command line or a YAML file, on one process or several."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from mmalign.cli import launch
from mmalign.cli.aliases import aliases
from mmalign.cli.fields import OWN, USUAL, options_of
from mmalign.cli.models import load_pipeline, model_options
from mmalign.cli.options import (
    Alias,
    Command,
    Given,
    Option,
    UsageError,
    config_path,
    flag,
    nearest,
    number,
    one_of,
    read_yaml,
    switch,
    whole,
)
from mmalign.cli.terminal import Interrupted, rank_prefix
from mmalign.cli.trained import checkpoints, farewell, how_to_go_on

METHODS = {
    "smpo": (
        "mmalign.pipelines.image.smpo",
        "SmPO",
        "smoothed preferences on ReNoise-inverted latents (arXiv:2506.02698)",
    ),
    "inpo": ("mmalign.pipelines.image.inpo", "InPO", "preferences on DDIM-inverted latents (arXiv:2503.18454)"),
    "dpo": ("mmalign.pipelines.image.dpo", "DiffusionDPO", "preferences on forward-noised latents (arXiv:2311.12908)"),
    "sft": ("mmalign.pipelines.image.sft", "DiffusionSFT", "supervised fine-tuning on the preferred pictures"),
    "self-npo": (
        "mmalign.pipelines.image.self_npo",
        "SelfNPO",
        "a negative side for guidance, from prompts alone (arXiv:2505.11777)",
    ),
    "diffusion-npo": (
        "mmalign.pipelines.image.diffusion_npo",
        "DiffusionNPO",
        "a negative side for guidance, by what a reward dislikes (arXiv:2505.11245)",
    ),
    "longalign": (
        "mmalign.pipelines.image.longalign",
        "LongAlign",
        "long prompts in segments, trained by a reward that counts style less (arXiv:2410.11817)",
    ),
    "ppd": (
        "mmalign.pipelines.image.ppd",
        "PPD",
        "one model for many users, told apart by a few pairs (arXiv:2501.06655)",
    ),
    "rrpo": (
        "mmalign.pipelines.video.rrpo",
        "RRPO",
        "models that watch clips: phrases in which answers differ, the rest held to the base (arXiv:2504.12083)",
    ),
    "lfm2-vl": (
        "mmalign.pipelines.vision.lfm2_vl",
        "LFM2VL",
        "LFM2-VL and LFM2: DPO and every pair loss, with distillation from a larger one (arXiv:2511.23404)",
    ),
    "token-dpo": (
        "mmalign.training.token_pipeline",
        "Token",
        "models that answer about text, pictures or clips: DPO, and every pair loss (arXiv:2305.18290)",
    ),
}
# Those that train models that answer in tokens; see train_answers.py.
ANSWERING = ("rrpo", "lfm2-vl", "token-dpo")
# Those that learn from pairs, and whose result is drawn with by itself; PPD without a user draws what the base draws.
ALIGNING = [name for name in METHODS if name not in ("self-npo", "diffusion-npo", "longalign", "ppd", *ANSWERING)]
PAIRS = (
    "preference pairs: a Hub id, a parquet, json or jsonl file, a folder with metadata.jsonl or of x_chosen.png, "
    'x_rejected.png, x.txt, WebDataset shards (x-{000..011}.tar), or "playground"'
)
_PROMPTS = (
    "prompts: a file (.txt one a line, .json, .jsonl, .csv, .tsv or .parquet with a column prompt or caption), "
    '"playground", or the prompts of preference pairs; with --source images or --stage supervised pictures with captions: a folder of '
    "x.png and x.txt, metadata.jsonl, or pairs, of which the preferred side is used"
)
_DATA = "model and data"
_SCALE_LR = Option(
    name="scale_lr",
    help="multiply learning_rate by the pairs of one optimiser step, as diffusers' scripts do with this flag",
    convert=switch,
    default=False,
    group=USUAL,
)
_LORA = "what is trained: a LoRA, or everything with --full"
_HELP = """usage: mmalign train METHOD [options]

{methods}

Options of a method:  mmalign train smpo --help
One GPU:              mmalign train smpo --model stabilityai/stable-diffusion-xl-base-1.0 --data my-pairs/ --preset sdxl
Two GPUs:             mmalign train smpo --num-processes 2 --config run.yaml
Go on after a stop:   mmalign train smpo --config run.yaml --resume-from-checkpoint latest
"""
_EPILOG = """Spellings of diffusers' and Salesforce's DPO scripts work too:
--pretrained_model_name_or_path, --dataset_name, --train_batch_size, --max_train_steps, --beta_dpo, --mixed_precision, …
"""


def run(argv: Sequence[str]) -> int:
    """Trains, or starts the processes that do."""
    method, words = method_of(list(argv))
    if method is None:
        lines = [f"  {name:<14}{summary}" for name, (_, _, summary) in METHODS.items()]
        print(_HELP.format(methods="\n".join(lines)), end="")
        return 0
    # The file's `env:` block must act before torch is loaded.
    file = read_yaml(config_path(words))
    module, prefix, _ = METHODS[method]
    pipelines = import_module(module)
    verb = make_command(method, getattr(pipelines, f"{prefix}Config"))
    given = verb.read(words, file)
    if given is None:
        return 0
    exit_code = launch.relaunch([method, *words], given.chosen(launch.NAMES))
    if exit_code is not None:
        return exit_code
    pipeline_class = getattr(pipelines, f"{prefix}Pipeline")
    if method in ANSWERING:
        from mmalign.cli.train_answers import train_answers

        return train_answers(method, pipeline_class, given, words)
    return _train(method, pipeline_class, given, words)


def make_command(method: str, config_class: Any) -> Command:
    """The options of `mmalign train METHOD`."""
    own = run_options(method, config_class)
    without = {option.name for option in own} | {"local_rank"}
    fields = options_of(config_class, refused=config_class.refused, without=without)
    refused = [Alias(name, reason) for name, reason in launch.REFUSED.items()]
    known = {option.name for option in (*own, *fields)}
    if method in ANSWERING:
        from mmalign.cli.train_answers import answering_command

        return answering_command(method, config_class, own, [*fields, _SCALE_LR, *launch.OPTIONS], refused)
    return Command(
        prog=f"mmalign train {method}",
        description=METHODS[method][2][0].upper() + METHODS[method][2][1:] + ".",
        example=f"mmalign train {method} --model playground --data playground --output-dir runs/{method}",
        options=[
            *own,
            *(field for field in fields if field.group == OWN),
            _SCALE_LR,
            *(field for field in fields if field.group != OWN),
            *launch.OPTIONS,
        ],
        aliases=[*aliases(method, known), *refused],
        epilog=_EPILOG,
        complete=lambda given: completed(given, config_class),
    )


def run_options(method: str, config_class: Any) -> list[Option]:
    """What a run is given beside its config's fields."""
    lora: dict[str, Any] = {"group": _LORA}
    return [
        *model_options(group=_DATA),
        Option(
            name="data",
            help=PAIRS if method in ALIGNING else _PROMPTS,
            required=True,
            group=_DATA,
        ),
        Option(name="eval_data", help="held-out pairs for --eval-strategy steps", group=_DATA, nullable=True),
        Option(
            name="max_rows",
            help="only the first rows of the data",
            convert=whole,
            metavar="N",
            group=_DATA,
            nullable=True,
        ),
        Option(
            name="root",
            help="the folder that paths in --data are relative to; none is where the file lies",
            metavar="DIR",
            group=_DATA,
            nullable=True,
        ),
        Option(
            name="streaming",
            help="read a Hub data set as it comes and store its latents only; with --max-rows where its length is not known",
            convert=switch,
            default=False,
            group=_DATA,
        ),
        Option(
            name="output_dir",
            help="checkpoints, samples, history and the trained weights go here",
            metavar="DIR",
            default=f"runs/{method}",
            group=_DATA,
        ),
        Option(
            name="overwrite",
            help="remove the checkpoints of an earlier run there first",
            convert=switch,
            default=False,
            group=_DATA,
        ),
        Option(
            name="preset",
            help="start from published settings; other options come on top. --print-config shows what they are",
            convert=one_of(*config_class.presets),
            metavar="|".join(config_class.presets),
            group=_DATA,
            nullable=True,
        ),
        Option(
            name="full",
            help="train every weight of the network instead of a LoRA",
            convert=switch,
            default=False,
            **lora,
        ),
        Option(name="lora_r", help="rank", convert=whole, metavar="N", default=16, **lora),
        Option(name="lora_alpha", help="scale; none is the rank", convert=number, metavar="X", nullable=True, **lora),
        Option(
            name="lora_dropout", help="dropout on the LoRA's input", convert=number, metavar="X", default=0.0, **lora
        ),
        Option(
            name="lora_target_modules",
            help="layers that get one: names, one regular expression, or all-linear; none is the attention projections",
            metavar="NAME",
            many=True,
            nullable=True,
            **lora,
        ),
        Option(
            name="base_quantization",
            help="hold the frozen base in 4 or 8 bits, by bitsandbytes on a GPU; the LoRA stays in float32",
            convert=one_of("nf4", "int8"),
            metavar="nf4|int8",
            nullable=True,
            **lora,
        ),
        Option(
            name="save_pipeline",
            help="also save the whole aligned pipeline, LoRA merged, in output_dir/pipeline (always with --full)",
            convert=switch,
            default=False,
            **lora,
        ),
    ]


def method_of(words: list[str], verb: str = "train") -> tuple[str | None, list[str]]:
    """The method and the other words; launcher options may stand before it."""
    if words and words[0] in METHODS:
        return words[0], words[1:]
    at = next((at for at, word in enumerate(words) if word in METHODS), None)
    if at is not None:
        return words[at], words[:at] + words[at + 1 :]
    if not words or any(word in ("-h", "--help", "--help-all") for word in words):
        return None, words
    first = words[0]
    known = f"the methods are {', '.join(METHODS)}"
    if first.startswith("-"):
        raise UsageError(f"the method stands after the verb: mmalign {verb} smpo {first} …; {known}")
    raise UsageError(f"no method {first!r}{nearest(first, METHODS)}; {known}")


def completed(given: Given, config_class: Any) -> Given:
    """Puts the preset under the explicit options; the playground's pairs have their own, and a held-out split."""
    from mmalign.training.loading import EMBEDDED_ANSWERING, PLAYGROUND

    own = given["data"] in (PLAYGROUND, *EMBEDDED_ANSWERING) and "playground" in config_class.presets
    name = given.values.get("preset") or ("playground" if own else None)
    preset = config_class.preset_options(name, given.chosen(given.explicit)) if name else {}
    if given.explicit & {"fp16", "bf16"}:
        preset = {name: value for name, value in preset.items() if name not in ("fp16", "bf16")}
    if given["eval_data"] == "playground":
        preset["eval_split"] = "test"
    added = {name: value for name, value in preset.items() if name not in given.explicit}
    # The preset is written out, so that a printed configuration stands on its own.
    values = given.values | added | {"preset": None}
    note = f"preset {name}, written out" if name else ""
    return Given(values, (given.explicit | set(added)) - {"preset"}, given.config, note)


def config_options(given: Given, config_class: Any) -> dict[str, Any]:
    """The keyword arguments of the method's config: what was given, and what the number of processes makes of it."""
    import dataclasses

    fields = {item.name for item in dataclasses.fields(config_class)}
    options = given.chosen(fields) | {"output_dir": given["output_dir"]}
    processes = world_size()
    if processes > 1 and "use_cpu" not in options and not _has_accelerator():
        # Otherwise transformers would run one independent training a process.
        options["use_cpu"] = True
    if given["scale_lr"]:
        config = config_class(**options)
        pairs = config.per_device_train_batch_size * config.gradient_accumulation_steps * processes
        options["learning_rate"] = config.learning_rate * pairs
        say(
            f"learning rate {config.learning_rate:g} × {pairs} pairs a step = {options['learning_rate']:g} (--scale-lr)"
        )
    options["resume_from_checkpoint"] = resume_from(given)
    return options


def world_size() -> int:
    """How many processes a launcher started."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def _has_accelerator() -> bool:
    import torch

    return torch.accelerator.is_available()


def say(message: str) -> None:
    if not rank_prefix():
        print(message)


def resume_from(given: Given) -> str | None:
    """What the trainer resumes from: a folder, or "latest". An earlier run's checkpoints are never mixed with a new one's."""
    folder, asked = Path(given["output_dir"]), given["resume_from_checkpoint"]
    found = checkpoints(folder)
    if asked is None and found:
        if not given["overwrite"]:
            raise ValueError(
                f"{folder} already holds {found[-1].name}: go on with --resume-from-checkpoint latest, remove the earlier "
                "checkpoints with --overwrite, or choose another --output-dir"
            )
        if not rank_prefix():
            for path in found:
                shutil.rmtree(path)
    if asked is None or str(asked).lower() in ("latest", "true"):
        return asked
    for path in (Path(asked), folder / asked):
        if path.is_dir():
            return str(path)
    raise ValueError(f"no checkpoint {asked}; {folder} holds {', '.join(path.name for path in found) or 'none'}")


def adapter_of(given: Given, config_class: Any) -> Any:
    """`lora_of`, or None for a method that trains a part of its own."""
    if config_class.takes_lora:
        return lora_of(given)
    touched = [*(["full"] if given["full"] else []), *touched_lora(given)]
    if touched:
        raise UsageError(
            f"{flag(touched[0])} has no effect: {config_class.method} trains a part of its own, and no LoRA"
        )
    return None


def touched_lora(given: Given) -> list[str]:
    """The options of a LoRA that are not at their defaults."""
    # A printed configuration states the defaults too.
    stated = {"lora_r": 16, "lora_alpha": None, "lora_dropout": 0.0, "lora_target_modules": None}
    return [name for name, default in stated.items() if given[name] != default]


def lora_of(given: Given) -> Any:
    """The LoRA that is trained; None with --full."""
    if given["full"]:
        touched = touched_lora(given)
        if touched:
            raise UsageError(f"--full trains every weight, so {flag(touched[0])} has no effect; drop one of the two")
        return None
    from mmalign.training.pipeline import default_lora

    return as_asked(default_lora(), given, alpha=1)


def as_asked(lora: Any, given: Given, *, alpha: int) -> Any:
    """The LoRA with the rank, scale, dropout and layers of the options; `alpha`: how many times the rank the scale is by default."""
    lora.r, lora.lora_dropout = given["lora_r"], given["lora_dropout"]
    lora.lora_alpha = alpha * lora.r if given["lora_alpha"] is None else given["lora_alpha"]
    if names := given["lora_target_modules"]:
        # peft reads a text as a regular expression of a layer's whole name, and a set as its last parts.
        is_one_text = len(names) == 1 and (names[0] == "all-linear" or not re.fullmatch(r"[\w.]+", names[0]))
        lora.target_modules = names[0] if is_one_text else set(names)
    return lora


def _base_quantization(given: Given) -> str | None:
    """How the base is quantised; UsageError beside what a quantised base cannot do."""
    kind: str | None = given["base_quantization"]
    if kind is not None and given["full"]:
        raise UsageError("--full trains every weight, and quantised ones cannot be trained: drop --base-quantization")
    if kind is not None and given["save_pipeline"]:
        raise UsageError(
            "--save-pipeline merges the LoRA, which a quantised base would round: drop one of it and --base-quantization"
        )
    return kind


def is_opened_here(given: Given) -> bool:
    """Whether an option of how the data are read was given, which the trainer has no field for."""
    return given["max_rows"] is not None or given["root"] is not None or given["streaming"]


def source_of(given: Given, *, captioned: bool = False) -> Any:
    """The training data as the trainer takes it; `captioned`: of a method that takes single pictures too."""
    if not is_opened_here(given):
        return given["data"]
    from mmalign.data import load_pairs

    return load_pairs(
        given["data"],
        split=given["train_split"],
        root=given["root"],
        max_rows=given["max_rows"],
        streaming=given["streaming"],
        captioned=captioned,
    )


def checked_config(options: dict[str, Any], config_class: Any) -> Any:
    """The run's config; ValueError where it would use another number of processes than there are."""
    config = config_class(**options)
    if config.world_size != world_size():
        raise ValueError(
            f"{world_size()} processes run, but training would use {config.world_size}: on a machine without GPUs add --use-cpu"
        )
    return config


def _train(method: str, pipeline_class: Any, given: Given, words: list[str]) -> int:
    from mmalign.denoisers.parts import draws_clips

    config_class = pipeline_class.config_class
    lora, quantization = adapter_of(given, config_class), _base_quantization(given)
    options = config_options(given, config_class)
    config = checked_config(options, config_class)
    # The trainer brings each part to its device while it is needed there.
    pipe = load_pipeline(given, pipeline_class, device="cpu", quantization=quantization)
    source = source_of(given, captioned=not config.needs_pairs)
    if is_opened_here(given):
        options["train_split"] = None
    folder = Path(given["output_dir"])
    try:
        pipe.align(source, eval_dataset=given["eval_data"], peft_config=lora, **options)
    except KeyboardInterrupt:
        raise Interrupted(how_to_go_on(method, words, folder)) from None
    if not rank_prefix():
        if given["full"] or given["save_pipeline"]:
            pipe.save_pretrained(folder / "pipeline")
        print(farewell(given, folder, config, judged=not draws_clips(pipe)))
    return 0
