"""Estimates, sample pictures, the card, what is printed, and weights on disk."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image
from tiny import tiny_pipeline
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from training.runs import history, lora, losses, moved_lora, pairs, trainer

from mmalign.denoisers import adapter_for
from mmalign.likelihood.config import InversionConfig
from mmalign.training.card import public_name
from mmalign.training.estimate import duration, forward_equivalents, memory_of
from mmalign.training.loading import load_base
from mmalign.training.pipeline import default_lora
from mmalign.training.progress import line
from mmalign.training.weights import add_adapter, load_trained, save_trained

# Estimates.


def test_memory_counts_weights_gradients_state_and_copy() -> None:
    network = nn.Sequential(nn.Linear(10, 10, bias=False), nn.Linear(10, 10, bias=False))
    network[0].requires_grad_(False)
    memory = memory_of(network, None, "adamw_torch")
    assert (memory.weights, memory.gradients, memory.optimizer, memory.reference) == (800, 400, 800, 0)
    # A hundred weights are too few for bitsandbytes to quantise; Adafactor keeps a mean a row and one a column.
    assert memory_of(network, network, "adamw_bnb_8bit").total == 800 + 400 + 800 + 800
    assert memory_of(network, None, "adafactor").optimizer == 80
    large = nn.Linear(1024, 64, bias=False)
    assert memory_of(large, None, "adamw_bnb_8bit").optimizer == 2 * (65536 + 4 * 256)
    assert "activations" in str(memory) and "reference" not in str(memory)


def test_forward_equivalents_are_those_of_the_published_costs() -> None:
    schedule = adapter_for(tiny_pipeline("sd")).schedule
    assert forward_equivalents(schedule, None, has_reference=True) == 4
    assert forward_equivalents(schedule, None, has_reference=False, recomputes=True) == 4
    assert forward_equivalents(schedule, None, has_reference=True, adapted=True) == 3
    ddim = forward_equivalents(schedule, InversionConfig(num_steps=10), has_reference=True)
    renoise = forward_equivalents(schedule, InversionConfig(num_steps=10, renoise_steps=1), has_reference=True)
    # The exact grid makes ⌈10(t+1)/1000⌉ moves, 5.5 on average; the published grids 6.38.
    assert ddim == pytest.approx(4 + 5.5) and renoise == pytest.approx(4 + 11)
    official = InversionConfig(num_steps=10, compat="official-0.20")
    assert forward_equivalents(schedule, official, has_reference=True) == pytest.approx(10.38, abs=0.01)
    assert forward_equivalents(schedule, InversionConfig(num_steps=10, solver="heun"), has_reference=True) == renoise


@pytest.mark.parametrize("peft_config", [default_lora(), None], ids=["lora", "full"])
def test_forward_equivalents_are_counted_operations(peft_config: Any) -> None:
    """On the playground's Stable Diffusion; in networks of a few channels the adapter and the outer layers weigh more."""
    denoiser = adapter_for(load_base("playground"))
    network = denoiser.module.train()
    inputs = torch.zeros(1, 4, 8, 8), torch.zeros(1, dtype=torch.long), denoiser.encode_prompt(["a red bag"])
    with FlopCounterMode(display=False) as forward, torch.no_grad():
        denoiser.predict(network, *inputs)
    network.requires_grad_(peft_config is None)
    if peft_config is not None:
        add_adapter(network, peft_config)

    def counted() -> float:
        with FlopCounterMode(display=False) as both:
            denoiser.predict(network, *inputs).sum().backward()
        return both.get_total_flops() / forward.get_total_flops()

    schedule, adapted = denoiser.schedule, peft_config is not None
    told = [
        forward_equivalents(schedule, None, has_reference=False, adapted=adapted, recomputes=recomputes)
        for recomputes in (False, True)
    ]
    alone = counted()
    assert alone == pytest.approx(told[0], rel=0.05)
    network.enable_gradient_checkpointing()
    # torch stops to recompute a block once it has what the backward reads, so that its last layer runs once.
    assert 0.5 < counted() - alone < told[1] - told[0] == 1


@pytest.mark.parametrize(("corrections", "a_point"), [(0, 5), (1, 6)], ids=["inpo", "smpo"])
def test_a_training_point_costs_less_where_every_landing_is_one(corrections: int, a_point: int) -> None:
    schedule = adapter_for(tiny_pipeline("sd")).schedule
    config = InversionConfig(num_steps=10, renoise_steps=corrections, grid="strided")
    assert forward_equivalents(schedule, config, has_reference=True, every_landing=True) == 10 * a_point
    # In turn: ten moves and the reference at their ends, once; then the policy alone.
    for visits, cost in ((1, 3 + 10 * (a_point - 3)), (20, 3 + 10 * (a_point - 3) / 20)):
        assert forward_equivalents(schedule, config, has_reference=True, visits=visits) == cost


