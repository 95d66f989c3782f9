"""The trained weights of a transformers model: which they are, and how they lie on disk: a LoRA as peft's, or all as transformers'."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

from torch import Tensor, nn

from mmalign.denoisers.adapters import acting_adapters, adapter_layers
from mmalign.denoisers.parts import is_quantized
from mmalign.training.token_parts import Trained, check_targets, mark_trained
from mmalign.training.weights import ADAPTER, add_adapter, check_adapter, check_precision, has_adapter

ADAPTER_FILE = "adapter_model.safetensors"
_CONFIG_FILE = "adapter_config.json"
_PREFIX = "base_model.model."


@contextmanager
def answers_trainable(model: nn.Module, peft_config: Any, trained: Trained, seed: int) -> Iterator[None]:
    """Puts a LoRA on the model, or makes the weights of these parts trainable; undone where the block raises.

    ValueError where the model carries a LoRA already.
    """
    if has_adapter(model):
        carried = ", ".join(cast(Any, model).peft_config)
        raise ValueError(
            f"the model already carries a LoRA ({carried}): save the pipeline, which merges it, and train what was saved"
        )
    before = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        if peft_config is None:
            mark_trained(model, trained)
        else:
            check_adapter(model, peft_config)
            check_targets(model, peft_config, trained)
            model.requires_grad_(False)
            # peft keeps the very object on the model, and transformers writes the base's name into it.
            add_adapter(model, copy.deepcopy(peft_config), seed)
        check_precision(model)
        yield
    except BaseException:
        if has_adapter(model):
            without_adapters(model)
        for parameter, flag in before:
            parameter.requires_grad_(flag)
        raise


def without_adapters(model: nn.Module) -> nn.Module:
    """The model with its adapters taken off for good, in place."""
    from diffusers.utils.peft_utils import recurse_remove_peft_layers

    recurse_remove_peft_layers(model)
    if has_adapter(model):
        del model.peft_config
        cast(Any, model)._hf_peft_config_loaded = False
    return model


def merged_copy(model: nn.Module) -> nn.Module:
    """The model itself where it carries no adapter; else a copy with its adapters merged, as strong as they act now."""
    if not adapter_layers(model):
        return model
    if is_quantized(model):
        raise ValueError(
            f"{type(model).__name__} is quantised, and merging its LoRA would round both: load the adapter into the unquantised base "
            "and save that"
        )
    merged = copy.deepcopy(model)
    acting = list(acting_adapters(merged))
    for layer in adapter_layers(merged):
        layer.merge(adapter_names=acting)
    return without_adapters(merged)


def save_answering(model: nn.Module, folder: Path) -> None:
    """Writes what training changed: `adapter_model.safetensors` with its configuration, or all weights as transformers does."""
    folder.mkdir(parents=True, exist_ok=True)
    if has_adapter(model):
        save_adapter(model, folder)
    else:
        cast(Any, model).save_pretrained(folder)


def save_adapter(model: nn.Module, folder: Path) -> None:
    """The LoRA as `PeftModel.from_pretrained` and `model.load_adapter` read it."""
    from peft.utils import get_peft_model_state_dict
    from safetensors.torch import save_file

    # "auto" would ask the Hub whether the base's vocabulary has grown, to keep embeddings, which a LoRA does not change.
    state = get_peft_model_state_dict(model, adapter_name=ADAPTER, save_embedding_layers=False)
    tensors = {_PREFIX + name: value.detach().cpu().contiguous() for name, value in state.items()}
    save_file(tensors, folder / ADAPTER_FILE, {"format": "pt"})
    config = copy.deepcopy(cast(Any, model).peft_config[ADAPTER])
    config.inference_mode = True
    config.save_pretrained(str(folder))


def load_answering(model: nn.Module, folder: Path) -> None:
    """Reads back what `save_answering` wrote, into a model of the same shape, exactly."""
    from safetensors.torch import load_file

    if has_adapter(model):
        if not (folder / ADAPTER_FILE).is_file():
            raise ValueError(f"{folder} holds no {ADAPTER_FILE}; it was saved by a run without a peft_config")
        _load_adapter(model, load_file(folder / ADAPTER_FILE), folder / ADAPTER_FILE)
        return
    files = sorted(folder.glob("model*.safetensors"))
    if not files:
        raise ValueError(f"{folder} holds no model.safetensors; it was saved by a run with a peft_config")
    read = type(model).from_pretrained(folder, dtype=next(model.parameters()).dtype)  # type: ignore[attr-defined]
    model.load_state_dict(read.state_dict())


def _load_adapter(model: nn.Module, state: dict[str, Tensor], file: Path) -> None:
    from peft.utils import set_peft_model_state_dict

    bare = {name.removeprefix(_PREFIX): value for name, value in state.items()}
    result = set_peft_model_state_dict(model, bare, adapter_name=ADAPTER)
    lacking = [name for name in result.missing_keys if f".{ADAPTER}." in name]
    if result.unexpected_keys or lacking:
        raise ValueError(f"{file} does not fit the adapter: see {(list(result.unexpected_keys) + lacking)[0]}")
