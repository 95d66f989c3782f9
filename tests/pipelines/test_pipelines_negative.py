"""A negative branch with weights of its own: which branch runs with what, mixtures, loading, saving, and what is refused."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig
from safetensors.torch import save_file
from tiny import ASKED, KINDS, NUM_FRAMES, tiny_pipeline
from torch import Tensor

from mmalign.denoisers.adapters import acting_adapters
from mmalign.pipelines.image.self_npo import SelfNPOPipeline
from mmalign.training.export import export
from mmalign.training.lora import lora_in
from mmalign.training.weights import aligned_network

LORAS = {"positive": (0, 2, ["to_q", "to_v"]), "negative": (1, 3, ["to_k", "to_q"])}


def draw(pipe: Any, guidance: float = 3.0, prompts: Any = "a red shirt", **options: Any) -> np.ndarray:
    given: dict[str, Any] = {"num_inference_steps": 2, "output_type": "np", "height": 16, "width": 16}
    name = type(pipe).__name__
    given |= {"true_cfg_scale": guidance, "negative_prompt": ""} if "Flux" in name else {"guidance_scale": guidance}
    given |= ASKED["wan"] if "Wan" in name else {"num_frames": NUM_FRAMES} if "Cog" in name else {}
    pipe.set_progress_bar_config(disable=True)
    out = pipe(prompts, generator=torch.Generator().manual_seed(0), **given | options)
    return np.asarray(out.images if hasattr(out, "images") else out.frames)


def apart(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.abs(a - b).max())


@pytest.fixture(scope="module")
def released(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """For every family a positive and a negative LoRA, and another network."""
    folder = tmp_path_factory.mktemp("released")
    for kind in KINDS:
        for side, (seed, rank, targets) in LORAS.items():
            pipe = tiny_pipeline(kind)
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                config = LoraConfig(r=rank, lora_alpha=5, target_modules=targets, init_lora_weights=False)
                aligned_network(pipe)[1].add_adapter(config)  # type: ignore[operator]
            export(pipe, folder / kind / side)
        aligned_network(tiny_pipeline(kind, seed=3))[1].save_pretrained(folder / kind / "network")  # type: ignore[operator]
    return folder


def aligned(kind: str, released: Path) -> Any:
    """Ours, with the positive LoRA."""
    pipe = SelfNPOPipeline.from_pipe(tiny_pipeline(kind))
    pipe.load_aligned(released / kind / "positive")
    return pipe


def offsets(folder: Path) -> dict[str, Tensor]:
    """Weight → what the LoRA in a folder adds to it."""
    layers = lora_in(folder).layers()
    return {f"{name}.weight": layer.scale * layer.up @ layer.down for name, layer in layers.items()}


def network_of(kind: str, *parts: tuple[float, dict[str, Tensor]]) -> Any:
    """The base's network with weighted offsets added to its weights."""
    network = aligned_network(tiny_pipeline(kind))[1]
    state = network.state_dict()
    for weight, offset in parts:
        for name, value in offset.items():
            state[name] += weight * value
    return network


# The branches.


