"""A LoRA on a base whose weights are quantised: by bitsandbytes and torchao where they are installed, and by a stand-in."""

import copy
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import save_tiny, tiny_pipeline
from torch import Tensor, nn
from torch.testing._internal.two_tensor import TwoTensor
from training.runs import batch, history, losses, moved_lora, trainer
from training.test_training_resume import Stop

from mmalign import DiffusionDPOPipeline
from mmalign.denoisers.base import module_dtype
from mmalign.denoisers.parts import is_quantized, stored
from mmalign.likelihood.reference import make_reference
from mmalign.training.estimate import memory_of
from mmalign.training.loading import quantization

BACKENDS = ("stand-in", "nf4", "int8", "torchao")


class Int8Linear(nn.Module):
    """A linear layer whose weight is held in int8, with one scale a row."""

    def __init__(self, plain: nn.Linear) -> None:
        super().__init__()
        scale = plain.weight.detach().abs().amax(1, keepdim=True) / 127
        self.weight = nn.Parameter((plain.weight.detach() / scale).round().to(torch.int8), requires_grad=False)
        self.bias = plain.bias
        self.register_buffer("scale", scale)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight.to(x.dtype) * self.scale.to(x.dtype), self.bias)


def quantized(backend: str, folder: Path, patch: pytest.MonkeyPatch) -> Any:
    """The tiny pipeline with a quantised UNet; diffusers asks for a GPU that bitsandbytes itself does not need."""
    if backend == "stand-in":
        pipe = DiffusionDPOPipeline._adopt(tiny_pipeline("sd"))
        for module in list(pipe.unet.modules()):
            # Feed-forward and embedding layers; peft adapts no layer of this class.
            for name, child in module.named_children():
                if type(child) is nn.Linear and name not in ("to_q", "to_v"):
                    setattr(module, name, Int8Linear(child))
        return pipe
    package = "torchao" if backend == "torchao" else "bitsandbytes"
    if find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    source = save_tiny("sd", folder / "base")
    if backend == "torchao":
        from diffusers import PipelineQuantizationConfig, TorchAoConfig
        from torchao.quantization import Int8WeightOnlyConfig

        options = PipelineQuantizationConfig(quant_mapping={"unet": TorchAoConfig(Int8WeightOnlyConfig())})
    else:
        from diffusers.quantizers.bitsandbytes import bnb_quantizer

        for kind in (bnb_quantizer.BnB4BitDiffusersQuantizer, bnb_quantizer.BnB8BitDiffusersQuantizer):
            patch.setattr(kind, "validate_environment", lambda self, *args, **kwargs: None)
            patch.setattr(kind, "update_device_map", lambda self, device_map: device_map)
        with pytest.MonkeyPatch.context() as inside:
            inside.setattr(torch.accelerator, "is_available", lambda: True)
            options = quantization(backend, torch.float32)
    return DiffusionDPOPipeline.from_pretrained(source, quantization_config=options, dtype=torch.float32)


