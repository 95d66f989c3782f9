"""Optimisers of 8 and 4 bits: what they need, what they keep, and that they train and resume where their package is installed."""

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from training.runs import config, history, trained, trainer
from training.test_training_resume import Stop
from transformers import Trainer
from transformers.trainer_optimizer import _BITSANDBYTES_OPTIMIZERS, _TORCHAO_OPTIMIZERS
from transformers.training_args import OptimizerNames

from mmalign.training import optimizers
from mmalign.training.optimizers import needed_package, state_bytes

PLAIN = ("adamw_torch", "adafactor", "sgd", "adagrad", "rmsprop")
PACKED = [name.value for name in (*_BITSANDBYTES_OPTIMIZERS, *_TORCHAO_OPTIMIZERS)]
ON_CPU = [name for name in PACKED if "paged" not in name]


def need(name: str) -> None:
    """Skips without the package."""
    package = needed_package(name)
    if package is not None and find_spec(package) is None:
        pytest.skip(f"{package} is not installed")


@pytest.fixture(autouse=True)
def not_compiled() -> Iterator[None]:
    """torchao compiles its step, anew for every shape, which takes longer than all these tests."""
    with torch.compiler.set_stance("force_eager"):
        yield


def held(value: Any) -> int:
    """Bytes of a tensor of the state; a quantised one is its parts. Tables of 256 levels are shared or small."""
    if not isinstance(value, Tensor) or value.dim() == 0:
        return 0
    if is_traceable_wrapper_subclass(value):
        return sum(held(getattr(value, part)) for part in value.__tensor_flatten__()[0])
    return 0 if value.numel() in (16, 256) and value.dim() == 1 else value.numel() * value.element_size()


@pytest.mark.parametrize("name", [*PLAIN, *ON_CPU])
def test_the_state_is_as_large_as_estimated(name: str, tmp_path: Path) -> None:
    need(name)
    kind, options = Trainer.get_optimizer_cls_and_kwargs(config("dpo", tmp_path, optim=name))
    # Large, too small to be quantised, no multiple of a block, a convolution, a vector.
    shapes = [(96, 128), (30, 40), (65, 97), (32, 32, 3, 3), (64,)]
    weights = [nn.Parameter(torch.randn(shape)) for shape in shapes]
    optimizer = kind(weights, **options)
    sum(weight.square().sum() for weight in weights).backward()
    optimizer.step()
    for weight in weights:
        measured = sum(held(value) for value in optimizer.state[weight].values())
        assert state_bytes(name, weight) == pytest.approx(measured, rel=0.01, abs=8), tuple(weight.shape)


def test_every_name_knows_its_package() -> None:
    for name in OptimizerNames:
        expected = {"bitsandbytes": name in _BITSANDBYTES_OPTIMIZERS, "torchao": name in _TORCHAO_OPTIMIZERS}
        assert needed_package(name.value) == next((package for package, mine in expected.items() if mine), None), name


@pytest.mark.parametrize("name", PACKED)
def test_without_its_package_the_config_says_what_to_install(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(optimizers, "find_spec", lambda package: None)
    with pytest.raises(ImportError) as caught:
        config("dpo", tmp_path, optim=name)
    assert str(caught.value) == f'optim={name!r} needs {needed_package(name)}: pip install "mmalign[8bit]"'


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"optim": "galore_adamw_8bit"}, "optim='galore_adamw_8bit' is refused: it needs optim_target_modules"),
        ({"optim": "apollo_adamw"}, "is refused: it needs optim_target_modules"),
        ({"optim": "lomo"}, "steps inside the backward pass"),
        ({"optim": "adafactor", "adam_epsilon": 1e-3}, "adam_epsilon has no effect with optim='adafactor'"),
        ({"optim": "rmsprop", "adam_beta1": 0.5}, "adam_beta1 has no effect with optim='rmsprop'"),
    ],
)
def test_what_would_fail_or_be_ignored_later_is_refused_at_once(
    options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        config("dpo", tmp_path, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"optim": "paged_adamw_8bit"}, "optim='paged_adamw_8bit' has no effect on a CPU"),
        ({"optim": "lion_8bit", "adam_epsilon": 1e-3}, "adam_epsilon has no effect with optim='lion_8bit'"),
    ],
)
def test_what_bitsandbytes_would_ignore_is_refused(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    need(options["optim"])
    with pytest.raises(ValueError, match=message):
        config("dpo", tmp_path, **options)


@pytest.mark.parametrize("name", ["adamw_bnb_8bit", "lion_8bit", "ademamix_8bit", "adamw_torch_8bit"])
def test_an_8bit_optimiser_trains_and_resumes(name: str, tmp_path: Path) -> None:
    need(name)
    options = {"optim": name, "max_steps": 4, "save_strategy": "steps", "save_steps": 2, "learning_rate": 1e-4}
    # A few of the tiny UNet's convolutions are large enough to have 8-bit states.
    whole = trainer(tmp_path / "whole", peft_config=None, **options)
    start = trained(whole)
    whole.train()
    state = [value for states in whole.optimizer.optimizer.state.values() for value in states.values()]
    assert any(part.dtype == torch.uint8 for value in state for part in parts(value))
    assert all(not torch.equal(start[key], value) for key, value in trained(whole).items() if "weight" in key)
    trainer(tmp_path / "run", peft_config=None, callbacks=[Stop(2)], **options).train()
    run = trainer(tmp_path / "run", peft_config=None, **options)
    run.train(resume_from_checkpoint="latest")
    assert history(run) == pytest.approx(history(whole), abs=1e-6)
    for key, value in trained(run).items():
        torch.testing.assert_close(value, trained(whole)[key], rtol=1e-5, atol=1e-7)


def parts(value: Any) -> list[Tensor]:
    if not isinstance(value, Tensor):
        return []
    names = value.__tensor_flatten__()[0] if is_traceable_wrapper_subclass(value) else []
    return [value, *(getattr(value, name) for name in names)]
