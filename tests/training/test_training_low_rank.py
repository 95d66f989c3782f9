"""A whole network as a LoRA of its base: exact where its difference has that rank, else nearest, and the error is the true one."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tiny import tiny_pipeline

from mmalign.training.export import export
from mmalign.training.low_rank import low_rank


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.mark.parametrize("format", ["diffusers", "peft"])
def test_a_difference_of_low_rank_is_found_exactly(format: str, tmp_path: Path) -> None:
    """Of linear layers and convolutions; the file that is written brings the base to where the network was."""
    pipe, target = tiny_pipeline("sd"), tiny_pipeline("sd").unet
    state = target.state_dict()
    for name, value in state.items():
        if name.endswith((".to_q.weight", ".conv1.weight", ".proj_in.weight")):
            flat = value.flatten(1)
            value += (0.1 * random(len(flat), 2) @ random(2, flat.shape[1])).reshape(value.shape)
    lora, error = low_rank(pipe.unet, "unet", state, 2)
    assert error < 1e-5
    export(lora, tmp_path, format=format)  # type: ignore[arg-type]
    from mmalign.training.aligned import load_aligned

    load_aligned(pipe, tmp_path)
    t, x, text = torch.tensor([500]), random(1, 4, 8, 8), random(1, 5, 16)
    with torch.no_grad():
        torch.testing.assert_close(pipe.unet(x, t, text).sample, target(x, t, text).sample, rtol=1e-4, atol=1e-4)


def test_the_error_is_that_of_the_whole_difference_and_falls_with_the_rank() -> None:
    pipe, trained = tiny_pipeline("sd"), tiny_pipeline("sd", seed=3).unet.state_dict()
    base = pipe.unet.state_dict()
    whole = torch.cat([(trained[name] - value).flatten() for name, value in base.items()])
    errors = []
    for rank in (1, 3, 1000):
        lora, error = low_rank(pipe.unet, "unet", trained, rank)
        left = {name: trained[name] - value for name, value in base.items()}
        for name, layer in lora.layers().items():
            left[f"{name}.weight"] = left[f"{name}.weight"] - (
                layer.scale * layer.up.flatten(1) @ layer.down.flatten(1)
            ).reshape(left[f"{name}.weight"].shape)
        rest = torch.cat([value.flatten() for value in left.values()])
        assert error == pytest.approx(float(rest.norm() / whole.norm()), rel=1e-4)
        errors.append(error)
    assert errors[0] > errors[1] > errors[2]
    # At full rank only what has no place in a LoRA is left.
    kept = [name for name in base if name.endswith(".weight") and trained[name].ndim > 1]
    rest = torch.cat([(trained[name] - base[name]).flatten() for name in base if name not in kept])
    assert errors[2] == pytest.approx(float(rest.norm() / whole.norm()), rel=1e-3)


def test_nothing_to_write_is_refused() -> None:
    pipe = tiny_pipeline("sd")
    with pytest.raises(ValueError, match="no linear layer or convolution differs from the base"):
        low_rank(pipe.unet, "unet", pipe.unet.state_dict(), 4)
    with pytest.raises(ValueError, match="rank must be at least 1, got 0"):
        low_rank(pipe.unet, "unet", pipe.unet.state_dict(), 0)
    lora, _ = low_rank(pipe.unet, "unet", tiny_pipeline("sd", seed=3).unet.state_dict(), 1)
    with pytest.raises(ValueError, match="merging a LoRA needs its base"):
        export(lora, "somewhere", format="merged")


def test_the_command_tells_the_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from mmalign import cli

    tiny_pipeline("sd").save_pretrained(tmp_path / "model")
    save_file(tiny_pipeline("sd", seed=3).unet.state_dict(), tmp_path / "trained.safetensors")
    common = [
        "export",
        str(tmp_path / "trained.safetensors"),
        "--format",
        "diffusers",
        "--output",
        str(tmp_path / "lora"),
    ]
    assert cli.main([*common, "--model", str(tmp_path / "model"), "--rank", "4"]) == 0
    told = capsys.readouterr().out
    assert "rank 4: " in told and "% of the difference from" in told
    assert cli.main([*common, "--rank", "4"]) == 2
    lora = [*common[:1], str(tmp_path / "lora"), *common[2:]]
    assert cli.main([*lora, "--model", str(tmp_path / "model"), "--rank", "4"]) == 2
