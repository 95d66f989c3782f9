"""Stable Cascade's prior: what its pipeline tells the network, latents as the published encoder makes them, and its traps."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import cascade_network, tiny_pipeline
from torchvision.models import efficientnet_v2_s
from torchvision.transforms import Normalize

from mmalign.denoisers import StableCascadeDenoiser, adapter_for
from mmalign.denoisers.effnet_encoder import EffNetEncoder, find_encoder, load_encoder
from mmalign.denoisers.user_attention import (
    UserAttentionConfig,
    add_user_attention,
    remove_user_attention,
    user_attention,
)

PROMPTS = ["a red sneaker on a blue background", "a green bag"]


@pytest.fixture(scope="module")
def denoiser():
    return adapter_for(tiny_pipeline("cascade"))


@pytest.fixture(scope="module")
def encoder(cascade_folder):
    return load_encoder(cascade_folder / "effnet_encoder.safetensors")


def pictures(rows=2, size=64):
    return 2 * torch.rand(rows, 3, size, size, generator=torch.Generator().manual_seed(0)) - 1


def latents(rows=2):
    return torch.randn(rows, 16, 2, 2, generator=torch.Generator().manual_seed(1))


def features():
    """The published network without weights."""
    with torch.device("meta"):
        return efficientnet_v2_s().features


# What the network is told.


def test_predict_repeats_the_pipelines_own_calls(denoiser):
    calls = []

    def record(module, args, kwargs, output):
        calls.append((kwargs["sample"], kwargs["timestep_ratio"], output[0]))

    hook = denoiser.module.register_forward_hook(record, with_kwargs=True)
    denoiser.pipe(PROMPTS, height=85, width=85, num_inference_steps=4, guidance_scale=1.0)
    hook.remove()
    told = denoiser.encode_prompt(PROMPTS)
    assert [ratio[0].item() for _, ratio, _ in calls] == [1.0, 0.75, 0.5, 0.25]
    for row, (x, _, out) in zip((999, 749, 499, 249), calls, strict=True):
        with torch.no_grad():
            found = denoiser.predict(denoiser.module, x, torch.tensor([row, row]), told)
        torch.testing.assert_close(found, out, rtol=0, atol=1e-5)


def test_the_tokens_of_the_text_matter_beside_its_pooled_state(denoiser):
    """The network passes over them without a word where it is told nothing of pictures."""
    x, t, told = latents(1), torch.tensor([400]), denoiser.encode_prompt(PROMPTS[:1])
    assert told.prompt_embeds.shape == (1, 77, 16) and told.pooled.shape == (1, 16)
    other = replace(told, prompt_embeds=denoiser.encode_prompt(PROMPTS[1:]).prompt_embeds)
    pooled = replace(told, pooled=denoiser.encode_prompt(PROMPTS[1:]).pooled)
    with torch.no_grad():
        one, two, three = (denoiser.predict(denoiser.module, x, t, given) for given in (told, other, pooled))
    assert (one - two).abs().max() > 1e-3 and (one - three).abs().max() > 1e-3


def test_rows_do_not_depend_on_their_batch_and_time_matters(denoiser):
    x, told = latents(), denoiser.encode_prompt(PROMPTS)
    t = torch.tensor([30, 800])
    with torch.no_grad():
        both = denoiser.predict(denoiser.module, x, t, told)
        alone = denoiser.predict(denoiser.module, x[1:], t[1:], told[1])
        earlier = denoiser.predict(denoiser.module, x[1:], t[:1], told[1])
    torch.testing.assert_close(both[1:], alone, rtol=0, atol=1e-5)
    assert (alone - earlier).abs().max() > 1e-2


def test_a_bfloat16_network_runs_in_its_own_precision():
    denoiser = adapter_for(tiny_pipeline("cascade"))
    x, t, told = latents(), torch.tensor([127, 511]), denoiser.encode_prompt(PROMPTS)
    with torch.no_grad():
        exact = denoiser.predict(denoiser.module, x, t, told)
        denoiser.pipe.prior.to(torch.bfloat16)
        half = denoiser.predict(denoiser.module, x, t, told)
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), exact, rtol=0.1, atol=0.1)


def test_truncated_prompts_are_counted(denoiser):
    fits, long = " ".join(["red"] * 75), " ".join(["red"] * 76)
    assert denoiser.count_truncated([fits]) == 0
    assert denoiser.count_truncated([long, fits, long]) == 2


# Latents.


def test_weights_have_torchvisions_names_and_the_published_files(encoder, cascade_folder):
    published = features().state_dict()
    expected = {f"backbone.{name}": value.shape for name, value in published.items()}
    expected |= {"mapper.0.weight": (16, 1280, 1, 1), "mapper.1.num_batches_tracked": ()}
    expected |= {f"mapper.1.running_{name}": (16,) for name in ("mean", "var")}
    assert {name: value.shape for name, value in encoder.state_dict().items()} == expected
    for name, value in load_file(cascade_folder / "effnet_encoder.safetensors").items():
        assert torch.equal(encoder.state_dict()[name], value), name


def test_latents_are_normalised_features_of_imagenets_pixels_and_nothing_else(cascade_folder, encoder):
    pipe = tiny_pipeline("cascade")
    pipe.register_to_config(_name_or_path=str(cascade_folder))
    state = encoder.state_dict()
    seen = features().eval()
    own = {name.removeprefix("backbone."): value for name, value in state.items() if "backbone" in name}
    seen.load_state_dict(own, assign=True)
    pixels = pictures(2, 96)
    unit = Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))((pixels + 1) / 2)
    with torch.no_grad():
        mapped = torch.einsum("bchw,oc->bohw", seen(unit), state["mapper.0.weight"][:, :, 0, 0])
    mean, variance = (state[f"mapper.1.running_{name}"].view(1, -1, 1, 1) for name in ("mean", "var"))
    found = adapter_for(pipe).encode_image(pixels, [torch.Generator()] * 2)
    assert found.shape == (2, 16, 3, 3) == (2, *adapter_for(pipe).latent_shape(96, 96))
    torch.testing.assert_close(found, (mapped - mean) / (variance + 1e-5).sqrt(), rtol=1e-3, atol=1e-3)
    # Random features blow rounding up; statistics of a batch would change everything.
    alone = adapter_for(pipe).encode_image(pixels[1:])
    assert (alone - found[1:]).norm() < 0.02 * alone.norm() < 0.02 * 1.5 * (found[0] - found[1]).norm()


def test_pictures_of_768_pixels_are_24_latents_wide(denoiser):
    assert denoiser.latent_shape(*denoiser.native_size) == (16, 24, 24)
    with pytest.raises(ValueError, match="multiples of 32"):
        denoiser.latent_shape(768, 760)
    with pytest.raises(ValueError, match="draws pictures, not clips"):
        denoiser.latent_shape(64, 64, 9)


def test_the_encoder_is_found_beside_the_prior_or_its_decoder(tmp_path, cascade_folder):
    with pytest.raises(ValueError, match="hf download stabilityai/stable-cascade effnet_encoder.safetensors"):
        find_encoder(str(tmp_path))
    with pytest.raises(ValueError, match="not loaded from a folder has none"):
        adapter_for(tiny_pipeline("cascade")).encode_image(pictures())
    (tmp_path / "decoder").mkdir()
    (tmp_path / "decoder" / "effnet_encoder.safetensors").touch()
    assert find_encoder(str(tmp_path)).parent == tmp_path / "decoder"
    assert find_encoder(str(cascade_folder)).parent == cascade_folder


def test_for_a_prior_of_the_hub_the_published_file_is_fetched_or_the_way_without_told(monkeypatch, tmp_path):
    import huggingface_hub

    asked = []

    def fetch(repository, name):
        asked.append((repository, name))
        if len(asked) > 1:
            raise OSError("the Hub cannot be reached")
        return str(tmp_path / name)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fetch)
    assert find_encoder("someone/a-cascade-prior") == tmp_path / "effnet_encoder.safetensors"
    assert asked == [("stabilityai/stable-cascade", "effnet_encoder.safetensors")]
    with pytest.raises(ValueError, match="cannot be reached: run `hf download someone/a-cascade-prior --local-dir"):
        find_encoder("someone/a-cascade-prior")


def test_another_file_is_no_encoder(tmp_path):
    file = tmp_path / "effnet_encoder.safetensors"
    save_file({"mapper.0.weight": torch.zeros(16, 1280, 1, 1)}, file)
    with pytest.raises(ValueError, match="is not the encoder of Stable Cascade"):
        load_encoder(file)
    with torch.device("meta"):
        shapes = {name: value.shape for name, value in EffNetEncoder().state_dict().items()}
    save_file(
        {name: torch.zeros(shape if "mapper.0" not in name else (4, 1280, 1, 1)) for name, shape in shapes.items()},
        file,
    )
    with pytest.raises(ValueError, match="mapper.0.weight"):
        load_encoder(file)
    file.write_bytes(b"not safetensors")
    with pytest.raises(ValueError, match="is not the encoder of Stable Cascade"):
        load_encoder(file)


# The user attention.


def test_the_user_attention_shares_the_query_of_a_block_that_attends_to_picture_and_text_at_once():
    denoiser = adapter_for(tiny_pipeline("cascade"))
    branch = add_user_attention(denoiser.module, UserAttentionConfig(width=6))
    assert len(branch.layers) == 4
    name, layer = next(iter(branch.layers.items()))
    block = denoiser.module.get_submodule(name.replace("/", ".").removesuffix(".attention"))
    attn = block.attention
    torch.nn.init.normal_(layer.value.weight)
    x, text = torch.randn(2, 16, 3, 2), torch.randn(2, 5, 16)
    users = branch.read(torch.randn(2, 4, 6), torch.tensor([0.5, 2.0]))

    def heads(part):
        return part.unflatten(-1, (attn.heads, -1)).transpose(1, 2)

    def attend(query, key, value):
        weights = (heads(query) @ heads(key).transpose(-1, -2) / (16 / attn.heads) ** 0.5).softmax(-1)
        return (weights @ heads(value)).transpose(1, 2).flatten(2)

    seen = block.norm(x).flatten(2).transpose(1, 2)
    both = torch.cat([seen, block.kv_mapper(text)], dim=1)
    query = attn.to_q(seen)
    z = attend(query, attn.to_k(both), attn.to_v(both))
    z = z + users.weight[:, None, None] * attend(query, layer.key(users.tokens), layer.value(users.tokens))
    expected = x + attn.to_out[0](z).transpose(1, 2).reshape(x.shape)
    branch.users = users
    torch.testing.assert_close(block(x, text), expected, rtol=1e-4, atol=1e-4)
    branch.users = None
    assert not torch.allclose(block(x, text), expected)


def test_on_the_published_prior_it_has_64_layers_and_as_many_weights_as_documented():
    with torch.device("meta"):
        network = cascade_network(
            timestep_ratio_embedding_dim=64, conditioning_dim=2048, block_out_channels=(2048, 2048), switch_level=[False],
            num_attention_heads=(32, 32), down_num_layers_per_block=(8, 24), up_num_layers_per_block=(24, 8),
            clip_text_in_channels=1280, clip_text_pooled_in_channels=1280, clip_image_in_channels=768,
        )  # fmt: skip
        assert sum(p.numel() for p in network.parameters()) == pytest.approx(3.589e9, rel=1e-3)
        for projection, weights in ((2048, 544e6), (None, 940e6)):
            branch = add_user_attention(network, UserAttentionConfig(width=3584, projection=projection))
            assert len(branch.layers) == 64
            assert sum(p.numel() for p in branch.parameters()) == pytest.approx(weights, rel=2e-3)
            remove_user_attention(network)


def test_users_are_forgotten_when_the_network_fails():
    denoiser = adapter_for(tiny_pipeline("cascade"))
    branch = add_user_attention(denoiser.module, UserAttentionConfig(width=6))
    told = replace(denoiser.encode_prompt(PROMPTS), user=torch.randn(2, 4, 6), user_weight=torch.ones(2))
    with pytest.raises(RuntimeError):
        denoiser.predict(denoiser.module, torch.zeros(2, 3, 2, 2), torch.tensor([1, 2]), told)
    assert branch.users is None and denoiser.module._gradient_checkpointing_func is None
    assert user_attention(denoiser.module) is branch


# What is refused.


def test_other_parts_of_stable_cascade_are_told_where_alignment_happens():
    decoder = type("StableCascadeDecoderPipeline", (), {"components": {"decoder": cascade_network()}, "config": {}})()
    with pytest.raises(ValueError, match="aligned in its prior .*stable-cascade-prior"):
        adapter_for(decoder)
    other = SimpleNamespace(components={"prior": torch.nn.Linear(1, 1)}, config={})
    with pytest.raises(ValueError, match="its network is Linear"):
        adapter_for(other)
    assert isinstance(adapter_for(tiny_pipeline("cascade")), StableCascadeDenoiser)


def test_latents_are_not_decoded(denoiser):
    with pytest.raises(ValueError, match="features that no VAE decodes"):
        denoiser.decode(latents())
