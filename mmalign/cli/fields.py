"""Options made from a config class: one for every dataclass field, its help taken from where the field is documented."""

from __future__ import annotations

import dataclasses
import enum
import re
import types
import typing
from collections.abc import Callable
from typing import Any

from mmalign.cli.options import Convert, Option, mapping_or_text, number, one_of, switch, text, whole
from mmalign.scorer_names import SCORERS

OWN = "the method: latents × comparison × loss"
USUAL = "training"
OTHERS = "the rest of transformers.TrainingArguments"

# Inherited fields that most runs touch, in the order of the help.
_USUAL = """
    max_steps num_train_epochs per_device_train_batch_size gradient_accumulation_steps learning_rate lr_scheduler_type warmup_steps
    optim weight_decay max_grad_norm bf16 fp16 tf32 gradient_checkpointing seed dataloader_num_workers logging_steps report_to run_name
    eval_strategy eval_steps per_device_eval_batch_size save_steps save_total_limit load_best_model_at_end metric_for_best_model
    resume_from_checkpoint push_to_hub hub_model_id use_cpu
""".split()

# Where the docstrings say nothing, or say it for a whole family of fields, or transformers says it at length.
_EXPLAINED = {
    "loss_type": "the link: any pair loss of mmalign.losses; several are summed with loss_weights",
    "loss_weights": "one weight for each loss_type",
    "label_smoothing": "share of flipped labels that the loss assumes, for losses that have it (robust, sigmoid, …)",
    "f_divergence_type": "divergence between policy and reference, as in TRL",
    "f_alpha_divergence_coef": "α of the alpha divergence",
    "discopop_tau": "temperature of loss_type discopop",
    "simpo_gamma": "target margin of loss_type simpo",
    "cpo_alpha": "weight of the likelihood term of loss_type cpo",
    "ln_pref_omega": "weight of the margin term of loss_type ln_pref",
    "ln_pref_lambda": "weight of loss_type ln_pref's term that holds each side to a level",
    "ln_pref_margin": "target margin of loss_type ln_pref",
    "latents": "how the log-ratio is measured: forward noise, DDIM inversion, ReNoise inversion",
    "scorer": f"reward for comparisons other than human: {', '.join(SCORERS)}; or the data's own, column:<name>",
    "comparison": "what a pair is worth: its human label, relabelled by the scorer, smoothed by it, Bradley–Terry weight",
    "smoothing_normalizer": "how the scorer's values are normalised before smoothing",
    "keep_human_ties": "let the scorer decide pairs that humans called a tie",
    "min_abs_strength": "leave out pairs that the scorer finds closer than this",
    "loss_space": "prediction space in which errors are taken; none is the model's own",
    "reference": "adapter off, a frozen copy, or whichever fits",
    "ema_decay": "keep, draw, evaluate and save a moving average of the trained weights, such as 0.999; none is none",
    "train_split": 'split of a Hub data set or of "playground"; none is train',
    "eval_split": 'split of the evaluation data; none is train, and test for "playground"',
    "resolution": "pixels of the short side and of the centre crop; none is the model's own",
    "num_frames": "frames of a clip, sampled evenly from it; none is the model's own; for video models only",
    "cache_dir": "where encoded pairs are kept; none is the place that `mmalign cache` shows",
    "validation_prompts": "draw these every validation_steps into output_dir/samples, beside what the model drew before",
    "validation_steps": "optimiser steps between sample pictures; 0 is never",
    "validation_seed": "seed of the first sample picture; the next ones count up",
    "validation_inference_steps": "sampling steps of the sample pictures",
    "validation_guidance_scale": "guidance of the sample pictures",
    "max_steps": "optimiser steps; -1 leaves it to num_train_epochs",
    "num_train_epochs": "passes over the pairs",
    "per_device_train_batch_size": "pairs a process takes at once",
    "gradient_accumulation_steps": "batches that make one optimiser step",
    "learning_rate": "for the whole step; not scaled by the batch (see --scale-lr)",
    "lr_scheduler_type": "constant_with_warmup, constant, linear, cosine, …",
    "warmup_steps": "optimiser steps until the full learning rate; below 1 a share of all steps",
    "optim": 'adamw_torch, adamw_torch_fused, adafactor, adamw_bnb_8bit, paged_adamw_8bit (pip install "mmalign[8bit]"), …',
    "weight_decay": "of AdamW",
    "bf16": "mixed precision in bfloat16",
    "fp16": "mixed precision in float16, with loss scaling",
    "tf32": "TF32 matrix products on Ampere and later",
    "gradient_checkpointing": "compute activations twice to save memory",
    "seed": "of the LoRA's start, the order of the pairs, and every draw",
    "dataloader_num_workers": "processes that read pairs ahead",
    "logging_steps": "optimiser steps between log lines",
    "report_to": "trackers: tensorboard, wandb, trackio, …",
    "run_name": "name of the run at a tracker",
    "eval_strategy": "when --eval-data is measured",
    "eval_steps": "optimiser steps between evaluations",
    "per_device_eval_batch_size": "pairs a process takes at once in evaluation",
    "save_steps": "optimiser steps between checkpoints",
    "save_total_limit": "checkpoints that are kept",
    "load_best_model_at_end": "end with the best checkpoint instead of the last",
    "metric_for_best_model": "by which metric, such as eval_rewards/accuracies",
    "resume_from_checkpoint": "a checkpoint folder, its name in output_dir, or latest",
    "push_to_hub": "push to the Hub at every save",
    "hub_model_id": "the repository to push to",
    "use_cpu": "train on the CPU even if there is a GPU",
}


