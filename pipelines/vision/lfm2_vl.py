"""LFM2 and LFM2-VL (arXiv:2511.23404): load what was released, ask and align it, save it so that other runtimes read it.

    pipe = LFM2VLPipeline.from_pretrained("LiquidAI/LFM2-VL-450M", image_budget="fast")
    pipe.align("my-pairs/", output_dir="runs/lfm2", loss_type="ln_pref", beta=5.0)

What is minimised is any loss of pairs or of single answers, and with a teacher decoupled top-K distillation on the chosen answers
beside it: L = pair loss + kd_weight · (mean of DTK over the answer's tokens).
"""

import json
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Self, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import pad

from mmalign.data.answer_tokens import AnswerBatch
from mmalign.files import write_json
from mmalign.likelihood.answers import AnswerScores, score_answers
from mmalign.likelihood.distilled import distil_tokens
from mmalign.likelihood.token_head import head_of
from mmalign.pipelines.vision.image_budget import ImageBudget, budget_of, predicted_tokens, read_budget, tiling_of
from mmalign.training.align_trainer import Losses
from mmalign.training.loading import EMBEDDED_ANSWERING
from mmalign.training.token_config import PLAYGROUND, TokenConfig
from mmalign.training.token_data import Answers
from mmalign.training.token_loading import load_answering_model, loading, shared_options
from mmalign.training.token_measurement import AnswerMeasurement, AnswerPolicy, Features, media_features, states
from mmalign.training.token_pipeline import Message, TokenPipeline
from mmalign.training.token_trainer import TokenTrainer

_log = logging.getLogger(__name__)

SEES, READS = ("lfm2_vl",), ("lfm2", "lfm2_moe")
# The cards' words: a temperature so low wants min_p to cut the tail, and a penalty against loops.
_DECODING = {"do_sample": True, "min_p": 0.15, "repetition_penalty": 1.05}
_TEMPERATURE = {"lfm2_vl": 0.1, "lfm2": 0.3, "lfm2_moe": 0.3}
_ARCHITECTURES = {"lfm2": "Lfm2ForCausalLM", "lfm2_moe": "Lfm2MoeForCausalLM"}
_NORM = "multi_modal_projector.layer_norm."


def recommended_decoding(model_type: str) -> dict[str, Any]:
    """Keywords for `generate` as the model cards recommend them."""
    _check_type(model_type)
    return {**_DECODING, "temperature": _TEMPERATURE[model_type]}


