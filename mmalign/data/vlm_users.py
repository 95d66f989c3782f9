"""Users by a vision language model: it looks at a few pairs, writes down what the person likes, and what it then thinks are the tokens.

PPD's first stage (arXiv:2501.06655) as its authors released it: preferred picture first, greedy, the states at the token from which the
last one was written. The prompt is ours (user_prompt.json).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import torch

from mmalign.data.users import Profile, Shot

if TYPE_CHECKING:
    from PIL import Image

MODEL = "llava-hf/llava-onevision-qwen2-7b-ov-chat-hf"
Layers = Literal["all", "last"] | list[int]


class VlmUserEncoder:
    """Tokens (L, D) from LLaVA-OneVision: one a layer, the embedding first and the last after its norm (29 of 3584 with 7B).

    layers: "all", "last", or numbers of layers, from the end where negative. max_new_tokens: where a text is cut off; its state is then
    one in the middle of a sentence, and `Profile.stopped` says "length".
    """

    def __init__(
        self, model: Any, processor: Any, *, name: str, layers: Layers = "all", max_new_tokens: int = 1024
    ) -> None:
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
        if layers not in ("all", "last") and (isinstance(layers, str) or not layers):
            raise ValueError(f"layers must be 'all', 'last' or a list of numbers, got {layers!r}")
        self.model, self.processor, self.name = model.eval().requires_grad_(False), processor, name
        self.layers, self.max_new_tokens = layers, max_new_tokens

    @classmethod
    def from_pretrained(
        cls,
        model: str | Path = MODEL,
        *,
        revision: str | None = None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        layers: Layers = "all",
        max_new_tokens: int = 1024,
    ) -> VlmUserEncoder:
        """From a folder or Hub id with safetensors weights."""
        from transformers import AutoProcessor, LlavaOnevisionForConditionalGeneration

        at = revision or "main"
        loaded: Any = LlavaOnevisionForConditionalGeneration.from_pretrained(
            model, revision=at, dtype=dtype, use_safetensors=True
        )
        processor = AutoProcessor.from_pretrained(model, revision=at)
        name = str(getattr(loaded.config, "_commit_hash", None) or at)
        return cls(loaded.to(device), processor, name=f"{model}@{name}", layers=layers, max_new_tokens=max_new_tokens)

    @property
    def made_by(self) -> dict[str, Any]:
        """Model, layers, length and prompt."""
        told = json.dumps(_layout(), sort_keys=True)
        return {
            "encoder": "vision-language",
            "model": self.name,
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "layers": self.layers,
            "max_new_tokens": self.max_new_tokens,
            "prompt": hashlib.sha256(told.encode()).hexdigest(),
        }

    @torch.no_grad()
    def encode(self, shots: Sequence[Shot]) -> Profile:
        """Writes a profile of whoever made these comparisons, and returns the states at its end with it."""
        inputs = self._inputs(shots)
        written = self.model.generate(
            **inputs,
            do_sample=False,
            max_new_tokens=self.max_new_tokens,
            output_hidden_states=True,
            return_dict_in_generate=True,
        )
        new = written.sequences[0, inputs["input_ids"].shape[1] :]
        # The states of the last step: at its last input, the token before the last one that was written.
        states = torch.stack([layer[0, -1] for layer in written.hidden_states[-1]]).float().cpu()
        stopped = "end" if int(new[-1]) in self._ends() else "length"
        text = self.processor.tokenizer.decode(new, skip_special_tokens=True)
        return Profile(self._chosen(states), text, stopped)

    def _inputs(self, shots: Sequence[Shot]) -> Any:
        # The published chat template puts pictures before all text, whatever their order, so they are named in the text.
        text = prompt_of([shot.prompt for shot in shots], self.processor.image_token)
        turn = [{"role": "user", "content": [{"type": "text", "text": text}]}]
        written = self.processor.apply_chat_template(turn, add_generation_prompt=True)
        mean = self.processor.image_processor.image_mean
        pictures = [squared(side, mean) for shot in shots for side in (shot.preferred, shot.rejected)]
        # A list of lists is one conversation with many pictures, each read as one tile; a flat list would be many conversations.
        inputs = self.processor(text=[written], images=[pictures], return_tensors="pt")
        return inputs.to(self.model.device, self.model.dtype)

    def _chosen(self, states: torch.Tensor) -> torch.Tensor:
        if self.layers == "all":
            return states
        numbers = [-1] if self.layers == "last" else self.layers
        if any(not -len(states) <= number < len(states) for number in numbers):
            raise ValueError(f"layers={numbers} of a model with {len(states)} (the embedding is 0)")
        return states[numbers]

    def _ends(self) -> list[int]:
        ends = self.model.generation_config.eos_token_id
        return ends if isinstance(ends, list) else [] if ends is None else [ends]


def prompt_of(prompts: Sequence[str], image: str) -> str:
    """What the model is asked about pairs of these captions; `image` stands where a picture goes, preferred before rejected."""
    layout = _layout()
    numbered = list(enumerate(prompts, 1))
    pairs = [layout["pair"].format(number=n, prompt=p.replace(image, " "), image=image) for n, p in numbered]
    answers = [layout["answer"].format(number=n) for n, _ in numbered]
    parts = [layout["opening"].format(count=len(prompts)), *pairs, layout["task"], *answers, layout["profile"]]
    return "\n\n".join(parts)


def squared(picture: Image.Image, mean: Sequence[float]) -> Image.Image:
    """The picture in the middle of a square of the processor's mean colour, uncut and undistorted."""
    from PIL import Image

    side = max(picture.size)
    red, green, blue = (round(255 * value) for value in mean)
    paper = Image.new("RGB", (side, side), (red, green, blue))
    paper.paste(picture, ((side - picture.width) // 2, (side - picture.height) // 2))
    return paper


@cache
def _layout() -> dict[str, str]:
    text = (files("mmalign") / "data" / "user_prompt.json").read_text(encoding="utf-8")
    return cast(dict[str, str], json.loads(text))
