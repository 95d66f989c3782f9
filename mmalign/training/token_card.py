"""The model card of a token model's run: how transformers loads what was trained."""

from pathlib import Path
from typing import Any

from torch import nn

from mmalign.training.card import Card, public_name, write_card
from mmalign.training.loading import EMBEDDED_ANSWERING
from mmalign.training.token_config import TokenConfig
from mmalign.training.token_parts import sees
from mmalign.training.weights import has_adapter

_JUDGE = "Whether the answers got better is for held-out questions."


def write_token_card(
    folder: Path,
    args: TokenConfig,
    *,
    model: nn.Module,
    data: str,
    left_out: str,
    metrics: dict[str, Any],
    settings: dict[str, Any],
) -> None:
    """Writes README.md; `left_out`: which rows were not trained on, and why."""
    base_model = str(getattr(model, "name_or_path", "") or "unknown")
    is_lora, base = has_adapter(model), public_name(base_model)
    loader = "AutoModelForImageTextToText" if sees(model) else "AutoModelForCausalLM"
    card = Card(
        library="peft" if is_lora else "transformers",
        task="image-text-to-text" if sees(model) else "text-generation",
        base_model=base_model,
        is_finetune=not is_lora,
        data=data,
        tags=["lora", "transformers"] if is_lora else ["transformers"],
        subject=f"{base} aligned",
        usage=_usage(loader, base, is_lora=is_lora),
        note=f"\nNot every row was trained on: {left_out}\n" if left_out else "",
        settings=settings,
        metrics=metrics,
        judge=_JUDGE,
    )
    write_card(folder, args, card)


def _usage(loader: str, base: str, *, is_lora: bool) -> str:
    """Python that loads the result; FOLDER is the card's own folder, or its id on the Hub."""
    if not is_lora:
        return f"""from transformers import AutoProcessor, {loader}

model = {loader}.from_pretrained(FOLDER)
processor = AutoProcessor.from_pretrained(FOLDER)"""
    # Plain transformers does not know the embedded models by name.
    if base in EMBEDDED_ANSWERING:
        return f"""from mmalign import RRPOPipeline

pipe = RRPOPipeline.from_pretrained({base!r})
pipe.model.load_adapter(FOLDER)"""
    return f"""from transformers import AutoProcessor, {loader}

model = {loader}.from_pretrained({base!r})
model.load_adapter(FOLDER)
processor = AutoProcessor.from_pretrained(FOLDER)"""