def load_lfm2(source: str | os.PathLike[str], **options: Any) -> tuple[Any, Any]:
    """Model and processor (of a text model: its tokenizer) from a folder or Hub id, by the model_type of its config.

    options: those of transformers' `from_pretrained`. Whether the projector has its LayerNorm is told by the weights: some
    conversions carry a config that denies what they hold. ValueError names a weight that is missing, where transformers would go on
    with a random one.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer

    if os.fspath(source) in EMBEDDED_ANSWERING:
        return load_answering_model(source, **options)
    shared = shared_options(options)
    with loading(source) as where:
        config = AutoConfig.from_pretrained(where, **shared)
    _check_type(config.model_type)
    sees = config.model_type in SEES
    loader, reader = (AutoModelForImageTextToText, AutoProcessor) if sees else (AutoModelForCausalLM, AutoTokenizer)
    options = {"use_safetensors": True, **options, "output_loading_info": True}
    with loading(source) as where:
        model, notes = loader.from_pretrained(where, config=config, **options)
        missing, surplus = (sorted(notes[kind]) for kind in ("missing_keys", "unexpected_keys"))
        if sees and any(_NORM in key for key in (*missing, *surplus)):
            config.projector_use_layernorm = any(_NORM in key for key in surplus)
            _log.warning(
                "%s: the config says the projector has %s LayerNorm, the weights have %s; the weights are followed",
                source,
                *(("no", "one") if config.projector_use_layernorm else ("a", "none")),
            )
            model, notes = loader.from_pretrained(where, config=config, **options)
            missing, surplus = (sorted(notes[kind]) for kind in ("missing_keys", "unexpected_keys"))
        processor = reader.from_pretrained(where, **shared)
    if missing or surplus:
        odd = f"lacks {missing[0]}" if missing else f"holds {surplus[0]}, which is not part of the model"
        raise ValueError(f"{source} {odd}: its config.json belongs to other weights")
    return model, processor


def apply_export_notes(folder: str | os.PathLike[str]) -> list[str]:
    """Adds to a saved model's config.json what llama.cpp, MLX and older transformers look for; returns what was added.

    text_config.architectures  transformers 5 leaves it out; llama.cpp's converter chooses the text model by it
    block_ff_dim               transformers 5 writes intermediate_size only; older converters and mlx-lm read this name
    Both say what is there already, so that transformers loads the same model.
    """
    path = Path(folder).expanduser() / "config.json"
    if not path.is_file():
        raise ValueError(f"{path.parent} has no config.json: give the folder that save_pretrained wrote")
    config = json.loads(path.read_text(encoding="utf-8"))
    _check_type(config.get("model_type", ""))
    inner = config["model_type"] in SEES
    text, prefix = (config["text_config"], "text_config.") if inner else (config, "")
    notes: dict[str, Any] = {"architectures": [_ARCHITECTURES[text["model_type"]]]} if inner else {}
    # A mixture of experts never had the other name.
    if text["model_type"] == "lfm2":
        notes["block_ff_dim"] = text["intermediate_size"]
    added = {key: value for key, value in notes.items() if text.get(key) != value}
    if added:
        text |= added
        write_json(path, config)
    return [prefix + key for key in added]


def _check_type(model_type: str) -> None:
    if model_type not in SEES + READS:
        raise ValueError(f"this is for LFM2: model_type must be one of {', '.join(SEES + READS)}, got {model_type!r}")


@dataclass
class LFM2VLConfig(TokenConfig):
    """Options of `TokenConfig`, and those of distillation, which are for pairs' preferred answers and single ones that are liked.

    teacher          a folder or Hub id of an LFM2 model with the same tokenizer, such as a larger one
    kd_weight        how much the distillation counts beside the loss of the pairs
    kd_top_k         tokens of the teacher that are compared one by one, at each position
    kd_temperature   τ of the comparison within them; how they stand against all others is compared without
    kd_tau_squared   times τ², so that the slope hangs less on τ
    """

    method: ClassVar[str] = "lfm2-vl"
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        # The report's preference stage, as third parties tell it; full fine-tuning.
        "report": {
            "loss_type": "ln_pref", "beta": 5.0, "learning_rate": 8e-7, "num_train_epochs": 2,
            "lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr_rate": 0.1},
        },
        # What Liquid's own fine-tuning code sets for models that see.
        "leap": {
            "beta": 0.1, "learning_rate": 5e-7, "num_train_epochs": 1, "warmup_steps": 0.05, "max_length": 4096,
            "lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr_rate": 0.02},
            "per_device_train_batch_size": 1, "gradient_accumulation_steps": 16,
        },
        "playground": PLAYGROUND,
    }  # fmt: skip

    teacher: str | None = None
    kd_weight: float = 0.0
    kd_top_k: int = 32
    kd_temperature: float = 1.0
    kd_tau_squared: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.teacher is None) != (self.kd_weight == 0):
            raise ValueError("teacher and kd_weight go together: name a teacher, and how much it counts")
        if not self.kd_weight >= 0 or self.kd_top_k < 1 or not self.kd_temperature > 0:
            raise ValueError("kd_weight must not be negative, kd_top_k be at least 1, and kd_temperature above 0")
        for name in ("kd_top_k", "kd_temperature", "kd_tau_squared"):
            if self.teacher is None and getattr(self, name) != self.default(name):
                raise ValueError(f"{name} has no effect without a teacher")

    def details(self, elements: int | None) -> list[str]:
        """As `TokenConfig`'s, and the teacher."""
        told = f"distilled from {self.teacher}: {self.kd_weight:g} × DTK of {self.kd_top_k} tokens, τ {self.kd_temperature:g}"
        return [*super().details(elements), *([told] if self.teacher else [])]


