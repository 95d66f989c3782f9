"""Loading, aligning and inverting: what a user does with a pipeline, and what is said when it cannot be done."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tiny import save_tiny, tiny_pipeline
from training.runs import METHODS, lora, moved_lora, pairs, pipeline

import mmalign
from mmalign import SmPOPipeline
from mmalign.training.loading import load_base

SMALL: dict[str, Any] = {
    "max_steps": 2,
    "per_device_train_batch_size": 2,
    "use_cpu": True,
    "disable_tqdm": True,
    "save_strategy": "no",
    "logging_steps": 1,
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny("sd", tmp_path_factory.mktemp("base") / "tiny")


@pytest.fixture
def copy(base: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(base, tmp_path / "copy"))


def draw(pipe: Any, prompt: str = "a red shirt") -> Any:
    pipe.set_progress_bar_config(disable=True)
    options: dict[str, Any] = {"num_inference_steps": 2, "output_type": "np"}
    return pipe(prompt, generator=torch.Generator().manual_seed(0), **options).images[0]


# Loading.


@pytest.mark.parametrize("name", METHODS.values())
def test_a_pipeline_is_the_diffusers_pipeline_it_was_loaded_from(name: str, base: Path) -> None:
    from diffusers import StableDiffusionPipeline

    kind = getattr(mmalign, f"{name}Pipeline")
    pipe = kind.from_pretrained(str(base), dtype=torch.float32)
    assert isinstance(pipe, kind) and isinstance(pipe, StableDiffusionPipeline)
    assert type(pipe).__name__ == "StableDiffusionPipeline"
    assert np.array_equal(draw(pipe), draw(tiny_pipeline("sd")))


def test_the_playground_takes_a_dtype_and_is_single_without() -> None:
    # The command line always passes one.
    for options, expected in (({}, torch.float32), ({"dtype": torch.bfloat16}, torch.bfloat16)):
        assert next(load_base("playground", **options).unet.parameters()).dtype == expected


def test_dtype_acts_under_both_spellings(base: Path) -> None:
    for option in ("dtype", "torch_dtype"):
        assert SmPOPipeline.from_pretrained(base, **{option: torch.bfloat16}).unet.dtype == torch.bfloat16


def test_from_pipe_shares_components_and_leaves_the_other_its_class(base: Path) -> None:
    other = tiny_pipeline("sdxl")
    pipe = SmPOPipeline.from_pipe(other)
    assert pipe.unet is other.unet and isinstance(pipe, SmPOPipeline) and not isinstance(other, SmPOPipeline)
    assert pipe.config.force_zeros_for_empty_prompt == other.config.force_zeros_for_empty_prompt
    again = mmalign.InPOPipeline.from_pipe(pipe)
    assert isinstance(again, mmalign.InPOPipeline) and not isinstance(again, SmPOPipeline)
    vae = tiny_pipeline("sdxl", seed=3).vae
    assert SmPOPipeline.from_pipe(other, vae=vae).vae is vae


def test_from_single_file_reads_safetensors_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from diffusers import StableDiffusionXLPipeline

    asked: dict[str, Any] = {}

    def from_single_file(link: str, **options: Any) -> Any:
        asked.update(options, link=link)
        return tiny_pipeline("sdxl")

    monkeypatch.setattr(StableDiffusionXLPipeline, "from_single_file", from_single_file)
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"")
    pipe = SmPOPipeline.from_single_file(str(file), base="StableDiffusionXLPipeline", dtype=torch.float16)
    assert isinstance(pipe, SmPOPipeline) and asked == {"link": str(file), "dtype": torch.float16}
    for name in ("model.ckpt", "model.pt", "https://example.com/model.bin"):
        with pytest.raises(ValueError, match="no .safetensors file; pickled checkpoints can run code"):
            SmPOPipeline.from_single_file(name)
    with pytest.raises(ValueError, match="no such file"):
        SmPOPipeline.from_single_file(str(tmp_path / "other.safetensors"))
    with pytest.raises(ValueError, match="names no pipeline of diffusers"):
        SmPOPipeline.from_single_file(str(file), base="SDXL")


def one_line(message: str, call: Any) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)


def test_a_wrong_folder_is_told(tmp_path: Path) -> None:
    one_line("no such folder. Name one that holds model_index.json", lambda: load_base(tmp_path / "nowhere"))
    one_line("no such folder", lambda: load_base("./nowhere"))
    (tmp_path / "notes.txt").write_text("x")
    one_line(r"no diffusers pipeline: it has no model_index.json \(found: notes.txt\)", lambda: load_base(tmp_path))
    (tmp_path / "pytorch_lora_weights.safetensors").write_text("x")
    one_line(
        "holds a LoRA, not a pipeline: load its base model, then pipe.load_lora_weights", lambda: load_base(tmp_path)
    )


def test_a_missing_component_is_told(copy: Path) -> None:
    shutil.rmtree(copy / "vae")
    one_line(
        r"lacks the component vae/ that its model_index.json lists: copy it there, or pass vae=",
        lambda: load_base(copy),
    )
    assert load_base(copy, vae=tiny_pipeline("sd").vae).vae is not None


def test_pickled_weights_are_read_only_when_asked_for(copy: Path) -> None:
    weights = copy / "unet" / "diffusion_pytorch_model.safetensors"
    torch.save(load_file(weights), weights.with_suffix(".bin"))
    weights.unlink()
    one_line(r"unet holds pickled weights only \(diffusion_pytorch_model.bin\).*convert them", lambda: load_base(copy))
    assert np.array_equal(draw(load_base(copy, use_safetensors=None)), draw(tiny_pipeline("sd")))


def test_a_broken_file_is_told(copy: Path) -> None:
    (copy / "unet" / "config.json").write_text("{")
    one_line("could not be loaded", lambda: load_base(copy))


def test_an_unknown_hub_id_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    from diffusers import DiffusionPipeline

    def offline(*args: Any, **kwargs: Any) -> None:
        raise OSError("Cannot load model someone/nothing:\n  no network")

    monkeypatch.setattr(DiffusionPipeline, "from_pretrained", offline)
    one_line(
        "'someone/nothing' is no folder here, and the Hub's model could not be loaded",
        lambda: load_base("someone/nothing"),
    )


def test_a_pipeline_of_another_sort_is_refused() -> None:
    from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

    unet = UNet2DModel(sample_size=8, block_out_channels=(4, 8), norm_num_groups=4, down_block_types=("DownBlock2D",) * 2,
                       up_block_types=("UpBlock2D",) * 2, layers_per_block=1)  # fmt: skip
    with pytest.raises(ValueError, match="DDPMPipeline"):
        SmPOPipeline.from_pipe(DDPMPipeline(unet, DDPMScheduler()))


# Aligning.


def test_align_returns_metrics_history_and_folder_and_draws(base: Path, tmp_path: Path) -> None:
    pipe = SmPOPipeline.from_pretrained(base)
    before = draw(pipe)
    options = SMALL | {"learning_rate": 1e-2, "comparison": "human", "inversion_steps": 2}
    result = pipe.align(
        pairs(),
        output_dir=tmp_path / "run",
        eval_dataset=pairs(3, seed=4),
        eval_strategy="steps",
        eval_steps=2,
        **options,
    )
    assert result.output_dir == tmp_path / "run" and [e["step"] for e in result.history if "loss" in e] == [1, 2]
    assert {"loss", "rewards/accuracies", "eval_loss", "train_loss", "train_runtime"} <= result.metrics.keys()
    assert result.metrics["loss"] == result.history[1]["loss"]
    assert np.abs(draw(pipe) - before).max() > 1e-3
    assert json.loads((tmp_path / "run" / "history.json").read_text()) == result.history
    assert "# tiny aligned by SmPO" in (tmp_path / "run" / "README.md").read_text()
    pipe.disable_lora()
    assert np.array_equal(draw(pipe), before)


def test_the_same_call_gives_the_same_weights(tmp_path: Path) -> None:
    drawn = []
    for number in (1, 2):
        torch.manual_seed(number)
        pipe = pipeline("inpo")
        pipe.align(pairs(), output_dir=tmp_path / str(number), learning_rate=1e-2, inversion_steps=2, **SMALL)
        drawn.append(draw(pipe))
    assert np.array_equal(*drawn)


def test_align_with_a_preset_takes_its_settings(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    options = SMALL | {"gradient_accumulation_steps": 1, "fp16": False, "warmup_steps": 0}
    with caplog.at_level("INFO", "mmalign"):
        result = pipeline("dpo").align(pairs(), output_dir=tmp_path, preset="sd15", **options)
    assert result.metrics["learning_rate"] == 2.048e-5
    told = next(r.getMessage() for r in caplog.records if r.getMessage().startswith("dpo: latents"))
    assert "beta 5000" in told and "effective learning rate 2.048e-05" in told


def test_the_playgrounds_pairs_bring_their_preset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def stop(*, args: Any, **rest: Any) -> None:
        asked.append(args)
        raise InterruptedError

    pipe = pipeline("smpo")
    monkeypatch.setattr(type(pipe), "trainer_class", staticmethod(stop))
    for data, options in (("playground", {}), ("playground", {"preset": "sd15", "fp16": False}), (pairs(), {})):
        with pytest.raises(InterruptedError):
            pipe.align(data, output_dir=tmp_path, use_cpu=True, **options)
    assert [args.scorer for args in asked] == ["playground", "pickscore", "pickscore"]
    assert [args.max_steps for args in asked] == [100, 200, -1]


def test_align_goes_on_from_a_checkpoint(tmp_path: Path) -> None:
    options = SMALL | {"save_strategy": "steps", "save_steps": 1}
    whole = pipeline("dpo").align(pairs(), output_dir=tmp_path, **options)
    shutil.rmtree(tmp_path / "checkpoint-2")
    again = pipeline("dpo").align(pairs(), output_dir=tmp_path, resume_from_checkpoint="latest", **options)
    assert [e["loss"] for e in again.history if "loss" in e] == [e["loss"] for e in whole.history if "loss" in e]


def test_the_default_lora_starts_at_the_base(tmp_path: Path) -> None:
    pipe = pipeline("dpo")
    result = pipe.align(pairs(), output_dir=tmp_path, **SMALL | {"max_steps": 1})
    config = pipe.unet.peft_config["default"]
    assert (config.r, config.lora_alpha) == (16, 16) and set(config.target_modules) == {
        "to_q",
        "to_k",
        "to_v",
        "to_out.0",
    }
    assert result.metrics["loss"] == pytest.approx(0.693147, abs=1e-6)


def test_options_of_no_config_are_an_error(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="bteta"):
        pipeline("dpo").align(pairs(), output_dir=tmp_path, bteta=3.0)


# Inverting.


def picture(seed: int = 0, size: tuple[int, int] = (20, 24)) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (*size, 3), dtype=np.uint8))


@pytest.mark.parametrize("kind", ["sd", "sd-v", "sdxl"])
def test_invert_reports_the_round_trip(kind: str) -> None:
    pipe = pipeline("smpo", kind)
    trip = pipe.invert([picture(0), picture(1, (40, 18))], ["a red shirt", "a blue bag"], num_steps=4)
    assert trip.inversion.x_t.shape == trip.reconstruction.shape == (2, 4, 8, 8)
    assert trip.rmse.shape == trip.psnr.shape == (2,) and (trip.rmse > 0).all() and torch.isfinite(trip.psnr).all()
    assert (trip.inversion.timestep == 999).all() and (trip.inversion.landing == 999).all()
    assert (trip.inversion.moves == 4).all()


def test_invert_is_better_with_corrections_and_for_small_timesteps() -> None:
    pipe = pipeline("smpo")

    def error(**options: Any) -> float:
        return pipe.invert(picture(), "a red shirt", **options).rmse.item()

    plain = error(num_steps=40, renoise_steps=0, timestep=60)
    assert error(num_steps=40, renoise_steps=1, timestep=60) < 0.8 * plain
    assert plain < 0.1 * error(num_steps=40, renoise_steps=0)
    assert error(num_steps=40, renoise_steps=0, timestep=60) == plain
    assert pipe.invert(picture(), "a red shirt", num_steps=3, solver="heun").rmse > 0


def test_invert_with_noise_needs_a_generator_a_picture() -> None:
    pipe = pipeline("smpo")
    with pytest.raises(ValueError, match="eta > 0 needs 1 generators"):
        pipe.invert(picture(), "a red shirt", num_steps=2, eta=0.1)
    generators = [torch.Generator().manual_seed(seed) for seed in (3, 3)]
    one, two = (pipe.invert(picture(), "a", num_steps=2, eta=0.1, generator=[g]).inversion.x_t for g in generators)
    assert torch.equal(one, two)


def test_invert_says_what_is_wrong() -> None:
    pipe = pipeline("smpo")
    one_line("2 pictures need one prompt or 2, got 3", lambda: pipe.invert([picture()] * 2, ["a", "b", "c"]))
    one_line("0 pictures need one prompt", lambda: pipe.invert([], "a"))
    one_line("holds text or a path", lambda: pipe.invert("bag.png", "a"))
    one_line("timesteps must lie in 0 … 999", lambda: pipe.invert(picture(), "a", timestep=1000))
    one_line("combine must be one of", lambda: pipe.invert(picture(), "a", combine="best"))


def test_invert_uses_the_adapter_and_keeps_modes(tmp_path: Path) -> None:
    pipe = pipeline("smpo")
    before = pipe.invert(picture(), "a red shirt", num_steps=2).inversion.x_t
    pipe.align(
        pairs(),
        output_dir=tmp_path,
        peft_config=moved_lora(),
        comparison="human",
        inversion_steps=2,
        **SMALL | {"max_steps": 1},
    )
    pipe.unet.train()
    after = pipe.invert(picture(), "a red shirt", num_steps=2).inversion.x_t
    assert not torch.equal(before, after) and pipe.unet.training


def test_an_adapter_with_dropout_inverts_without_it() -> None:
    pipe = pipeline("smpo")
    pipe.unet.add_adapter(lora(init_lora_weights=False, lora_dropout=0.5))
    pipe.unet.train()
    one, two = (pipe.invert(picture(), "a", num_steps=2).inversion.x_t for _ in range(2))
    assert torch.equal(one, two)


def test_clips_are_inverted_whole() -> None:
    pipe = pipeline("smpo", "cogvideox")
    clip = tuple(picture(seed) for seed in range(11))
    one = pipe.invert(clip, "a red shirt", num_steps=2)
    two = pipe.invert([clip[::-1], clip], "a red shirt", num_steps=2)
    assert one.inversion.x_t.shape == (1, 4, 3, 4, 4) and torch.isfinite(two.psnr).all()
    torch.testing.assert_close(two.inversion.x_t[1:], one.inversion.x_t, rtol=0, atol=1e-4)
    one_line("holds 1 frame.s., and 9 are asked for", lambda: pipe.invert(list(clip), "a"))
