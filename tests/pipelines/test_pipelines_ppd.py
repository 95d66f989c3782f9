"""PPD's pipeline: the base without a user, for plain diffusers too; a user's picture; users mixed in tokens and in scores."""

import json

import numpy as np
import pytest
import torch
from tiny import tiny_pipeline

from mmalign import PPDPipeline
from mmalign.data.users import Group, UserEmbeddings
from mmalign.denoisers.user_attention import UserAttentionConfig, add_user_attention, user_attention

WIDTH = 5


def personal(kind="sd"):
    pipe = PPDPipeline._adopt(tiny_pipeline(kind))
    network = pipe.components.get("unet") or pipe.transformer
    branch = add_user_attention(network, UserAttentionConfig(width=WIDTH))
    with torch.no_grad():
        for parameter in branch.parameters():
            parameter.add_(0.5 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(4)))
    tokens = torch.randn(2, 3, WIDTH, generator=torch.Generator().manual_seed(5))
    pipe.users = UserEmbeddings([Group("ann", (), ()), Group("bob", (), ())], tokens, {})
    return pipe


def draw(pipe, prompt="a red shirt", guidance=3.0, **options):
    generator = torch.Generator().manual_seed(0)
    output = pipe(
        prompt, generator=generator, num_inference_steps=2, guidance_scale=guidance, output_type="latent", **options
    )
    return output.images


@pytest.mark.parametrize("kind", ["sd", "sdxl", "sd3", "flux"])
def test_without_a_user_or_at_scale_zero_it_draws_the_bases_picture(kind):
    base, pipe = tiny_pipeline(kind), personal(kind)
    expected = draw(base)
    assert torch.equal(draw(pipe), expected)
    assert torch.equal(draw(pipe, user="ann", user_scale=0.0), expected)
    ann = draw(pipe, user="ann")
    assert not torch.allclose(ann, expected) and not torch.allclose(ann, draw(pipe, user="bob"))
    # Nothing of the user is left behind.
    assert torch.equal(draw(pipe), expected)


def test_plain_diffusers_loads_the_saved_folder_and_draws_the_bases_picture(tmp_path):
    from diffusers import DiffusionPipeline

    base, pipe = tiny_pipeline("sd"), personal()
    expected = draw(pipe, user="ann")
    pipe.save_pretrained(tmp_path)
    assert torch.equal(draw(pipe, user="ann"), expected)
    plain = DiffusionPipeline.from_pretrained(tmp_path, use_safetensors=True)
    plain.set_progress_bar_config(disable=True)
    assert type(plain).__module__.startswith("diffusers.")
    assert torch.equal(draw(plain), draw(base))
    assert {path.name for path in (tmp_path / "user_attention").iterdir()} == {
        "user_attention.safetensors",
        "config.json",
    }
    assert not (tmp_path / "users.safetensors").exists()
    assert "user_attention" not in json.loads((tmp_path / "model_index.json").read_text())
    again = PPDPipeline.from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    again.users = pipe.users
    assert torch.equal(draw(again, user="ann"), expected)


def test_an_output_folder_is_loaded_onto_its_base(tmp_path):
    from mmalign.training.weights import save_trained

    pipe = personal()
    save_trained(pipe, pipe.unet, tmp_path)
    other = PPDPipeline._adopt(tiny_pipeline("sd"))
    other.load_aligned(tmp_path)
    other.users = pipe.users
    assert torch.equal(draw(other, user="bob"), draw(pipe, user="bob"))


def test_users_of_another_encoder_than_it_was_trained_with_are_refused(tmp_path):
    pipe = PPDPipeline._adopt(tiny_pipeline("sd"))
    learned = {"encoder": "clip", "fingerprint": "one"}
    add_user_attention(pipe.unet, UserAttentionConfig(width=WIDTH, encoder=learned))
    pipe.save_pretrained(tmp_path)
    again = PPDPipeline.from_pretrained(tmp_path)
    tokens = torch.ones(1, 3, WIDTH)

    def users(**made_by):
        return UserEmbeddings([Group("ann", (), ())], tokens, made_by)

    again.users = users(encoder="clip", fingerprint="two", seed=1)
    with pytest.raises(
        ValueError, match="made by encoder clip, fingerprint two, and this model learned .* fingerprint one"
    ):
        draw(again, user="ann")
    draw(again, user=tokens[0])
    again.users = users(**learned, seed=2, data="elsewhere")
    draw(again, user={"ann": 1.0})


