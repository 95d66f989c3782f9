"""PPD on Stable Cascade's prior: users in its sampler's calls, folders, and pictures where a decoder lies beside it."""

import json

import numpy as np
import pytest
import torch
from tiny import cascade_decoder, tiny_pipeline

from mmalign import PPDPipeline
from mmalign.data.users import Group, UserEmbeddings
from mmalign.denoisers.user_attention import UserAttentionConfig, add_user_attention, user_attention
from mmalign.evaluation.generate import generate
from mmalign.pipelines.image.self_npo import SelfNPOPipeline

WIDTH = 5


@pytest.fixture(scope="module")
def with_decoder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cascade")
    tiny_pipeline("cascade").save_pretrained(folder)
    cascade_decoder().save_pretrained(folder / "decoder")
    # As published: under a name by which diffusers finds the class no longer.
    index = folder / "decoder" / "model_index.json"
    parts = json.loads(index.read_text())
    index.write_text(json.dumps(parts | {"vqgan": ["wuerstchen", "PaellaVQModel"]}))
    return folder


def personal(folder=None):
    pipe = PPDPipeline._adopt(tiny_pipeline("cascade")) if folder is None else PPDPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    branch = add_user_attention(pipe.prior, UserAttentionConfig(width=WIDTH))
    with torch.no_grad():
        for parameter in branch.parameters():
            parameter.add_(0.5 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(4)))
    tokens = torch.randn(2, 3, WIDTH, generator=torch.Generator().manual_seed(5))
    pipe.users = UserEmbeddings([Group("ann", (), ()), Group("bob", (), ())], tokens, {})
    return pipe


def call(pipe, prompt="a red shirt", guidance=3.0, **options):
    given = {"height": 128, "width": 128, "num_inference_steps": 2, "guidance_scale": guidance}
    return pipe(prompt, generator=torch.Generator().manual_seed(0), **given | options)


def draw(pipe, *args, **options):
    return call(pipe, *args, **options).image_embeddings


def test_without_a_user_or_at_scale_zero_it_draws_what_the_base_draws():
    base, pipe = tiny_pipeline("cascade"), personal()
    expected = draw(base)
    assert torch.equal(draw(pipe), expected)
    assert torch.equal(draw(pipe, user="ann", user_scale=0.0), expected)
    ann = draw(pipe, user="ann")
    assert not torch.allclose(ann, expected) and not torch.allclose(ann, draw(pipe, user="bob"))
    assert torch.equal(draw(pipe), expected)


def test_the_unconditional_half_which_comes_second_has_no_user():
    pipe, base, seen = personal(), tiny_pipeline("cascade"), []
    plain = pipe.prior.forward

    def watch(**options):
        output = plain(**options)
        seen.append((options, output[0]))
        return output

    pipe.prior.forward = watch
    draw(pipe, ["a red shirt", "a blue bag"], user=["ann", "bob"], num_images_per_prompt=2)
    assert len(seen) == 2
    for told, output in seen:
        with torch.no_grad():
            without = base.prior(**told)[0]
        with_user, unconditional = output.chunk(2)
        torch.testing.assert_close(unconditional, without.chunk(2)[1], rtol=0, atol=1e-5)
        assert all((a - b).abs().max() > 1e-2 for a, b in zip(with_user, without.chunk(2)[0], strict=True))
        # The second half reads the empty prompt.
        empty = pipe.encode_prompt("cpu", 1, 1, False, prompt=[""])[0]
        torch.testing.assert_close(told["clip_text"][4:], empty.expand(4, -1, -1))


@pytest.mark.parametrize("mix", ["tokens", "scores"])
def test_mixtures_meet_their_ends(mix):
    pipe = personal()
    for user in ("ann", "bob"):
        weights = {name: float(name == user) for name in ("ann", "bob")}
        torch.testing.assert_close(draw(pipe, user=weights, user_mix=mix), draw(pipe, user=user), rtol=1e-3, atol=1e-3)
    both = draw(pipe, user={"ann": 0.5, "bob": 0.5}, user_mix=mix)
    assert not torch.allclose(both, draw(pipe, user="ann"))
    if mix == "scores":
        none = draw(pipe, user={"ann": 0.0, "bob": 0.0}, user_mix=mix)
        torch.testing.assert_close(none, draw(pipe), rtol=1e-4, atol=1e-4)


