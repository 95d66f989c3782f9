"""LFM2-VL and LFM2 by model_type: folders of either generation load, and what is saved can be read elsewhere."""

import copy
import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_vlm import picture, tiny_vlm
from torch import Tensor

from mmalign.pipelines.vision.lfm2_vl import apply_export_notes, load_lfm2, recommended_decoding

NORM = "model.multi_modal_projector.layer_norm."


def saved(kind: str, folder: Path) -> Path:
    model, processor = tiny_vlm(kind)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def logits(model: Any, processor: Any, kind: str) -> Tensor:
    if kind != "lfm2_vl":
        return model(**processor("What is it?", return_tensors="pt")).logits
    shown = {"images": [[picture(100, 60).image]], "text": ["<image>What is it?"]}
    return model(**processor(**shown, return_tensors="pt")).logits


def rewrite(folder: Path, change: Any) -> None:
    state = load_file(folder / "model.safetensors")
    save_file(change(state), folder / "model.safetensors", {"format": "pt"})


def edit(folder: Path, **values: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.mark.parametrize("kind", ["lfm2_vl", "lfm2", "lfm2_moe"])
def test_every_kind_loads_by_its_model_type(kind: str, tmp_path: Path) -> None:
    expected = logits(*tiny_vlm(kind), kind)
    model, processor = load_lfm2(saved(kind, tmp_path))
    assert model.config.model_type == kind
    torch.testing.assert_close(logits(model, processor, kind), expected, rtol=0, atol=0)


@pytest.mark.parametrize("inner", [False, True])
def test_both_names_of_the_vision_tower_load(inner: bool, tmp_path: Path) -> None:
    """Released files have `vision_tower.vision_model.`, a model that was made from its config saves without."""
    expected = logits(*tiny_vlm("lfm2_vl"), "lfm2_vl")
    folder, tower = saved("lfm2_vl", tmp_path), "model.vision_tower."

    def renamed(state: dict[str, Tensor]) -> dict[str, Tensor]:
        bare = {name.replace(tower + "vision_model.", tower): value for name, value in state.items()}
        return {name.replace(tower, tower + "vision_model.") if inner else name: value for name, value in bare.items()}

    rewrite(folder, renamed)
    assert any(tower + "vision_model." in name for name in load_file(folder / "model.safetensors")) == inner
    torch.testing.assert_close(logits(*load_lfm2(folder), "lfm2_vl"), expected, rtol=0, atol=0)


def test_the_weights_decide_whether_the_projector_has_its_norm(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model, _ = tiny_vlm("lfm2_vl")
    expected = logits(*tiny_vlm("lfm2_vl"), "lfm2_vl")
    edit(saved("lfm2_vl", tmp_path / "with"), projector_use_layernorm=False)
    with caplog.at_level(logging.WARNING):
        loaded, processor = load_lfm2(tmp_path / "with")
    assert "the projector has no LayerNorm, the weights have one" in caplog.text
    assert loaded.config.projector_use_layernorm
    torch.testing.assert_close(logits(loaded, processor, "lfm2_vl"), expected, rtol=0, atol=0)

    bare = copy.deepcopy(model)
    bare.model.multi_modal_projector.use_layer_norm = False
    without = logits(bare, processor, "lfm2_vl")
    folder = saved("lfm2_vl", tmp_path / "without")
    rewrite(folder, lambda state: {name: value for name, value in state.items() if not name.startswith(NORM)})
    loaded, processor = load_lfm2(folder)
    assert "the projector has a LayerNorm, the weights have none" in caplog.text
    torch.testing.assert_close(logits(loaded, processor, "lfm2_vl"), without, rtol=0, atol=0)
    assert (without - expected).abs().max() > 1e-4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda state: {key: x for key, x in state.items() if "linear_1.bias" not in key},
            "lacks .*linear_1.bias: its",
        ),
        (lambda state: state | {"model.more": torch.zeros(1)}, "holds model.more, which is not part"),
    ],
)
def test_weights_of_another_config_are_refused(change: Any, message: str, tmp_path: Path) -> None:
    rewrite(saved("lfm2_vl", tmp_path), change)
    with pytest.raises(ValueError, match=message):
        load_lfm2(tmp_path)


def test_other_models_are_refused(tmp_path: Path) -> None:
    edit(saved("lfm2", tmp_path), model_type="llama")
    for call in (load_lfm2, apply_export_notes):
        with pytest.raises(ValueError, match="one of lfm2_vl, lfm2, lfm2_moe, got 'llama'"):
            call(tmp_path)
    with pytest.raises(ValueError, match="has no config.json"):
        apply_export_notes(tmp_path / "empty")


@pytest.mark.parametrize(
    ("kind", "added"),
    [
        ("lfm2_vl", ["text_config.architectures", "text_config.block_ff_dim"]),
        ("lfm2", ["block_ff_dim"]),
        ("lfm2_moe", []),
    ],
)
def test_export_notes_say_what_others_read_and_change_nothing(kind: str, added: list[str], tmp_path: Path) -> None:
    expected = logits(*tiny_vlm(kind), kind)
    folder = saved(kind, tmp_path)
    assert apply_export_notes(folder) == added
    assert apply_export_notes(folder) == []
    config = json.loads((folder / "config.json").read_text())
    text = config["text_config"] if kind == "lfm2_vl" else config
    if kind != "lfm2_moe":
        assert text["block_ff_dim"] == text["intermediate_size"] == 64
        assert text["architectures"] == ["Lfm2ForCausalLM"]
    if kind == "lfm2_vl":
        assert config["architectures"] == ["Lfm2VlForConditionalGeneration"]
    torch.testing.assert_close(logits(*load_lfm2(folder), kind), expected, rtol=0, atol=0)


def test_decoding_is_as_the_cards_say(tmp_path: Path) -> None:
    assert recommended_decoding("lfm2_vl") == {
        "do_sample": True,
        "temperature": 0.1,
        "min_p": 0.15,
        "repetition_penalty": 1.05,
    }
    assert recommended_decoding("lfm2")["temperature"] == recommended_decoding("lfm2_moe")["temperature"] == 0.3
    model, tokenizer = tiny_vlm("lfm2")
    inputs = tokenizer("What is it?", return_tensors="pt")
    spoken = model.generate(**inputs, max_new_tokens=3, **recommended_decoding("lfm2"))
    assert spoken.shape[1] > inputs["input_ids"].shape[1]
