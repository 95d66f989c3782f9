"""CogVideoX: its schedule, its three generations, and the numbers of frames that survive its VAE."""

from typing import Any

import pytest
import torch
from diffusers import CogVideoXDDIMScheduler, CogVideoXDPMScheduler
from tiny import cogvideox_transformer, tiny_pipeline

from mmalign.denoisers import CogVideoXDenoiser, Schedule, adapter_for

PROMPT = "a red sneaker on a blue background"
# What tells the published checkpoints apart: sine positions (2B), rotary ones (5B), two latent frames a patch (1.5).
GENERATIONS: dict[str, dict[str, Any]] = {
    "2b": {"use_rotary_positional_embeddings": False},
    "5b": {},
    "1.5": {"patch_size_t": 2, "patch_bias": False},
}
BETAS: dict[str, Any] = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


@pytest.fixture(scope="module", params=GENERATIONS)
def pipe(request: Any) -> Any:
    made = tiny_pipeline("cogvideox")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        made.register_modules(transformer=cogvideox_transformer(**GENERATIONS[request.param]))
    return made


def clip(rows: int = 1, frames: int = 9) -> torch.Tensor:
    return torch.rand(rows, 3, frames, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1


@pytest.mark.parametrize("kind", [CogVideoXDDIMScheduler, CogVideoXDPMScheduler])
@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("zero_snr", [True, False])
def test_the_schedule_is_the_schedulers(kind: Any, shift: float, zero_snr: bool) -> None:
    options = {"prediction_type": "v_prediction", "snr_shift_scale": shift, "rescale_betas_zero_snr": zero_snr}
    scheduler = kind(**BETAS, **options)
    schedule = Schedule.from_scheduler(scheduler)
    x0, noise = torch.randn(2, 5, 4, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    t = torch.tensor([0, 17, 500, 990, 999])
    torch.testing.assert_close(schedule.add_noise(x0, noise, t), scheduler.add_noise(x0, noise, t), rtol=0, atol=1e-5)
    velocity = schedule.target(x0, noise, t, "velocity")
    torch.testing.assert_close(velocity, scheduler.get_velocity(x0, noise, t), rtol=0, atol=1e-5)
    assert (schedule.max_timestep < 999) == zero_snr and schedule.signal.dtype == torch.float64
    unshifted = torch.cumprod(1 - scheduler.betas.double(), 0).sqrt()
    assert ((schedule.signal - unshifted).abs().max() > 0.01) == (shift != 1 or zero_snr)


def test_predict_repeats_the_pipelines_own_calls(pipe: Any) -> None:
    """At another size and length than the network's own, so that positions must be made for them."""
    calls = []
    height, width = (8, 16) if pipe.transformer.config.patch_size_t else (24, 32)

    def record(module: Any, args: Any, kwargs: Any, output: Any) -> None:
        calls.append((kwargs["hidden_states"], kwargs["timestep"], output[0]))

    handle = pipe.transformer.register_forward_hook(record, with_kwargs=True)
    pipe(
        PROMPT,
        height=height,
        width=width,
        num_frames=17,
        num_inference_steps=2,
        guidance_scale=1.0,
        output_type="latent",
    )
    handle.remove()
    denoiser = adapter_for(pipe)
    assert isinstance(denoiser, CogVideoXDenoiser) and len(calls) == 2
    conditioning = denoiser.encode_prompt([PROMPT])
    for x, t, out in calls:
        assert x.transpose(1, 2).shape[1:] == denoiser.latent_shape(height, width, 17)
        with torch.no_grad():
            predicted = denoiser.predict(denoiser.module, x.transpose(1, 2), t, conditioning)
        torch.testing.assert_close(predicted, out.transpose(1, 2), rtol=0, atol=1e-5)


def test_decode_is_the_pipelines_clip(pipe: Any) -> None:
    options: dict[str, Any] = {"num_inference_steps": 2}
    latents, frames = (
        pipe(PROMPT, **options, output_type=kind, generator=torch.Generator().manual_seed(0)).frames
        for kind in ("latent", "pt")
    )
    denoiser = adapter_for(pipe)
    decoded = (denoiser.decode(latents.transpose(1, 2)) / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(decoded.transpose(1, 2), frames, rtol=0, atol=1e-5)
    assert frames.shape[1] == denoiser.native_frames == 9 and denoiser.native_size == (16, 16)


def test_encoding_keeps_the_number_of_frames_and_puts_what_fills_a_patch_in_front(pipe: Any) -> None:
    denoiser, pixels = adapter_for(pipe), clip(2)
    latents = denoiser.encode_image(pixels)
    scaled = pipe.vae.encode(pixels).latent_dist.mean * pipe.vae.config.scaling_factor
    added = latents.shape[2] - scaled.shape[2]
    assert added == (1 if pipe.transformer.config.patch_size_t == 2 else 0)
    assert latents.shape[1:] == denoiser.latent_shape(16, 16, 9) and denoiser.decode(latents).shape == pixels.shape
    torch.testing.assert_close(latents[:, :, added:], scaled, rtol=0, atol=1e-6)
    torch.testing.assert_close(latents[:, :, :added], scaled[:, :, :added], rtol=0, atol=1e-6)


def test_a_clips_latent_does_not_depend_on_its_batch() -> None:
    denoiser, pixels = adapter_for(tiny_pipeline("cogvideox")), clip(2)

    def generators(rows: list[int]) -> list[torch.Generator]:
        return [torch.Generator().manual_seed(row) for row in rows]

    both = denoiser.encode_image(pixels, generators([5, 6]))
    alone = denoiser.encode_image(pixels[1:], generators([6]))
    torch.testing.assert_close(both[1:], alone, rtol=0, atol=1e-6)
    assert (both - denoiser.encode_image(pixels)).abs().max() > 1e-3


def test_numbers_of_frames_that_the_vae_would_change_are_refused() -> None:
    """The VAE takes 5 frames to 2 latent ones, and those to 8 frames: it was made for 8k + 1."""
    pipe = tiny_pipeline("cogvideox")
    denoiser = adapter_for(pipe)
    assert pipe.vae.decode(pipe.vae.encode(clip(frames=5)).latent_dist.mean).sample.shape[2] == 8
    for frames in (5, 8, 0, None):
        with pytest.raises(ValueError, match=f"1 more than a multiple of 8, got {frames}"):
            denoiser.latent_shape(16, 16, frames)
    for frames in (1, 9, 17):
        pixels = clip(frames=frames)
        assert denoiser.decode(denoiser.encode_image(pixels)).shape == pixels.shape
    with pytest.raises(ValueError, match="multiples of 8"):
        denoiser.latent_shape(20, 16, 9)


def test_a_size_beyond_the_positions_of_1_5_is_refused_before_anything_is_encoded() -> None:
    pipe = tiny_pipeline("cogvideox")
    assert adapter_for(pipe).latent_shape(24, 16, 9) == (4, 3, 6, 4)
    pipe.register_modules(transformer=cogvideox_transformer(**GENERATIONS["1.5"]))
    with pytest.raises(ValueError, match="positions up to 16×16 pixels, got 24×16"):
        adapter_for(pipe).latent_shape(24, 16, 9)


def test_pipelines_that_draw_from_something_given_are_refused() -> None:
    import diffusers

    made = tiny_pipeline("cogvideox")
    for name, given in {"ImageToVideo": "image", "VideoToVideo": "video", "FunControl": "control_video"}.items():
        other = getattr(diffusers, f"CogVideoX{name}Pipeline")(**made.components)
        with pytest.raises(ValueError, match=f"it draws from a given {given}"):
            adapter_for(other)
    made.register_modules(transformer=cogvideox_transformer(in_channels=8))
    with pytest.raises(ValueError, match="reads 8 channels but latents have 4"):
        adapter_for(made)
