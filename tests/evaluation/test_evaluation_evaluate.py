"""Two models on the same prompts and seeds, end to end on tiny pipelines; drawing resumes and reuses."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from mmalign.evaluation import (
    Scorer,
    compare_sides,
    draw_side,
    evaluate,
    model_fingerprint,
    paired_difference,
    win_rate,
)
from mmalign.evaluation.drawing import paired_rows

PROMPTS = ["a red sneaker", "a blue bag", "a green shirt"]


def options(scorer, tmp_path):
    return {
        "scorers": [scorer],
        "output_dir": tmp_path,
        "num_inference_steps": 1,
        "guidance_scale": 2.0,
        "num_images_per_prompt": 2,
        "progress": False,
    }


@pytest.fixture(scope="module")
def base():
    from tiny import tiny_pipeline

    return tiny_pipeline("sd", seed=0)


@pytest.fixture(scope="module")
def aligned():
    from tiny import tiny_pipeline

    return tiny_pipeline("sd", seed=1)


@pytest.fixture
def calls(base, aligned, monkeypatch):
    """The batches of prompts that either pipeline was asked for."""
    seen = []
    kind = type(base)
    original = kind.__call__

    def recorded(self, prompt, **keywords):
        seen.append(list(prompt))
        return original(self, prompt, **keywords)

    monkeypatch.setattr(kind, "__call__", recorded)
    return seen


def test_end_to_end(aligned, base, channel_scorer, tmp_path):
    scorer = channel_scorer("red")
    assert isinstance(scorer, Scorer)
    result = evaluate(aligned, base, PROMPTS, **options(scorer, tmp_path), batch_size=4)
    assert [row.prompt for row in result.rows] == [prompt for prompt in PROMPTS for _ in range(2)]
    ours = [row.aligned_scores["red"] for row in result.rows]
    theirs = [row.base_scores["red"] for row in result.rows]
    prompts = [row.prompt for row in result.rows]
    found = result.scorers[0]
    assert found.win_rate == win_rate(ours, theirs, [0, 0, 1, 1, 2, 2])
    assert found.difference == paired_difference(ours, theirs, [0, 0, 1, 1, 2, 2])
    assert found.aligned.mean == pytest.approx(np.mean(ours))
    assert found.base.median == pytest.approx(np.median(theirs))
    per_prompt = np.reshape(ours, (3, 2)).mean(axis=1)
    assert found.aligned.standard_error == pytest.approx(per_prompt.std(ddof=1) / np.sqrt(3))
    assert found.win_rate.num_clusters == len(set(prompts)) == 3
    for row in result.rows:
        pixels = np.asarray(Image.open(row.base_picture))
        assert row.base_scores["red"] == pytest.approx(pixels[..., 0].mean() / 255)
    assert result.settings["num_inference_steps"] == 1
    assert result.settings["scheduler"] == type(base.scheduler).__name__
    assert scorer.batches == [4, 2, 4, 2]
    drift = result.statistics[-1]
    assert drift.name == "drift" and drift.difference.value > 0


def test_pictures_are_reused_and_only_missing_ones_are_drawn(aligned, base, channel_scorer, tmp_path, calls):
    keywords = options(channel_scorer("red"), tmp_path)
    first = evaluate(aligned, base, PROMPTS, **keywords)
    assert sum(map(len, calls)) == 12
    calls.clear()

    assert evaluate(aligned, base, PROMPTS, **keywords).rows == first.rows
    assert calls == []

    first.rows[0].base_picture.unlink()
    first.rows[3].base_picture.write_bytes(b"\x89PNG cut short")
    again = evaluate(aligned, base, PROMPTS, **keywords)
    assert calls == [[PROMPTS[0], PROMPTS[1]]]
    assert again.rows == first.rows
    calls.clear()

    more = evaluate(aligned, base, [*PROMPTS, "a black dress"][::-1], **keywords)
    assert calls == [["a black dress"] * 2] * 2, "the order and number of prompts changes no picture"
    assert more.rows[-2:] == first.rows[:2]
    calls.clear()

    for change in ({"num_inference_steps": 2}, {"guidance_scale": 1.5}, {"height": 8}, {"seed": 1}):
        evaluate(aligned, base, PROMPTS[:1], **{**keywords, **change})
        assert sum(map(len, calls)) == 4, f"{change} must draw anew"
        calls.clear()
    assert not list(tmp_path.rglob("*.tmp"))


def test_a_run_that_is_killed_keeps_what_it_drew(base, tmp_path, monkeypatch, calls):
    keywords = {"label": "base", "output_dir": tmp_path, "num_inference_steps": 1, "guidance_scale": 2.0}
    asked = type(base).__call__

    def dies_at_the_second_batch(self, prompt, **options):
        if len(calls) == 2:
            raise KeyboardInterrupt
        return asked(self, prompt, **options)

    with monkeypatch.context() as patch:
        patch.setattr(type(base), "__call__", dies_at_the_second_batch)
        with pytest.raises(KeyboardInterrupt):
            draw_side(base, [*PROMPTS, "a bag", "a dress"], batch_size=2, progress=False, **keywords)
    assert len(list(tmp_path.rglob("*.png"))) == 4
    calls.clear()
    side = draw_side(base, [*PROMPTS, "a bag", "a dress"], batch_size=2, progress=False, **keywords)
    assert calls == [["a dress"]]
    assert all(picture.is_file() for picture in side.pictures)


def test_a_full_disk_leaves_no_half_picture(base, tmp_path, monkeypatch):
    from mmalign import files

    def full(source, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "replace", full)
    with pytest.raises(OSError, match="no space left on the disk that holds .*free some"):
        draw_side(base, PROMPTS, label="base", output_dir=tmp_path, num_inference_steps=1, guidance_scale=2.0)
    assert [file.name for file in tmp_path.rglob("*") if file.is_file()] == []


def test_seeds_are_shared_distinct_and_tied_to_the_prompt():
    rows, seeds = paired_rows(["a", "b"], 3, seed=0)
    assert rows == ["a", "a", "a", "b", "b", "b"]
    assert len(set(seeds)) == 6
    assert paired_rows(["b"], 3, seed=0)[1] == seeds[3:]
    assert paired_rows(["a", "b", "a"], 1, seed=0) == (["a", "b", "a"], [seeds[0], seeds[3], seeds[1]])
    assert not set(seeds) & set(paired_rows(["a", "b"], 3, seed=1)[1])


def test_one_model_with_its_adapter_off_and_on(base, channel_scorer, tmp_path):
    """The base and the aligned side from one model in memory: the fingerprint knows the adapter's state."""
    from peft import LoraConfig
    from tiny import tiny_pipeline

    pipe = tiny_pipeline("sd", seed=0)
    torch.manual_seed(0)
    pipe.unet.add_adapter(LoraConfig(r=2, lora_alpha=40, target_modules=["to_q", "to_v"], init_lora_weights=False))
    keywords = {"output_dir": tmp_path, "num_inference_steps": 1, "guidance_scale": 2.0, "progress": False}
    on = draw_side(pipe, PROMPTS, label="aligned", **keywords)
    pipe.unet.disable_adapters()
    off = draw_side(pipe, PROMPTS, label="base", **keywords)
    plain = draw_side(base, PROMPTS, label="plain", **keywords)
    assert len({on.model_fingerprint, off.model_fingerprint, plain.model_fingerprint}) == 3
    for without, original in zip(off.pictures, plain.pictures, strict=True):
        assert np.array_equal(np.asarray(Image.open(without)), np.asarray(Image.open(original)))
    result = compare_sides(on, off, scorers=[channel_scorer("red")], progress=False)
    assert all(row.aligned_scores != row.base_scores for row in result.rows)