def options_of(
    config_class: type, *, refused: typing.Container[str], without: typing.Container[str] = ()
) -> list[Option]:
    """One option a field: the config's own first, then the usual inherited ones, then the others (hidden from the short help)."""
    hints = typing.get_type_hints(config_class)
    documented = documented_fields(config_class)
    own = own_fields(config_class)
    result = []
    for item in dataclasses.fields(config_class):
        if item.name in without:
            continue
        group = USUAL if item.name in _USUAL else OWN if item.name in own else OTHERS
        inherited = _first_sentence(str(item.metadata.get("help", "")))
        explained = _EXPLAINED.get(item.name) or documented.get(item.name) or inherited
        made = option_of(item, hints[item.name], help=explained, group=group, hidden=group == OTHERS)
        if item.name in refused:
            made = dataclasses.replace(
                made, help="refused: training says why", hidden=True, printed=False, group=OTHERS
            )
        result.append(made)
    order = {name: at for at, name in enumerate(_USUAL)}
    groups = {OWN: 0, USUAL: 1, OTHERS: 2}
    return sorted(result, key=lambda option: (groups[option.group], order.get(option.name, 0)))


def own_fields(config_class: type) -> list[str]:
    """Names that our classes declare and transformers does not."""
    from transformers import TrainingArguments

    inherited = {item.name for item in dataclasses.fields(TrainingArguments)}
    return [item.name for item in dataclasses.fields(config_class) if item.name not in inherited]


def option_of(item: dataclasses.Field[Any], hint: Any, *, help: str, group: str, hidden: bool) -> Option:
    """The option of one field, its conversion read off the type."""
    default = None if item.default is dataclasses.MISSING else item.default
    if item.default_factory is not dataclasses.MISSING:
        default = item.default_factory()
    if isinstance(default, enum.Enum):
        default = default.value
    members = [part for part in _members(hint) if part is not type(None)]
    # `report_to` takes the word "none".
    nullable = (len(members) < len(_members(hint)) or default is None) and default != "none"
    lists = [part for part in members if typing.get_origin(part) is list]
    if lists:
        members = list(typing.get_args(lists[0])) or [str]
    convert, metavar = _conversion(members, default)
    if lists and isinstance(default, str):
        default = [default]
    return Option(
        name=item.name,
        help=help,
        convert=convert,
        metavar=metavar,
        default=default,
        group=group,
        many=bool(lists),
        nullable=nullable,
        hidden=hidden,
        printed=default not in ("", [""]),
    )


def documented_fields(config_class: type) -> dict[str, str]:
    """Field → the line that explains it, from the tables in the docstrings of our config classes and of InversionConfig."""
    from mmalign.likelihood.config import InversionConfig

    inversion = _table(InversionConfig.__doc__)
    inversion["steps"] = inversion.pop("num_steps", "")
    result = {f"inversion_{name}": explained for name, explained in inversion.items()}
    for kind in reversed(config_class.__mro__):
        if kind.__module__.startswith("mmalign."):
            result |= _table(kind.__doc__)
    names = {item.name for item in dataclasses.fields(config_class)}
    for name in [name for name in result if name.endswith("*")]:
        explained = result.pop(name)
        result = {other: explained for other in names if other.startswith(name[:-1]) and other not in result} | result
    return {name: explained for name, explained in result.items() if name in names}


def _table(doc: str | None) -> dict[str, str]:
    """The `name   explanation` lines of a docstring, continuation lines joined."""
    result: dict[str, str] = {}
    names: list[str] = []
    for line in (doc or "").splitlines():
        row = re.match(r"^ {4}([a-z_0-9*]+(?:, [a-z_0-9*]+)*) {2,}(\S.*)$", line)
        if row:
            names = row[1].split(", ")
            result |= dict.fromkeys(names, row[2])
        elif names and re.match(r"^ {8,}\S", line):
            result |= {name: f"{result[name]} {line.strip()}" for name in names}
        else:
            names = []
    return result


def _members(hint: Any) -> tuple[Any, ...]:
    return typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)


def _conversion(members: list[Any], default: Any) -> tuple[Convert, str]:
    literals = [
        value for part in members if typing.get_origin(part) is typing.Literal for value in typing.get_args(part)
    ]
    enums = [part for part in members if isinstance(part, type) and issubclass(part, enum.Enum)]
    if literals and float in members:
        return _number_or(*literals), "|".join(["X", *literals])
    if literals and all(isinstance(value, str) for value in literals):
        return one_of(*literals), "|".join(literals)
    if enums:
        choices = [str(value.value) for value in enums[0]]
        return one_of(*choices), "|".join(choices) if len(choices) <= 4 else "NAME"
    if dict in members or any(typing.get_origin(part) is dict for part in members):
        return mapping_or_text, "JSON"
    if bool in members and str not in members:
        return switch, "BOOL"
    if float in members:
        return _number_like(default), "X"
    if int in members:
        return whole, "N"
    return text, "TEXT"


def _number_or(*words: str) -> Convert:
    """A number, or one of a few words."""

    def convert(value: Any) -> float | str:
        if value in words:
            return str(value)
        try:
            return number(value)
        except ValueError as error:
            raise ValueError(f"{error}, nor {' or '.join(map(repr, words))}") from error

    return convert


def _number_like(default: Any) -> Callable[[Any], int | float]:
    """Whole numbers stay whole where the default is one (`save_steps: 100`, of type float in transformers)."""

    def convert(value: Any) -> int | float:
        result = number(value)
        return int(result) if isinstance(default, int) and result.is_integer() else result

    return convert


def _first_sentence(explained: str) -> str:
    sentence = re.split(r"(?<=[a-z`)\"'])\. ", " ".join(explained.split()), maxsplit=1)[0]
    return sentence.rstrip(".")
