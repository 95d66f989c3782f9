"""What alignments released, put onto their base: networks in folders, files and pipelines, and LoRAs of three kinds."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from mmalign.denoisers.user_attention import FOLDER, load_user_attention
from mmalign.rewards.checkpoints import read_checkpoint
from mmalign.training.lora_list import named_weights, read_lora_list
from mmalign.training.weights import LORA_FILE, aligned_network, has_adapter

_PEFT_FILE, _PEFT_CONFIG, _PEFT_PREFIX = "adapter_model.safetensors", "adapter_config.json", "base_model.model."
_NETWORK_FILE = "diffusion_pytorch_model"
_PICKLED = (".bin", ".ckpt", ".pth", ".pt")
# A key that only such weights hold → what they are, the most telling first.
_KINDS = (
    ("lora", "a LoRA"),
    ("model.diffusion_model.", "a single-file checkpoint: load it as the base (from_single_file)"),
    ("add_embedding.", "the UNet of Stable Diffusion XL"),
    ("down_blocks.0.resnets.0.time_emb_proj.", "a UNet"),
    ("single_transformer_blocks.", "the transformer of FLUX"),
    ("pos_embed.", "the transformer of Stable Diffusion 3"),
    ("quant_conv.", "a VAE"),
    ("decoder.conv_in.", "a VAE"),
    ("text_model.", "a text encoder"),
)


@dataclass(frozen=True)
class Released:
    """The weights of a LoRA or of a whole network, and the file they (or the first of them) stood in."""

    file: Path
    state: dict[str, Tensor]

    @property
    def is_lora(self) -> bool:
        """Whether they are a LoRA's."""
        return any("lora" in key for key in self.state)


def load_aligned(
    pipe: Any, path: str | os.PathLike[str], *, adapter_name: str = "aligned", allow_pickle: bool = False
) -> str | None:
    """Puts aligned weights onto `pipe`, the base they were trained from, and returns the adapter's name, None for a whole network.

    path: a folder here, a Hub id, or one file. Read are a pipeline or a folder with unet/ or transformer/ (that network is taken, the
    other parts stay), a network's own folder, a folder here with a user attention, and a LoRA of diffusers, peft or kohya; all in
    safetensors. With `allow_pickle` also state dicts in .bin, .ckpt, .pth and .pt, and LoRAs that are lists without names
    (`training.lora_list`), as tensors only. ValueError names the first weight that does not fit, before anything is changed.
    """
    folder = Path(path).expanduser()
    if (folder / FOLDER).is_dir():
        network = aligned_network(pipe)[1]
        load_user_attention(network, folder).to(next(network.parameters()).dtype)
        return None
    released = read_released(pipe, path, allow_pickle=allow_pickle)
    if released.is_lora:
        add_lora(pipe, released, adapter_name)
        return adapter_name
    replace_weights(aligned_network(pipe)[1], released)
    return None


def read_released(pipe: Any, path: str | os.PathLike[str], *, allow_pickle: bool = False) -> Released:
    """What `load_aligned` would put onto `pipe`, as tensors."""
    component, network = aligned_network(pipe)
    files = _files(str(path), component, allow_pickle)
    if (listed := read_lora_list(files[0])) is not None:
        weights, _ = named_weights(network, listed)
        return Released(files[0], {f"{component}.{name}": value for name, value in weights.items()})
    state: dict[str, Tensor] = {}
    for file in files:
        state |= read_checkpoint(file)
    return Released(files[0], state)


# Finding the files.


def _files(path: str, component: str, allow_pickle: bool) -> list[Path]:
    """The files to read, here; from the Hub only these are fetched."""
    place = Path(path).expanduser()
    if place.is_dir():
        names = [file.relative_to(place).as_posix() for file in sorted(place.glob("*")) + sorted(place.glob("*/*"))]
        return [place / name for name in _wanted(names, component, allow_pickle, path)]
    if place.is_file():
        return [place.parent / name for name in _wanted([place.name], component, allow_pickle, path)]
    if path.startswith((".", "/", "~")) or path.count("/") != 1:
        raise ValueError(f"{path}: no such file or folder, and no Hub id")
    from huggingface_hub import list_repo_files, snapshot_download

    wanted = _wanted(list_repo_files(path), component, allow_pickle, path)
    folder = Path(snapshot_download(path, allow_patterns=[*wanted, _PEFT_CONFIG]))
    return [folder / name for name in wanted]


def _wanted(names: Sequence[str], component: str, allow_pickle: bool, path: str) -> list[str]:
    """The names of the weight files, the network's own folder first; ValueError where there are none, or pickles nobody asked for."""
    for folder in (f"{component}/", ""):
        inside = [name for name in names if name.startswith(folder) and "/" not in name[len(folder) :]]
        if found := _chosen([name for name in inside if name.endswith(".safetensors")], path):
            return found
        found = _chosen([name for name in inside if name.endswith(_PICKLED)], path)
        if found and not allow_pickle:
            raise ValueError(
                f"{path} holds pickled weights only ({found[0]}), which can run code when they are read: convert them to "
                "safetensors, or pass allow_pickle=True (--allow-pickle) if you trust them"
            )
        if found:
            return found
    shown = ", ".join(sorted(names)[:6]) or "nothing"
    raise ValueError(
        f"{path} holds no LoRA (found: {shown}), and no {component}/; name a run's output_dir, a released folder, or a file"
    )