def test_fingerprint_follows_weights_and_adapter_scale(base, aligned):
    from peft import LoraConfig
    from peft.tuners.tuners_utils import BaseTunerLayer
    from tiny import tiny_pipeline

    pipe = tiny_pipeline("sd", seed=0)
    assert model_fingerprint(pipe) == model_fingerprint(base) != model_fingerprint(aligned)
    with torch.no_grad():
        pipe.vae.decoder.conv_out.bias[0] += 1e-6
    assert model_fingerprint(pipe) != model_fingerprint(base)
    pipe.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"]))
    before = model_fingerprint(pipe)
    next(m for m in pipe.unet.modules() if isinstance(m, BaseTunerLayer)).set_scale("default", 0.5)
    assert model_fingerprint(pipe) != before
    pipe.unet.to("meta")
    with pytest.raises(ValueError, match="unet.* is offloaded and cannot be read"):
        model_fingerprint(pipe)


def test_fingerprint_follows_every_setting_that_a_picture_depends_on(base, tmp_path):
    from diffusers import DDIMScheduler, DiffusionPipeline
    from tiny import save_tiny, tiny_pipeline

    plain = model_fingerprint(base)
    stored = DiffusionPipeline.from_pretrained(save_tiny("sd", tmp_path / "here"))
    stored.save_pretrained(tmp_path / "there")
    moved = DiffusionPipeline.from_pretrained(tmp_path / "there")
    assert model_fingerprint(moved) == model_fingerprint(stored), "where it lies is no part of a model"

    def changed(change):
        pipe = tiny_pipeline("sd", seed=0)
        change(pipe)
        return model_fingerprint(pipe)

    def swap_merges(pipe):
        state = json.loads(pipe.tokenizer.backend_tokenizer.to_str())
        state["model"]["merges"][0], state["model"]["merges"][1] = state["model"]["merges"][1::-1]
        pipe.tokenizer._tokenizer = type(pipe.tokenizer.backend_tokenizer).from_str(json.dumps(state))

    assert changed(lambda pipe: setattr(pipe, "scheduler", DDIMScheduler())) == plain, "belongs to the sampler settings"
    found = {
        plain,
        changed(lambda pipe: pipe.vae.register_to_config(scaling_factor=3.0)),
        changed(lambda pipe: pipe.unet.register_to_config(sample_size=4)),
        changed(lambda pipe: pipe.register_to_config(requires_safety_checker=True)),
        changed(lambda pipe: setattr(pipe.tokenizer, "model_max_length", 9)),
        changed(swap_merges),
        changed(lambda pipe: setattr(pipe, "__class__", type("Other", (type(pipe),), {}))),
    }
    assert len(found) == 7


