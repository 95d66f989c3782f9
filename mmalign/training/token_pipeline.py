"""A transformers model with its processor, to be aligned, asked and saved: the same verbs as an image pipeline's."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Self, cast

import torch
from torch import nn

from mmalign.denoisers.parts import evaluating
from mmalign.files import staged
from mmalign.training.pipeline import AlignResult
from mmalign.training.token_config import TokenConfig
from mmalign.training.token_loading import load_answering_model
from mmalign.training.token_parts import default_lora
from mmalign.training.token_trainer import TokenTrainer
from mmalign.training.token_weights import merged_copy, save_adapter
from mmalign.training.weights import ADAPTER, has_adapter

Message = dict[str, Any]


class TokenPipeline:
    """`pipe(question, images=[…])` answers, `pipe.align(pairs, output_dir=…)` aligns, `pipe.save_pretrained(…)` is for transformers."""

    config_class: ClassVar[type[TokenConfig]] = TokenConfig
    trainer_class: ClassVar[type[TokenTrainer]] = TokenTrainer

    def __init__(self, model: nn.Module, processor: Any) -> None:
        self.model, self.processor = model.eval(), processor

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike[str], **options: Any) -> Self:
        """A Hub id or a folder, with transformers' keywords."""
        return cls(*load_answering_model(pretrained_model_name_or_path, **options))

    @classmethod
    def from_parts(cls, model: nn.Module, processor: Any) -> Self:
        """Around a model and its processor; they are shared: aligning the pipeline aligns the model."""
        return cls(model, processor)

    @property
    def device(self) -> torch.device:
        """Where the model stands."""
        return cast(torch.device, cast(Any, self.model).device)

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """Moves the model, as torch does."""
        self.model.to(*args, **kwargs)
        return self

    def align(
        self,
        train_dataset: Any,
        *,
        output_dir: str | os.PathLike[str],
        eval_dataset: Any = None,
        peft_config: Any = "default",
        ref_model: Any = None,
        preset: str | None = None,
        **options: Any,
    ) -> AlignResult:
        """Aligns this pipeline in place: builds the method's config from `options`, trains, and returns the result.

        `preset`: published settings under `options`. `peft_config`: a `peft.LoraConfig`; "default" is a LoRA of rank 16 on the linear
        layers of the parts that are trained; None trains all their weights. `output_dir` then holds the weights, the processor,
        `README.md` and `history.json`. The model stays on its device, ready to answer.
        """
        options |= {"output_dir": str(output_dir)}
        args = self.config_class.preset(preset, **options) if preset else self.config_class(**options)
        if isinstance(peft_config, str) and peft_config == "default":
            peft_config = default_lora(self.model, args.trained_parts)
        trainer = self.trainer_class(
            model=self,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            peft_config=peft_config,
            ref_model=ref_model,
        )
        trained = trainer.train()
        trainer.save_model()
        return AlignResult(trainer.last_metrics() | trained.metrics, list(trainer.state.log_history), Path(output_dir))

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[Message],
        *,
        images: Sequence[Any] = (),
        videos: Sequence[Any] = (),
        max_new_tokens: int = 256,
        processor_kwargs: dict[str, Any] | None = None,
        **generation: Any,
    ) -> str:
        """The answer to a question, or to a chat in transformers' messages; greedy unless `do_sample=True`.

        images: pictures, before the question. videos: clips, each a sequence of frames, all of which are shown. Chats hold theirs in
        their messages. generation: keywords of `model.generate`.
        """
        processor_kwargs = dict(processor_kwargs or {})
        if videos:
            # The families' processors would choose among them, or want to know the video that they are from.
            processor_kwargs.setdefault("do_sample_frames", False)
        if not isinstance(prompt, str):
            if images or videos:
                raise ValueError("a chat holds its pictures and clips in its messages: leave images and videos out")
            messages = [dict(message) for message in prompt]
        elif hasattr(self.processor, "image_processor") or hasattr(self.processor, "video_processor"):
            media = [{"type": "image", "image": one} for one in images] + [
                {"type": "video", "video": one} for one in videos
            ]
            messages = [{"role": "user", "content": [*media, {"type": "text", "text": prompt}]}]
        elif images or videos:
            raise ValueError(f"{type(self.model).__name__} only reads: leave images and videos out")
        else:
            messages = [{"role": "user", "content": prompt}]
        return self._answer(messages, processor_kwargs, {"do_sample": False, **generation}, max_new_tokens)

    def _answer(
        self, messages: list[Message], processor_kwargs: dict[str, Any], generation: dict[str, Any], longest: int
    ) -> str:
        more = {"processor_kwargs": processor_kwargs} if processor_kwargs else {}
        inputs = self.processor.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt", **more
        ).to(self.device)
        tokenizer = getattr(self.processor, "tokenizer", self.processor)
        with evaluating([self.model]):
            told = cast(Any, self.model).generate(
                **inputs, max_new_tokens=longest, pad_token_id=tokenizer.pad_token_id, **generation
            )
        return str(tokenizer.decode(told[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)).strip()

    def save_pretrained(self, save_directory: str | os.PathLike[str]) -> None:
        """Saves a folder that plain transformers loads. An adapter is merged into a copy, and also written into `adapter/` as peft's.

        ValueError for an adapter on quantised weights.
        """
        with staged(Path(save_directory)) as part:
            merged = merged_copy(self.model)
            if has_adapter(self.model) and ADAPTER in cast(Any, self.model).peft_config:
                (part / "adapter").mkdir(parents=True)
                save_adapter(self.model, part / "adapter")
            cast(Any, merged).save_pretrained(part)
            self.processor.save_pretrained(part)
            self._save_more(part)

    def _save_more(self, folder: Path) -> None:
        """What a family's other readers need of a folder that is saved."""

    def push_to_hub(self, repo_id: str, *, private: bool | None = None, token: str | None = None) -> str:
        """Saves to a folder and uploads it to the Hub; the address of the commit."""
        import tempfile

        from huggingface_hub import HfApi

        api = HfApi(token=token)
        api.create_repo(repo_id, private=private, exist_ok=True)
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            return str(api.upload_folder(repo_id=repo_id, folder_path=folder))
