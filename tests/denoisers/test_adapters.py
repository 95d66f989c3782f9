"""Adapters against what the diffusers pipelines really compute when they sample."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny import KINDS, PICTURE_KINDS, save_tiny, tiny_pipeline

from mmalign.denoisers import StableDiffusionDenoiser, StableDiffusionXLDenoiser, adapter_for

PROMPTS = ["a red sneaker on a blue background", "a green bag"]
SIZES = torch.tensor([[640, 480, 3, 5, 512, 384], [300, 200, 0, 7, 256, 256]])


@pytest.fixture(scope="module")
def pipes() -> dict[str, Any]:
    return {kind: tiny_pipeline(kind) for kind in KINDS}


def sampling_calls(pipe: Any, **options: Any) -> list[SimpleNamespace]:
    """What a real pipeline call feeds its network, and what comes out."""
    calls = []

    def record(module: Any, args: Any, kwargs: Any, output: Any) -> None:
        named = dict(zip(("x", "t"), args, strict=True)) if args else {}
        named |= {"out": output[0], **kwargs}
        calls.append(SimpleNamespace(**{"x": kwargs.get("hidden_states"), "t": kwargs.get("timestep")} | named))

    handle = adapter_for(pipe).module.register_forward_hook(record, with_kwargs=True)
    try:
        pipe(height=16, width=16, num_inference_steps=2, output_type="latent", **options)
    finally:
        handle.remove()
    return calls


@pytest.mark.parametrize("kind", KINDS)
def test_predict_repeats_the_pipelines_own_unet_calls(pipes: dict[str, Any], kind: str) -> None:
    """Prompt encoding, size conditioning, timestep and call, all at once, without guidance."""
    denoiser = adapter_for(pipes[kind])
    conditioning = denoiser.encode_prompt(PROMPTS[:1])
    extra = {}
    if kind == "sdxl":
        original, crop, target = (tuple(v.tolist()) for v in SIZES[0].split(2))
        extra = dict(original_size=original, crops_coords_top_left=crop, target_size=target)
    conditioning = denoiser.with_sizes(conditioning, SIZES[:1])
    # FLUX's scale is an input of the network; the others' would add an unconditional row.
    scale = 3.5 if kind == "flux" else 1.0
    calls = sampling_calls(pipes[kind], prompt=PROMPTS[0], guidance_scale=scale, **extra)
    assert len(calls) >= 2
    compared = 0
    for call in calls:
        t, x, out = table_index(denoiser, call.t, kind), call.x, call.out
        if t is None:
            continue
        if kind == "flux":
            x, out = (pipes[kind]._unpack_latents(packed, 16, 16, 2) for packed in (x, out))
        if kind == "cogvideox":
            x, out = x.transpose(1, 2), out.transpose(1, 2)
        with torch.no_grad():
            output = denoiser.predict(denoiser.module, x, t, conditioning)
        torch.testing.assert_close(output, out, rtol=0, atol=1e-5)
        compared += 1
    assert compared >= (1 if denoiser.schedule.is_flow else 2)


def table_index(denoiser: Any, told: Any, kind: str) -> torch.Tensor | None:
    """The row of the schedule's table at which the network is told that; a flow sampler also stops between rows."""
    told = torch.as_tensor(told).reshape(1)
    if not denoiser.schedule.is_flow:
        return told.long()
    every = denoiser.schedule.model_timestep(torch.arange(1000)) / (1000 if kind == "flux" else 1)
    found = (every - told).abs() < 1e-6 * every[-1]
    return found.nonzero()[:, 0] if found.any() else None


@pytest.mark.parametrize("kind", KINDS)
def test_prompts_matter_and_rows_keep_their_order(pipes: dict[str, Any], kind: str) -> None:
    denoiser = adapter_for(pipes[kind])
    both = denoiser.encode_prompt(PROMPTS)
    second = denoiser.encode_prompt(PROMPTS[1:])
    torch.testing.assert_close(both.prompt_embeds[1:], second.prompt_embeds, rtol=0, atol=1e-5)
    assert (both.prompt_embeds[0] - both.prompt_embeds[1]).abs().max() > 0.1
    assert not both.prompt_embeds.requires_grad


def test_sdxl_text_is_the_penultimate_state_of_both_encoders_and_the_pooled_second(pipes: dict[str, Any]) -> None:
    pipe = pipes["sdxl"]
    conditioning = adapter_for(pipe).encode_prompt(PROMPTS)
    states = []
    for tokenizer, encoder in ((pipe.tokenizer, pipe.text_encoder), (pipe.tokenizer_2, pipe.text_encoder_2)):
        ids = tokenizer(PROMPTS, padding="max_length", max_length=77, return_tensors="pt").input_ids
        output = encoder(ids, output_hidden_states=True)
        states.append(output.hidden_states[1])  # two layers: embeddings, first (penultimate), second
    torch.testing.assert_close(conditioning.prompt_embeds, torch.cat(states, dim=-1), rtol=0, atol=1e-5)
    torch.testing.assert_close(conditioning.pooled, output.text_embeds, rtol=0, atol=1e-5)


