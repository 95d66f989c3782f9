"""Trains a CLIP to compare pictures of long prompts segment by segment: Denscore, LongAlign's reward (arXiv:2410.11817).

    DenscoreTrainer(model="laion/CLIP-ViT-H-14-laion2B-s32B-b79K", args=DenscoreConfig("denscore"), train_dataset="pairs/")
    scorer("denscore:denscore")      # the folder that `save_model` wrote

The loss is `mmalign.rewards.segment_loss`, each pair weighted by one over how many its prompt has.
"""

import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import Trainer

from mmalign.data import PairSource, load_pairs
from mmalign.rewards.clip import ClipScorer
from mmalign.rewards.segment_loss import pair_losses, segment_logits
from mmalign.training.arguments import Arguments

logger = logging.getLogger("mmalign")


@dataclass
class DenscoreConfig(Arguments):
    """Defaults of PickScore, whose code Denscore was trained with; its own numbers were not published."""

    method: ClassVar[str] = "denscore"

    learning_rate: float = 3e-6
    weight_decay: float = 0.3
    lr_scheduler_type: str = "linear"
    warmup_steps: float = 500
    max_steps: int = 4000
    per_device_train_batch_size: int = 16
    gradient_accumulation_steps: int = 8
    save_steps: float = 500


class DenscoreTrainer(Trainer):
    """`model`: a CLIP's folder or Hub id, or a `ClipScorer`; data as in `load_pairs`. `save_model` writes a folder for
    `scorer("denscore:FOLDER")`."""

    config_class = DenscoreConfig
    args: DenscoreConfig

    def __init__(self, model: Any, args: DenscoreConfig, train_dataset: Any, eval_dataset: Any = None) -> None:
        clip = model if isinstance(model, ClipScorer) else ClipScorer.from_pretrained(model)
        self.reader = clip.in_segments()
        super().__init__(
            model=clip.model.requires_grad_(True),
            args=args,
            train_dataset=ComparedPairs(load_pairs(train_dataset, split=args.train_split)),
            eval_dataset=None
            if eval_dataset is None
            else ComparedPairs(load_pairs(eval_dataset, split=args.eval_split)),
            data_collator=self.collate,
            processing_class=clip.tokenizer,
        )
        # The loss is a mean over the batch, to be divided by the accumulated ones.
        self.model_accepts_loss_kwargs = False
        self._right: list[Tensor] = []

    def collate(self, items: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """N pairs: pixels of all first sides and all second ones, and the segments of all prompts."""
        pieces = [self.reader.segments(item["prompt"]) for item in items]
        tokens = self.reader.tokenizer(
            [piece for prompt in pieces for piece in prompt],
            padding="max_length",
            truncation=True,
            max_length=self.reader.max_length,
            return_tensors="pt",
        )
        pictures = [item[side] for side in ("image_0", "image_1") for item in items]
        return {
            "pixel_values": self.reader.preprocess(pictures),
            "input_ids": tokens.input_ids,
            "attention_mask": tokens.attention_mask,
            "lengths": [len(prompt) for prompt in pieces],
            "label": torch.tensor([item["label"] for item in items]),
            "weight": torch.tensor([item["weight"] for item in items]),
        }

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The weighted mean of the pairs' losses; ValueError once it is not finite."""
        read = {name: inputs[name] for name in ("pixel_values", "input_ids", "attention_mask")}
        logits = segment_logits(model(**read).logits_per_image.float(), inputs["lengths"])
        losses = pair_losses(logits, inputs["label"].to(logits))
        loss = (losses * inputs["weight"].to(losses)).mean()
        if not torch.isfinite(loss):
            raise ValueError(f"the loss is {loss.item()} at step {self.state.global_step}: lower learning_rate")
        decided = inputs["label"] != 0.5
        chosen = (logits[:, 0] > logits[:, 1]).to(inputs["label"]) == inputs["label"].round()
        if model.training:
            self._right.append(chosen[decided].detach().cpu())
        return (loss, logits) if return_outputs else loss

    def prediction_step(
        self, model: nn.Module, inputs: Any, prediction_loss_only: bool, ignore_keys: Any = None
    ) -> Any:
        """The loss alone."""
        with torch.no_grad():
            return self.compute_loss(model, self._prepare_inputs(inputs)), None, None

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Also `accuracy`: of the pairs since the last time that are no ties, how often the preferred side scored higher."""
        if "loss" in logs and self._right:
            right = torch.cat(self._right)
            logs |= {"accuracy": round(float(right.float().mean()), 4)} if len(right) else {}
            self._right.clear()
        super().log(logs, start_time)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        super()._save(output_dir, state_dict)
        self.reader.image_processor.save_pretrained(output_dir or cast(str, self.args.output_dir))


class ComparedPairs(Dataset[dict[str, Any]]):
    """The rows of a source whose opinion can be read, each weighted by one over its prompt's pairs; 1 in the mean."""

    def __init__(self, source: PairSource) -> None:
        self.source = source
        prompts = source.prompts()
        self.rows = [row for row, opinion in enumerate(source.opinions()) if opinion is not None and prompts[row]]
        if not self.rows:
            raise ValueError(f"{source.name} holds no pair that can be read: see `mmalign validate-data`")
        if len(self.rows) < len(source):
            logger.warning(
                "%d of %d rows left out: see `mmalign validate-data`", len(source) - len(self.rows), len(source)
            )
        counts = Counter(prompts[row] for row in self.rows)
        self.weights = [len(self.rows) / len(counts) / counts[prompts[row]] for row in self.rows]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, item: int) -> dict[str, Any]:
        pair = self.source[self.rows[item]]
        return {
            "prompt": pair.prompt, "image_0": pair.image_0, "image_1": pair.image_1, "label": pair.label, "weight": self.weights[item],
        }  # fmt: skip
