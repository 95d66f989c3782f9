"""A picture depends on its prompt and its seed, not on its batch; the pipeline is left as it was found."""

import numpy as np
import pytest
import torch

from mmalign.evaluation import generate

PROMPTS = ["a red sneaker", "a blue bag", "a green shirt", "a black dress", "a white sneaker"]
SEEDS = [3, 1, 4, 1, 5]


@pytest.fixture(scope="module")
def pipe():
    from tiny import tiny_pipeline

    return tiny_pipeline("sd")


def draw(pipe, prompts=PROMPTS, seeds=SEEDS, **options):
    options = {"num_inference_steps": 2, "guidance_scale": 3.0, "progress": False, **options}
    return generate(pipe, prompts, seeds, **options)


def difference(a, b):
    return np.abs(np.asarray(a, dtype=int) - np.asarray(b, dtype=int)).max()


def test_a_picture_does_not_depend_on_batch_or_neighbours(pipe):
    alone, together = draw(pipe, batch_size=1), draw(pipe, batch_size=4)
    backward = draw(pipe, PROMPTS[::-1], SEEDS[::-1], batch_size=2)[::-1]
    for one, many, reversed_ in zip(alone, together, backward, strict=True):
        assert difference(one, many) <= 1  # rounding of a different matrix shape may move a level
        assert difference(one, reversed_) <= 1
    assert difference(alone[1], draw(pipe, PROMPTS[1:2], [2])[0]) > 1, "another seed must draw another picture"
    assert difference(draw(pipe, ["a red bag"], [3])[0], draw(pipe, ["a blue dress"], [3])[0]) > 0


def test_two_text_encoders_and_another_scheduler():
    from tiny import tiny_pipeline

    pipe = tiny_pipeline("sdxl")
    alone, together = draw(pipe, PROMPTS[:3], SEEDS[:3], batch_size=1), draw(pipe, PROMPTS[:3], SEEDS[:3], batch_size=3)
    assert max(difference(one, many) for one, many in zip(alone, together, strict=True)) <= 1


def test_size_is_passed_on(pipe):
    assert draw(pipe, PROMPTS[:1], [0], height=8, width=24)[0].size == (24, 8)
    assert draw(pipe, PROMPTS[:1], [0])[0].size == (16, 16)


def test_the_inner_bar_is_hidden_and_the_outer_one_counts_pictures(pipe, capsys):
    pipe.set_progress_bar_config(desc="mine", disable=False)
    draw(pipe, batch_size=2, progress=True)
    shown = capsys.readouterr().err
    assert "5/5" in shown and "mine" not in shown
    assert pipe._progress_bar_config == {"desc": "mine", "disable": False}
    draw(pipe)
    assert capsys.readouterr().err == ""


def test_training_mode_is_off_while_drawing_and_restored_after_an_error(pipe):
    seen, broken = [], []

    def look(module, _):
        seen.append(module.training)
        if broken:
            raise RuntimeError("out of memory")

    handle = pipe.unet.register_forward_pre_hook(look)
    try:
        pipe.unet.train()
        pipe.unet.mid_block.eval()
        modes = [module.training for module in pipe.unet.modules()]
        draw(pipe, PROMPTS[:1], [0])
        assert seen and not any(seen)
        assert [module.training for module in pipe.unet.modules()] == modes
        broken.append(True)
        with pytest.raises(RuntimeError, match="out of memory"):
            draw(pipe, PROMPTS[:1], [0])
        assert [module.training for module in pipe.unet.modules()] == modes
    finally:
        handle.remove()
        pipe.unet.eval()


def test_a_picture_of_nan_is_an_error_that_names_it():
    import torch
    from tiny import tiny_pipeline

    broken = tiny_pipeline("sd")
    with torch.no_grad():
        broken.vae.decoder.conv_out.bias.fill_(float("nan"))
    with pytest.raises(ValueError, match="'a red sneaker' with seed 3 has NaN"):
        draw(broken, PROMPTS[:1], SEEDS[:1])


