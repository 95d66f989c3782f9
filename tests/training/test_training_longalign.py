"""LongAlign's two stages on tiny models: what moves, what must not, resuming, and what is kept."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from denoisers.test_long_prompts import LONG, tiny_tail
from tiny import WORDS, tiny_pipeline
from torch import Tensor
from training import worker
from training.runs import Watch, gradients, history, lora, pairs, trained

from mmalign import LongAlignConfig, LongAlignPipeline, LongAlignTrainer
from mmalign.denoisers.long_prompts import long_prompts_of, read_long_prompts
from mmalign.rewards import ClipScorer, CommonDirection

PROMPTS = [f"A {one} {two}. It lies on {three}." for one in WORDS[:5] for two in WORDS[7:11] for three in WORDS[:6]]


@pytest.fixture(autouse=True)
def tiny_reward(monkeypatch: pytest.MonkeyPatch, clip_folder: Path) -> None:
    import mmalign.training.reward_trainer as reward_trainer

    monkeypatch.setattr(
        reward_trainer, "scorer", lambda name, **options: ClipScorer.from_pretrained(clip_folder, name=name)
    )


def pipeline(kind: str = "sd", tail: bool = False) -> Any:
    pipe = LongAlignPipeline._adopt(tiny_pipeline(kind))
    pipe.read_long_prompts()
    if tail:
        reader = long_prompts_of(pipe)
        read_long_prompts(pipe, reader.config, tiny_tail())
    return pipe


def run(folder: Path, *, pipe: Any = None, data: Any = None, peft_config: Any = "lora", **options: Any) -> Any:
    given: dict[str, Any] = {
        "output_dir": str(folder), "max_steps": 2, "per_device_train_batch_size": 2, "logging_steps": 1, "save_strategy": "no",
        "use_cpu": True, "disable_tqdm": True, "learning_rate": 1e-2,
    }  # fmt: skip
    if options.get("stage", "reward") == "reward":
        given |= {"scorer": "tiny", "rollout_steps": 4, "grad_steps": 2, "rollout_guidance_scale": 2.0}
    return LongAlignTrainer(
        model=pipeline() if pipe is None else pipe,
        args=LongAlignConfig(**given | options),
        train_dataset=PROMPTS if data is None else data,
        peft_config=lora() if peft_config == "lora" else peft_config,
    )


def losses_of(trainer: Any, rows: list[int], epoch: int = 0) -> torch.Tensor:
    with trainer._at_work():
        return trainer.row_losses(trainer.model, {"row": rows}, epoch=epoch, data=trainer._train).loss


@pytest.mark.parametrize("kind", ["sd", "sdxl", "sd3"])
def test_both_gradients_of_the_reward_agree_and_change_the_lora_alone(kind: str, tmp_path: Path) -> None:
    found = {}
    for gradient in ("exact", "graph"):
        pipe = pipeline(kind)
        before = {name: value.clone() for name, value in pipe.vae.state_dict().items()}
        trainer = run(tmp_path / gradient, pipe=pipe, gradient=gradient, peft_config=lora(init_lora_weights=False))
        losses = losses_of(trainer, [4, 1])
        with trainer._at_work():
            losses.mean().backward()
        found[gradient] = losses.detach(), gradients(trainer)
        assert all(torch.equal(value, before[name]) for name, value in pipe.vae.state_dict().items())
        assert all(parameter.grad is None for parameter in pipe.vae.parameters())
        assert all(parameter.requires_grad for parameter in pipe.vae.parameters())
    torch.testing.assert_close(found["exact"][0], found["graph"][0], rtol=1e-4, atol=1e-5)
    assert found["exact"][1].keys() == found["graph"][1].keys() and len(found["exact"][1]) > 2
    largest = max(float(value.abs().max()) for value in found["graph"][1].values())
    for name, value in found["graph"][1].items():
        assert float((found["exact"][1][name] - value).abs().max()) < 1e-3 * largest, name


def test_a_prompt_s_loss_is_its_own(tmp_path: Path) -> None:
    trainer = run(tmp_path)
    with torch.no_grad():
        both, alone = losses_of(trainer, [4, 1]), losses_of(trainer, [1])
        other = losses_of(trainer, [1], epoch=1)
    torch.testing.assert_close(both[1:], alone, rtol=0, atol=1e-4)
    assert float((other - alone).abs()) > 1e-6


def test_the_loss_is_half_of_what_the_reward_lacks_of_one(tmp_path: Path, clip_folder: Path) -> None:
    """The picture drawn by hand with diffusers' DDIM, and scored by hand at omega."""
    from diffusers import DDIMScheduler

    pipe = pipeline()
    trainer = run(tmp_path, pipe=pipe, reward_crop=1.0, omega=0.3)
    rows = [4, 1]
    with torch.no_grad():
        losses = losses_of(trainer, rows)
    from mmalign.likelihood.draws import randn, row_generators

    prompts = [trainer._train.prompts[row] for row in rows]
    sampler = DDIMScheduler.from_config(
        pipe.scheduler.config, timestep_spacing="trailing", set_alpha_to_one=True, clip_sample=False
    )
    noise = randn(row_generators(42, 0, rows, "rollout"), (4, 8, 8))
    pipe.scheduler, before = sampler, pipe.scheduler
    images = pipe(
        prompts, latents=noise, num_inference_steps=4, guidance_scale=2.0, height=16, width=16, output_type="np"
    ).images
    pipe.scheduler = before
    clip = ClipScorer.from_pretrained(clip_folder).in_segments()
    direction = CommonDirection.estimate(clip, trainer._train.prompts).vector
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2)
    seen = clip.picture_embeddings(clip.preprocess_pixels(pixels))
    asked = clip.prompt_embeddings(prompts)
    reward = (seen * (asked - 0.7 * (asked @ direction)[:, None] * direction)).sum(1)
    torch.testing.assert_close(losses, (1 - reward) / 2, rtol=0, atol=1e-3)
    assert np.ptp(losses.numpy()) > 1e-3