def test_the_estimate_and_the_settings_are_told_before_the_first_step(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "mmalign"):
        run = trainer(tmp_path, "smpo", disable_tqdm=False, max_steps=1)
        run.train()
    weights = sum(p.numel() * p.element_size() for p in run.network.parameters())
    told = [record.getMessage() for record in caplog.records]
    settings = next(i for i, text in enumerate(told) if text.startswith("smpo: latents=renoise"))
    estimate = next(i for i, text in enumerate(told) if text.startswith("memory: at least"))
    end = next(i for i, text in enumerate(told) if text.startswith("trained in"))
    assert settings < estimate < end
    assert "for errors summed over 256 elements" in told[settings]
    assert (
        f"weights {weights / 1024:.0f} KiB" in told[estimate]
        and "for 1 steps of" in told[estimate]
        and "forward passes a batch" in told[estimate]
    )
    assert "step 1/1  loss 0.6931" in told[end]


def test_without_a_bar_nothing_is_timed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    run = trainer(tmp_path, max_steps=1)
    monkeypatch.setattr(run, "one_forward", lambda: pytest.fail("timed"))
    with caplog.at_level(logging.INFO, "mmalign"):
        run.train()
    assert any(record.getMessage().startswith("step 1/1  loss") for record in caplog.records)


def test_timing_changes_no_loss(tmp_path: Path) -> None:
    runs = [trainer(tmp_path, disable_tqdm=quiet, peft_config=lora(lora_dropout=0.3)) for quiet in (True, False)]
    for run in runs:
        run.train()
    assert history(runs[0]) == history(runs[1])


def test_durations_and_lines_read_well() -> None:
    assert [duration(s) for s in (4, 89, 600, 5400, 36000)] == ["4 s", "89 s", "10 min", "1.5 h", "10.0 h"]
    logs = {"loss": 0.69, "rewards/accuracies": 0.5, "grad_norm": 1.25, "learning_rate": 1e-5, "errors/chosen": 3.0}
    assert line(logs, 3, 20) == "step 3/20  loss 0.6900  accuracy 0.50  gradient 1.2  lr 1e-05"
    assert line({"eval_loss": 0.5}, 3, 20) == "evaluation at step 3/20  loss 0.5000"


# Sample pictures.


def test_sample_pictures_are_drawn_and_change_nothing_else(tmp_path: Path) -> None:
    options = {"max_steps": 3, "learning_rate": 1e-2, "peft_config": lora(lora_dropout=0.3)}
    plain = trainer(tmp_path / "plain", **options)
    plain.train()
    prompts = ["a red shirt", "حذاء أحمر"]
    run = trainer(
        tmp_path / "drawn", validation_steps=2, validation_prompts=prompts, validation_inference_steps=2, **options
    )
    run.train()
    assert history(run) == history(plain)
    found = sorted((tmp_path / "drawn" / "samples").iterdir())
    assert [path.name for path in found] == ["step-000000.png", "step-000002.png"]
    first, later = (Image.open(path) for path in found)
    # One column before training, two afterwards, a row a prompt; small pictures are enlarged.
    assert later.width - first.width > 128 and min(first.height, later.height) > 2 * 128


def test_sample_clips_show_three_frames_and_the_card_tells_the_task(tmp_path: Path) -> None:
    options: dict[str, Any] = {
        "validation_steps": 1,
        "validation_prompts": ["a red shirt"],
        "validation_inference_steps": 1,
    }
    run = trainer(tmp_path, kind="cogvideox", num_frames=17, max_steps=1, **options)
    run.train()
    run.save_model()
    later = Image.open(tmp_path / "samples" / "step-000001.png")
    # Two columns of three frames of 16 × 16, twice enlarged.
    assert later.width == 2 * 24 + 2 * (3 * 16 * 2) + 12
    header = card(tmp_path)[0]
    assert header["pipeline_tag"] == "text-to-video" and "text-to-image" not in header["tags"]
    assert run._train.dataset[0]["chosen"].shape == (4, 5, 4, 4)


# The card.


def card(folder: Path) -> tuple[dict[str, Any], str]:
    _, header, text = (folder / "README.md").read_text().split("---\n", 2)
    return yaml.safe_load(header), text


