"""LoRA scales: 0 is the base to the bit, the pipeline is left as it was, and nothing is drawn twice."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from mmalign.evaluation import evaluate, read_report, result_lines, write_report
from mmalign.evaluation.sweep import at_lora_scale

PROMPTS = ["a red sneaker", "a blue bag"]


def with_lora(**options):
    from peft import LoraConfig
    from tiny import tiny_pipeline

    pipe = tiny_pipeline("sd", seed=0)
    torch.manual_seed(0)
    config = LoraConfig(r=2, lora_alpha=40, target_modules=["to_q", "to_v"], init_lora_weights=False, **options)
    pipe.unet.add_adapter(config, adapter_name="aligned")
    return pipe


@pytest.fixture(scope="module")
def base():
    from tiny import tiny_pipeline

    return tiny_pipeline("sd", seed=0)


def scalings(pipe):
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [layer for layer in pipe.unet.modules() if isinstance(layer, BaseTunerLayer)]
    return [(dict(layer.scaling), layer.disable_adapters) for layer in layers]


def options(scorers, folder):
    return {
        "scorers": scorers,
        "output_dir": folder,
        "num_inference_steps": 1,
        "guidance_scale": 2.0,
        "progress": False,
    }


def test_a_sweep_starts_at_the_base_and_passes_through_the_comparison(base, channel_scorer, tmp_path, monkeypatch):
    pipe, drawn = with_lora(), []
    before, kind = scalings(pipe), type(pipe)
    original = kind.__call__

    def counted(self, prompt, **keywords):
        drawn.extend(prompt)
        return original(self, prompt, **keywords)

    monkeypatch.setattr(kind, "__call__", counted)
    red = channel_scorer("red")
    keywords = options([red, channel_scorer("green", 1)], tmp_path)
    result = evaluate(pipe, base, PROMPTS, lora_scales=[1.0, 0.0, 0.5], **keywords)
    assert len(red.batches) == 4, "at 1 the scores of the comparison are taken"
    assert [point.scale for point in result.sweep] == [0, 0.5, 1]
    nothing, half, whole = result.sweep
    for scorer in nothing.scorers:
        assert (scorer.win_rate.ties, scorer.win_rate.p_value) == (2, 1.0)
        assert scorer.difference.value == scorer.difference.high == 0
    assert all(statistic.difference.value == 0 for statistic in nothing.statistics)
    assert whole.scorers == result.scorers and whole.statistics == result.statistics
    assert half.statistics[-1].difference.value not in (0, whole.statistics[-1].difference.value)
    assert scalings(pipe) == before
    assert len(drawn) == 2 * 4, "base, aligned, 0 and 0.5; at 1 the pictures of the comparison are taken"
    drawn.clear()
    assert evaluate(pipe, base, PROMPTS, lora_scales=[0.0, 0.5], **keywords).sweep == (nothing, half)
    assert drawn == []

    files = write_report(result, tmp_path)
    assert read_report(tmp_path) == result
    html = files.html.read_text()
    assert "<h2>LoRA scale</h2>" in html and "win rate by red" in html and "change of brightness" in html
    assert json.loads(files.json.read_text())["sweep"][1]["scale"] == 0.5
    assert any(line.startswith("  LoRA scale 0.5: ") for line in result_lines(result))


def test_weights_that_the_caller_named_have_another_name_at_every_scale(base, channel_scorer, tmp_path):
    keywords = options([channel_scorer("red")], tmp_path)
    named = {"aligned_fingerprint": "mine", "base_fingerprint": "base"}
    result = evaluate(with_lora(), base, PROMPTS, lora_scales=[0.0, 1.0], **named, **keywords)
    assert result.sweep[0].statistics[-1].difference.value == 0 < result.sweep[1].statistics[-1].difference.value


@pytest.mark.parametrize("kind", [{}, {"use_dora": True}, {"use_rslora": True}])
def test_scale_0_draws_the_bases_pictures(base, kind):
    def picture(pipe):
        generator = torch.Generator().manual_seed(0)
        return np.asarray(pipe(PROMPTS[0], num_inference_steps=1, generator=generator, output_type="np").images)

    pipe = with_lora(**kind)
    changed = picture(pipe)
    with at_lora_scale(pipe, 0):
        assert np.array_equal(picture(pipe), picture(base))
    assert np.array_equal(picture(pipe), changed) and not np.array_equal(changed, picture(base))
    with at_lora_scale(pipe, 1):
        assert np.array_equal(picture(pipe), changed)


@pytest.mark.parametrize("trains", [True, False])
def test_a_sweep_neither_freezes_nor_trains_weights(trains):
    pipe = with_lora()
    for name, weight in pipe.unet.named_parameters():
        weight.requires_grad_(trains and "lora_A" in name)
    before = {name: weight.requires_grad for name, weight in pipe.unet.named_parameters()}
    for scale in (0, 0.5):
        with at_lora_scale(pipe, scale):
            pass
        assert {name: weight.requires_grad for name, weight in pipe.unet.named_parameters()} == before


def test_a_sweep_told_by_a_training_scorer_says_so(base, channel_scorer, tmp_path):
    keywords = options([channel_scorer("red")], tmp_path)
    result = evaluate(with_lora(), base, PROMPTS[:1], lora_scales=[0.5], trained_on={"red"}, **keywords)
    assert result_lines(result)[-1].endswith("by red, seen in training")
    assert '<td class="name">Win rate by red, seen in training</td>' in write_report(result, tmp_path).html.read_text()


def test_an_error_while_drawing_leaves_the_scale_as_it_was():
    pipe = with_lora()
    before = scalings(pipe)
    for scale in (0, 0.5):
        with pytest.raises(KeyboardInterrupt), at_lora_scale(pipe, scale):
            assert scalings(pipe) != before
            raise KeyboardInterrupt
        assert scalings(pipe) == before


def test_what_cannot_be_scaled_is_refused_before_anything_is_drawn(base, channel_scorer, tmp_path):
    keywords = options([channel_scorer("red")], tmp_path)
    with pytest.raises(ValueError, match="one LoRA, loaded and not merged; active here: none"):
        evaluate(base, base, PROMPTS, lora_scales=[0.5], **keywords)
    with pytest.raises(ValueError, match="must be a finite number, got nan"):
        evaluate(with_lora(), base, PROMPTS, lora_scales=[float("nan")], **keywords)
    merged = with_lora()
    merged.fuse_lora()
    with pytest.raises(ValueError, match="unfuse_lora"):
        evaluate(merged, base, PROMPTS, lora_scales=[0.5], **keywords)
    assert not list(tmp_path.rglob("*.png"))


def test_pictures_of_a_scale_are_stored_apart(base, channel_scorer, tmp_path):
    evaluate(with_lora(), base, PROMPTS[:1], lora_scales=[0.5], **options([channel_scorer("red")], tmp_path))
    folders = sorted((tmp_path / "pictures").glob("aligned-*"))
    assert len(folders) == 2
    first, second = (np.asarray(Image.open(next(folder.glob("*.png")))) for folder in folders)
    assert not np.array_equal(first, second)