def test_training_raises_the_reward_and_keeps_what_it_was_made_of(tmp_path: Path) -> None:
    options: dict[str, Any] = {"max_steps": 15, "per_device_train_batch_size": 8, "rollout_guidance_scale": 1.0}
    trainer = run(tmp_path, peft_config=None, **options)
    rows = list(range(12))
    with torch.no_grad():
        before = losses_of(trainer, rows, epoch=-1).mean()
    trainer.train()
    trainer.save_model()
    with torch.no_grad():
        after = losses_of(trainer, rows, epoch=-1).mean()
    assert after < before - 1e-3
    assert (tmp_path / "unet").is_dir()
    assert CommonDirection.load(tmp_path / "common_direction.safetensors").num_captions == len(PROMPTS)
    card = (tmp_path / "README.md").read_text()
    assert "2410.11817" in card and "reward tiny at omega 0.3" in card and "read_long_prompts" in card
    logged = json.loads((tmp_path / "history.json").read_text())[0]
    assert logged["reward"] == pytest.approx(logged["reward/text"] + 0.3 * logged["reward/style"], abs=1e-5)
    assert logged["loss"] == pytest.approx((1 - logged["reward"]) / 2, abs=1e-4)


@pytest.mark.parametrize("stage", ["reward", "supervised"])
def test_a_stopped_run_goes_on_exactly(stage: str, tmp_path: Path) -> None:
    options: dict[str, Any] = {"stage": stage, "max_steps": 4, "data": PROMPTS if stage == "reward" else pairs()}
    options["data"] = options["data"][:101] if stage == "reward" else options["data"]
    tail = stage == "supervised"
    whole = run(tmp_path / "whole", pipe=pipeline(tail=tail), **options)
    whole.train()
    first = run(tmp_path / "parts", pipe=pipeline(tail=tail), save_strategy="steps", save_steps=2, **options)
    first.train()
    second = run(tmp_path / "parts", pipe=pipeline(tail=tail), save_strategy="steps", save_steps=2, **options)
    second.train(resume_from_checkpoint=str(tmp_path / "parts" / "checkpoint-2"))
    assert history(second)[-2:] == history(whole)[-2:]
    for name, value in trained(whole).items():
        assert torch.equal(value, trained(second)[name]), name
    if tail:
        mine, other = (long_prompts_of(part.pipe).tail.adapter.state_dict() for part in (whole, second))
        started = tiny_tail().adapter.state_dict()
        assert all(torch.equal(mine[name], other[name]) for name in mine)
        assert any(not torch.equal(mine[name], started[name]) for name in mine)
        assert not any(part.training for part in long_prompts_of(second.pipe).tail.networks.values())