def test_sides_that_are_not_paired_are_refused(base, channel_scorer, tmp_path):
    keywords = {"output_dir": tmp_path, "num_inference_steps": 1, "guidance_scale": 2.0, "progress": False}
    side = draw_side(base, PROMPTS[:1], label="base", **keywords)
    other_seed = draw_side(base, PROMPTS[:1], label="base", seed=1, **keywords)
    other_scale = draw_side(base, PROMPTS[:1], label="base", **{**keywords, "guidance_scale": 3.0})
    with pytest.raises(ValueError, match="same prompts and seeds"):
        compare_sides(side, other_seed, scorers=[channel_scorer("red")])
    with pytest.raises(ValueError, match="guidance_scale: 2.0 and 3.0"):
        compare_sides(side, other_scale, scorers=[channel_scorer("red")])


def test_models_that_draw_in_different_sizes_are_not_compared(base, channel_scorer, tmp_path):
    from tiny import tiny_pipeline

    smaller = tiny_pipeline("sd", seed=1)
    smaller.unet.register_to_config(sample_size=4)
    with pytest.raises(ValueError, match="height: 8 and 16; width: 8 and 16"):
        evaluate(smaller, base, PROMPTS[:1], **options(channel_scorer("red"), tmp_path))
    same = evaluate(base, base, PROMPTS[:1], **options(channel_scorer("red"), tmp_path))
    assert (same.settings["height"], same.settings["width"]) == (16, 16)


def test_a_training_scorer_cannot_pass_as_held_out(aligned, base, channel_scorer, tmp_path, calls):
    red, twin = channel_scorer("red"), channel_scorer("twin")

    def run(scorers, trained_on):
        keywords = {**options(red, tmp_path), "scorers": scorers}
        return evaluate(aligned, base, PROMPTS, trained_on=trained_on, **keywords)

    with pytest.raises(ValueError, match=r"names \['rde'\]"):
        run([red], {"rde"})
    with pytest.raises(ValueError, match="'twin' has the same fingerprint as 'red'"):
        run([red, twin], {"red"})
    with pytest.raises(TypeError, match="set of scorer names"):
        run([red], "red")
    with pytest.raises(ValueError, match="different names"):
        run([red, red], set())
    with pytest.raises(ValueError, match="at least one scorer"):
        run([], set())
    with pytest.raises(ValueError, match="at least one prompt"):
        evaluate(aligned, base, [], **options(red, tmp_path))
    with pytest.raises(ValueError, match="different labels"):
        evaluate(aligned, base, PROMPTS, aligned_label="base", **options(red, tmp_path))
    with pytest.raises(ValueError, match="confidence"):
        evaluate(aligned, base, PROMPTS, confidence=2.0, **options(red, tmp_path))
    assert calls == [], "what is refused is refused before anything is drawn"


def test_answers_of_a_scorer_are_checked(make_result, monkeypatch, channel_scorer):
    kind = channel_scorer
    with monkeypatch.context() as patch:
        patch.setattr(kind, "score", lambda self, images, prompts: torch.zeros(len(images), len(images)))
        with pytest.raises(ValueError, match=r"one score a picture, shape \(3,\), got \(3, 3\)"):
            make_result([(1, 2)] * 3)
    monkeypatch.setattr(kind, "score", lambda self, images, prompts: torch.full((len(images),), torch.nan))
    with pytest.raises(ValueError, match="Scorer 'green' has 3 of 3 scores that are NaN"):
        make_result([(1, 2)] * 3)
