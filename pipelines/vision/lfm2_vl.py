"""LFM2 and LFM2-VL (arXiv:2511.23404): load what was released, decode as its cards say, save so that other runtimes read it."""

import json
import logging
import os
from pathlib import Path
from typing import Any

from mmalign.files import absence_explained, write_json

_log = logging.getLogger(__name__)

SEES, READS = ("lfm2_vl",), ("lfm2", "lfm2_moe")
# The cards' words: a temperature so low wants min_p to cut the tail, and a penalty against loops.
_DECODING = {"do_sample": True, "min_p": 0.15, "repetition_penalty": 1.05}
_TEMPERATURE = {"lfm2_vl": 0.1, "lfm2": 0.3, "lfm2_moe": 0.3}
_ARCHITECTURES = {"lfm2": "Lfm2ForCausalLM", "lfm2_moe": "Lfm2MoeForCausalLM"}
_NORM = "multi_modal_projector.layer_norm."


def recommended_decoding(model_type: str) -> dict[str, Any]:
    """Keywords for `generate` as the model cards recommend them."""
    _check_type(model_type)
    return {**_DECODING, "temperature": _TEMPERATURE[model_type]}


def load_lfm2(source: str | os.PathLike[str], **options: Any) -> tuple[Any, Any]:
    """Model and processor (of a text model: its tokenizer) from a folder or Hub id, by the model_type of its config.

    options: those of transformers' `from_pretrained`. Whether the projector has its LayerNorm is told by the weights: some
    conversions carry a config that denies what they hold. ValueError names a weight that is missing, where transformers would go on
    with a random one.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer

    source = os.fspath(source)
    revision = {"revision": options["revision"]} if "revision" in options else {}
    with absence_explained(f"download {source} from the Hub, and pass its folder"):
        config = AutoConfig.from_pretrained(source, **revision)
        _check_type(config.model_type)
        sees = config.model_type in SEES
        loader, reader = (AutoModelForImageTextToText, AutoProcessor) if sees else (AutoModelForCausalLM, AutoTokenizer)
        options = {"use_safetensors": True, **options, "output_loading_info": True}
        model, notes = loader.from_pretrained(source, config=config, **options)
        missing, surplus = (sorted(notes[kind]) for kind in ("missing_keys", "unexpected_keys"))
        if sees and any(_NORM in key for key in (*missing, *surplus)):
            config.projector_use_layernorm = any(_NORM in key for key in surplus)
            _log.warning(
                "%s: the config says the projector has %s LayerNorm, the weights have %s; the weights are followed",
                source,
                *(("no", "one") if config.projector_use_layernorm else ("a", "none")),
            )
            model, notes = loader.from_pretrained(source, config=config, **options)
            missing, surplus = (sorted(notes[kind]) for kind in ("missing_keys", "unexpected_keys"))
        if missing or surplus:
            odd = f"lacks {missing[0]}" if missing else f"holds {surplus[0]}, which is not part of the model"
            raise ValueError(f"{source} {odd}: its config.json belongs to other weights")
        return model, reader.from_pretrained(source, **revision)


def apply_export_notes(folder: str | os.PathLike[str]) -> list[str]:
    """Adds to a saved model's config.json what llama.cpp, MLX and older transformers look for; returns what was added.

    text_config.architectures  transformers 5 leaves it out; llama.cpp's converter chooses the text model by it
    block_ff_dim               transformers 5 writes intermediate_size only; older converters and mlx-lm read this name
    Both say what is there already, so that transformers loads the same model.
    """
    path = Path(folder).expanduser() / "config.json"
    if not path.is_file():
        raise ValueError(f"{path.parent} has no config.json: give the folder that save_pretrained wrote")
    config = json.loads(path.read_text(encoding="utf-8"))
    _check_type(config.get("model_type", ""))
    inner = config["model_type"] in SEES
    text, prefix = (config["text_config"], "text_config.") if inner else (config, "")
    notes: dict[str, Any] = {"architectures": [_ARCHITECTURES[text["model_type"]]]} if inner else {}
    # A mixture of experts never had the other name.
    if text["model_type"] == "lfm2":
        notes["block_ff_dim"] = text["intermediate_size"]
    added = {key: value for key, value in notes.items() if text.get(key) != value}
    if added:
        text |= added
        write_json(path, config)
    return [prefix + key for key in added]


def _check_type(model_type: str) -> None:
    if model_type not in SEES + READS:
        raise ValueError(f"this is for LFM2: model_type must be one of {', '.join(SEES + READS)}, got {model_type!r}")
