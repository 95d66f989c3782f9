"""`mmalign export` on a run's folder, and `--aligned` for what others released."""

import numpy as np
import pytest
import torch
from peft import LoraConfig
from PIL import Image
from tiny import save_tiny, tiny_pipeline

from mmalign import cli
from mmalign.training.weights import save_trained


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a base, the folder of a run on it, and another UNet."""
    folder = tmp_path_factory.mktemp("export")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        save_tiny("sd", "model")
        pipe = tiny_pipeline("sd")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            pipe.unet.add_adapter(
                LoraConfig(r=4, lora_alpha=17, target_modules=["to_q", "to_v"], init_lora_weights=False)
            )
        save_trained(pipe, pipe.unet, folder / "run")
        tiny_pipeline("sd", seed=3).unet.save_pretrained("other")
        yield folder


def picture(place, name, *words):
    assert (
        cli.main(["generate", "--prompt", "a red shirt", "--steps", "3", "--no-grid", "--output-dir", name, *words])
        == 0
    )
    return np.asarray(Image.open(next((place / name).glob("*.png")))).astype(int)


def test_a_run_is_exported_and_drawn_from_again(place, capsys):
    run = picture(place, "0", "--model", "model", "--lora", "run")
    assert cli.main(["export", "run", "--format", "kohya", "--output", "k.safetensors"]) == 0
    assert "written: k.safetensors" in capsys.readouterr().out
    assert np.abs(picture(place, "1", "--model", "model", "--aligned", "k.safetensors") - run).max() <= 1
    words = ["--model", "model", "--format", "merged", "--dtype", "float16", "--output", "merged"]
    assert cli.main(["export", "run", *words]) == 0
    assert np.abs(picture(place, "2", "--model", "merged") - run).max() <= 8
    assert np.abs(picture(place, "3", "--model", "model") - run).max() > 8
    # Without its base a folder is enough for a pipeline, and a file of another kind needs one.
    assert cli.main(["export", "merged", "--format", "merged", "--output", "again"]) == 0
    assert cli.main(["export", "k.safetensors", "--model", "model", "--format", "peft", "--output", "peft"]) == 0
    assert np.abs(picture(place, "4", "--model", "model", "--aligned", "peft") - run).max() <= 1


def test_a_released_network_is_drawn_with(place):
    other = picture(place, "5", "--model", "model", "--aligned", "other")
    assert np.abs(other - picture(place, "6", "--model", "model")).max() > 8


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["export", "--format", "kohya", "--output", "x.safetensors"], "nothing to export: name a run's folder"),
        (["export", "run", "--format", "merged", "--output", "x"], "--format merged needs the base of run"),
        (["export", "run", "--format", "webui", "--output", "x"], "--format takes one of diffusers, peft"),
        (["export", "run", "--format", "kohya", "--output", "x"], "give a path that ends in .safetensors"),
        (["export", "run", "--format", "peft", "--output", "x", "--lora-scale", "0.5"], "acts on --format merged"),
        (
            ["export", "run", "--format", "peft", "--output", "x", "--variant", "fp16"],
            "--variant has no effect without",
        ),
        (["export", "other", "--format", "peft", "--output", "x"], "other holds no pytorch_lora_weights.safetensors"),
        (
            ["generate", "--prompt", "a", "--model", "model", "--aligned", "other", "--lora-scale", "0.5"],
            "--lora-scale acts on a LoRA, and other is a whole network",
        ),
    ],
)
def test_what_is_refused(place, words, message, capsys):
    assert cli.main(words) == 2
    assert message in capsys.readouterr().err
    assert not (place / "x").exists()
