"""Models that answer, and questions, as verbs take them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mmalign.cli.models import best_device, device_option, dtype_option, revision_option
from mmalign.cli.options import Alias, Given, Option, mapping_or_text, number, whole

_ADAPTER = "adapter_model.safetensors"
# How an answer is compared with what is right.
GRADERS = ("auto", "yes-no", "choice", "text")
ALIASES = [
    Alias("model_name_or_path", "is model", lambda value: {"model": value}),
    Alias("pretrained_model_name_or_path", "is model", lambda value: {"model": value}),
    Alias("torch_dtype", "is dtype", lambda value: {"dtype": value}),
    Alias("adapter", "is lora", lambda value: {"lora": value}),
]


def answering_options(*, group: str, lora: bool = False) -> list[Option]:
    """--model and how it is loaded."""
    adapter = Option(
        name="lora",
        help="what alignment made of it: a run's folder or a Hub id with a LoRA of peft",
        metavar="DIR",
        group=group,
        nullable=True,
    )
    return [
        Option(
            name="model",
            help="a Hub id or a folder of transformers: a model that answers, of text, pictures or clips; or playground-vision or "
            "playground-video, which are embedded",
            required=True,
            group=group,
        ),
        *([adapter] if lora else []),
        revision_option(group),
        dtype_option(group),
    ]


def question_options(group: str) -> list[Option]:
    """--data and how questions are read from it."""
    common: dict[str, Any] = {"group": group, "nullable": True}
    return [
        Option(
            name="data",
            help="questions: rows with question (or prompt), image or video, and where known answer, kind, pair, options; a .json, "
            ".jsonl or parquet file, a folder, a Hub id, or playground-vision or playground-video. Of preference pairs the preferred "
            "answer is right",
            required=True,
            group=group,
        ),
        Option(name="split", help="split of a Hub data set or folder; none is train", metavar="NAME", **common),
        Option(
            name="root",
            help="the folder that paths in --data are relative to; none is where the file lies",
            metavar="DIR",
            **common,
        ),
        Option(name="max_rows", help="only the first questions", convert=whole, metavar="N", **common),
        Option(
            name="num_frames",
            help="frames of a clip, sampled evenly from it; none is all that the data have",
            convert=whole,
            metavar="N",
            **common,
        ),
        Option(name="fps", help="or so many frames a second", convert=number, metavar="X", **common),
    ]


def asking_options(group: str) -> list[Option]:
    """How answers are made."""
    return [
        device_option(group),
        Option(
            name="batch_size",
            help="questions answered at once; does not change the answers but by rounding",
            convert=whole,
            metavar="N",
            default=8,
            group=group,
        ),
        Option(
            name="max_new_tokens",
            help="tokens after which an answer is cut",
            convert=whole,
            metavar="N",
            default=256,
            group=group,
        ),
        Option(
            name="processor_kwargs",
            help='for the model\'s processor, such as its image budget: {"max_pixels": 200704}',
            convert=mapping_or_text,
            metavar="JSON",
            group=group,
            nullable=True,
        ),
    ]


def load_answering(
    given: Given,
    pipeline_class: Any = None,
    *,
    name: str | None = None,
    lora: str | None = None,
    device: str | None = None,
    **more: Any,
) -> Any:
    """The model that was asked for, with its processor and its LoRA, on its device.

    pipeline_class: none is `TokenPipeline`. more: for its `from_pretrained`. With a LoRA in a run's folder comes the processor that
    the run saved there, which may have an image budget of its own.
    """
    import torch
    from transformers import AutoProcessor

    from mmalign.training.token_pipeline import TokenPipeline

    options: dict[str, Any] = {"dtype": getattr(torch, given["dtype"]), **more}
    if name is None and given["revision"] is not None:
        options["revision"] = given["revision"]
    pipe: Any = (pipeline_class or TokenPipeline).from_pretrained(name or given["model"], **options)
    if lora is not None:
        folder = Path(lora).expanduser()
        if folder.is_dir() and not (folder / _ADAPTER).is_file():
            raise ValueError(
                f"{folder} holds no {_ADAPTER}: give a whole model to --model, and what it was made of to --base"
            )
        found = pipe.model.load_adapter(str(folder) if folder.is_dir() else lora)
        # transformers goes on, with what is missing as it was begun.
        if astray := sorted({*found.missing_keys, *found.unexpected_keys}):
            raise ValueError(
                f"{lora} was trained from another model than {name or given['model']}: {len(astray)} weights stand in one of the two "
                f"only, such as {astray[0]}"
            )
        if (folder / "tokenizer_config.json").is_file():
            pipe.processor = AutoProcessor.from_pretrained(folder)
    # Nothing is trained here.
    pipe.model.requires_grad_(False)
    return pipe.to(best_device(device or given.values.get("device")))


def questions_of(given: Given) -> Any:
    """The questions of --data."""
    from mmalign.cli.answer_data import open_questions

    names = ("split", "root", "max_rows")
    return open_questions(given["data"], **{name: given[name] for name in names}, **frames_of(given))


def frames_of(given: Given) -> dict[str, Any]:
    """Which frames of a clip are read, and where they are kept, so that a video is decoded once."""
    from mmalign.data import default_cache_dir

    return {name: given[name] for name in ("num_frames", "fps")} | {"frame_cache": default_cache_dir() / "frames"}


def asking_of(given: Given) -> dict[str, Any]:
    """What `asking_options` gave, as keywords of `evaluation.answering.answer`."""
    return {name: given[name] for name in ("batch_size", "max_new_tokens", "processor_kwargs")}
