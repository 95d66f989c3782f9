"""`mmalign train METHOD` for models that answer in tokens: their options, their LoRA, and what to type once they are trained."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from mmalign.cli import train
from mmalign.cli.aliases import RENAMED, aliases
from mmalign.cli.answer_models import answering_options, load_answering
from mmalign.cli.fields import OTHERS, OWN, USUAL, documented_fields
from mmalign.cli.options import Alias, Command, Given, Option, UsageError, flag, mapping_or_text
from mmalign.cli.terminal import Interrupted, command, rank_prefix
from mmalign.cli.trained import checkpoints, how_to_go_on

_METHOD = "the method: what is compared, and the loss"
_DATA = (
    "preference data: rows with prompt, chosen, rejected, or as of RLAIF-V, ms-swift, ShareGPT, RRPO, VideoChat2; a .json, .jsonl or "
    "parquet file, a folder, a Hub id, or playground-vision or playground-video"
)
_HELP = {
    "data": _DATA,
    "train_split": "split of a Hub data set or a folder; none is train",
    "eval_split": "the same of the evaluation data",
    "loss_type": "any loss of pairs in mmalign.losses, or of single answers (kto, …); several are summed with loss_weights",
    "eval_data": "held-out preference data for --eval-strategy steps",
    "output_dir": "checkpoints, history and the trained weights go here",
    "cache_dir": "where --reference-cache keeps what it keeps; none is the place that `mmalign cache` shows",
    "full": "train every weight of --trained-parts instead of a LoRA",
    "lora_alpha": "scale; none is twice the rank",
    "lora_target_modules": "layers that get one: names, or one regular expression; none is every linear layer of --trained-parts",
    "save_pipeline": "also save the whole model, LoRA merged, in output_dir/pipeline",
}
# Of denoisers alone.
_WITHOUT = ("model", "revision", "dtype", "vae", "variant", "base_class", "streaming", "base_quantization")
_TRANSLATED = ("mixed_precision", "use_8bit_adam", "use_adafactor", "use_ema")
# As TRL's scripts have them.
_TRL = {
    "model_name_or_path": "model",
    "model_revision": "revision",
    "dataset_train_split": "train_split",
    "dataset_test_split": "eval_split",
}


def _budget(value: Any) -> Any:
    """A name or a mapping that `ImageBudget` knows."""
    from mmalign.pipelines.vision.image_budget import read_budget

    told = mapping_or_text(value)
    read_budget(told)
    return told


_IMAGE_BUDGET = Option(
    name="image_budget",
    help="tokens that a picture may cost, by name or as "
    '{"min_tokens": 32, "max_tokens": 64, "split": false}; kept in the processor that the run saves; none is the model\'s own',
    convert=_budget,
    metavar="quality|balanced|fast|JSON",
    nullable=True,
)


def answering_command(
    method: str, config_class: Any, own: Sequence[Option], fields: Sequence[Option], refused: Sequence[Alias]
) -> Command:
    """The options of the verb, from those of a run (`train.run_options`) and of the config."""
    explained = documented_fields(config_class)
    group = own[0].group
    run = [
        replace(option, help=_HELP.get(option.name, option.help))
        for option in own
        if option.name not in _WITHOUT and (option.name != "preset" or config_class.presets)
    ]
    config = [
        replace(option, help=_HELP.get(option.name) or explained.get(option.name) or option.help, group=_METHOD)
        if option.group == OWN
        else option
        for option in fields
    ]
    budget = [replace(_IMAGE_BUDGET, group=group)] if method == "lfm2-vl" else []
    options = [
        *answering_options(group=group),
        *budget,
        *run,
        *_of(config, _METHOD),
        *_of(config, USUAL),
        *_of(config, OTHERS),
    ]
    options += [option for option in config if option.group not in (_METHOD, USUAL, OTHERS)]
    known = {option.name for option in options}
    foreign = [
        alias for alias in aliases(method, known) if alias.name in _TRANSLATED or RENAMED.get(alias.name) in known
    ]
    return Command(
        prog=f"mmalign train {method}",
        description=train.METHODS[method][2][0].upper() + train.METHODS[method][2][1:] + ".",
        example=f"mmalign train {method} --model {_EXAMPLES[method]} --output-dir runs/{method}",
        options=options,
        aliases=[*foreign, *(Alias(name, f"is {ours}", _is(ours)) for name, ours in _TRL.items()), *refused],
        epilog="Spellings of TRL's scripts work too: --model_name_or_path, --dataset_name, --dataset_train_split, …\n",
        complete=lambda given: train.completed(given, config_class),
    )


_EXAMPLES = {
    "rrpo": "llava-hf/llava-onevision-qwen2-7b-ov-hf --data pairs.jsonl --preset llava-video --lora-r 128",
    "lfm2-vl": "LiquidAI/LFM2-VL-450M --data pairs.jsonl --preset leap",
    "token-dpo": "LiquidAI/LFM2-VL-450M --data pairs.jsonl",
}


def _of(options: Sequence[Option], group: str) -> list[Option]:
    return [option for option in options if option.group == group]


def _is(target: str) -> Any:
    return lambda value: {target: value}


def train_answers(method: str, pipeline_class: Any, given: Given, words: list[str]) -> int:
    """One run, from its options to what to type next."""
    config_class = pipeline_class.config_class
    if given["full"] and (touched := train.touched_lora(given)):
        raise UsageError(f"--full trains every weight, so {flag(touched[0])} has no effect; drop one of the two")
    options = train.config_options(given, config_class)
    config = train.checked_config(options, config_class)
    # The trainer brings the model to its device.
    budget = given.values.get("image_budget")
    pipe = load_answering(given, pipeline_class, device="cpu", **({} if budget is None else {"image_budget": budget}))
    source, evaluated = _sources(given, config)
    if source is not given["data"]:
        options |= {"train_split": None, "eval_split": None, "num_frames": None}
    folder = Path(given["output_dir"])
    try:
        pipe.align(source, eval_dataset=evaluated, peft_config=_lora(given, pipe, config), **options)
    except KeyboardInterrupt:
        raise Interrupted(how_to_go_on(method, words, folder)) from None
    if not rank_prefix():
        if given["save_pipeline"]:
            pipe.save_pretrained(folder / "pipeline")
        print(_farewell(given, folder))
    return 0


def _sources(given: Given, config: Any) -> tuple[Any, Any]:
    """The data as they were named; opened here where an option says how, which the trainer has no field for."""
    from mmalign.cli.answer_data import is_playground, open_answers

    embedded = is_playground(given["data"]) or is_playground(given["eval_data"])
    if given["max_rows"] is None and given["root"] is None and not embedded:
        return given["data"], given["eval_data"]
    from mmalign.data import default_cache_dir

    shared = {"num_frames": config.num_frames, "frame_cache": Path(config.cache_dir or default_cache_dir()) / "frames"}
    source = open_answers(
        given["data"],
        split=config.train_split,
        root=given["root"],
        max_rows=given["max_rows"],
        **shared,
    )
    held_out = given["eval_data"]
    if held_out is not None:
        held_out = open_answers(held_out, split=config.eval_split, root=given["root"], held_out=True, **shared)
    return source, held_out


def _lora(given: Given, pipe: Any, config: Any) -> Any:
    """The LoRA that is trained; None with --full."""
    if given["full"]:
        return None
    from mmalign.training.token_parts import default_lora

    return train.as_asked(default_lora(pipe.model, config.trained_parts), given, alpha=2)


def _farewell(given: Given, folder: Path) -> str:
    """Where everything was saved, and what to type next."""
    from mmalign.cli.answer_data import is_playground

    wanted = {
        "adapter_model.safetensors": f'the LoRA: model.load_adapter("{folder}"), or PeftModel.from_pretrained(model, "{folder}")',
        "model.safetensors": f'the whole model: AutoModel….from_pretrained("{folder}")',
        "pipeline": f'the whole model, LoRA merged: AutoModel….from_pretrained("{folder / "pipeline"}")',
        "history.json": "everything that was logged",
        "README.md": "the model card",
    }
    lines = ["", f"saved in {folder}:"]
    lines += [f"  {name:<34}{what}" for name, what in wanted.items() if (folder / name).exists()]
    lines += [f"  {path.name}" for path in checkpoints(folder)[-1:]]
    whole = ["--model", str(folder), "--base", given["model"]]
    model = whole if given["full"] else ["--model", given["model"], "--lora", str(folder)]
    embedded = given["data"] if is_playground(given["data"]) else None
    data = ["--data", embedded or "questions.jsonl"]
    return "\n".join(
        [
            *lines,
            "",
            "next:" if embedded else "next (questions.jsonl: question, answer, image or video):",
            "  " + command("mmalign", "answer", *model[: 2 if given["full"] else 4], *data),
            "  " + command("mmalign", "evaluate-answers", *model, *data),
        ]
    )
