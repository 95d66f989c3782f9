"""Names that users of other image trainers already type, and what becomes of them here.

From diffusers' `train_diffusion_dpo(_sdxl).py` and Salesforce's DiffusionDPO `train.py`. Each maps onto our options or is refused with
the reason; none is ignored.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

from mmalign.cli.options import Alias, one_of, switch

RENAMED = {
    "adam_weight_decay": "weight_decay",
    "allow_tf32": "tf32",
    "beta_dpo": "beta",
    "checkpointing_steps": "save_steps",
    "checkpoints_total_limit": "save_total_limit",
    "dataset_name": "data",
    "dataset_split_name": "train_split",
    "lora_rank": "lora_r",
    "lr": "learning_rate",
    "lr_scheduler": "lr_scheduler_type",
    "lr_warmup_steps": "warmup_steps",
    "max_train_samples": "max_rows",
    "max_train_steps": "max_steps",
    "pretrained_model_name_or_path": "model",
    "pretrained_vae_model_name_or_path": "vae",
    "proportion_empty_prompts": "prompt_dropout",
    "rank": "lora_r",
    "split": "train_split",
    "torch_dtype": "dtype",
    "tracker_name": "project",
    "tracker_project_name": "project",
    "train_batch_size": "per_device_train_batch_size",
    "train_data_dir": "data",
    "validation_prompt": "validation_prompts",
}

REFUSED = {
    "dataset_config_name": "a data set is a Hub id, a file or a folder; name the split with --train-split",
    "dreamlike_pairs_only": "filter the data set before training and give the result to --data",
    "enable_xformers_memory_efficient_attention": "attention runs on torch's own SDPA, which needs no switch",
    "hard_skip_resume": "a resumed run sees the rows that the uninterrupted one would have seen",
    "image_column": "columns are recognised by name, as in Pick-a-Pic, HPDv2, HPDv3, ImageRewardDB, TRL, or prompt, chosen, rejected",
    "caption_column": "columns are recognised by name: caption or prompt",
    "input_perturbation": "the noise is part of the measured log-ratio and is not perturbed",
    "is_turbo": "distilled turbo models are not supported",
    "logging_dir": "logs go where the tracker of --report-to puts them; set TENSORBOARD_LOGGING_DIR for TensorBoard",
    "noise_offset": "the noise is part of the measured log-ratio and is not shifted",
    "num_validation_images": "one picture a prompt is drawn; repeat a prompt in --validation-prompts for more",
    "prior_generation_precision": "nothing is generated before training",
    "random_crop": "pictures are encoded once, with a centre crop",
    "random_flip": "pictures are encoded once, not flipped",
    "sdxl": "the model's family is read from its folder",
    "sft": "write `mmalign train sft`",
    "snr_gamma": "denoising errors are not reweighted by SNR in these methods",
    "train_method": "the method stands after the verb: mmalign train dpo",
    "unet_init": "give a pipeline folder that holds this UNet to --model",
    "vae_encode_batch_size": "pictures are encoded once, in batches that fit",
}

# The Selector of DiffusionDPO's utils → our scorer's name.
CHOICE_MODELS = {
    "pickscore": "pickscore",
    "clip": "clip:laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
    "playground": "playground",
}


def aliases(method: str, known: Collection[str]) -> list[Alias]:
    """Every foreign spelling, as `mmalign train METHOD` with the options `known` takes it."""
    renamed = [
        Alias(name, f"is {target}", _rename(target))
        if target in known
        else Alias(name, f"{method} has no {target}, which this would be")
        for name, target in RENAMED.items()
    ]
    refused = [Alias(name, reason) for name, reason in REFUSED.items()]
    return [*renamed, *refused, *_translated(method, known)]


def _translated(method: str, known: Collection[str]) -> list[Alias]:
    relabels = Alias("choice_model", "relabels pairs by a scorer", _choice_model(method))
    return [
        Alias("mixed_precision", "sets fp16 and bf16", _mixed_precision),
        Alias("use_8bit_adam", "is optim adamw_bnb_8bit", _if_true(optim="adamw_bnb_8bit")),
        # The decay of diffusers' EMAModel where nothing is said.
        Alias("use_ema", "keeps a moving average of the weights", _if_true(ema_decay=0.9999)),
        Alias("use_adafactor", "is optim adafactor", _if_true(optim="adafactor")),
        Alias("center_crop", "is what happens", _only(True, "pictures are encoded with a centre crop, always")),
        Alias("no_hflip", "is what happens", _only(True, "pictures are never flipped")),
        Alias(
            "run_validation",
            "draws sample pictures",
            _only(False, "set --validation-steps and --validation-prompts instead"),
        ),
        relabels if "scorer" in known else Alias("choice_model", f"{method} compares nothing, so no scorer is asked"),
    ]


def _rename(target: str) -> Callable[[Any], dict[str, Any]]:
    return lambda value: {target: value}


def _if_true(**options: Any) -> Callable[[Any], dict[str, Any]]:
    return lambda value: options if switch(value) else {}


def _only(allowed: bool, reason: str) -> Callable[[Any], dict[str, Any]]:
    def expand(value: Any) -> dict[str, Any]:
        if switch(value) != allowed:
            raise ValueError(f"{str(switch(value)).lower()} is refused: {reason}")
        return {}

    return expand


def _mixed_precision(value: Any) -> dict[str, Any]:
    said = one_of("no", "fp16", "bf16")(value)
    return {"fp16": said == "fp16", "bf16": said == "bf16"}


def _choice_model(method: str) -> Callable[[Any], dict[str, Any]]:
    """SmPO's comparison is a scorer's already; the other methods are told to relabel."""

    def expand(value: Any) -> dict[str, Any]:
        name = str(value)
        if name not in CHOICE_MODELS and not name.startswith("clip:"):
            raise ValueError(
                f"has no scorer {name!r} here; it takes {', '.join(CHOICE_MODELS)} or clip:<Hub id or folder>"
            )
        scorer = {"scorer": CHOICE_MODELS.get(name, name)}
        return scorer if method == "smpo" else scorer | {"comparison": "relabel"}

    return expand
