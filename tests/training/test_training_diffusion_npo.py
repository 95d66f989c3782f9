"""Diffusion-NPO by reward: whose picture is rewarded, who learns from it, and that the result is drawn away from."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import WORDS, tiny_pipeline
from training.runs import gradients, lora

from mmalign import DiffusionNPOConfig, DiffusionNPOPipeline, DiffusionNPOTrainer, SelfNPOPipeline, cli
from mmalign.denoisers.adapters import adapter_layers
from mmalign.likelihood.draws import randn, row_generators
from mmalign.rewards import ClipScorer

PROMPTS = [f"a {one} {two}" for one in WORDS[:5] for two in WORDS[7:11]]


@pytest.fixture(autouse=True)
def tiny_reward(monkeypatch: pytest.MonkeyPatch, clip_folder: Path) -> None:
    import mmalign.training.reward_trainer as reward_trainer

    monkeypatch.setattr(
        reward_trainer, "scorer", lambda name, **options: ClipScorer.from_pretrained(clip_folder, name=name)
    )


def run(folder: Path, *, kind: str = "sd", peft_config: Any = "lora", **options: Any) -> Any:
    given: dict[str, Any] = {
        "output_dir": str(folder), "max_steps": 2, "per_device_train_batch_size": 2, "logging_steps": 1, "save_strategy": "no",
        "use_cpu": True, "disable_tqdm": True, "learning_rate": 1e-2, "rollout_steps": 4, "grad_steps": 2,
        "rollout_guidance_scale": 3.0, "scorer": "tiny",
    }  # fmt: skip
    return DiffusionNPOTrainer(
        model=DiffusionNPOPipeline._adopt(tiny_pipeline(kind)),
        args=DiffusionNPOConfig(**given | options),
        train_dataset=PROMPTS,
        peft_config=lora() if peft_config == "lora" else peft_config,
    )


def losses_of(trainer: Any, rows: list[int], epoch: int = 0) -> torch.Tensor:
    with trainer._at_work():
        return trainer.row_losses(trainer.model, {"row": rows}, epoch=epoch, data=trainer._train).loss


def drawn(pipe: Any, prompts: list[str], noise: torch.Tensor, scale: float) -> torch.Tensor:
    """Pixels by diffusers' own DDIM, in four steps."""
    from diffusers import DDIMScheduler

    pipe.scheduler = DDIMScheduler.from_config(
        pipe.scheduler.config, timestep_spacing="trailing", set_alpha_to_one=True, clip_sample=False
    )
    pipe.set_progress_bar_config(disable=True)
    asked: dict[str, Any] = {"num_inference_steps": 4, "height": 16, "width": 16, "output_type": "np"}
    images = pipe(prompts, latents=noise, guidance_scale=scale, **asked).images
    return torch.from_numpy(images).permute(0, 3, 1, 2)


@pytest.mark.parametrize("mode", ["guided", "inverted"])
def test_the_loss_is_the_reward_of_what_the_saved_negative_side_draws(
    mode: str, tmp_path: Path, clip_folder: Path
) -> None:
    """Guided: of the pipeline that loads it as its negative side, at g. Inverted: of the one that has it in both branches."""
    trainer = run(tmp_path, mode=mode, reward_crop=1.0, peft_config=lora(init_lora_weights=False))
    rows = [4, 1]
    with torch.no_grad():
        losses = losses_of(trainer, rows)
    trainer.save_model()
    pipe = SelfNPOPipeline._adopt(tiny_pipeline("sd"))
    if mode == "guided":
        pipe.load_negative(tmp_path)
    else:
        pipe.load_aligned(tmp_path)
    prompts = [trainer._train.prompts[row] for row in rows]
    noise = randn(row_generators(42, 0, rows, "rollout"), (4, 8, 8))
    scorer = ClipScorer.from_pretrained(clip_folder)
    with torch.no_grad():
        reward = scorer.score_pixels(drawn(pipe, prompts, noise, 3.0), prompts)
        plain = scorer.score_pixels(drawn(tiny_pipeline("sd"), prompts, noise, 3.0), prompts)
    torch.testing.assert_close(losses, (1 - reward) / 2 if mode == "guided" else reward / 2, rtol=0, atol=1e-3)
    assert float((reward - plain).abs().max()) > 5e-3, "the negative side shows"


@pytest.mark.parametrize("kind", ["sd", "sdxl", "sd3"])
def test_both_gradients_agree_and_reach_the_negative_network_alone(kind: str, tmp_path: Path) -> None:
    found = {}
    for gradient in ("exact", "graph"):
        trainer = run(tmp_path / gradient, kind=kind, gradient=gradient, peft_config=lora(init_lora_weights=False))
        asked: list[tuple[bool, bool]] = []
        predict = trainer.denoiser.predict

        def watched(module: Any, x: Any, t: Any, told: Any, asked: Any = asked, predict: Any = predict) -> Any:
            asked.append((not adapter_layers(module)[0].disable_adapters, torch.is_grad_enabled()))
            return predict(module, x, t, told)

        trainer.model._predict = trainer.denoiser.predict = watched
        with trainer._at_work():
            trainer.row_losses(trainer.model, {"row": [4, 1]}, epoch=0, data=trainer._train).loss.mean().backward()
        # Who has the LoRA off is never asked for a gradient, who has it on sometimes is.
        assert set(asked) == {(False, False), (True, False), (True, True)}
        found[gradient] = gradients(trainer)
        assert all(".lora_" in name for name in found[gradient])
    largest = max(float(value.abs().max()) for value in found["graph"].values())
    assert found["exact"].keys() == found["graph"].keys() and largest > 0
    for name, value in found["graph"].items():
        assert float((found["exact"][name] - value).abs().max()) < 1e-3 * largest, name