def test_sdxl_empty_prompt_is_what_the_unconditional_branch_uses(pipes: dict[str, Any]) -> None:
    pipe = pipes["sdxl"]
    zeros = adapter_for(pipe).encode_prompt(["", PROMPTS[0]])
    call = sampling_calls(pipe, prompt=PROMPTS[0], guidance_scale=5.0)[0]  # rows: unconditional, conditional
    torch.testing.assert_close(zeros.prompt_embeds, call.encoder_hidden_states, rtol=0, atol=1e-5)
    torch.testing.assert_close(zeros.pooled, call.added_cond_kwargs["text_embeds"], rtol=0, atol=1e-5)
    encoded = StableDiffusionXLDenoiser(pipe, empty_prompt="encode").encode_prompt(["", PROMPTS[0]])
    assert encoded.prompt_embeds[0].abs().max() > 0.1
    torch.testing.assert_close(encoded.prompt_embeds[1], zeros.prompt_embeds[1], rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="empty_prompt"):
        StableDiffusionXLDenoiser(pipe, empty_prompt="drop")  # type: ignore[arg-type]


def test_sdxl_sizes_act_and_are_required(pipes: dict[str, Any]) -> None:
    denoiser = adapter_for(pipes["sdxl"])
    conditioning = denoiser.encode_prompt(PROMPTS)
    x, t = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([10, 900])
    with pytest.raises(ValueError, match="with_sizes"):
        denoiser.predict(denoiser.module, x, t, conditioning)
    with pytest.raises(ValueError, match="sizes must be"):
        denoiser.with_sizes(conditioning, SIZES[:1])
    with torch.no_grad():
        one = denoiser.predict(denoiser.module, x, t, denoiser.with_sizes(conditioning, SIZES))
        other = denoiser.predict(denoiser.module, x, t, denoiser.with_sizes(conditioning, SIZES * 2))
    assert (one - other).abs().max() > 1e-4


@pytest.mark.parametrize("kind", KINDS)
def test_truncated_prompts_are_counted(pipes: dict[str, Any], kind: str) -> None:
    denoiser = adapter_for(pipes[kind])
    most = {"sd3": 255, "flux": 511, "cogvideox": 225, "wan": 511}.get(
        kind, 75
    )  # with T5's end, or CLIP's start and end: 256, 512, 226, 512, 77
    fits, long = " ".join(["red"] * most), " ".join(["red"] * (most + 1))
    assert denoiser.count_truncated([PROMPTS[0], fits]) == 0
    assert denoiser.count_truncated([long, PROMPTS[0], long]) == 2