def test_the_card_says_what_was_done_without_machine_paths(tmp_path: Path) -> None:
    tiny_pipeline("sd").save_pretrained(tmp_path / "my-base")
    run = trainer(tmp_path / "run", "inpo", pipe=str(tmp_path / "my-base"), eval_dataset=pairs(3, seed=4))
    run.train()
    run.evaluate()
    run.save_model()
    header, text = card(tmp_path / "run")
    assert header["library_name"] == "diffusers" and header["pipeline_tag"] == "text-to-image"
    assert {"mmalign", "inpo", "lora", "diffusers-training"} <= set(header["tags"])
    # A local folder and rows in memory are no names on the Hub.
    assert "base_model" not in header and "datasets" not in header
    for part in (
        "# my-base aligned by DDIM-InPO",
        "hf.co/papers/2503.18454",
        "on `list`",
        '"eval_loss"',
        '"beta": 2000.0',
        "load_lora",
    ):
        assert part in text
    assert str(tmp_path) not in (tmp_path / "run" / "README.md").read_text()
    logged = json.loads((tmp_path / "run" / "history.json").read_text())
    assert logged == run.state.log_history


def test_the_card_names_what_the_hub_knows(tmp_path: Path) -> None:
    run = trainer(tmp_path, peft_config=None, max_steps=1)
    run.pipe.register_to_config(_name_or_path="someone/base")
    object.__setattr__(run._train, "name", "someone/pairs")
    run.save_model()
    header, text = card(tmp_path)
    assert (header["base_model"], header["base_model_relation"]) == ("someone/base", "finetune")
    assert header["datasets"] == ["someone/pairs"] and "lora" not in header["tags"]
    assert "UNet2DConditionModel.from_pretrained(FOLDER, subfolder='unet')" in text
    assert [public_name(name) for name in ("/home/me/x", None, "a/b", "C:\\me")] == ["x", "unknown", "a/b", "C:\\me"]


def test_an_sft_card_speaks_of_no_pair_loss(tmp_path: Path) -> None:
    run = trainer(tmp_path, "sft", max_steps=1)
    run.train()
    run.save_model()
    text = card(tmp_path)[1]
    assert "denoising error" in text and "beta" not in text and "sigmoid" not in text


# Weights.


def test_weights_come_back_exactly_also_from_several_files(tmp_path: Path) -> None:
    for peft_config in (moved_lora(), None):
        run = trainer(tmp_path, peft_config=peft_config)
        folder = tmp_path / str(peft_config is None)
        save_trained(run.pipe, run.network, folder)
        before = {name: p.detach().clone() for name, p in run.network.named_parameters()}
        with torch.no_grad():
            for parameter in run.network.parameters():
                parameter.add_(1.0) if parameter.requires_grad else None
        load_trained(run.network, folder)
        assert all(torch.equal(p, before[name]) for name, p in run.network.named_parameters())
    run.network.save_pretrained(tmp_path / "sharded" / "unet", max_shard_size="100KB")
    assert len(list((tmp_path / "sharded" / "unet").glob("*.safetensors"))) > 1
    with torch.no_grad():
        run.network.conv_in.weight.zero_()
    load_trained(run.network, tmp_path / "sharded")
    assert torch.equal(run.network.conv_in.weight, before["conv_in.weight"])


def test_a_lora_is_float32_over_a_half_base_and_float64_over_a_double_one(tmp_path: Path) -> None:
    for dtype, expected in ((torch.bfloat16, torch.float32), (torch.float64, torch.float64)):
        run = trainer(tmp_path, dtype=dtype, max_steps=1)
        assert {p.dtype for p in run.network.parameters() if p.requires_grad} == {expected}
        run.train()
        assert history(run)[0] == pytest.approx(0.6931, abs=1e-3)


def test_bf16_gradients_are_those_of_float32_and_the_start_is_ln2(tmp_path: Path) -> None:
    grads = []
    for bf16 in (False, True):
        run = trainer(tmp_path, bf16=bf16)
        loss = losses(run, range(4))
        assert loss.dtype == torch.float32 and (loss - 0.693147).abs().max() < 1e-5
        loss.mean().backward()
        grads.append(torch.cat([p.grad.flatten() for n, p in run.network.named_parameters() if "lora_B" in n]))
    assert torch.cosine_similarity(*grads, dim=0) > 0.98


@pytest.mark.parametrize(
    ("peft_config", "message"),
    [
        ("adapter", "peft_config must be a peft.LoraConfig, got str"),
        (lora(bias="all"), "peft_config.bias is refused"),
        (lora(modules_to_save=["conv_in"]), "peft_config.modules_to_save is refused"),
    ],
)
def test_adapters_that_no_lora_file_can_hold_are_refused(peft_config: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, peft_config=peft_config)