def test_plain_diffusers_loads_the_saved_folder_and_draws_what_the_base_draws(tmp_path):
    from diffusers import DiffusionPipeline

    pipe = personal()
    expected = draw(pipe, user="ann")
    pipe.save_pretrained(tmp_path)
    assert torch.equal(draw(pipe, user="ann"), expected)
    plain = DiffusionPipeline.from_pretrained(tmp_path, use_safetensors=True)
    assert type(plain).__name__ == "StableCascadePriorPipeline" and user_attention(plain.prior) is None
    assert torch.equal(draw(plain), draw(tiny_pipeline("cascade")))
    again = PPDPipeline.from_pretrained(tmp_path)
    again.users = pipe.users
    assert torch.equal(draw(again, user="ann"), expected)


def test_it_loads_with_diffusers_own_warning_told_once(tmp_path, caplog):
    tiny_pipeline("cascade").save_pretrained(tmp_path)
    caplog.clear()
    with caplog.at_level("WARNING"):
        PPDPipeline.from_pretrained(tmp_path)
    assert sum("StableCascadePriorPipeline has been deprecated" in record.message for record in caplog.records) == 1


# Pictures.


def test_with_a_decoder_beside_it_the_call_draws_pictures_for_the_user(with_decoder, tmp_path):
    pipe = personal(with_decoder)
    ann, bob = (call(pipe, user=user, output_type="np").images for user in ("ann", "bob"))
    assert ann.shape == (1, 128, 128, 3) and not np.allclose(ann, bob)
    decoder, generator = cascade_decoder(), torch.Generator().manual_seed(0)
    given = {"height": 128, "width": 128, "num_inference_steps": 2, "guidance_scale": 3.0, "generator": generator}
    drawn = personal()("a red shirt", user="ann", **given)
    names = ("image_embeddings", "prompt_embeds", "prompt_embeds_pooled")
    by_hand = decoder(**{name: drawn[name] for name in names}, generator=generator, output_type="np")
    np.testing.assert_allclose(ann, by_hand.images, rtol=0, atol=1e-4)
    # Another number of its steps acts; and what is saved does not hold the decoder.
    assert not np.allclose(call(pipe, user="ann", output_type="np", decoder_inference_steps=3).images, ann)
    pipe.save_pretrained(tmp_path)
    assert not (tmp_path / "decoder").exists()
    assert call(pipe, return_dict=False)[0].size == (128, 128)


def test_every_picture_depends_on_its_prompt_and_seed_alone(with_decoder):
    pipe, given = personal(with_decoder), {"num_inference_steps": 2, "guidance_scale": 3.0, "height": 128, "width": 128}
    both = generate(pipe, ["a red shirt", "a blue bag"], [3, 4], progress=False, **given)
    (alone,) = generate(pipe, ["a blue bag"], [4], progress=False, **given)
    apart = np.abs(np.asarray(both[1], dtype=int) - np.asarray(alone, dtype=int))
    assert apart.max() <= 2 and not np.array_equal(np.asarray(both[0]), np.asarray(both[1]))


def test_without_a_decoder_pictures_are_refused_and_one_can_be_set(with_decoder):
    given = {"num_inference_steps": 1, "guidance_scale": 1.0, "height": 128, "width": 128, "progress": False}
    for pipe in (personal(), tiny_pipeline("cascade")):
        with pytest.raises(ValueError, match="draws features and no pictures: .*--local-dir FOLDER/decoder"):
            generate(pipe, ["a red shirt"], [0], **given)
    pipe = personal()
    pipe.decoder = cascade_decoder()
    assert generate(pipe, ["a red shirt"], [0], **given)[0].size == (128, 128)


# What is refused.


def test_a_negative_side_and_long_prompts_are_refused():
    pipe = SelfNPOPipeline._adopt(tiny_pipeline("cascade"))
    with pytest.raises(ValueError, match="StableCascadeUNet, which runs the prompt's half first"):
        pipe.load_negative("anywhere")
    with pytest.raises(ValueError, match="stable-cascade reads prompts by T5 alone, or was never tried"):
        pipe.read_long_prompts()
