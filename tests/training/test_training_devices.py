"""Where weights stand before, during and after a run, in which precision, and on devices without float64."""

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from tiny import tiny_pipeline
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from training.runs import batch, lora, moved_lora, pipeline, trainer

from mmalign.denoisers import adapter_for
from mmalign.denoisers.parts import evaluating, networks
from mmalign.likelihood.config import InversionConfig
from mmalign.likelihood.reference import make_reference
from mmalign.training import health
from mmalign.training import run_trainer as training
from mmalign.training.devices import on_device, storable
from mmalign.training.measurement import Method, Pairs, draw, measure
from mmalign.training.saving import SavingTrainer


def test_parts_go_to_a_device_and_back() -> None:
    parts = [nn.Linear(2, 2), nn.Linear(2, 2)]
    with pytest.raises(KeyError), on_device(parts, torch.device("cpu")):
        raise KeyError
    parts[0].train()
    parts[1].eval()
    with evaluating(parts):
        assert not any(part.training for part in parts)
    assert [part.training for part in parts] == [True, False]


def test_everything_encodes_on_the_training_device_and_the_network_alone_trains_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    moved: list[tuple[list[str], str]] = []

    def recording(parts: list[nn.Module], device: torch.device) -> Any:
        moved.append(([type(part).__name__ for part in parts], device.type))
        return nullcontext()

    monkeypatch.setattr(training, "on_device", recording)
    run = trainer(tmp_path, peft_config=None)
    parts, device = moved.pop()
    assert sorted(parts) == ["AutoencoderKL", "CLIPTextModel", "UNet2DConditionModel"] and device == "cpu"
    # Whatever the training device is, the encoders wait on the CPU; the UNet is there with its frozen copy.
    monkeypatch.setattr(type(run.args), "device", torch.device("meta"))
    with run._at_work():
        assert [(sorted(parts), device) for parts, device in moved] == [
            (["AutoencoderKL", "CLIPTextModel"], "cpu"),
            (["UNet2DConditionModel", "UNet2DConditionModel"], "meta"),
        ]


def test_only_what_stands_elsewhere_is_moved() -> None:
    class Part(nn.Linear):
        def to(self, device: Any) -> Any:  # type: ignore[override]
            moves.append((self.name, torch.device(device).type))
            return self

    moves: list[tuple[str, str]] = []
    here, there = Part(2, 2), Part(2, 2, device="meta")
    here.name, there.name = "here", "there"
    with on_device([here, there], torch.device("meta")):
        assert moves == [("here", "meta")]
    assert moves == [("here", "meta"), ("here", "cpu")]


class Doubles(TorchDispatchMode):
    """Finds float64 tensors on a device that has none."""

    def __init__(self, device: str) -> None:
        super().__init__()
        self.device, self.found = device, []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        outputs = result if isinstance(result, (tuple, list)) else [result]
        for output in outputs:
            if isinstance(output, torch.Tensor) and output.dtype == torch.float64 and output.device.type == self.device:
                self.found.append(str(func))
        return result


@pytest.mark.parametrize("kind", ["sd", "sd-v"])
@pytest.mark.parametrize("inversion", [None, InversionConfig(num_steps=2, renoise_steps=1)], ids=["forward", "renoise"])
def test_a_step_needs_no_float64_on_a_device_that_has_none(kind: str, inversion: Any) -> None:
    """The device "meta" stands in for MPS: shapes and dtypes are real there, values are not."""
    pipe = tiny_pipeline(kind)
    denoiser = adapter_for(pipe)
    reference = make_reference(denoiser.module, kind="copy")
    exact = denoiser.schedule
    denoiser.schedule = storable(exact, torch.device("mps"))
    assert denoiser.schedule.signal.dtype == torch.float32 and storable(exact, torch.device("cpu")) is exact
    torch.testing.assert_close(denoiser.schedule.noise.double(), exact.noise, rtol=1e-7, atol=0)
    denoiser.module.to("meta")
    reference.module.to("meta")
    text = denoiser.encode_prompt(["a red shirt"] * 4).to("meta")
    pairs_ = Pairs(torch.zeros(4, 4, 8, 8, device="meta"), text, [3, 8], torch.ones(2, device="meta"))
    drawn = draw([3, 8], seed=0, epoch=0, schedule=denoiser.schedule, share_noise=True, share_eta_noise=False)

    def policy(x: torch.Tensor, t: torch.Tensor, conditioning: Any) -> torch.Tensor:
        return denoiser.predict(denoiser.module, x, t, conditioning)

    with Doubles("meta") as doubles:
        schedule = denoiser.schedule.to("meta")
        method = Method(inversion=inversion)
        measured = measure(denoiser, policy, denoiser.module, reference, pairs_, drawn, method, schedule=schedule)
        measured.policy_error.sum().backward()
    assert measured.policy_error.shape == (4,) and measured.policy_error.device.type == "meta"
    assert doubles.found == []