def test_the_supervised_loss_is_the_denoising_error_under_clip_and_t5(tmp_path: Path) -> None:
    from mmalign.likelihood.draws import randint, randn, row_generators

    pipe = pipeline(tail=True)
    trainer = run(tmp_path, pipe=pipe, stage="supervised", data=pairs())
    inputs = trainer.collate([trainer._train.dataset[item] for item in (0, 3)])
    with torch.no_grad(), trainer._at_work():
        long_prompts_of(pipe).tail.adapter.eval()
        trainer.__dict__["_has_dropout"] = False
        found = trainer.row_losses(trainer.model, inputs, epoch=0, data=trainer._train)
    rows = inputs["row"]
    noise = randn(row_generators(42, 0, rows, "noise"), (4, 8, 8))
    t = randint(row_generators(42, 0, rows, "timestep"), 0, 1000)
    alpha_bar = torch.cumprod(1 - pipe.scheduler.betas, 0)[t].view(-1, 1, 1, 1)
    x_t = alpha_bar.sqrt() * inputs["chosen"] + (1 - alpha_bar).sqrt() * noise
    prompts = [trainer._train.encoded.prompts[place] for place in inputs["prompt_index"]]
    text, _ = pipe.encode_prompt(prompts, "cpu", 1, False)
    assert text.shape == (2, 480, 16)
    with torch.no_grad():
        error = (pipe.unet(x_t, t, encoder_hidden_states=text).sample - noise).square().mean((1, 2, 3))
    torch.testing.assert_close(found.loss, error, rtol=0, atol=1e-4)


def test_dropped_captions_are_the_empty_prompt_for_both_encoders(tmp_path: Path) -> None:
    pipe = pipeline(tail=True)
    trainer = run(tmp_path, pipe=pipe, stage="supervised", data=pairs(), prompt_dropout=1.0)
    inputs = trainer.collate([trainer._train.dataset[item] for item in (0, 3)])
    with torch.no_grad():
        text = trainer._captioned(inputs, 0, trainer._train)[1].prompt_embeds
        kept = trainer._captioned(inputs, -1, trainer._train)[1].prompt_embeds
        _, empty = pipe.encode_prompt([""], "cpu", 1, True)
    torch.testing.assert_close(text, empty.expand_as(text), rtol=0, atol=1e-5)
    assert not torch.allclose(kept, text)


def test_a_saved_pipeline_draws_the_same_here_and_its_base_in_plain_diffusers(tmp_path: Path) -> None:
    from diffusers import DiffusionPipeline

    pipe = pipeline(tail=True)
    pipe.save_pretrained(tmp_path)
    options: dict[str, Any] = dict(height=16, width=16, num_inference_steps=2, output_type="np")

    def drawn(pipe: Any, prompt: str) -> torch.Tensor:
        return torch.from_numpy(pipe(prompt, generator=torch.Generator().manual_seed(0), **options).images)

    loaded = LongAlignPipeline.from_pretrained(tmp_path)
    torch.testing.assert_close(drawn(loaded, LONG), drawn(pipe, LONG), rtol=0, atol=1e-5)
    plain = DiffusionPipeline.from_pretrained(tmp_path)
    plain.set_progress_bar_config(disable=True)
    torch.testing.assert_close(drawn(plain, "a bag"), drawn(tiny_pipeline("sd"), "a bag"), rtol=0, atol=1e-5)
    around = LongAlignPipeline.from_pipe(pipe)
    torch.testing.assert_close(drawn(around, LONG), drawn(pipe, LONG), rtol=0, atol=1e-5)
    fresh = LongAlignPipeline.from_pretrained(save(tmp_path / "base"))
    assert long_prompts_of(fresh).tail is None and long_prompts_of(fresh).config.layout == "segments"


def save(folder: Path) -> Path:
    tiny_pipeline("sd").save_pretrained(folder)
    return folder


def test_the_released_parts_are_loaded_one_on_the_other(tmp_path: Path) -> None:
    from training.test_training_lora_list import merged_by_hand, released

    from mmalign.denoisers.text_adapter import save_adapter

    tail, unet = tiny_tail(), tiny_pipeline("sd").unet
    save_adapter(tail.adapter, tmp_path / "s28750_adapter")
    tail.encoder.save_pretrained(tmp_path / "t5")
    tail.tokenizer.save_pretrained(tmp_path / "t5")
    lists = [released(unet), [tensor * 0.5 for tensor in released(unet)]]
    for name, tensors in zip(("s28750_lora_vis.pt", "sd15-reward-3750.pt"), lists, strict=True):
        torch.save(tensors, tmp_path / name)
        merged_by_hand(unet, tensors)
    pipe = LongAlignPipeline._adopt(tiny_pipeline("sd"))
    pipe.load_released(tmp_path, t5=tmp_path / "t5")
    assert not getattr(pipe.unet, "peft_config", None)
    for name, value in unet.state_dict().items():
        torch.testing.assert_close(pipe.unet.state_dict()[name], value, rtol=0, atol=1e-4)
    reader = long_prompts_of(pipe)
    assert reader.config.compat == "longalign" and reader.tail.max_tokens == 240
    assert torch.equal(reader.tail.adapter.norm1.weight, tail.adapter.norm1.weight)
    pipe("a bag", height=16, width=16, num_inference_steps=1, output_type="np")