def test_the_true_reward_guided_and_the_inverted_one_pull_the_same_way(tmp_path: Path) -> None:
    """At the start, where N is P: a reward of what is guided away from N asks of N what the inverted reward of its own does."""
    options: dict[str, Any] = {"reward_crop": 1.0, "peft_config": lora(init_lora_weights=False), "grad_steps": 4}
    guided = run(tmp_path / "one", **options)
    inverted = run(tmp_path / "two", mode="inverted", rollout_guidance_scale=1.0, **options)
    for trainer in (guided, inverted):
        with trainer._at_work():
            trainer.row_losses(trainer.model, {"row": [4, 1]}, epoch=0, data=trainer._train).loss.mean().backward()
    one, two = (torch.cat([value.flatten() for value in gradients(run).values()]) for run in (guided, inverted))
    # Both make N worse: they point the same way.
    assert float(torch.nn.functional.cosine_similarity(one, two, dim=0)) > 0.2


def test_training_all_weights_leaves_what_it_is_guided_towards(tmp_path: Path) -> None:
    pipe, plain = DiffusionNPOPipeline._adopt(tiny_pipeline("sd")), tiny_pipeline("sd")
    options: dict[str, Any] = {
        "rollout_steps": 2,
        "grad_steps": 1,
        "scorer": "tiny",
        "use_cpu": True,
        "disable_tqdm": True,
    }
    pipe.align(
        PROMPTS, output_dir=tmp_path, peft_config=None, max_steps=2, per_device_train_batch_size=2, learning_rate=1e-2,
        save_strategy="no", **options,
    )  # fmt: skip
    for name, value in plain.unet.state_dict().items():
        assert torch.equal(pipe.unet.state_dict()[name], value)
    moved = pipe.negative_unet.state_dict()
    assert any(not torch.equal(moved[name], value) for name, value in plain.unet.state_dict().items())
    assert "A negative side of" in (tmp_path / "README.md").read_text()
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    guided = drawn(pipe, PROMPTS[:1], noise, 3.0)
    other = SelfNPOPipeline._adopt(plain)
    assert not torch.allclose(guided, drawn(other, PROMPTS[:1], noise, 3.0))
    other.load_negative(tmp_path)
    torch.testing.assert_close(drawn(other, PROMPTS[:1], noise, 3.0), guided, rtol=0, atol=1e-6)


def test_an_inverted_reward_falls(tmp_path: Path) -> None:
    trainer = run(
        tmp_path,
        mode="inverted",
        rollout_guidance_scale=1.0,
        max_steps=12,
        per_device_train_batch_size=8,
        peft_config=None,
    )
    rows = list(range(8))
    with torch.no_grad():
        before = losses_of(trainer, rows, epoch=-1).mean()
    trainer.train()
    with torch.no_grad():
        after = losses_of(trainer, rows, epoch=-1).mean()
    assert after < before - 1e-3 and trainer.state.log_history[0]["reward"] == pytest.approx(
        2 * trainer.state.log_history[0]["loss"], abs=1e-4
    )


def test_what_has_no_effect_is_refused(tmp_path: Path) -> None:
    common: dict[str, Any] = {"output_dir": str(tmp_path), "use_cpu": True}
    for wrong, reason in (
        ({"grad_cond_only": True}, "grad_cond_only has no effect with mode='guided'"),
        ({"rollout_guidance_scale": 1.0}, "needs rollout_guidance_scale above 1"),
        ({"mode": "both"}, "mode must be one of"),
        ({"prompt_dropout": 0.1}, "prompt_dropout has no effect"),
    ):
        with pytest.raises(ValueError, match=reason):
            DiffusionNPOConfig(**common | wrong)
    with pytest.raises(ValueError, match="leave ref_model out"):
        DiffusionNPOTrainer(
            model=tiny_pipeline("sd"),
            args=DiffusionNPOConfig(**common),
            train_dataset=PROMPTS,
            ref_model=tiny_pipeline("sd"),
        )


def test_the_command_line_trains_one_and_draws_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    tiny_pipeline("sd").save_pretrained("model")
    Path("prompts.txt").write_text("\n".join(PROMPTS[:3]))
    words = ["--model", "model", "--data", "prompts.txt", "--output-dir", "run", "--use-cpu", "--max-steps", "1"]
    words += [
        "--rollout-steps",
        "2",
        "--grad-steps",
        "1",
        "--train-batch-size",
        "2",
        "--lora-r",
        "2",
        "--scorer",
        "tiny",
    ]
    assert cli.main(["train", "diffusion-npo", *words]) == 0
    shown = capsys.readouterr().out
    assert "--negative run" in shown and "--trained-on tiny" in shown
    drawing = ["--model", "model", "--negative", "run", "--prompt", "a bag", "--steps", "1", "--output-dir", "out"]
    assert cli.main(["generate", *drawing]) == 0