@pytest.mark.parametrize("kind", PICTURE_KINDS)
def test_decode_is_the_pipelines_picture(pipes: dict[str, Any], kind: str) -> None:
    pipe, denoiser = pipes[kind], adapter_for(pipes[kind])
    options = dict(prompt=PROMPTS[0], height=16, width=16, num_inference_steps=2)
    latents = pipe(**options, output_type="latent", generator=torch.Generator().manual_seed(0)).images
    if kind == "flux":
        latents = pipe._unpack_latents(latents, 16, 16, 2)
    picture = pipe(**options, output_type="pt", generator=torch.Generator().manual_seed(0)).images
    decoded = (denoiser.decode(latents) / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(decoded, picture, rtol=0, atol=1e-5)
    assert latents.shape[1:] == denoiser.latent_shape(16, 16)


def test_encoding_scales_the_posterior_and_draws_by_row(pipes: dict[str, Any]) -> None:
    pipe, denoiser = pipes["sd"], adapter_for(pipes["sd"])
    pixels = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    posterior = pipe.vae.encode(pixels).latent_dist
    torch.testing.assert_close(denoiser.encode_image(pixels), posterior.mode() * 0.18215, rtol=0, atol=1e-6)

    def generators(rows: list[int]) -> list[torch.Generator]:
        return [torch.Generator().manual_seed(row) for row in rows]

    drawn = denoiser.encode_image(pixels, generators([5, 6, 7]))
    torch.testing.assert_close(denoiser.encode_image(pixels[1:2], generators([6])), drawn[1:2], rtol=0, atol=1e-6)
    standard = (drawn / 0.18215 - posterior.mean) / posterior.std
    expected = torch.stack([torch.randn(4, 8, 8, generator=g) for g in generators([5, 6, 7])])
    torch.testing.assert_close(standard, expected, rtol=0, atol=1e-3)
    with pytest.raises(ValueError, match="3 images need 3 generators"):
        denoiser.encode_image(pixels, generators([1]))


def test_latent_statistics_of_the_vae_config_are_undone_by_decode() -> None:
    pipe = tiny_pipeline("sdxl")
    pixels = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    plain = adapter_for(pipe).encode_image(pixels)
    picture = adapter_for(pipe).decode(plain)
    pipe.vae.register_to_config(latents_mean=[0.1, -0.2, 0.3, 0.0], latents_std=[2.0, 1.0, 0.5, 1.5])
    normed = adapter_for(pipe).encode_image(pixels)
    mean, std = torch.tensor([0.1, -0.2, 0.3, 0.0]), torch.tensor([2.0, 1.0, 0.5, 1.5])
    expected = (plain / 0.13025 - mean.view(1, 4, 1, 1)) / std.view(1, 4, 1, 1) * 0.13025
    torch.testing.assert_close(normed, expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(adapter_for(pipe).decode(normed), picture, rtol=0, atol=1e-5)


def test_a_vae_that_overflows_is_reported_with_the_remedy() -> None:
    pipe = tiny_pipeline("sdxl")
    with torch.no_grad():
        pipe.vae.quant_conv.bias.fill_(float("nan"))
    with pytest.raises(ValueError, match="sdxl-vae-fp16-fix"):
        adapter_for(pipe).encode_image(torch.zeros(1, 3, 16, 16))


def test_a_half_precision_vae_that_asks_for_float32_gets_it_for_the_call() -> None:
    pixels = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    pipe, rounded = tiny_pipeline("sd"), tiny_pipeline("sd")
    pipe.vae.to(torch.float16)
    rounded.vae.to(torch.float16).to(torch.float32)
    expected = adapter_for(rounded).encode_image(pixels)
    torch.testing.assert_close(adapter_for(pipe).encode_image(pixels), expected, rtol=0, atol=1e-6)
    assert pipe.vae.dtype == torch.float16


def test_a_half_precision_module_runs_in_its_own_dtype(pipes: dict[str, Any]) -> None:
    x, t = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([10, 900])
    for kind in ("sd", "sdxl"):
        pipe = tiny_pipeline(kind)
        denoiser = adapter_for(pipe)
        conditioning = denoiser.with_sizes(denoiser.encode_prompt(PROMPTS), SIZES)
        with torch.no_grad():
            exact = denoiser.predict(denoiser.module, x, t, conditioning)
            pipe.unet.to(torch.bfloat16)
            half = denoiser.predict(denoiser.module, x, t, conditioning)
        assert half.dtype == torch.bfloat16
        torch.testing.assert_close(half.float(), exact, rtol=0.1, atol=0.1)


def test_families_are_chosen_by_components(pipes: dict[str, Any]) -> None:
    assert isinstance(adapter_for(pipes["sd"]), StableDiffusionDenoiser)
    assert isinstance(adapter_for(pipes["sdxl"]), StableDiffusionXLDenoiser)
    assert adapter_for(pipes["sd-v"]).schedule.prediction_type == "v_prediction"
    assert adapter_for(pipes["sd"]).module is pipes["sd"].unet
    with pytest.raises(ValueError, match="multiples of 2"):
        adapter_for(pipes["sd"]).latent_shape(17, 16)
    with pytest.raises(ValueError, match="num_frames=9 has no effect: stable-diffusion draws pictures"):
        adapter_for(pipes["sd"]).encode_image(torch.zeros(1, 3, 9, 16, 16))


def test_unsupported_pipelines_are_told_what_is_missing() -> None:
    other = SimpleNamespace(components={"transformer": torch.nn.Linear(1, 1), "vae": 1, "scheduler": 1}, config={})
    with pytest.raises(ValueError, match="its network is Linear(.|\n)*Found components: .*transformer"):
        adapter_for(other)
    parts = dict.fromkeys(["vae", "text_encoder", "tokenizer", "scheduler", "controlnet"], 1)
    unet = type("UNet2DConditionModel", (), {"config": {"in_channels": 9}})()
    vae = SimpleNamespace(config={"latent_channels": 4})
    control = SimpleNamespace(components={**parts, "unet": unet}, config={}, unet=unet, vae=vae)
    lacking = SimpleNamespace(components={"unet": unet, "tokenizer": 1}, config={})
    with pytest.raises(ValueError, match="lacks scheduler, text_encoder, vae"):
        adapter_for(lacking)
    with pytest.raises(ValueError, match="controlnet would be ignored"):
        adapter_for(control)
    control.components["controlnet"] = None
    with pytest.raises(ValueError, match="9 channels but latents have 4 .an inpainting"):
        adapter_for(control)
    control.config = {"requires_aesthetics_score": True}
    with pytest.raises(ValueError, match="refiner"):
        adapter_for(control)


@pytest.mark.parametrize("kind", KINDS)
def test_tiny_pipelines_are_small_and_survive_saving(kind: str, tmp_path: Any, pipes: dict[str, Any]) -> None:
    from diffusers import DiffusionPipeline

    modules = [part for part in pipes[kind].components.values() if isinstance(part, torch.nn.Module)]
    assert sum(p.numel() for module in modules for p in module.parameters()) < 500_000
    loaded = DiffusionPipeline.from_pretrained(save_tiny(kind, tmp_path / kind))
    assert type(loaded) is type(pipes[kind])
    networks = (adapter_for(pipe).module.parameters() for pipe in (pipes[kind], loaded))
    for mine, theirs in zip(*networks, strict=True):
        assert torch.equal(mine, theirs)
    embeds = adapter_for(loaded).encode_prompt(PROMPTS).prompt_embeds
    torch.testing.assert_close(embeds, adapter_for(pipes[kind]).encode_prompt(PROMPTS).prompt_embeds, rtol=0, atol=0)
