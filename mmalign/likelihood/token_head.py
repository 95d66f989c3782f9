"""From a language model's last hidden states to logits: its own head, with whatever scales or caps them, outside of its forward.

Read from the model's configuration, and compared with what the model itself says before anything relies on it (`check_head`).
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn


@dataclass(frozen=True, eq=False)
class TokenHead:
    """logits = cap · tanh(multiplier · module(hidden) / cap), without the tanh where cap is None; in float32."""

    module: nn.Module
    multiplier: float = 1.0
    cap: float | None = None

    def __call__(self, hidden: Float[Tensor, "N D"]) -> Float[Tensor, "N V"]:
        """Logits in float32 (float64 stays); the product itself is made in the head's own precision, as the model makes it."""
        logits = self.module(hidden)
        logits = logits.float() if logits.dtype.itemsize < 4 else logits
        if self.multiplier != 1.0:
            logits = logits * self.multiplier
        return logits if self.cap is None else torch.tanh(logits / self.cap) * self.cap

    @property
    def vocabulary(self) -> int:
        """Number of logits."""
        return int(cast(Tensor, self.module.weight).shape[0])


def head_of(model: nn.Module) -> TokenHead:
    """The head of a transformers model that generates text; ValueError where it has none."""
    module = cast(Any, model).get_output_embeddings()
    if module is None:
        raise ValueError(
            f"{type(model).__name__} has no output embeddings: load it as …ForCausalLM or …ForConditionalGeneration"
        )
    config = cast(Any, model).config.get_text_config()
    multiplier = float(getattr(config, "logit_scale", None) or 1.0) / float(
        getattr(config, "logits_scaling", None) or 1.0
    )
    return TokenHead(module, multiplier, getattr(config, "final_logit_softcapping", None))


def base_head_of(model: nn.Module) -> TokenHead:
    """The same without adapters, whatever is switched on when it is called."""
    head = head_of(model)
    # A LoRA keeps the base's layer under the one name, a copy that is trained whole under the other.
    names = [name for name in ("base_layer", "original_module") if hasattr(head.module, name)]
    return replace(head, module=getattr(head.module, names[0])) if names else head


def trunk_of(model: nn.Module) -> nn.Module:
    """The model below its head, whose `last_hidden_state` the head reads."""
    return cast(nn.Module, getattr(model, cast(Any, model).base_model_prefix))


@torch.no_grad()
def check_head(model: nn.Module, inputs: dict[str, Any], *, tolerance: float = 1e-2) -> None:
    """ValueError where `head_of` gives other logits than the model itself, which it would for a head that this file does not know.

    inputs: of one forward pass. tolerance: of the largest difference, as a share of the largest logit.
    """
    keeps = "logits_to_keep" in inspect.signature(model.forward).parameters
    own = model(**inputs, **({"logits_to_keep": 1} if keeps else {})).logits[:, -1].float()
    ours = head_of(model)(trunk_of(model)(**inputs).last_hidden_state[:, -1]).float()
    gap = float((own - ours).abs().max() / own.abs().max().clamp(min=1e-6))
    if not gap <= tolerance:
        raise ValueError(
            f"the logits of {type(model).__name__} are not its output embeddings' ({gap:.2g} apart): it scales or caps them in a way "
            "that is not known here, and log-probabilities would be wrong"
        )