@pytest.mark.parametrize("mix", ["tokens", "scores"])
def test_mixtures_meet_their_ends(mix):
    pipe = personal()
    for user in ("ann", "bob"):
        weights = {name: float(name == user) for name in ("ann", "bob")}
        torch.testing.assert_close(draw(pipe, user=weights, user_mix=mix), draw(pipe, user=user), rtol=1e-4, atol=1e-4)
    both = draw(pipe, user={"ann": 0.5, "bob": 0.5}, user_mix=mix)
    assert not torch.allclose(both, draw(pipe, user="ann"))
    if mix == "scores":
        assert torch.allclose(draw(pipe, user={"ann": 0.0, "bob": 0.0}, user_mix=mix), draw(pipe), atol=1e-5)


def test_scores_are_mixed_as_the_formula_says():
    pipe = personal()
    calls = []
    plain = pipe.unet.forward

    def watch(*args, **options):
        output = plain(*args, **options)
        calls.append((args, options, output[0]))
        return output

    pipe.unet.forward = watch
    draw(pipe, user={"ann": 0.3, "bob": -0.5}, user_mix="scores", user_scale=2.0, guidance=1.0)
    base, ann, bob = (output for _, _, output in calls[:3])
    # The next step's input tells what the first one predicted: the sampler is deterministic.
    mixed = base + 0.6 * (ann - base) - 1.0 * (bob - base)
    pipe.scheduler.set_timesteps(2)
    x = calls[0][0][0]
    expected = pipe.scheduler.step(mixed, pipe.scheduler.timesteps[0], x, return_dict=False)[0]
    following = next(args[0] for args, _, _ in calls[3:])
    torch.testing.assert_close(following, expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(ann, base) and not torch.allclose(bob, base)


def test_the_unconditional_half_has_no_user():
    pipe = personal()
    rows = []
    plain = pipe.unet.forward

    def watch(*args, **options):
        told = (options.get("cross_attention_kwargs") or {}).get("ip_hidden_states")
        rows.append(None if told is None else told.weight.tolist())
        return plain(*args, **options)

    pipe.unet.forward = watch
    draw(pipe, ["a red shirt", "a blue bag"], user=["ann", "bob"], user_scale=0.7, num_images_per_prompt=2)
    assert rows[0] == pytest.approx([0.0] * 4 + [0.7] * 4)


def test_every_prompt_has_its_own_user():
    pipe = personal()

    def one(user, rows):
        generators = [torch.Generator().manual_seed(7) for _ in range(rows)]
        given = {"num_inference_steps": 2, "guidance_scale": 3.0, "output_type": "latent"}
        return pipe(["a red shirt"] * rows, user=user, generator=generators, **given).images

    both = one(["ann", "bob"], 2)
    torch.testing.assert_close(both[:1], one("ann", 1), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(both[1:], one("bob", 1), rtol=1e-4, atol=1e-4)
    tokens = pipe.users.user("bob")
    assert torch.equal(one(tokens, 1), one("bob", 1))


def test_what_cannot_be_drawn_is_refused():
    pipe = personal()
    with pytest.raises(ValueError, match="no user 'eve'"):
        draw(pipe, user="eve")
    with pytest.raises(ValueError, match="need one user or 2"):
        draw(pipe, ["a", "b"], user=["ann"])
    with pytest.raises(ValueError, match="user_mix"):
        draw(pipe, user="ann", user_mix="both")
    with pytest.raises(ValueError, match="mapping"):
        draw(pipe, user="ann", user_mix="scores")
    pipe.users = None
    with pytest.raises(ValueError, match="cannot be looked up"):
        draw(pipe, user="ann")
    with pytest.raises(ValueError, match="no user attention"):
        draw(PPDPipeline._adopt(tiny_pipeline("sd")), user=torch.zeros(3, WIDTH))


def test_a_lora_is_merged_and_the_users_stay_apart(tmp_path):
    from diffusers import DiffusionPipeline
    from peft import LoraConfig

    pipe = personal()
    pipe.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False))
    expected, ann = draw(pipe), draw(pipe, user="ann")
    pipe.save_pretrained(tmp_path)
    plain = DiffusionPipeline.from_pretrained(tmp_path)
    plain.set_progress_bar_config(disable=True)
    np.testing.assert_allclose(draw(plain).numpy(), expected.numpy(), rtol=1e-3, atol=1e-4)
    again = PPDPipeline.from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    again.users = pipe.users
    np.testing.assert_allclose(draw(again, user="ann").numpy(), ann.numpy(), rtol=1e-3, atol=1e-4)
    assert user_attention(again.unet) is not None
