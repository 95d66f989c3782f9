"""HPSv3: a Qwen2-VL reads the picture and a long text about the prompt, and a small head what it thinks at one last token.

Facts are those of the authors' package hpsv3 1.0.0 with transformers 4.45.2, with which this agrees on small random weights; the
published weights were not at hand, so that nothing is claimed of them. Where there is a GPU, this compares both on them:

    python benchmarks/hpsv3_parity.py --weights HPSv3.safetensors --theirs <python in which hpsv3 is installed> --device cuda
"""

from __future__ import annotations

import ast
import hashlib
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from mmalign.files import absence_explained
from mmalign.rewards.base import NetworkScorer
from mmalign.rewards.checkpoints import fitted, part_of, read_checkpoint, shape_of
from mmalign.rewards.fingerprints import module_hash, text_hash, tokenizer_hash
from mmalign.rewards.pixels import normalise, resize_pixels, to_pixels

if TYPE_CHECKING:
    from PIL import Image

REPO, FILE = "MizzenAI/HPSv3", "HPSv3.safetensors"
# Whose sizes, tokens and chat form the weights have; its own weights are not read.
BASE = "Qwen/Qwen2-VL-7B-Instruct"
# What the network is told before and after a prompt is the authors' text: it is read from their wheel.
WHEEL = "hpsv3-1.0.0-py3-none-any.whl"
_SOURCE = "hpsv3/dataset/data_collator_qwen.py"
_SOURCE_HASH = "b0f936e89f8df652c67d470412e1d9afd27aa711dec85724c19989ac91e7a3e3"
_REWARD, _PICTURE, _PROMPT = "<|Reward|>", "<|image_pad|>", "{text_prompt}"
# Large and small pictures alike are brought as near to this as sides in multiples of 28 can be.
_AREA = 256 * 28 * 28
_FORMAT = 1


@dataclass(frozen=True)
class Patches:
    """Pictures of several sizes in squares, one picture after the other; grid: of each (1, rows, columns)."""

    values: Float[Tensor, "T D"]
    grid: Int[Tensor, "B 3"]

    def to(self, device: torch.device | str) -> Patches:
        return Patches(self.values.to(device), self.grid.to(device))