@dataclass(frozen=True, eq=False)
class DistilledScores(AnswerScores):
    """Scores of answers, and DTK per token of the chosen ones; 0 for a single answer that is disliked."""

    dtk: Float[Tensor, " B"] | None = None


class DistillingPolicy(AnswerPolicy):
    """The model that is trained, which also tells how far it is from a teacher on the chosen answers."""

    def __init__(self, network: nn.Module, teacher: nn.Module, args: LFM2VLConfig) -> None:
        super().__init__(network)
        # In a list, so that it is no part of what is trained, moved or saved.
        self._teacher, self._args = [teacher], args

    def forward(self, batch: AnswerBatch, features: Features | None = None, **options: Any) -> DistilledScores:
        """The scores of the supervised tokens, and the distance; options: of `score_answers`."""
        hidden = states(self.network, batch, features or media_features(self.network, batch))
        found = score_answers(self.network, hidden, batch.inputs["input_ids"], batch.supervised, **options)
        return DistilledScores(found.log_prob, found.kl, found.entropy, self._distance(hidden, batch))

    def _distance(self, hidden: Tensor, batch: AnswerBatch) -> Float[Tensor, " B"]:
        teacher, args = self._teacher[0], self._args
        with torch.no_grad():
            taught = states(teacher, batch, media_features(teacher, batch))
        # Rows are in order, the chosen ones first.
        counts = batch.supervised[: len(batch.rows)].sum(1)
        chosen = int(counts.sum())
        each = distil_tokens(
            hidden[:chosen],
            head_of(self.network),
            taught[:chosen],
            head_of(teacher),
            top_k=args.kd_top_k,
            temperature=args.kd_temperature,
            tau_squared=args.kd_tau_squared,
        )
        means = torch.stack([row.mean() for row in each.split(counts.tolist())])
        return means if len(batch.supervised) > len(batch.rows) else means * (batch.label > 0.5)


class LFM2VLTrainer(TokenTrainer):
    """`TokenTrainer` with a teacher, if `args` name one."""

    config_class = LFM2VLConfig
    args: LFM2VLConfig
    _teacher: nn.Module | None = None

    def check_arguments(self, args: Any, train_dataset: Any, eval_dataset: Any, peft_config: Any) -> None:
        """As in `TokenTrainer`; loads the teacher. ValueError where it reads other tokens."""
        super().check_arguments(args, train_dataset, eval_dataset, peft_config)
        _check_type(cast(Any, self.network).config.model_type)
        if args.processor_kwargs and cast(Any, self.network).config.model_type in SEES:
            asked = budget_of(self.processor, args.processor_kwargs)
            if asked.trap and asked != budget_of(self.processor):
                _log.warning("processor_kwargs: %s", asked.trap)
        # transformers sets `args` after it asks for the module that is trained.
        self._asked = args
        if args.teacher is None:
            return
        self._teacher, processor = load_lfm2(args.teacher)
        self._teacher.eval().requires_grad_(False)
        if _vocabulary(processor) != _vocabulary(self.processor):
            raise ValueError(
                f"teacher {args.teacher} has another tokenizer: distil from a model of the same generation"
            )

    def policy_module(self) -> AnswerPolicy:
        """The model behind the scores of a batch, with the teacher beside it."""
        if self._teacher is None:
            return super().policy_module()
        return DistillingPolicy(self.network, self._teacher, self._asked)

    def _own_copies(self) -> list[nn.Module]:
        return super()._own_copies() + ([] if self._teacher is None else [self._teacher])

    def loss_of(self, measured: AnswerMeasurement, kl: Tensor | None = None) -> Tensor:
        """One loss a pair or a single answer, the distillation in that of the chosen one."""
        loss = super().loss_of(measured, kl)
        if not isinstance(measured.policy, DistilledScores) or measured.policy.dtk is None:
            return loss
        dtk = measured.policy.dtk
        # For the panel, which `row_losses` makes of the same batch.
        liked = len(dtk) if measured.sides == 2 else int((measured.label > 0.5).sum())
        self._distance = {"dtk": (float(dtk.detach().sum()), float(liked))} if liked else {}
        return loss + self.args.kd_weight * pad(dtk, (0, len(loss) - len(dtk)))

    def row_losses(self, model: nn.Module, inputs: dict[str, Any], *, epoch: int, data: Answers) -> Losses:
        """As in `TokenTrainer`, with "dtk" in the panel."""
        found = super().row_losses(model, inputs, epoch=epoch, data=data)
        return found if self._teacher is None else replace(found, panel=found.panel | self._distance)

    def _write_weights(self, folder: Path) -> None:
        super()._write_weights(folder)
        if (folder / "config.json").is_file():
            apply_export_notes(folder)


