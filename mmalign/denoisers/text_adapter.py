"""T5's reading of a whole prompt, brought to CLIP's width by LaVi-Bridge's adapter (arXiv:2403.07860), as LongAlign's SD 1.5 has it.

tail = T5Tail(tokenizer, encoder, load_adapter("LongSD/s28750_adapter"))
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

CONFIG, WEIGHTS = "config.json", "diffusion_pytorch_model.safetensors"
_SIZES = ("in_dim", "int_dim", "out_dim")


class TextAdapter(nn.Module):
    """(…, in_dim) → (…, out_dim): two normalised GEGLU layers through int_dim; for T5-large and SD 1.5: 1024, 896, 768."""

    def __init__(self, in_dim: int = 1024, int_dim: int = 896, out_dim: int = 768, dropout: float = 0.1) -> None:
        super().__init__()
        self.sizes = (in_dim, int_dim, out_dim)
        # Attributes are named as the released weights are.
        self.ff1 = _FeedForward(in_dim, int_dim, dropout)
        self.ff2 = _FeedForward(int_dim, out_dim, dropout)
        self.norm1 = nn.LayerNorm(in_dim)
        self.norm2 = nn.LayerNorm(int_dim)

    def forward(self, states: Float[Tensor, "... D"]) -> Float[Tensor, "... E"]:
        return self.ff2(self.norm2(self.ff1(self.norm1(states))))


class _FeedForward(nn.Module):
    def __init__(self, width: int, out: int, dropout: float) -> None:
        super().__init__()
        self.net = nn.Sequential(_GatedLinear(width, 4 * width), nn.Dropout(dropout), nn.Linear(4 * width, out))

    def forward(self, states: Tensor) -> Tensor:
        return self.net(states)


class _GatedLinear(nn.Module):
    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.proj = nn.Linear(width, 2 * out)

    def forward(self, states: Tensor) -> Tensor:
        values, gate = self.proj(states).chunk(2, dim=-1)
        return values * functional.gelu(gate)


def save_adapter(adapter: TextAdapter, folder: Path) -> None:
    """Writes config.json and diffusion_pytorch_model.safetensors, as LongAlign released its own."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    sizes = {"_class_name": "TextAdapter", **dict(zip(_SIZES, adapter.sizes, strict=True))}
    (folder / CONFIG).write_text(json.dumps(sizes, indent=1) + "\n", encoding="utf-8")
    state = {name: value.detach().cpu().contiguous() for name, value in adapter.state_dict().items()}
    save_file(state, folder / WEIGHTS, metadata={"format": "pt"})


def load_adapter(folder: str | Path) -> TextAdapter:
    """The adapter in a folder as `save_adapter` writes it, in eval mode and float32; ValueError for another folder."""
    folder = Path(folder).expanduser()
    lacking = [name for name in (CONFIG, WEIGHTS) if not (folder / name).is_file()]
    if lacking:
        raise ValueError(
            f"{folder} holds no {lacking[0]}: name the folder of a TextAdapter, such as LongSD's s28750_adapter"
        )
    config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    if not all(isinstance(config.get(name), int) for name in _SIZES):
        raise ValueError(f"{folder / CONFIG} states no {', '.join(_SIZES)}: it is no TextAdapter's")
    adapter = TextAdapter(*(config[name] for name in _SIZES))
    load_adapter_weights(adapter, folder)
    return adapter.eval().requires_grad_(False)


def load_adapter_weights(adapter: TextAdapter, folder: Path) -> None:
    """The weights in such a folder, into an adapter of their sizes; ValueError for other sizes."""
    from safetensors.torch import load_file

    try:
        adapter.load_state_dict(load_file(folder / WEIGHTS))
    except RuntimeError as error:
        raise ValueError(f"{folder / WEIGHTS} does not fit: {str(error).splitlines()[-1].strip()}") from error


@dataclass(frozen=True, eq=False)
class T5Tail:
    """What stands behind CLIP's embeddings: T5's states of the whole prompt, cut or padded to max_tokens, through the adapter."""

    tokenizer: Any
    encoder: Any
    adapter: TextAdapter
    max_tokens: int = 240

    @property
    def networks(self) -> dict[str, nn.Module]:
        """Both networks, by name."""
        return {"t5_encoder": self.encoder, "text_adapter": self.adapter}

    @torch.no_grad()
    def states(self, prompts: Sequence[str]) -> Float[Tensor, "B L D"]:
        """T5's last states, padding included and unmasked, as the adapter was trained on."""
        tokens = self.tokenizer(
            list(prompts), padding="max_length", max_length=self.max_tokens, truncation=True, return_tensors="pt"
        )
        return self.encoder(tokens.input_ids.to(self.encoder.device)).last_hidden_state

    def __call__(self, prompts: Sequence[str]) -> Float[Tensor, "B L E"]:
        """With gradient to the adapter, if it is trained."""
        weight = self.adapter.norm1.weight
        return self.adapter(self.states(prompts).to(weight.device, weight.dtype))

    def to(self, device: torch.device | str) -> "T5Tail":
        """Both networks moved there."""
        for network in self.networks.values():
            network.to(device)
        return self


def load_tail(adapter: Path | str, t5: Path | str, tokenizer: Path | str, max_tokens: int) -> T5Tail:
    """From the adapter's folder, and folders or Hub ids of T5 (safetensors weights, read in float32) and its tokenizer."""
    from transformers import AutoTokenizer, T5EncoderModel

    loaded = load_adapter(adapter)
    try:
        words = AutoTokenizer.from_pretrained(tokenizer)
        encoder: Any = T5EncoderModel.from_pretrained(t5, use_safetensors=True, dtype=torch.float32)
    except OSError as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(
            f"{reason}: download {t5} from the Hub, weights as safetensors, and pass its folder as t5"
        ) from error
    if encoder.config.d_model != loaded.sizes[0]:
        raise ValueError(
            f"{t5} is {encoder.config.d_model} wide and the adapter reads {loaded.sizes[0]}: pass the T5 it was trained on"
        )
    return T5Tail(words, encoder.eval().requires_grad_(False), loaded, max_tokens)