@pytest.fixture(params=BACKENDS)
def pipe(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    return quantized(request.param, tmp_path, monkeypatch)


def test_a_lora_trains_resumes_and_is_saved_alone(pipe: Any, tmp_path: Path) -> None:
    assert is_quantized(pipe.unet) and module_dtype(pipe.unet) == torch.float32
    assert not any(is_quantized(part) for part in (pipe.vae, pipe.text_encoder))
    base = make_reference(copy.deepcopy(pipe.unet)).fingerprint()
    options: dict[str, Any] = {"max_steps": 4, "learning_rate": 1e-3, "save_strategy": "steps", "save_steps": 2}
    run = trainer(tmp_path / "run", pipe=pipe, peft_config=moved_lora(), callbacks=[Stop(2)], **options)
    # The adapter's rank-2 factors are trained, in float32, and nothing else; the base is the reference.
    assert {p.dtype for p in run.network.parameters() if p.requires_grad} == {torch.float32}
    assert all("lora" in name for name, p in run.network.named_parameters() if p.requires_grad)
    assert run.reference.kind == "adapter" and run.reference.fingerprint() == base
    with run.reference.model(run.network) as frozen:
        off = run.denoiser.predict(frozen, *point(run))
    on = run.denoiser.predict(run.network, *point(run))
    assert (on - off).abs().max() > 1e-3
    run.train()
    assert run.reference.fingerprint() == base
    whole_pipe = copy.deepcopy(pipe)
    for part in (pipe, whole_pipe):
        part.unet.unload_lora()
    whole = trainer(tmp_path / "whole", pipe=whole_pipe, peft_config=moved_lora(), **options)
    whole.train()
    again = trainer(tmp_path / "run", pipe=pipe, peft_config=moved_lora(), **options)
    again.train(resume_from_checkpoint="latest")
    assert history(again) == pytest.approx(history(whole), abs=1e-6)
    again.save_model()
    plain = tiny_pipeline("sd")
    plain.load_lora_weights(tmp_path / "run")
    with pytest.raises(ValueError, match="the unet is quantised, and merging its LoRA would round both"):
        pipe.save_pretrained(tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def point(run: Any) -> tuple[Any, Any, Any]:
    pairs_ = run._pairs(run._train, batch(run), 0)
    return pairs_.x0, torch.full((4,), 500), pairs_.conditioning


def test_quantised_weights_are_not_trained(pipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mmalign.training import trainer as module

    monkeypatch.setattr(module, "prepare", lambda *a, **k: pytest.fail("encoded"))
    with pytest.raises(ValueError, match="quantised weights cannot be trained: pass a peft_config"):
        trainer(tmp_path, pipe=pipe, peft_config=None)


def test_memory_counts_what_quantised_weights_take(pipe: Any) -> None:
    plain = tiny_pipeline("sd").unet
    whole = memory_of(plain, None, "adamw_torch").weights
    saved = 0
    for name, module in plain.named_modules():
        other = pipe.unet.get_submodule(name)
        if isinstance(module, nn.Linear) and is_quantized(other):
            rows, columns = module.weight.shape
            if type(other.weight).__name__ == "Params4bit":
                # Half a byte a weight and a scale for 64 of them, with a table of levels and a header a layer.
                small = rows * columns // 2 + 4 * -(-rows * columns // 64) + 64
            else:
                small = rows * columns + 4 * rows
            saved += 4 * rows * columns - small
    assert saved > 0.2 * whole
    assert memory_of(pipe.unet, None, "adamw_torch").weights == pytest.approx(whole - saved, rel=0.03)


def test_a_reference_of_another_quantisation_is_refused(pipe: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="another dtype or quantisation"):
        trainer(tmp_path, pipe=pipe, ref_model=tiny_pipeline("sd", 1).unet)


def test_rounding_of_the_base_is_the_references_too(pipe: Any, tmp_path: Path) -> None:
    """A LoRA that starts at its base prefers nothing, however coarse the base is."""
    run = trainer(tmp_path, pipe=pipe)
    torch.testing.assert_close(losses(run), torch.full((2,), 0.693147), rtol=1e-5, atol=1e-6)


def test_a_quantised_tensor_is_its_parts() -> None:
    inner = TwoTensor(torch.ones(2), torch.zeros(2))
    assert [part.tolist() for part in stored(inner)] == [[1.0, 1.0], [0.0, 0.0]]
    plain = torch.ones(3)
    assert stored(plain)[0] is plain
    assert not is_quantized(nn.Linear(2, 2).to(torch.bfloat16))


def test_what_is_missing_for_a_quantised_base_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    from mmalign.training import loading

    monkeypatch.setattr(loading, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r'needs bitsandbytes: pip install "mmalign\[8bit\]"'):
        quantization("nf4", torch.bfloat16)
    monkeypatch.setattr(loading, "find_spec", lambda name: object())
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    with pytest.raises(ValueError, match="on a GPU only"):
        quantization("nf4", torch.bfloat16)
