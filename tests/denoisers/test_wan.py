"""Wan 2.1: its schedules, what the network is told, the numbers of frames that survive its VAE, and what is refused."""

import inspect
from typing import Any

import diffusers
import pytest
import torch
from tiny import tiny_pipeline

from mmalign.denoisers import Schedule, WanDenoiser, adapter_for
from mmalign.denoisers.base import module_dtype

PROMPT = "a red sneaker on a blue background"


@pytest.fixture(scope="module")
def pipe() -> Any:
    return tiny_pipeline("wan")


def clip(rows: int = 1, frames: int = 5) -> torch.Tensor:
    return torch.rand(rows, 3, frames, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1


def calls_of(pipe: Any, **options: Any) -> list[tuple[dict[str, Any], torch.Tensor]]:
    """What the pipeline feeds its network while it draws, and what comes out."""
    calls = []
    handle = pipe.transformer.register_forward_hook(
        lambda module, args, kwargs, output: calls.append((kwargs, output[0])), with_kwargs=True
    )
    pipe(PROMPT, num_inference_steps=2, output_type="latent", **options)
    handle.remove()
    return calls


@pytest.mark.parametrize("scheduler", ["UniPCMultistepScheduler", "FlowMatchEulerDiscreteScheduler"])
def test_predict_repeats_the_pipelines_own_calls_at_another_size_and_length(scheduler: str) -> None:
    pipe = tiny_pipeline("wan")
    if scheduler.startswith("Flow"):
        pipe.register_modules(scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0))
    calls = calls_of(pipe, height=32, width=48, num_frames=9, guidance_scale=1.0)
    denoiser = adapter_for(pipe)
    assert isinstance(denoiser, WanDenoiser) and len(calls) == 2
    conditioning = denoiser.encode_prompt([PROMPT])
    every, compared = denoiser.schedule.model_timestep(torch.arange(1000)), 0
    for given, out in calls:
        assert given["hidden_states"].shape[1:] == denoiser.latent_shape(32, 48, 9)
        torch.testing.assert_close(conditioning.prompt_embeds, given["encoder_hidden_states"], rtol=0, atol=1e-5)
        # A sampler also stops between the rows of the table.
        row = ((every - given["timestep"]).abs() < 1e-3).nonzero()[:, 0]
        if len(row):
            with torch.no_grad():
                predicted = denoiser.predict(denoiser.module, given["hidden_states"], row, conditioning)
            torch.testing.assert_close(predicted, out, rtol=0, atol=1e-5)
            compared += 1
    assert compared >= 1


def test_the_empty_prompt_is_what_the_unconditional_branch_uses(pipe: Any) -> None:
    empty = calls_of(pipe, height=16, width=16, num_frames=1, guidance_scale=3.0)[1][0]["encoder_hidden_states"]
    torch.testing.assert_close(adapter_for(pipe).encode_prompt([""]).prompt_embeds, empty, rtol=0, atol=1e-5)


def test_prompts_are_counted_as_the_pipeline_cleans_them(pipe: Any) -> None:
    denoiser = adapter_for(pipe)
    # "&#97;" is "a" once it is cleaned, and several tokens before.
    assert denoiser.count_truncated([" ".join(["&#97;"] * 511)]) == 0
    assert denoiser.count_truncated([" ".join(["&#97;"] * 512)]) == 1


