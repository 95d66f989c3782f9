"""The trained weights of a network: which they are, and how they lie on disk: a LoRA, a user attention, or all."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mmalign.denoisers.parts import ALIGNED, networks
from mmalign.denoisers.user_attention import (
    UserAttentionConfig,
    add_user_attention,
    load_user_attention,
    remove_user_attention,
    save_user_attention,
    user_attention,
)

LORA_FILE = "pytorch_lora_weights.safetensors"
ADAPTER = "default"
_HALF = (torch.float16, torch.bfloat16)


@contextmanager
def made_trainable(network: nn.Module, peft_config: Any, seed: int) -> Iterator[None]:
    """Puts a LoRA on the network, or makes all its weights trainable; undone where the block raises."""
    if user_attention(network) is not None:
        raise ValueError("the pipeline carries a user attention, which PPD alone trains: load the base anew")
    before = [(parameter, parameter.requires_grad) for parameter in network.parameters()]
    if peft_config is not None:
        check_adapter(network, peft_config)
    try:
        network.requires_grad_(peft_config is None)
        if peft_config is not None:
            add_adapter(network, peft_config, seed)
        check_precision(network)
        yield
    except BaseException:
        if peft_config is not None and has_adapter(network):
            network.unload_lora()  # type: ignore[operator]
        for parameter, flag in before:
            parameter.requires_grad_(flag)
        raise


@contextmanager
def users_trainable(network: nn.Module, config: UserAttentionConfig, seed: int) -> Iterator[None]:
    """Puts a user attention on the network, or takes the one that is there, and makes it all that is trained.

    Undone where the block raises; ValueError where there is one of another form.
    """
    before = [(parameter, parameter.requires_grad) for parameter in network.parameters()]
    branch = user_attention(network)
    if branch is not None and branch.config != config:
        raise ValueError(
            f"the pipeline carries a user attention of {branch.config}, and this run is to train one of {config}"
        )
    try:
        network.requires_grad_(False)
        (branch or add_user_attention(network, config, seed=seed)).float().requires_grad_(True)
        yield
    except BaseException:
        if branch is None and user_attention(network) is not None:
            remove_user_attention(network)
        for parameter, flag in before:
            parameter.requires_grad_(flag)
        raise


def add_adapter(network: nn.Module, peft_config: Any, seed: int = 0) -> None:
    """Puts a LoRA on the network, drawn from `seed`, its weights in float32 at least, whatever the base's precision."""
    check_adapter(network, peft_config)
    device = next(network.parameters()).device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        network.add_adapter(peft_config, adapter_name=ADAPTER)  # type: ignore[operator]
    for parameter in network.parameters():
        if parameter.requires_grad and parameter.dtype in _HALF:
            parameter.data = parameter.data.float()


def has_adapter(network: nn.Module) -> bool:
    """Whether the network carries a LoRA."""
    return bool(getattr(network, "peft_config", None))


def check_takes_lora(network: nn.Module) -> None:
    """ValueError for a network without the verbs of diffusers or transformers for it."""
    from diffusers.loaders import PeftAdapterMixin
    from transformers.integrations import PeftAdapterMixin as OfTransformers

    if not isinstance(network, (PeftAdapterMixin, OfTransformers)):
        raise ValueError(
            f"diffusers puts no LoRA on {type(network).__name__}: train every weight (peft_config=None, --full), or a user attention "
            "(PPD)"
        )


def adapter_config(network: nn.Module, name: str = ADAPTER) -> dict[str, Any]:
    """The LoRA's configuration as JSON values; what only says by which library it was made is left out."""
    config = network.peft_config[name].to_dict()  # type: ignore[union-attr, index]
    return {key: sorted(value) if isinstance(value, set) else value for key, value in config.items()}


def component_name(pipe: Any, network: nn.Module) -> str:
    """Under which name the pipeline holds the network: "unet", "transformer" or "prior"."""
    return next(name for name, part in pipe.components.items() if part is network)


def aligned_network(pipe: Any) -> tuple[str, nn.Module]:
    """Name and module of the part of a diffusers pipeline that is aligned."""
    for name in ALIGNED:
        if pipe.components.get(name) is not None:
            return name, pipe.components[name]
    raise ValueError(f"{type(pipe).__name__} has none of {', '.join(ALIGNED)} to work on")


def refuse_other_adapters(pipe: Any) -> None:
    """ValueError where another part than the aligned network carries a LoRA: nothing of ours would keep it."""
    for name, part in networks(pipe).items():
        if name != aligned_network(pipe)[0] and has_adapter(part):
            raise ValueError(
                f"the pipeline's {name} carries a LoRA too, which would be lost: fuse it (pipe.fuse_lora) or unload it first"
            )