def test_a_picture_that_the_safety_checker_blacked_out_is_an_error_that_names_it(pipe, monkeypatch):
    flags = [False, True]
    monkeypatch.setattr(type(pipe), "run_safety_checker", lambda self, image, *_: (image * 0, flags))
    with pytest.raises(ValueError, match="blacked out the picture of 'a blue bag' with seed 1.*safety_checker=None"):
        draw(pipe, PROMPTS[:2], SEEDS[:2])
    flags[1] = False
    assert len(draw(pipe, PROMPTS[:2], SEEDS[:2])) == 2


def test_what_is_refused(pipe):
    with pytest.raises(ValueError, match="2 prompts and 1 seeds"):
        draw(pipe, PROMPTS[:2], [0])
    with pytest.raises(ValueError, match="batch_size"):
        draw(pipe, batch_size=0)
    assert draw(pipe, [], []) == []


def test_a_clip_depends_on_its_prompt_and_seed_only_and_evaluation_says_what_it_lacks(tmp_path):
    from tiny import tiny_pipeline

    from mmalign.evaluation import draw_side

    video = tiny_pipeline("cogvideox")
    together = draw(video, PROMPTS[:2], [3, 4], batch_size=2)
    alone = draw(video, PROMPTS[1:2], [4], num_frames=9)
    assert len(together) == 2 and all(len(clip) == 9 and clip[0].size == (16, 16) for clip in together)
    assert max(difference(one, many) for one, many in zip(alone[0], together[1], strict=True)) <= 1
    assert difference(together[0][4], together[1][4]) > 1
    with pytest.raises(ValueError, match="CogVideoXPipeline draws clips, and neither scorers nor the report read them"):
        draw_side(video, PROMPTS[:1], label="a", output_dir=tmp_path, num_inference_steps=1, guidance_scale=1.0)
    assert not list(tmp_path.iterdir())


def test_a_number_of_frames_is_refused_where_pictures_are_drawn(pipe):
    with pytest.raises(ValueError, match="num_frames=9 has no effect: StableDiffusionPipeline draws pictures"):
        draw(pipe, PROMPTS[:1], [0], num_frames=9)


def test_flux_is_guided_by_an_empty_negative_prompt_where_that_is_asked_for(pipe, tmp_path):
    from tiny import tiny_pipeline

    from mmalign.evaluation.drawing import draw_side

    flux = tiny_pipeline("flux")
    (guided,) = draw(flux, PROMPTS[:1], [3], true_cfg_scale=4.0)
    flux.set_progress_bar_config(disable=True)
    by_hand = flux(
        PROMPTS[0], negative_prompt="", true_cfg_scale=4.0, guidance_scale=3.0, num_inference_steps=2,
        generator=torch.Generator().manual_seed(3),
    ).images[0]  # fmt: skip
    assert difference(guided, by_hand) <= 1 and difference(guided, draw(flux, PROMPTS[:1], [3])[0]) > 1
    with pytest.raises(ValueError, match="StableDiffusionPipeline guides by guidance_scale"):
        draw(pipe, PROMPTS[:1], [3], true_cfg_scale=4.0)
    with pytest.raises(ValueError, match="must be above 1"):
        draw(flux, PROMPTS[:1], [3], true_cfg_scale=1.0)
    # Its pictures lie apart from those without it, whose folder is what it always was.
    common = {
        "label": "flux",
        "output_dir": tmp_path,
        "num_inference_steps": 1,
        "guidance_scale": 3.0,
        "progress": False,
    }
    sides = [draw_side(flux, PROMPTS[:1], **common, **scale) for scale in ({}, {"true_cfg_scale": 4.0})]
    assert sides[0].pictures[0].parent != sides[1].pictures[0].parent
    assert "true_cfg_scale" not in sides[0].settings.told() and sides[1].settings.told()["true_cfg_scale"] == 4.0