@pytest.mark.parametrize("kind", KINDS)
def test_each_branch_runs_with_its_own_network_and_prompt(
    kind: str, released: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe = SelfNPOPipeline.from_pipe(tiny_pipeline(kind))
    network = aligned_network(pipe)[1]
    seen: list[tuple[bool, Tensor]] = []
    plain_forward = type(network).forward

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append((self is network, kwargs["encoder_hidden_states"]))
        return plain_forward(self, *args, **kwargs)

    monkeypatch.setattr(type(network), "forward", forward)
    prompts = ["a red shirt", "a blue bag"]
    extra = {"negative_prompt": ["a dress", "black"]}
    draw(pipe, prompts=prompts, **extra)
    texts = torch.cat([text for _, text in seen])
    negative, positive = texts[:4].chunk(2)
    if kind in ("flux", "wan"):
        # The branches are two calls, and the positive one is the first.
        negative, positive = positive, negative
    seen.clear()
    pipe.load_negative(released / kind / "network")
    draw(pipe, prompts=prompts, **extra)
    own = torch.cat([text for ours, text in seen if ours])
    other = torch.cat([text for ours, text in seen if not ours])
    assert len(own) == len(other) == len(texts) // 2
    assert all(torch.equal(row, positive) for row in own.chunk(len(own) // 2))
    assert all(torch.equal(row, negative) for row in other.chunk(len(other) // 2))


@pytest.mark.parametrize("kind", ["sd", "sdxl", "sd3", "flux"])
def test_two_loras_on_one_network_draw_as_two_merged_networks_do(kind: str, released: Path, tmp_path: Path) -> None:
    """θ + αη + βδ, worked out by hand, as a second network."""
    positive, negative = (offsets(released / kind / side) for side in LORAS)
    pipe = aligned(kind, released)
    plain = draw(pipe)
    pipe.load_negative(released / kind / "negative", alpha=0.5, beta=0.8)
    drawn = draw(pipe)
    assert apart(drawn, plain) > 1e-3
    network_of(kind, (0.5, positive), (0.8, negative)).save_pretrained(tmp_path)
    other = aligned(kind, released)
    other.load_negative(tmp_path, alpha=0)
    assert apart(draw(other), drawn) < 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_without_an_offset_it_is_plain_guidance_and_below_one_always(kind: str, released: Path) -> None:
    pipe = aligned(kind, released)
    guided, unguided = draw(pipe), None if kind == "flux" else draw(pipe, 1.0)
    pipe.load_negative(released / kind / "negative", beta=0)
    assert apart(draw(pipe), guided) < 1e-5
    pipe.set_negative(beta=1)
    assert apart(draw(pipe), guided) > 1e-4
    if unguided is not None:
        assert np.array_equal(draw(pipe, 1.0), unguided)


def test_skip_layer_guidance_calls_the_positive_network_alone(released: Path) -> None:
    """A third call for the prompts alone, which is no pair of branches: no row of it may run by the negative side."""
    pipe = aligned("sd3", released)
    pipe.load_negative(released / "sd3" / "negative")
    options: dict[str, Any] = {"skip_guidance_layers": [0], "skip_layer_guidance_stop": 1.0}
    prompts = ["a red shirt", "a blue bag"]
    start = torch.randn(2, pipe.transformer.config.in_channels, 8, 8, generator=torch.Generator().manual_seed(1))
    both = draw(pipe, prompts=prompts, latents=start, **options)
    for i, prompt in enumerate(prompts):
        assert apart(draw(pipe, prompts=prompt, latents=start[i : i + 1], **options)[0], both[i]) < 1e-5
    assert apart(draw(pipe, prompts=prompts, latents=start), both) > 1e-4


@pytest.mark.parametrize("base", [False, True])
def test_the_prediction_is_the_negative_one_and_the_scaled_difference(base: bool, released: Path) -> None:
    """Step by step with two networks, one in each branch; α = β = 0 is the base in the negative one."""
    from diffusers import DDIMScheduler

    positive, negative = (offsets(released / "sd" / side) for side in LORAS)
    pipe = aligned("sd", released)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    pipe.load_negative(released / "sd" / "negative", **({"alpha": 0, "beta": 0} if base else {}))
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(2))
    drawn = pipe("a red shirt", latents=latents, num_inference_steps=3, guidance_scale=4.0, output_type="latent").images
    with_prompt, without = pipe.encode_prompt("a red shirt", "cpu", 1, True)
    for_positive = network_of("sd", (1, positive))
    for_negative = network_of("sd") if base else network_of("sd", (1, positive), (1, negative))
    pipe.scheduler.set_timesteps(3)
    with torch.no_grad():
        for t in pipe.scheduler.timesteps:
            lower = for_negative(latents, t, without).sample
            upper = for_positive(latents, t, with_prompt).sample
            latents = pipe.scheduler.step(lower + 4.0 * (upper - lower), t, latents).prev_sample
    torch.testing.assert_close(drawn, latents, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "scheduler", ["EulerDiscreteScheduler", "DPMSolverMultistepScheduler", "HeunDiscreteScheduler"]
)
def test_every_scheduler_and_guidance_rescale(scheduler: str, released: Path) -> None:
    import diffusers

    pipe = aligned("sd", released)
    pipe.scheduler = getattr(diffusers, scheduler).from_config(pipe.scheduler.config)
    options = {"guidance_rescale": 0.7, "num_inference_steps": 3}
    plain = draw(pipe, **options)
    pipe.load_negative(released / "sd" / "negative", beta=0)
    assert apart(draw(pipe, **options), plain) < 1e-5
    pipe.set_negative()
    assert apart(draw(pipe, **options), draw(pipe, num_inference_steps=3)) > 1e-4


def test_guidance_that_ends_on_the_way_ends_the_negative_branch(released: Path) -> None:
    """As diffusers' page on callbacks does it."""

    def end(pipe: Any, step: int, t: Any, values: dict[str, Any]) -> dict[str, Any]:
        pipe._guidance_scale = 0.0
        return {"prompt_embeds": values["prompt_embeds"].chunk(2)[-1]}

    options = {"callback_on_step_end": end, "callback_on_step_end_tensor_inputs": ["prompt_embeds"]}
    pipe = aligned("sd", released)
    plain = draw(pipe, **options)
    pipe.load_negative(released / "sd" / "negative", beta=0)
    assert apart(draw(pipe, **options), plain) < 1e-5


def test_the_network_is_left_as_it_was(released: Path) -> None:
    pipe = aligned("sd", released)
    pipe.set_adapters("aligned", 0.6)
    flags = {name: p.requires_grad for name, p in pipe.unet.named_parameters()}
    pipe.load_negative(released / "sd" / "negative")
    assert acting_adapters(pipe.unet) == {"aligned": pytest.approx(0.6)}
    draw(pipe)
    with pytest.raises(ValueError, match="callback"):
        draw(pipe, callback_on_step_end=lambda *_: 1 / 0, callback_on_step_end_tensor_inputs=["nothing"])
    with pytest.raises(ZeroDivisionError):
        draw(pipe, callback_on_step_end=lambda *_: 1 / 0)
    assert acting_adapters(pipe.unet) == {"aligned": pytest.approx(0.6)} and "forward" not in vars(pipe.unet)
    now = {name: p.requires_grad for name, p in pipe.unet.named_parameters()}
    assert {name: now[name] for name in flags if name in now} == {name: flags[name] for name in flags if name in now}
    before = aligned("sd", released)
    before.set_adapters("aligned", 0.6)
    pipe.unload_negative()
    assert np.array_equal(draw(pipe), draw(before))


def test_a_negative_lora_may_come_before_the_positive_one(released: Path) -> None:
    pipe = SelfNPOPipeline.from_pipe(tiny_pipeline("sd"))
    base = draw(pipe)
    pipe.load_negative(released / "sd" / "negative")
    assert np.array_equal(draw(pipe, 1.0), draw(tiny_pipeline("sd"), 1.0)) and apart(draw(pipe), base) > 1e-3
    pipe.load_aligned(released / "sd" / "positive")
    other = aligned("sd", released)
    other.load_negative(released / "sd" / "negative")
    assert apart(draw(pipe), draw(other)) < 1e-6
    pipe.unload_lora_weights()
    assert np.array_equal(draw(pipe), base)
    pipe.load_negative(released / "sd" / "negative")
    pipe.unload_negative()
    assert np.array_equal(draw(pipe), base) and not acting_adapters(pipe.unet)


# A whole network.


def test_a_whole_network_is_mixed_with_what_acts_beside_it(released: Path, tmp_path: Path) -> None:
    positive, theirs = offsets(released / "sd" / "positive"), tiny_pipeline("sd", seed=3).unet.state_dict()
    difference = {name: theirs[name] - value for name, value in tiny_pipeline("sd").unet.state_dict().items()}
    expected = network_of("sd", (0.4, positive), (0.7, difference)).state_dict()
    pipe = aligned("sd", released)
    pipe.load_negative(released / "sd" / "network", alpha=0.4, beta=0.7)
    for name, value in pipe.negative_unet.state_dict().items():
        torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-6)
    # The positive side merged into the base's weights: only a named base tells what it added.
    whole = SelfNPOPipeline.from_pipe(tiny_pipeline("sd"))
    whole.unet.load_state_dict(network_of("sd", (1, positive)).state_dict())
    whole.load_negative(released / "sd" / "network", alpha=0.4, beta=0.7, base=tiny_pipeline("sd"))
    for name, value in whole.negative_unet.state_dict().items():
        torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-6)
    assert apart(draw(whole), draw(pipe)) < 1e-5


def test_a_second_network_is_a_part_of_the_pipeline(released: Path) -> None:
    pipe = SelfNPOPipeline.from_pipe(tiny_pipeline("sd"))
    pipe.load_negative(released / "sd" / "network")
    assert pipe.components["negative_unet"] is pipe.negative_unet
    pipe.to(torch.float64)
    assert pipe.negative_unet.dtype == torch.float64
    plain = SelfNPOPipeline.from_pipe(pipe)
    assert "negative_unet" not in plain.components
    pipe.unload_negative()
    assert np.array_equal(draw(pipe), draw(plain))


@pytest.mark.parametrize("ending", ["ckpt", "pt", "bin", "safetensors"])
def test_released_state_dicts_are_read_where_they_are_asked_for(ending: str, released: Path, tmp_path: Path) -> None:
    state, file = tiny_pipeline("sd", seed=3).unet.state_dict(), tmp_path / f"unet.{ending}"
    if ending == "safetensors":
        save_file(state, file)
    else:
        torch.save(state, file)
    pipe = SelfNPOPipeline.from_pipe(tiny_pipeline("sd"))
    if ending != "safetensors":
        with pytest.raises(ValueError, match="pickled weights only .* allow_pickle=True"):
            pipe.load_negative(file)
    pipe.load_negative(file, allow_pickle=ending != "safetensors")
    assert all(torch.equal(value, state[name]) for name, value in pipe.negative_unet.state_dict().items())


# Saving.


@pytest.mark.parametrize(("kind", "side"), [("sd3", "negative"), ("sd", "network")])
def test_plain_diffusers_draws_the_aligned_picture_and_ours_the_guided_one(
    kind: str, side: str, released: Path, tmp_path: Path
) -> None:
    from diffusers import DiffusionPipeline

    pipe = aligned(kind, released)
    picture = draw(pipe)
    pipe.load_negative(released / kind / side, alpha=0.5, beta=0.7)
    guided = draw(pipe)
    pipe.save_pretrained(tmp_path)
    plain = DiffusionPipeline.from_pretrained(tmp_path)
    assert type(plain).__name__ == type(pipe).__name__ and apart(draw(plain), picture) < 1e-5
    again = SelfNPOPipeline.from_pretrained(tmp_path)
    assert apart(draw(again), guided) < 1e-5 and apart(guided, picture) > 1e-3


def test_a_negative_side_comes_from_the_hub_with_its_pipeline(
    released: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    from mmalign.training import pipeline

    pipe = aligned("sd", released)
    pipe.load_negative(released / "sd" / "negative")
    pipe.save_pretrained(tmp_path)
    assert "lies in `negative/`" in (tmp_path / "README.md").read_text()
    asked: list[Any] = []
    load = pipeline.load_base
    monkeypatch.setattr(pipeline, "load_base", lambda name, **options: load(tmp_path))
    monkeypatch.setattr(
        huggingface_hub, "snapshot_download", lambda name, **options: asked.append((name, options)) or str(tmp_path)
    )
    again = SelfNPOPipeline.from_pretrained("somebody/guided", revision="v1")
    assert apart(draw(again), draw(pipe)) < 1e-5
    assert asked == [("somebody/guided", {"revision": "v1", "allow_patterns": ["negative/*", "negative/*/*"]})]


def test_pictures_are_told_apart_by_their_mixture(released: Path) -> None:
    """Reports draw again what was drawn with other weights, and scales of the positive LoRA leave the negative one alone."""
    from mmalign.evaluation.fingerprint import model_fingerprint
    from mmalign.evaluation.sweep import at_lora_scale

    pipe = aligned("sd", released)
    pipe.load_negative(released / "sd" / "negative")
    names = {model_fingerprint(pipe)}
    for weights in ({"beta": 0.5}, {"alpha": 0.5}):
        pipe.set_negative(**weights)
        names.add(model_fingerprint(pipe))
    assert len(names) == 3
    pipe.set_negative(beta=0)
    with at_lora_scale(pipe, 0.5):
        half = draw(pipe)
    other = aligned("sd", released)
    other.set_adapters("aligned", 0.5)
    assert apart(half, draw(other)) < 1e-5


# What is refused.


def test_what_would_not_act_is_refused(released: Path) -> None:
    pipe = SelfNPOPipeline.from_pipe(tiny_pipeline("sd"))
    with pytest.raises(ValueError, match="load one, or pass them to load_negative"):
        pipe.set_negative(alpha=0.5)
    with pytest.raises(ValueError, match="alpha has no effect: nothing acts on the base"):
        pipe.load_negative(released / "sd" / "network", alpha=0.5)
    with pytest.raises(ValueError, match="base has no effect: .* is a LoRA"):
        pipe.load_negative(released / "sd" / "negative", base="playground")
    pipe.load_negative(released / "sd" / "negative", alpha=0.5)
    with pytest.raises(ValueError, match="alpha=0.5 has no effect"):
        draw(pipe)
    with pytest.raises(ValueError, match="has a negative side already"):
        pipe.load_negative(released / "sd" / "negative")
    pipe.set_negative()
    pipe.set_adapters("negative")
    with pytest.raises(ValueError, match="'negative' acts on the positive branch too"):
        draw(pipe)
    other = aligned("sd", released)
    other.load_negative(released / "sd" / "network")
    with pytest.raises(ValueError, match="load one, or pass them to load_negative"):
        other.set_negative(beta=0.5)
    other.set_adapters("aligned", 0.5)
    with pytest.raises(ValueError, match="mixed beside aligned × 1, and now aligned × 0.5 acts: load_negative again"):
        draw(other)
    fused = aligned("sd", released)
    fused.load_negative(released / "sd" / "negative")
    fused.fuse_lora(adapter_names=["aligned"])
    with pytest.raises(ValueError, match="a LoRA is fused"):
        draw(fused)


def test_pipelines_without_a_negative_branch_say_so(released: Path) -> None:
    flux = SelfNPOPipeline.from_pipe(tiny_pipeline("flux"))
    flux.load_negative(released / "flux" / "negative")
    for options in ({"true_cfg_scale": 1.0}, {"negative_prompt": None}):
        with pytest.raises(ValueError, match="only with true_cfg_scale above 1 and a negative_prompt"):
            draw(flux, **options)
    distilled = tiny_pipeline("sd")
    distilled.unet.register_to_config(time_cond_proj_dim=8)
    with pytest.raises(ValueError, match="guidance-distilled"):
        SelfNPOPipeline.from_pipe(distilled).load_negative(released / "sd" / "negative")