def test_any_other_method_trains_on_long_prompts_too(tmp_path: Path) -> None:
    from training.runs import trainer

    rows = [row | {"prompt": LONG} for row in pairs()]
    cut, whole = (trainer(tmp_path / str(option), data=rows, long_prompts=option) for option in (None, "segments"))
    assert cut._train.encoded.num_truncated_prompts == 1 and whole._train.encoded.num_truncated_prompts == 0
    assert whole._train.encoded.conditioning(torch.tensor([0])).prompt_embeds.shape == (1, 240, 16)
    assert cut._train.encoded.key != whole._train.encoded.key
    whole.train()
    assert long_prompts_of(whole.pipe) is not None and long_prompts_of(cut.pipe) is None
    with pytest.raises(ValueError, match="do not fill one batch"):
        trainer(tmp_path / "x", pipe=cut.pipe, data=rows[:1], long_prompts="segments")
    assert long_prompts_of(cut.pipe) is None, "where the constructor raises, the pipeline is as it was"


def test_settings_without_effect_are_refused(tmp_path: Path) -> None:
    common: dict[str, Any] = {"output_dir": str(tmp_path), "use_cpu": True}
    for wrong, reason in (
        ({"stage": "supervised", "omega": 0.5}, "omega has no effect"),
        ({"prompt_dropout": 0.1}, "prompt_dropout has no effect"),
        ({"omega": 1.0, "direction": "x"}, "direction has no effect"),
        ({"omega": 1.5}, "omega must lie"),
        ({"reward_crop": 0.0}, "reward_crop"),
        ({"gradient": "graph", "step_weights": "normalised"}, "no gradient of a sampler"),
        ({"train_adapter": False}, "train_adapter=False has no effect"),
        ({"grad_steps": 7}, "grad_steps must divide"),
        ({"long_prompts": None, "long_prompts_pack": True}, "long_prompts_pack has no effect"),
    ):
        with pytest.raises(ValueError, match=reason):
            LongAlignConfig(**common | wrong)
    with pytest.raises(ValueError, match="lora_dropout must be 0"):
        run(tmp_path, peft_config=lora(lora_dropout=0.1))
    with pytest.raises(ValueError, match="7 prompts are too few"):
        run(tmp_path, data=PROMPTS[:7])
    run(tmp_path, data=PROMPTS[:7], omega=1.0)


@pytest.mark.parametrize("peft_config", ["lora", None])
def test_distillation_s_teacher_is_the_model_as_it_was_and_its_student_the_trained_one(
    peft_config: Any, tmp_path: Path
) -> None:
    from mmalign.likelihood.consistency import consistency_losses, draw_times, teacher_step
    from mmalign.likelihood.draws import randn, row_generators

    before = pipeline()
    chosen = lora(init_lora_weights=False) if peft_config else None
    trainer = run(tmp_path, stage="supervised", data=pairs(), distill_guidance_scale=3.0, peft_config=chosen)
    with torch.no_grad():
        # As after some training.
        for parameter in trainer.network.parameters():
            parameter.add_(0.01 if parameter.requires_grad else 0)
    inputs, rows = trainer.collate([trainer._train.dataset[item] for item in (0, 3)]), [0, 3]
    with torch.no_grad(), trainer._at_work():
        found = trainer.row_losses(trainer.model, inputs, epoch=0, data=trainer._train).loss
        schedule, x0 = trainer._schedule, inputs["chosen"].float()
        t = draw_times(schedule, row_generators(42, 0, rows, "timestep"))
        x = schedule.add_noise(x0, randn(row_generators(42, 0, rows, "noise"), (4, 8, 8)), t)
        prompts = [pairs()[row]["prompt"] for row in rows]
        text, null = (before.encode_prompt(words, "cpu", 1, False)[0] for words in (prompts, [""] * 2))

        def teacher(x: Tensor, t: Tensor, conditioned: bool) -> Tensor:
            return before.unet(x, t, text if conditioned else null).sample

        later = teacher_step(teacher, schedule, x, t, 3.0)
        expected = consistency_losses(lambda x, t: trainer.network(x, t, text).sample, schedule, x, t, *later)
        drifted = consistency_losses(lambda x, t: before.unet(x, t, text).sample, schedule, x, t, *later)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-6)
    assert float((found - drifted).abs().min()) > 1e-4


