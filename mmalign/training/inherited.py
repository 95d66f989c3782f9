"""What becomes of every option that our configs inherit from `transformers.TrainingArguments`.

`acts`: it does here what it does there. `passed`: handed on to accelerate, the Hub or a logger. `refused`: it would have no effect
or a wrong one, so any value but its default raises; the reason may depend on the kind of model. A test keeps this table equal to the
fields of the installed class.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from transformers import TrainingArguments

ACTS = frozenset(
    """
    output_dir per_device_train_batch_size num_train_epochs max_steps learning_rate lr_scheduler_type
    lr_scheduler_kwargs warmup_steps optim weight_decay adam_beta1 adam_beta2 adam_epsilon
    gradient_accumulation_steps max_grad_norm bf16 fp16 tf32 gradient_checkpointing activation_checkpointing
    torch_empty_cache_steps logging_strategy logging_steps logging_first_step
    disable_tqdm eval_strategy eval_steps eval_delay per_device_eval_batch_size eval_on_start save_only_model
    save_strategy save_steps save_total_limit load_best_model_at_end metric_for_best_model greater_is_better
    full_determinism seed data_seed use_cpu dataloader_drop_last dataloader_num_workers dataloader_pin_memory
    dataloader_persistent_workers dataloader_prefetch_factor dataloader_multiprocessing_context
    dataloader_in_order resume_from_checkpoint
    """.split()
)

PASSED = frozenset(
    """
    log_on_each_node log_level log_level_replica report_to run_name project trackio_space_id trackio_bucket_id
    trackio_static_space_id save_on_each_node enable_jit_checkpoint push_to_hub hub_token hub_private_repo
    hub_model_id hub_revision restore_callback_states_from_checkpoint
    accelerator_config ddp_find_unused_parameters ddp_bucket_cap_mb ddp_broadcast_buffers ddp_static_graph
    ddp_backend ddp_timeout debug skip_memory_metrics local_rank
    """.split()
)

_NO_LABELS = "there are no class labels here; use label_smoothing with a loss_type that has it"
_NO_OUTPUTS = "evaluation keeps metrics, not model outputs"
_PUSHED_ONCE = "weights, card and history are pushed together, once, at the end"
_ONE_NETWORK = "not supported yet; several GPUs run with plain data parallelism"

_ALWAYS: dict[str, str] = {
    "auto_find_batch_size": "the batch size is part of the result: set per_device_train_batch_size and gradient_accumulation_steps",
    "batch_eval_metrics": _NO_OUTPUTS,
    "bf16_full_eval": "it would cast the policy that is being trained; bf16=True covers evaluation too",
    "deepspeed": _ONE_NETWORK,
    "do_eval": "say when to evaluate: eval_strategy='steps' with eval_steps",
    "do_predict": "there is nothing to predict; call the pipeline",
    "do_train": "it has no effect in a trainer; call trainer.train()",
    "eval_accumulation_steps": _NO_OUTPUTS,
    "eval_do_concat_batches": _NO_OUTPUTS,
    "eval_use_gather_object": _NO_OUTPUTS,
    "fp16_full_eval": "it would cast the policy that is being trained; fp16=True covers evaluation too",
    "fsdp": _ONE_NETWORK,
    "fsdp_config": _ONE_NETWORK,
    "hub_always_push": _PUSHED_ONCE,
    "hub_strategy": _PUSHED_ONCE,
    "ignore_data_skip": "a resumed run would see other rows than the uninterrupted one",
    "include_for_metrics": _NO_OUTPUTS,
    "label_names": _NO_LABELS,
    "label_smoothing_factor": _NO_LABELS,
    "logging_nan_inf_filter": "a non-finite loss stops the run instead of being logged as an average",
    "optim_args": "most optimisers of transformers ignore it; set adam_beta1, adam_beta2, adam_epsilon, weight_decay",
    "optim_target_modules": "it belongs to GaLore-like optimisers; choose the trained part with peft_config",
    "parallelism_config": _ONE_NETWORK,
    "prediction_loss_only": _NO_OUTPUTS,
    "train_sampling_strategy": "rows are shuffled by (seed, epoch)",
}

_NO_TOKENS = "a denoiser has no tokens"
_OWN_CHECKPOINTING = "diffusers' networks choose their own checkpointing function"
_COMPILED_BEFORE = "compile the pipeline's own network before training: pipe.unet.compile_repeated_blocks()"
_LIGER = "Liger's kernels are for language models"

REFUSED: dict[str, str] = _ALWAYS | {
    "activation_checkpointing_kwargs": _OWN_CHECKPOINTING,
    "average_tokens_across_devices": _NO_TOKENS,
    "gradient_checkpointing_kwargs": _OWN_CHECKPOINTING,
    "include_num_input_tokens_seen": _NO_TOKENS,
    "length_column_name": _NO_TOKENS,
    "liger_kernel_config": _LIGER,
    "neftune_noise_alpha": "it perturbs token embeddings, and a denoiser has none",
    "remove_unused_columns": "rows are encoded before training and every column is used",
    "torch_compile": _COMPILED_BEFORE,
    "torch_compile_backend": _COMPILED_BEFORE,
    "torch_compile_mode": _COMPILED_BEFORE,
    "use_cache": "it belongs to language models",
    "use_liger_kernel": _LIGER,
}

_REENTRANT = (
    "checkpoints are made without re-entrance, since through a frozen embedding the other kind would train nothing"
)
_NOT_COMPILED = "not supported yet for models that answer, whose batches all differ in length"
_OWN_HEAD = "Liger would replace the head and the loss; log-probabilities are computed in chunks here already"

# The same for models that answer in tokens.
REFUSED_OF_TOKENS: dict[str, str] = _ALWAYS | {
    "activation_checkpointing_kwargs": _REENTRANT,
    "average_tokens_across_devices": "losses are means over rows, whatever their number of tokens",
    "gradient_checkpointing_kwargs": _REENTRANT,
    "include_num_input_tokens_seen": "num_tokens stands in every logged entry",
    "length_column_name": "rows are shuffled by (seed, epoch), whatever their length",
    "liger_kernel_config": _OWN_HEAD,
    "neftune_noise_alpha": "policy and reference would read different embeddings, and noise would look like preference",
    "remove_unused_columns": "every column that a row needs is read by name",
    "torch_compile": _NOT_COMPILED,
    "torch_compile_backend": _NOT_COMPILED,
    "torch_compile_mode": _NOT_COMPILED,
    "use_cache": "a cache is kept where it is shared (share_prompt), and nowhere else",
    "use_liger_kernel": _OWN_HEAD,
}

# Options whose neutral value is not transformers' default.
_NEUTRAL: dict[str, Any] = {"remove_unused_columns": False, "logging_nan_inf_filter": False, "hub_strategy": "end"}

# Inherited options of which a continued run must have the same; the rest may change between a stop and a start.
RUN_OPTIONS = tuple(
    """
    seed data_seed learning_rate lr_scheduler_type lr_scheduler_kwargs warmup_steps optim weight_decay adam_beta1 adam_beta2
    adam_epsilon max_grad_norm bf16 fp16 dataloader_drop_last
    """.split()
)


def refuse_unsupported(args: Any, refused: Mapping[str, str]) -> None:
    """Raises ValueError for the first refused option that was set. To be called before transformers fills options in."""
    defaults = defaults_of(TrainingArguments) | _NEUTRAL
    for name, reason in refused.items():
        value = getattr(args, name)
        # transformers sets do_eval by itself, so a copy of options that evaluate has it.
        implied = name == "do_eval" and args.eval_strategy != "no"
        if value != defaults[name] and not implied:
            raise ValueError(f"{name}={value!r} is refused: {reason}")


def defaults_of(config_class: type) -> dict[str, Any]:
    """Field name → default of a dataclass."""
    result = {}
    for field in dataclasses.fields(config_class):
        if field.default_factory is not dataclasses.MISSING:
            result[field.name] = field.default_factory()
        else:
            result[field.name] = None if field.default is dataclasses.MISSING else field.default
    return result
