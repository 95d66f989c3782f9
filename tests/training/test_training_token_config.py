"""Options of training models that answer: they act or are refused, before a model is loaded or a row is read."""

from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig
from training.token_runs import config, pipeline, rows, trainer
from transformers import TrainingArguments

from mmalign.training.inherited import ACTS, PASSED, REFUSED_OF_TOKENS, defaults_of
from mmalign.training.token_config import TokenConfig
from mmalign.training.token_parts import default_lora


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beta": 0.0}, "beta must be positive"),
        ({"logps": "ld"}, "logps='ld' and ld_alpha go together"),
        ({"ld_alpha": 0.5}, "logps='ld' and ld_alpha go together"),
        ({"logps": "ld", "ld_alpha": 2.0}, "ld_alpha must lie in 0 … 1"),
        ({"logps": "median"}, "logps must be one of 'sum', 'mean', 'ld'"),
        ({"logps": "mean", "loss_type": "sigmoid_norm"}, "'sigmoid_norm' divides by the answers' lengths itself"),
        ({"logps": "mean", "loss_type": "ipo"}, "'ipo' divides by the answers' lengths itself"),
        ({"logps": "ld", "ld_alpha": 0.5, "loss_type": "kto"}, "reads single answers"),
        ({"joint": True, "share_prompt": True}, "leave share_prompt out"),
        ({"joint": True, "logps": "ld", "ld_alpha": 0.5}, "choose one"),
        ({"truncate": "answer"}, "truncate needs max_length"),
        ({"truncate": "prompt", "max_length": 9}, "truncate must be one of"),
        ({"share_prompt": True, "gradient_checkpointing": True}, "set gradient_checkpointing=False"),
        ({"loss_type": "mapo"}, "is for denoiser models, not models that answer in tokens"),
        ({"loss_type": ["kto", "sigmoid"]}, "'kto' reads single answers and 'sigmoid' pairs"),
        ({"desirable_weight": 2.0}, "desirable_weight has no effect with loss_type='sigmoid'"),
        ({"loss_type": "simpo"}, "set beta"),
        ({"loss_type": "simpo", "beta": 2.0, "reference": "copy"}, "reference has no effect"),
        ({"loss_type": "simpo", "beta": 2.0, "reference_cache": True}, "reference_cache has no effect"),
        ({"loss_type": "sft", "beta": 2.0}, "beta has no effect"),
        ({"simpo_gamma": 0.5}, "'sigmoid' takes no simpo_gamma"),
        ({"loss_type": "sigmod"}, "no loss is named 'sigmod'"),
        ({"f_alpha_divergence_coef": 0.5}, "belongs to f_divergence_type"),
        ({"ema_decay": 1.0}, "ema_decay must be"),
        ({"max_length": 0}, "max_length must be positive"),
        ({"num_frames": 0}, "num_frames must be positive"),
        ({"neftune_noise_alpha": 5.0}, "noise would look like preference"),
        ({"use_liger_kernel": True}, "computed in chunks here already"),
        ({"processor_kwargs": {"images_kwargs": {"fps": 1}}}, "processor_kwargs cannot take 'fps'"),
        ({"processor_kwargs": "fast"}, "processor_kwargs must be a mapping"),
    ],
)
def test_what_would_have_no_effect_is_refused(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        config(tmp_path, **options)


def test_one_loss_and_one_weight_need_no_list(tmp_path: Path) -> None:
    args = config(tmp_path, loss_type="sigmoid", loss_weights=0.5)
    assert (args.loss_type, args.loss_weights, args.objective()) == (["sigmoid"], [0.5], "0.5·sigmoid")


@pytest.mark.parametrize(
    ("loss_type", "per_token"),
    [
        ("sigmoid", False),
        ("ln_pref", True),
        (["ln_pref", "sft"], True),
        (["sigmoid_norm", "sigmoid"], False),
        ("sft", False),
    ],
)
def test_rewards_are_per_token_where_all_that_beta_scales_is(
    loss_type: str | list[str], per_token: bool, tmp_path: Path
) -> None:
    assert config(tmp_path, loss_type=loss_type).is_per_token == per_token


def test_the_refused_options_cover_the_installed_transformers() -> None:
    assert set(TrainingArguments.__dataclass_fields__) == ACTS | PASSED | set(REFUSED_OF_TOKENS)


@pytest.mark.parametrize("name", sorted(REFUSED_OF_TOKENS))
def test_a_refused_option_raises_with_its_reason(name: str, tmp_path: Path) -> None:
    default = defaults_of(TokenConfig)[name]
    value = (not default) if isinstance(default, bool) else "other"
    with pytest.raises(ValueError) as caught:
        config(tmp_path, **{name: value})
    assert str(caught.value) == f"{name}={value!r} is refused: {REFUSED_OF_TOKENS[name]}"


@pytest.mark.parametrize(
    ("targets", "options", "message"),
    [
        (
            ["q_proj", "o_proj"],
            {},
            "no module of Lfm2VlForConditionalGeneration is called 'o_proj'; its linear layers are ",
        ),
        (["out_proj"], {}, "puts a LoRA on model.vision_tower.*, in the encoder, and trained_parts='lm'"),
        (["linear_1"], {}, "in the projector, and trained_parts='lm'"),
        ("all-linear", {"trained_parts": "lm+projector"}, "in the encoder, and trained_parts='lm.projector'"),
        (".*o_proj", {}, "matches no module"),
        (None, {}, "names no target_modules"),
    ],
)
def test_a_lora_goes_where_it_can_and_is_meant_to(
    targets: Any, options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    pipe = pipeline("lfm2_vl")
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, "lfm2_vl", pipe, peft_config=LoraConfig(target_modules=targets), **options)
    assert not hasattr(pipe.model, "peft_config") and all(p.requires_grad for p in pipe.model.parameters())


@pytest.mark.parametrize(
    "targets",
    ["all-linear", ["q_proj", "out_proj"]],
    ids=lambda targets: targets if isinstance(targets, str) else "names",
)
def test_a_lora_may_name_much_and_exclude_the_encoder(targets: Any, tmp_path: Path) -> None:
    pipe = pipeline("lfm2_vl")
    beyond = r".*(vision_tower|multi_modal_projector).*"
    trainer(tmp_path, "lfm2_vl", pipe, peft_config=LoraConfig(target_modules=targets, exclude_modules=beyond))
    carrying = [name for name, _ in pipe.model.named_parameters() if ".lora_A." in name]
    assert carrying and all("language_model" in name for name in carrying)


@pytest.mark.parametrize("given", ["all-linear", {"r": 4}], ids=["text", "mapping"])
def test_what_is_no_lora_config_is_refused(given: Any, tmp_path: Path) -> None:
    pipe = pipeline()
    with pytest.raises(ValueError, match=f"peft_config must be a peft.LoraConfig, got {type(given).__name__}"):
        pipe.align(rows(), output_dir=tmp_path, peft_config=given, use_cpu=True, per_device_train_batch_size=2)


@pytest.mark.parametrize("peft_config", ["default", None])
def test_a_model_that_carries_a_lora_is_not_trained_on(peft_config: Any, tmp_path: Path) -> None:
    """All its weights would be trained, and the LoRA alone be saved."""
    pipe = pipeline()
    pipe.model.add_adapter(default_lora(pipe.model))
    before = {name: parameter.requires_grad for name, parameter in pipe.model.named_parameters()}
    with pytest.raises(ValueError, match=r"already carries a LoRA \(default\): save the pipeline"):
        trainer(tmp_path, "lfm2", pipe, peft_config=peft_config, reference="copy")
    assert {name: parameter.requires_grad for name, parameter in pipe.model.named_parameters()} == before


@pytest.mark.parametrize(
    "kind", ["lfm2", "lfm2_moe", "lfm2_vl", "qwen2_5_vl", "smolvlm", "internvl", "llava_next_video"]
)
def test_the_default_lora_is_on_the_language_model_alone(kind: str) -> None:
    model = pipeline(kind).model
    inside = {name for name, part in model.named_modules() if part is model.get_decoder()}
    model.add_adapter(default_lora(model))
    carrying = {name.partition(".lora_A.")[0] for name, _ in model.named_parameters() if ".lora_A." in name}
    assert carrying and all(any(name.startswith(f"{prefix}.") for prefix in inside) for name in carrying)
    layers = model.config.get_text_config().num_hidden_layers
    assert all(any(f".layers.{layer}." in name for name in carrying) for layer in range(layers))
    assert not any(name.endswith((".gate", "lm_head", "embed_tokens")) for name in carrying)


def test_parts_and_adapters_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is a language model and has no other parts"):
        trainer(tmp_path, trained_parts="all")
    with pytest.raises(ValueError, match="reference='adapter' needs a LoRA"):
        trainer(tmp_path, peft_config=None, reference="adapter")
    with pytest.raises(ValueError, match="a batch would have one row: change per_device_train_batch_size"):
        trainer(tmp_path, loss_type="kto", per_device_train_batch_size=1)
    with pytest.raises(ValueError, match="do not fill one batch of 8"):
        trainer(tmp_path, per_device_train_batch_size=8)


def test_a_model_that_is_spread_over_devices_is_refused(tmp_path: Path) -> None:
    pipe = pipeline()
    pipe.model.hf_device_map = {"model.embed_tokens": 0, "model.layers": "cpu"}
    with pytest.raises(ValueError, match="the model is spread over 0, cpu: load it without device_map"):
        trainer(tmp_path, "lfm2", pipe)
    pipe.model.hf_device_map = {"": 0}
    trainer(tmp_path, "lfm2", pipe)


def test_dropout_of_the_models_own_is_refused(tmp_path: Path) -> None:
    pipe = pipeline("qwen2_5_vl")
    layer = next(part for part in pipe.model.modules() if hasattr(part, "attention_dropout"))
    layer.attention_dropout = 0.1
    with pytest.raises(ValueError, match="attention_dropout is 0.1: .*load the model with attention_dropout=0.0"):
        trainer(tmp_path, "qwen2_5_vl", pipe)