def test_a_float32_schedule_changes_losses_by_rounding_only(tmp_path: Path) -> None:
    for method in ("dpo", "smpo"):
        run = trainer(tmp_path, method, peft_config=moved_lora())
        _, exact, _ = run.pair_losses(run.model, batch(run), epoch=0)
        run.denoiser.schedule = run._schedule = storable(run.denoiser.schedule, torch.device("mps"))
        _, rounded, pairs_ = run.pair_losses(run.model, batch(run), epoch=0)
        torch.testing.assert_close(rounded.policy_error, exact.policy_error, rtol=1e-4, atol=1e-7)
        panel = health.panel(rounded, pairs_, torch.zeros(2), beta=1.0, schedule=run._schedule)
        assert panel["loss"] == (0.0, 2.0)


def test_the_network_goes_home_and_the_pipeline_is_ready_to_draw(tmp_path: Path) -> None:
    pipe = pipeline()
    run = trainer(tmp_path, pipe=pipe, learning_rate=1e-2, gradient_checkpointing=True)
    run.train()
    assert not any(module.training for module in pipe.unet.modules())
    assert not pipe.unet.is_gradient_checkpointing
    assert {next(part.parameters()).device.type for part in networks(pipe).values()} == {"cpu"}
    draws = [
        target(
            "a red shirt", num_inference_steps=2, generator=torch.Generator().manual_seed(0), output_type="np"
        ).images
        for target in (pipe, tiny_pipeline("sd"))
    ]
    assert abs(draws[0] - draws[1]).max() > 1e-3


def test_the_network_is_ready_after_a_failure_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = trainer(tmp_path)
    monkeypatch.setattr(run, "_record", lambda *a, **k: (_ for _ in ()).throw(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        run.train()
    assert not run.network.training


def test_hooks_that_move_weights_are_refused(tmp_path: Path) -> None:
    pipe = pipeline()
    add_hook_to_module(pipe.text_encoder, AlignDevicesHook(execution_device="cpu"))
    with pytest.raises(ValueError, match=r"text_encoder has offloading or casting hooks.*remove_all_hooks"):
        trainer(tmp_path, pipe=pipe)


def test_sharding_launchers_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = SavingTrainer.create_accelerator_and_postprocess

    def sharded(self: Any) -> None:
        plain(self)
        self.is_fsdp_enabled = True

    monkeypatch.setattr(SavingTrainer, "create_accelerator_and_postprocess", sharded)
    pipe = pipeline()
    with pytest.raises(ValueError, match="DeepSpeed or FSDP, which are not supported yet"):
        trainer(tmp_path, pipe=pipe)
    assert not hasattr(pipe.unet, "peft_config") or not pipe.unet.peft_config


def test_inversion_runs_without_the_adapters_dropout(tmp_path: Path) -> None:
    points = []
    for dropout in (0.0, 0.5):
        run = trainer(tmp_path, "inpo", peft_config=lora(init_lora_weights=False, lora_dropout=dropout))
        run.model.train()
        points.append(run.pair_losses(run.model, batch(run), epoch=0)[1].point)
        assert run.network.training
    torch.testing.assert_close(points[0].x_t, points[1].x_t)