def save_trained(pipe: Any, network: nn.Module, folder: Path) -> None:
    """Writes what training changed: `user_attention/`, `pytorch_lora_weights.safetensors`, or the network's own folder."""
    folder.mkdir(parents=True, exist_ok=True)
    branch = user_attention(network)
    if branch is not None:
        save_user_attention(branch, folder)
        return
    name = component_name(pipe, network)
    if not has_adapter(network):
        network.save_pretrained(folder / name)  # type: ignore[operator]
        return
    from peft.utils import get_peft_model_state_dict

    save_lora(name, get_peft_model_state_dict(network, adapter_name=ADAPTER), adapter_config(network), folder)


def save_lora(component: str, weights: dict[str, Tensor], config: dict[str, Any], folder: Path) -> None:
    """Writes `pytorch_lora_weights.safetensors` as diffusers does, rank and α in its metadata; `weights` by peft's names."""
    from diffusers import StableDiffusion3Pipeline, StableDiffusionPipeline
    from diffusers.utils import convert_state_dict_to_diffusers

    # The writers of diffusers differ in the component they name, and in nothing else.
    writer = {"unet": StableDiffusionPipeline, "transformer": StableDiffusion3Pipeline}[component]
    state = convert_state_dict_to_diffusers(weights)
    if any(".lora_A." in key for key in state):
        # Only attention has names of its own. Diffusers takes the first key's spelling for all, so the two must not mix.
        state = weights
    layers = {f"{component}_lora_layers": state, f"{component}_lora_adapter_metadata": config}
    writer.save_lora_weights(folder, weight_name=LORA_FILE, **layers)


def load_trained(network: nn.Module, folder: Path) -> None:
    """Reads back what `save_trained` wrote, into a network of the same shape, exactly."""
    from safetensors.torch import load_file

    if user_attention(network) is not None:
        load_user_attention(network, folder)
        return
    if not has_adapter(network):
        files = sorted(folder.glob("*/diffusion_pytorch_model*.safetensors"))
        if not files:
            raise ValueError(f"{folder} holds no network folder; it was saved by a run with another peft_config")
        # A large network is saved in several files.
        _load_all(network, {name: value for file in files for name, value in load_file(file).items()})
        return
    if not (folder / LORA_FILE).is_file():
        raise ValueError(f"{folder} holds no {LORA_FILE}; it was saved by a run without a peft_config")
    from diffusers.utils import convert_unet_state_dict_to_peft
    from peft.utils import set_peft_model_state_dict

    state = {key.partition(".")[2]: value for key, value in load_file(folder / LORA_FILE).items()}
    result = set_peft_model_state_dict(network, convert_unet_state_dict_to_peft(state), adapter_name=ADAPTER)
    lacking = [name for name in result.missing_keys if f".{ADAPTER}." in name]
    if result.unexpected_keys or lacking:
        strange = (list(result.unexpected_keys) + lacking)[0]
        raise ValueError(f"{folder / LORA_FILE} does not fit the adapter: see {strange}")


def _load_all(network: nn.Module, state: dict[str, Tensor]) -> None:
    try:
        network.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(f"the saved network does not fit this one: {str(error).splitlines()[-1].strip()}") from error


def check_adapter(network: nn.Module, peft_config: Any) -> None:
    """ValueError for what is no LoRA that could be put on the network, trained and saved."""
    from peft import LoraConfig

    if not isinstance(peft_config, LoraConfig):
        raise ValueError(f"peft_config must be a peft.LoraConfig, got {type(peft_config).__name__}")
    check_takes_lora(network)
    existing = list(getattr(network, "peft_config", {}))
    if existing:
        raise ValueError(
            f"the pipeline already carries adapter(s) {', '.join(existing)}: fuse (fuse_lora, then unload_lora_weights) or unload them "
            "before training a new one"
        )
    for option in ("bias", "modules_to_save"):
        if getattr(peft_config, option) not in (None, "none"):
            raise ValueError(f"peft_config.{option} is refused: the file of a LoRA holds low-rank weights only")


def check_precision(network: nn.Module) -> None:
    """ValueError for trained weights in half precision."""
    half = [name for name, p in network.named_parameters() if p.requires_grad and p.dtype in _HALF]
    if half:
        raise ValueError(
            f"{len(half)} trained weights are in half precision ({half[0]}, …) and would round small steps away: load the pipeline "
            "with dtype=torch.float32 and train with bf16=True, or pass a peft_config"
        )