def test_decode_is_the_pipelines_clip_and_encoding_its_inverse_scale(pipe: Any) -> None:
    options: dict[str, Any] = dict(height=16, width=16, num_frames=5, num_inference_steps=2)
    latents, frames = (
        pipe(PROMPT, **options, output_type=kind, generator=torch.Generator().manual_seed(0)).frames
        for kind in ("latent", "pt")
    )
    denoiser, config = adapter_for(pipe), pipe.vae.config
    decoded = (denoiser.decode(latents) / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(decoded.transpose(1, 2), frames, rtol=0, atol=1e-5)
    mean, std = (torch.tensor(config[name]).view(1, 4, 1, 1, 1) for name in ("latents_mean", "latents_std"))
    expected = (pipe.vae.encode(clip()).latent_dist.mean - mean) / std
    torch.testing.assert_close(denoiser.encode_image(clip()), expected, rtol=0, atol=1e-5)


def test_a_clips_latent_does_not_depend_on_its_batch(pipe: Any) -> None:
    denoiser, pixels = adapter_for(pipe), clip(2)
    both = denoiser.encode_image(pixels, [torch.Generator().manual_seed(row) for row in (5, 6)])
    alone = denoiser.encode_image(pixels[1:], [torch.Generator().manual_seed(6)])
    torch.testing.assert_close(both[1:], alone, rtol=0, atol=1e-5)
    assert (both - denoiser.encode_image(pixels)).abs().max() > 1e-3


def test_numbers_of_frames_that_the_vae_would_change_are_refused(pipe: Any) -> None:
    denoiser = adapter_for(pipe)
    assert pipe.vae.decode(pipe.vae.encode(clip(frames=7)).latent_dist.mean).sample.shape[2] == 5
    for frames in (7, 8, 0, None):
        with pytest.raises(ValueError, match=f"1 more than a multiple of 4, got {frames}"):
            denoiser.latent_shape(16, 16, frames)
    for frames in (1, 5, 9):
        latents = denoiser.encode_image(clip(frames=frames))
        assert latents.shape[1:] == denoiser.latent_shape(16, 16, frames)
        assert denoiser.decode(latents).shape == clip(frames=frames).shape
    with pytest.raises(ValueError, match="multiples of 8"):
        denoiser.latent_shape(20, 16, 5)


def test_size_and_length_are_what_the_pipeline_draws_by_default(pipe: Any) -> None:
    default = {name: p.default for name, p in inspect.signature(diffusers.WanPipeline.__call__).parameters.items()}
    denoiser = adapter_for(pipe)
    assert denoiser.native_frames == default["num_frames"]
    assert denoiser.native_size == (default["height"], default["width"])


def test_a_half_precision_network_runs_though_diffusers_keeps_parts_of_it_in_float32(tmp_path: Any) -> None:
    """As `from_pretrained` loads it: the first parameter of all is one of those that stay in float32."""
    pipe = tiny_pipeline("wan")
    denoiser = adapter_for(pipe)
    x, t = torch.randn(2, 4, 2, 4, 4, generator=torch.Generator().manual_seed(0)), torch.tensor([10, 900])
    conditioning = denoiser.encode_prompt([PROMPT, "a green bag"])
    with torch.no_grad():
        exact = denoiser.predict(denoiser.module, x, t, conditioning)
    pipe.transformer.save_pretrained(tmp_path)
    half = diffusers.WanTransformer3DModel.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    assert next(half.parameters()).dtype == torch.float32 and module_dtype(half) == torch.bfloat16
    with torch.no_grad():
        output = denoiser.predict(half, x, t, conditioning)
    assert output.dtype == torch.bfloat16
    assert (output.float() - exact).norm() < 0.05 * exact.norm()


def test_a_half_precision_vae_needs_no_word_about_float32_in_its_config() -> None:
    pipe = tiny_pipeline("wan")
    exact = adapter_for(pipe).encode_image(clip())
    pipe.vae.to(torch.float16)
    torch.testing.assert_close(adapter_for(pipe).encode_image(clip()), exact, rtol=0, atol=0.02)


def test_what_draws_with_two_networks_or_from_something_given_is_refused(pipe: Any) -> None:
    parts = {name: part for name, part in pipe.components.items() if name != "transformer_2"}
    experts = diffusers.WanPipeline(**parts, transformer_2=pipe.transformer, boundary_ratio=0.9)
    for made in (experts, diffusers.WanPipeline(**parts, boundary_ratio=0.9)):
        with pytest.raises(ValueError, match="it draws with two networks"):
            adapter_for(made)
    with pytest.raises(ValueError, match="a timestep for each patch"):
        adapter_for(diffusers.WanPipeline(**parts, expand_timesteps=True))
    for name, given in {"ImageToVideo": "image", "VideoToVideo": "video"}.items():
        with pytest.raises(ValueError, match=f"it draws from a given {given}"):
            adapter_for(getattr(diffusers, f"Wan{name}Pipeline")(**parts))
    options = {**pipe.transformer.config, "in_channels": 9}
    with pytest.raises(ValueError, match="reads 9 channels but latents have 4"):
        adapter_for(diffusers.WanPipeline(**parts | {"transformer": diffusers.WanTransformer3DModel(**options)}))


def test_the_published_scheduler_gives_the_table_of_its_flow(pipe: Any) -> None:
    shifted = Schedule.from_scheduler(diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0))
    assert adapter_for(pipe).schedule.fingerprint() == shifted.fingerprint()
