"""The scene world's base as it is stored: it shares its autoencoder, and draws what is asked where it is asked."""

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import mmalign
from mmalign.evaluation import generate
from mmalign.playground import build, photographs, scene_base, scene_judges, scene_prompts, scene_text, scenes
from mmalign.playground.paths import ASSETS, CURVES, SCENES
from mmalign.training.loading import load_base, playground_folder


@cache
def base() -> Any:
    return load_base("playground-scenes")


def test_the_autoencoder_is_shared_and_sees_each_cell_alone() -> None:
    from diffusers import AutoencoderKL

    assert not (SCENES / "vae").exists()
    plain = AutoencoderKL.from_pretrained(playground_folder() / "vae", torch_dtype=torch.float32)
    rows = torch.arange(2)
    data = photographs.load("test")
    pixels = scenes.compose(data, rows, scenes.draw_scenes(data.labels, rows, seed=1)) * 2 - 1
    with torch.no_grad():
        alone = plain.encode(scenes.split(pixels)).latent_dist.mean
        latents = base().vae.encode(pixels).latent_dist.mean
        torch.testing.assert_close(latents, scenes.join(alone), atol=1e-5, rtol=1e-5)
        drawn = base().vae.decode(latents).sample
        torch.testing.assert_close(drawn, scenes.join(plain.decode(alone).sample), atol=1e-5, rtol=1e-5)
    # Whole, it would not do: its norms take their measure from all four cells.
    assert (plain.encode(pixels).latent_dist.mean - latents).abs().mean() > 0.05


def test_options_act_on_it_as_on_any_base() -> None:
    pipe = mmalign.SmPOPipeline.from_pretrained("playground-scenes", dtype=torch.bfloat16)
    assert pipe.unet.dtype == pipe.vae.dtype == torch.bfloat16 and base().unet.dtype == torch.float32
    assert pipe.config._name_or_path == "playground-scenes" and isinstance(pipe, mmalign.SmPOPipeline)
    other = load_base("playground").vae
    assert load_base("playground-scenes", vae=other).vae is other and not other.use_tiling


def test_a_saved_copy_draws_as_the_base_and_holds_no_path(tmp_path: Path) -> None:
    mmalign.SmPOPipeline.from_pretrained("playground-scenes").save_pretrained(tmp_path / "copy")
    assert json.loads((tmp_path / "copy" / "vae" / "config.json").read_text())["_name_or_path"] == "playground-scenes"
    copy = load_base(tmp_path / "copy")
    latents = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(copy.vae.decode(latents).sample, base().vae.decode(latents).sample)


def test_its_large_convolutions_are_stored_in_8_bits_and_load_in_any_precision(tmp_path: Path) -> None:
    file = tmp_path / "unet.safetensors"
    weights = {f"{i}.weight": torch.randn(8, 4 + i, 3, 3) for i in range(5)} | {"linear.weight": torch.randn(99, 99)}
    save_file({name: value.half() for name, value in weights.items()}, file)
    build.store_in_8_bits(file, dimensions=4, entries=8 * 5 * 9)
    stored = load_file(file)
    assert [name for name, value in stored.items() if value.dtype != torch.float8_e4m3fn] == [
        "0.weight",
        "1.weight",
        "linear.weight",
    ]
    for name, value in weights.items():
        torch.testing.assert_close(stored[name].float(), value, rtol=1 / 16, atol=2**-9)
    assert base().unet.dtype == torch.float32
    assert load_base("playground-scenes", dtype=torch.float16).unet.conv_in.weight.dtype == torch.float16


def test_the_embedded_playground_is_smaller_than_25_mebibytes() -> None:
    assert sum(file.stat().st_size for file in ASSETS.rglob("*") if file.is_file()) < 25 * 2**20


def test_its_tokenizer_is_the_one_that_is_built() -> None:
    captions = scene_prompts.short_prompts("test", 20, 2)
    assert base().tokenizer(captions).input_ids == scene_text.build_tokenizer()(captions).input_ids
    assert base().tokenizer.model_max_length == base().text_encoder.config.max_position_embeddings == 77


def test_it_draws_what_is_asked_where_it_is_asked() -> None:
    captions = scene_prompts.short_prompts("test", 12, 2)
    pictures = generate(base(), captions, range(12), num_inference_steps=12, guidance_scale=4.0, batch_size=12)
    assert pictures[0].size == (64, 64)
    judge = scene_judges.load("A")
    assert judge.read(pictures, captions).share() > 0.6
    exchanged = [text.replace("left", "LEFT").replace("right", "left").replace("LEFT", "right") for text in captions]
    assert judge.read(pictures, exchanged).share() < 0.35


def test_the_command_line_knows_its_prompts_and_judges() -> None:
    from mmalign.cli.evaluate import scorer_named
    from mmalign.cli.models import prompts_of

    assert prompts_of("playground-scenes") == scene_prompts.prompts().test
    for name in ("scene-judge-A", "scene-judge-B"):
        assert scorer_named(name, "cpu").name == name
    assert scorer_named("judge-A", "cpu").fingerprint == scorer_named("scene-judge-A", "cpu").fingerprint


def test_the_committed_curves_are_those_of_all_stages() -> None:
    curve = json.loads((CURVES / "scene-base.json").read_text())
    for number, stage in enumerate(scene_base.STAGES, start=1):
        steps = [entry["step"] for entry in curve if entry["stage"] == number]
        assert steps == list(range(stage.curve_every, stage.steps + 1, stage.curve_every))
    text = json.loads((CURVES / "scene-text.json").read_text())
    assert text[-1]["step"] == scene_text.STEPS and text[-1]["loss"] < text[0]["loss"] / 2
    measured = json.loads((CURVES / "scene-base-measured.json").read_text())["test"]
    for length in ("one_sentence", "two_sentences"):
        assert measured[length]["share"] > 4 * measured[length]["chance"]


def test_fifty_steps_of_its_text_encoder_meet_the_committed_curve() -> None:
    committed = json.loads((CURVES / "scene-text.json").read_text())[0]
    _, curve = scene_text.train(stop_after=committed["step"])
    assert curve[0]["loss"] == pytest.approx(committed["loss"], rel=2e-3)