def _chosen(files: list[str], path: str) -> list[str]:
    """Of the weight files of one folder those that belong together: a network's shards, a LoRA, or the only one there is."""
    networks = [name for name in files if Path(name).name.startswith(_NETWORK_FILE)]
    # "diffusion_pytorch_model.fp16.safetensors" is another precision of the same, and comes second.
    if networks:
        return [name for name in networks if _variant(name) == min(map(_variant, networks))]
    for known in (LORA_FILE, _PEFT_FILE):
        if known in files:
            return [known]
    if len(files) > 1:
        raise ValueError(f"{path} holds several weight files ({', '.join(sorted(files)[:4])}): name one of them")
    return files


def _variant(name: str) -> str:
    middle = Path(name).name.removeprefix(_NETWORK_FILE).split(".")[1:-1]
    return middle[0].partition("-")[0] if middle else ""


# A whole network.


def replace_weights(network: nn.Module, released: Released) -> None:
    """Takes over every weight, in the network's own precision and place."""
    if has_adapter(network):
        raise ValueError(
            "the pipeline carries a LoRA: load the whole network before it, or unload it (unload_lora_weights)"
        )
    check_fits(network, released)
    network.load_state_dict(released.state)


def check_fits(network: nn.Module, released: Released) -> None:
    """ValueError for the first weight of a whole network that is not the other's, or is lacking."""
    file, state, expected = released.file, released.state, network.state_dict()
    problems = [f"{key} is not in it" for key in state if key not in expected]
    problems += [f"{key} is missing" for key in expected if key not in state]
    problems += [
        _sizes(key, value, expected[key])
        for key, value in state.items()
        if value.shape != expected.get(key, value).shape
    ]
    if problems:
        raise ValueError(_misfit(file, network, problems[0], state))


def _sizes(key: str, there: Tensor, here: Tensor) -> str:
    return f"{key} is {tuple(there.shape)} there and {tuple(here.shape)} here"


def _misfit(file: Path, network: nn.Module, problem: str, state: dict[str, Tensor]) -> str:
    kind = next((kind for mark, kind in _KINDS if any(mark in key for key in state)), "something else")
    return f"{file} does not fit the pipeline's {type(network).__name__}: {problem}. It seems to be {kind}"


# A LoRA.


def add_lora(pipe: Any, released: Released, adapter_name: str) -> None:
    """Adds it as an adapter, once every layer is known to have its place."""
    file, state = released.file, released.state
    from diffusers.utils import convert_unet_state_dict_to_peft
    from peft import LoraConfig

    component, network = aligned_network(pipe)
    if any(key.startswith(_PEFT_PREFIX) for key in state):
        bare = {key.removeprefix(_PEFT_PREFIX): value for key, value in state.items()}
        _check_layers(network, bare, file, state)
        if not (file.parent / _PEFT_CONFIG).is_file():
            raise ValueError(f"{file} needs the {_PEFT_CONFIG} that peft wrote beside it: its α stands there")
        config = LoraConfig.from_pretrained(str(file.parent)).to_dict()
        network.load_lora_adapter(bare, prefix=None, adapter_name=adapter_name, metadata=config)  # type: ignore[operator]
        return
    source = str(file) if file.suffix == ".safetensors" else dict(state)
    try:
        read, *_ = type(pipe).lora_state_dict(source, unet_config=network.config, return_lora_metadata=True)
    except (ValueError, AssertionError) as error:
        reason = " ".join(str(error).split())[:200] or "its layers have other sizes"
        raise ValueError(f"{file} is a LoRA that diffusers cannot read for {type(pipe).__name__}: {reason}") from error
    ours = {key.removeprefix(f"{component}."): value for key, value in read.items() if key.startswith(f"{component}.")}
    if not ours:
        raise ValueError(
            _misfit(file, network, f"no key starts with {component}., the first is {next(iter(state))}", state)
        )
    _check_layers(network, convert_unet_state_dict_to_peft(ours), file, state)
    pipe.load_lora_weights(source, adapter_name=adapter_name)


def _check_layers(network: nn.Module, weights: dict[str, Tensor], file: Path, state: dict[str, Tensor]) -> None:
    """ValueError for the first layer that the network lacks, or has in another size."""
    modules = dict(network.named_modules())
    for key, value in weights.items():
        name, _, side = key.partition(".lora_")
        if name not in modules:
            raise ValueError(_misfit(file, network, f"{name} is not in it", state))
        if side not in ("A.weight", "B.weight"):
            continue
        axis = 1 if side == "A.weight" else 0
        there, here = value.shape[axis], modules[name].weight.shape[axis]
        if there != here:
            raise ValueError(_misfit(file, network, f"{key} is {there} wide and {name} is {here}", state))