class HPSv3Scorer(NetworkScorer):
    """μ of the (μ, ln σ) that a head gives at the token <|Reward|> (arXiv:2508.03789).

    σ was for training: two pictures were compared by μ_a − μ_b plus noise of variance σ_a² + σ_b², so that unclear pairs taught
    less. Like the authors' inference, this leaves it out. Prompts are never cut.
    """

    def __init__(
        self, model: Any, head: nn.Module, tokenizer: Any, *, frame: str, name: str, batch_size: int = 32
    ) -> None:
        """frame: the whole text of a conversation, with one <|image_pad|>, one {text_prompt} and one <|Reward|>."""
        super().__init__(nn.ModuleDict({"qwen": model, "head": head}), name=name, batch_size=batch_size)
        self.qwen, self.head, self.tokenizer, self.frame = model, head, tokenizer, frame

    @classmethod
    def from_file(
        cls,
        path: str | Path,
        *,
        name: str = "hpsv3",
        base: str | Path = BASE,
        wheel: str | Path | None = None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
        batch_size: int = 32,
    ) -> HPSv3Scorer:
        """From the published file. base: config and tokenizer of Qwen2-VL-7B; wheel: the authors', None: beside the file.

        dtype: of the Qwen2-VL; None is float32 on a CPU and elsewhere bfloat16, as the authors ran it. The head is read in float32.
        """
        from transformers import Qwen2VLConfig, Qwen2VLProcessor

        template = _template(Path(wheel or Path(path).parent / WHEEL).expanduser())
        with absence_explained(
            f"run `hf download {BASE} --exclude '*.safetensors' --local-dir qwen2-vl` where the Hub is reached, and pass "
            "HPSv3Scorer.from_file(…, base='qwen2-vl')"
        ):
            config: Any = Qwen2VLConfig.from_pretrained(base)
            processor: Any = Qwen2VLProcessor.from_pretrained(base)
        processor.tokenizer.add_tokens([_REWARD], special_tokens=True)
        frame = _frame(processor, template, base)
        state = read_checkpoint(path)
        words = shape_of(state, "model.embed_tokens.weight", "HPSv3")[0]
        if words != len(processor.tokenizer):
            raise ValueError(
                f"the weights know {words} tokens, {base} and {_REWARD} make {len(processor.tokenizer)}: pass base={BASE!r}"
            )
        config.text_config.vocab_size = words
        if dtype is None:
            dtype = torch.float32 if torch.device(device).type == "cpu" else torch.bfloat16
        qwen = _qwen(config, state).to(device, dtype)
        head = _head(part_of(state, "rm_head.", "HPSv3")).to(device)
        return cls(qwen, head, processor.tokenizer, frame=frame, name=name, batch_size=batch_size)

    @property
    def logit_scale(self) -> float:
        # P(a is better than b) of two pictures that the model is sure of; σ takes it nearer to a half.
        return 1.0

    @cached_property
    def fingerprint(self) -> str:
        parts = [module_hash(part, self.name) for part in (self.qwen, self.head)]
        return text_hash([_FORMAT, parts, tokenizer_hash(self.tokenizer), self.frame])

    def count_truncated(self, prompts: Sequence[str]) -> int:
        return 0

    def preprocess(self, images: Sequence[Image.Image]) -> Patches:
        from PIL import Image

        rows = []
        for image in images:
            height, width = self._size(image.height, image.width)
            rows.append(to_pixels(image.convert("RGB").resize((width, height), Image.Resampling.BICUBIC)))
        return self._patches(rows)

    def preprocess_pixels(self, pixels: Float[Tensor, "B 3 H W"]) -> Patches:
        return self._patches(list(resize_pixels(pixels, *self._size(*pixels.shape[2:])).split(1)))

    def reward(self, inputs: Patches, prompts: Sequence[str]) -> Float[Tensor, " B"]:
        counts = inputs.grid.prod(1) // self.qwen.config.vision_config.spatial_merge_size**2
        texts = [self._text(prompt, count) for prompt, count in zip(prompts, counts.tolist(), strict=True)]
        tokens = self.tokenizer(texts, padding=True, padding_side="right", return_tensors="pt").to(self.device)
        # Counted through, also over the picture, where Qwen2-VL would count rows and columns: so was the model trained.
        places = torch.arange(tokens.input_ids.shape[1], device=self.device).expand(3, *tokens.input_ids.shape)
        thoughts = self.qwen(
            input_ids=tokens.input_ids,
            attention_mask=tokens.attention_mask,
            position_ids=places,
            pixel_values=inputs.values,
            image_grid_thw=inputs.grid,
            use_cache=False,
        ).last_hidden_state
        asked = tokens.input_ids == self.tokenizer.convert_tokens_to_ids(_REWARD)
        return self.head(thoughts[asked].float())[:, 0]

    def _text(self, prompt: str, count: int) -> str:
        for sign in (_REWARD, _PICTURE):
            if sign in prompt:
                raise ValueError(f"the prompt {prompt!r} holds {sign}, a sign that HPSv3 counts: take it out")
        return self.frame.replace(_PICTURE, _PICTURE * count).replace(_PROMPT, prompt)

    def _size(self, height: int, width: int) -> tuple[int, int]:
        from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

        vision = self.qwen.config.vision_config
        side = vision.patch_size * vision.spatial_merge_size
        return smart_resize(height, width, factor=side, min_pixels=_AREA, max_pixels=_AREA)

    def _patches(self, pictures: list[Tensor]) -> Patches:
        """Of pictures (1, 3, h, w) in [0, 1]: squares in blocks of those that are merged, each twice, as two frames of a video."""
        vision = self.qwen.config.vision_config
        side, block, frames = vision.patch_size, vision.spatial_merge_size, vision.temporal_patch_size
        values, grid = [], []
        for picture in pictures:
            tiles = normalise(picture)[0].unflatten(2, (-1, block, side)).unflatten(1, (-1, block, side))
            _, rows, _, _, columns, _, _ = tiles.shape
            tiles = tiles.permute(1, 4, 2, 5, 0, 3, 6).unsqueeze(5).expand(-1, -1, -1, -1, -1, frames, -1, -1)
            values.append(tiles.flatten(4).flatten(0, 3))
            grid.append([1, rows * block, columns * block])
        return Patches(torch.cat(values), torch.tensor(grid, device=values[0].device))