class LFM2VLPipeline(TokenPipeline):
    """LFM2-VL, or LFM2 and LFM2-MoE, which only read; answers as the model cards recommend, which draws lots: see `__call__`."""

    config_class = LFM2VLConfig
    trainer_class = LFM2VLTrainer

    def __init__(self, model: nn.Module, processor: Any) -> None:
        _check_type(cast(Any, model).config.model_type)
        super().__init__(model, processor)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        *,
        image_budget: ImageBudget | str | Mapping[str, Any] | None = None,
        **options: Any,
    ) -> Self:
        """A Hub id or a folder, with transformers' keywords.

        image_budget: one, its fields, or "quality", "balanced", "fast"; None is the model's own.
        """
        pipe = cls(*load_lfm2(pretrained_model_name_or_path, **options))
        if image_budget is not None:
            pipe.image_budget = image_budget
        return pipe

    @property
    def image_budget(self) -> ImageBudget:
        """How many tokens a picture may cost; what is set is kept in what is saved."""
        return budget_of(self._that_sees())

    @image_budget.setter
    def image_budget(self, budget: ImageBudget | str | Mapping[str, Any]) -> None:
        read_budget(budget).apply_to(self._that_sees())

    def predicted_tokens(self, height: int, width: int) -> int:
        """Image tokens that a picture of so many pixels will cost, under the budget that is set."""
        return predicted_tokens(height, width, self.image_budget, tiling_of(self.processor))

    def __call__(self, prompt: str | list[Message], **options: Any) -> str:  # type: ignore[override]
        """As in `TokenPipeline`, but sampled as the cards recommend unless `do_sample=False`; keywords of `generate` win over them."""
        if not isinstance(prompt, str):
            prompt = [_plain_system(message) for message in prompt]
        if options.get("do_sample", True):
            options = {**recommended_decoding(cast(Any, self.model).config.model_type), **options}
        return super().__call__(prompt, **options)

    def _save_more(self, folder: Path) -> None:
        apply_export_notes(folder)

    def _that_sees(self) -> Any:
        kind = cast(Any, self.model).config.model_type
        if kind not in SEES:
            raise ValueError(f"{kind} only reads: it has no image budget")
        return self.processor


def _plain_system(message: Message) -> Message:
    """The released templates add a system message's words to strings, and fail on a list of parts."""
    content = message["content"]
    if message["role"] != "system" or isinstance(content, str):
        return message
    return {**message, "content": "".join(part["text"] for part in content)}


def _vocabulary(processor: Any) -> dict[str, int]:
    return dict(getattr(processor, "tokenizer", processor).get_vocab())