def test_distillation_learns_and_leaves_what_lcm_scheduler_draws_in_four_steps(tmp_path: Path) -> None:
    from diffusers import LCMScheduler

    pipe = pipeline()
    options: dict[str, Any] = {
        "stage": "supervised",
        "data": pairs(),
        "distill_guidance_scale": 3.0,
        "peft_config": None,
    }
    trainer = run(tmp_path, pipe=pipe, max_steps=30, per_device_train_batch_size=6, learning_rate=3e-3, **options)
    inputs = trainer.collate([trainer._train.dataset[item] for item in range(6)])

    def loss() -> float:
        with torch.no_grad(), trainer._at_work():
            return float(trainer.row_losses(trainer.model, inputs, epoch=-1, data=trainer._train).loss.mean())

    before = loss()
    trainer.train()
    assert loss() < 0.8 * before
    trainer.save_model()
    assert "LCMScheduler" in (tmp_path / "README.md").read_text()
    pipe.scheduler = LCMScheduler.from_config(pipe.scheduler.config)
    drawn = pipe("a red bag", num_inference_steps=4, guidance_scale=1.0, height=16, width=16, output_type="np").images
    assert np.isfinite(drawn).all() and drawn.std() > 0


def test_a_text_adapter_is_not_trained_by_distillation_and_flow_models_are_refused(tmp_path: Path) -> None:
    pipe = pipeline(tail=True)
    before = {name: value.clone() for name, value in long_prompts_of(pipe).tail.adapter.state_dict().items()}
    run(tmp_path, pipe=pipe, stage="supervised", data=pairs(), distill_guidance_scale=3.0).train()
    assert all(
        torch.equal(value, before[name]) for name, value in long_prompts_of(pipe).tail.adapter.state_dict().items()
    )
    with pytest.raises(ValueError, match="flow models have none"):
        run(tmp_path, pipe=pipeline("sd3"), stage="supervised", data=pairs(), distill_guidance_scale=3.0)
    common = {"output_dir": str(tmp_path), "distill_guidance_scale": 3.0}
    with pytest.raises(ValueError, match="no effect with stage='reward'"):
        LongAlignConfig(**common)
    with pytest.raises(ValueError, match="at least 1"):
        LongAlignConfig(**common | {"stage": "supervised", "distill_guidance_scale": 0.5})


@pytest.mark.parametrize("gradient", ["exact", "graph"])
def test_two_processes_take_the_step_of_one_with_a_direction_of_one(
    gradient: str, tmp_path: Path, clip_folder: Path
) -> None:
    common = {"scorer": f"clip:{clip_folder}", "gradient": gradient, "cache_dir": str(tmp_path / "cache")}
    whole = run(tmp_path / "whole", per_device_train_batch_size=4, **common)
    watch = Watch()
    whole.add_callback(watch)
    whole.train()
    first, second = worker.together(2, tmp_path / "parts", common, target=worker.share_rewards)
    assert (first["estimated"], second["estimated"]) == (1, 0)
    assert torch.equal(first["direction"], second["direction"])
    assert torch.equal(
        CommonDirection.load(tmp_path / "parts" / "common_direction.safetensors").vector, first["direction"]
    )
    largest = max(float(value.abs().max()) for value in watch.gradients[0].values())
    assert largest > 0
    for name, value in watch.gradients[0].items():
        assert torch.equal(first["gradients"][0][name], second["gradients"][0][name]), name
        torch.testing.assert_close(first["gradients"][0][name], value, rtol=1e-3, atol=1e-4 * largest)
    assert all(torch.equal(value, second["trained"][name]) for name, value in first["trained"].items())
    for name in ("loss", "reward", "reward/text", "reward/style"):
        found = first["history"][0][name]
        assert whole.state.log_history[0][name] == pytest.approx(found, rel=1e-3, abs=1e-5), name