def _template(wheel: Path) -> str:
    """What the authors put around a prompt, from the text of their source; nothing of it is run."""
    if not wheel.is_file():
        raise ValueError(
            f"{wheel} is missing, from which the text around a prompt is read: run "
            f"`pip download --no-deps --dest {wheel.parent} hpsv3==1.0.0`"
        )
    if not zipfile.is_zipfile(wheel):
        raise ValueError(f"{wheel} is no wheel: give {WHEEL}")
    with zipfile.ZipFile(wheel) as archive:
        # A file that was swapped for a large one is not read to its end.
        source = archive.open(_SOURCE).read(2**16) if _SOURCE in archive.namelist() else b""
    if hashlib.sha256(source).hexdigest() != _SOURCE_HASH:
        raise ValueError(f"{wheel} has not the text that HPSv3 was trained with: give {WHEEL}")
    texts: dict[str, Any] = {
        place.id: node.value.value
        for node in ast.parse(source).body
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant)
        for place in node.targets
        if isinstance(place, ast.Name)
    }
    return texts["INSTRUCTION"] + texts["prompt_with_special_token"]


def _frame(processor: Any, template: str, base: str | Path) -> str:
    """A conversation in Qwen2-VL's form, in which the picture and the prompt are still to be put."""
    content = [{"type": "image"}, {"type": "text", "text": template}]
    frame = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    if any(frame.count(sign) != 1 for sign in (_REWARD, _PICTURE, _PROMPT)):
        raise ValueError(f"the chat template of {base} is not Qwen2-VL's: pass base={BASE!r}")
    return frame


def _qwen(config: Any, state: dict[str, Tensor]) -> Any:
    from transformers import Qwen2VLModel

    # The authors' transformers had the language model beside the picture encoder, and its output layer is not asked.
    parts = {"visual.": "visual.", "model.": "language_model."}
    weights = {
        ours + key: value for theirs, ours in parts.items() for key, value in part_of(state, theirs, "HPSv3").items()
    }
    qwen = fitted(lambda: Qwen2VLModel(config), weights, "HPSv3")
    # The authors cast the whole model to bfloat16 before training, and with it the frequencies of its positions.
    frequencies = qwen.language_model.rotary_emb.inv_freq
    frequencies.copy_(frequencies.bfloat16())
    qwen.visual.rotary_pos_emb = _RoundedAngles(qwen.visual.rotary_pos_emb)
    return qwen


class _RoundedAngles(nn.Module):
    """Cosine and sine of a patch's row and column, every step of them in bfloat16, as in training."""

    def __init__(self, exact: Any) -> None:
        super().__init__()
        self.exact = exact

    def forward(self, x: Tensor, places: Int[Tensor, "T 2"]) -> tuple[Tensor, Tensor]:
        angles = places[..., None].bfloat16() * self.exact.inv_freq.to(x.device, torch.bfloat16)
        return self.exact.recomposition_frequencies(angles.cos()), self.exact.recomposition_frequencies(angles.sin())


def _head(state: dict[str, Tensor]) -> nn.Sequential:
    what = "HPSv3's head"
    (wide, given), narrow = shape_of(state, "0.weight", what), shape_of(state, "3.weight", what)[0]
    layers = [nn.ReLU(), nn.Dropout(0.05)]
    head: nn.Sequential = fitted(
        lambda: nn.Sequential(
            nn.Linear(given, wide), *layers, nn.Linear(wide, narrow), nn.ReLU(), nn.Linear(narrow, 2)
        ),
        state,
        what,
    )
    return head.float()
