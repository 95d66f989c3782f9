"""The trainer under methods that compare nothing: rows are prompts, or pictures with captions, as they are or as the
preferred sides of pairs."""

from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import Tensor

from mmalign.data import ComparisonConfig
from mmalign.data.texts import EncodedPrompts, encode_prompts, load_prompts
from mmalign.denoisers import Conditioning
from mmalign.likelihood import draws
from mmalign.training.estimate import forward_equivalents
from mmalign.training.measurement import dropped_prompts
from mmalign.training.prepare import Prepared, batch_of, prepare
from mmalign.training.run_config import RunConfig
from mmalign.training.run_trainer import RunTrainer
from mmalign.training.weights import has_adapter


@dataclass
class PromptConfig(RunConfig):
    """What reading prompts or captioned pictures needs beside the options of every run."""

    unit: ClassVar[str] = "prompts"
    # Of pairs that serve as pictures: their sides are told apart by their labels, and all have one shape.
    needs_pairs: ClassVar[bool] = False
    comparison: ClassVar[str] = "human"
    aspect_buckets: ClassVar[bool] = False

    @property
    def reads_pictures(self) -> bool:
        """Whether rows are pictures with captions; else they are prompts alone."""
        raise NotImplementedError

    def comparison_config(self) -> ComparisonConfig:
        """The preferred side is the one that people preferred."""
        return ComparisonConfig()


class PromptTrainer(RunTrainer):
    """Trains on prompts (a list, a prompt file, or the prompts of whatever `load_pairs` reads), or on pictures with captions, which the
    preferred sides of pairs are too.
    """

    config_class: type[PromptConfig] = PromptConfig
    args: PromptConfig

    def prepare_data(self, data: Any, args: PromptConfig, *, like: Any = None) -> Any:
        """Encoded prompts or, with captions, encoded pictures."""
        if args.reads_pictures:
            return prepare(data, self.denoiser, cast(Any, args), like=like)
        if isinstance(data, EncodedPrompts):
            return data
        source = load_prompts(data, split=args.train_split if like is None else args.eval_split)
        return encode_prompts(source, self.denoiser, cache_dir=args.cache_dir, progress=not args.disable_tqdm)

    @staticmethod
    def collate(items: list[Any]) -> dict[str, Any]:
        """Pairs as a batch, or the rows of prompts."""
        return batch_of(items) if "chosen" in items[0] else {"row": [item["row"] for item in items]}

    def network_inputs(self, inputs: dict[str, Any]) -> tuple[Tensor, Any]:
        """Latents and prompts of a training batch."""
        return self._rows(inputs, self._train)[:2]

    @property
    def _trained_passes(self) -> float:
        """Forward passes that one trained call of the network costs."""
        adapted, recomputes = has_adapter(self.network), bool(self.args.gradient_checkpointing)
        return forward_equivalents(
            self.denoiser.schedule, None, has_reference=False, adapted=adapted, recomputes=recomputes
        )

    def _rows(self, inputs: dict[str, Any], data: Any) -> tuple[Tensor, Conditioning, Conditioning]:
        """Clean latents (zeros without pictures), the prompts, and the empty prompt beside the same sizes, a row each."""
        args, device = self.args, self.args.device
        if isinstance(data, Prepared):
            x0, sizes = inputs["chosen"].to(device, self._precision), inputs["size_chosen"]
            source, index = data.encoded, torch.tensor(inputs["prompt_index"])
        else:
            height, width = (args.resolution, args.resolution) if args.resolution else self.denoiser.native_size
            shape = self.denoiser.latent_shape(height, width, args.num_frames or self.denoiser.native_frames)
            source, index = data, torch.tensor(inputs["row"])
            x0 = torch.zeros(len(index), *shape, device=device, dtype=self._precision)
            sizes = torch.tensor([[height, width, 0, 0, height, width]] * len(index))
        text = source.conditioning(index)
        empty = text.where(torch.zeros(len(index), dtype=torch.bool), source.empty)
        with_sizes = self.denoiser.with_sizes
        return x0, with_sizes(text.to(device), sizes), with_sizes(empty.to(device), sizes)

    def _dropped(self, rows: list[int], epoch: int) -> Tensor:
        """Which rows lose their prompt (B,); none in evaluation."""
        share = self.args.prompt_dropout if epoch >= 0 else 0.0
        return dropped_prompts(rows, seed=self.args.seed, epoch=epoch, share=share)

    def _drawn(self, rows: list[int], epoch: int, purpose: str) -> list[torch.Generator]:
        return draws.row_generators(self.args.seed, epoch, rows, purpose)
