"""LoRAs without names: by hand on every layer, there and back, and refused where they do not fit."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny_pipeline
from torch import nn

from mmalign.training.aligned import load_aligned
from mmalign.training.lora_list import listed_weights, named_weights

RANK = 3


@pytest.fixture
def unet() -> Any:
    return tiny_pipeline("sd").unet


def released(unet: Any) -> list[torch.Tensor]:
    """A list as the released code writes it: by class, then by the modules in each."""
    generator, tensors = torch.Generator().manual_seed(0), []
    parents = [
        m for m in unet.modules() if m.__class__.__name__ in {"ResnetBlock2D", "CrossAttention", "Attention", "GEGLU"}
    ]
    for parent in parents:
        for layer in parent.modules():
            if isinstance(layer, nn.Linear):
                shapes = (layer.out_features, RANK), (RANK, layer.in_features)
            elif isinstance(layer, nn.Conv2d):
                shapes = (layer.out_channels, RANK, 1, 1), (RANK, layer.in_channels, *layer.kernel_size)
            else:
                continue
            tensors += [torch.randn(shape, generator=generator).half() * 0.1 for shape in shapes]
    return tensors


def merged_by_hand(unet: Any, tensors: list[torch.Tensor]) -> None:
    """W += up @ down, convolutions flattened; the order by class as released."""
    place = iter(tensors)
    for parent in [m for m in unet.modules() if m.__class__.__name__ in {"ResnetBlock2D", "Attention", "GEGLU"}]:
        for layer in parent.modules():
            if isinstance(layer, nn.Linear | nn.Conv2d):
                up, down = next(place).float(), next(place).float()
                layer.weight.data += (up.flatten(1) @ down.flatten(1)).reshape(layer.weight.shape)


def test_a_list_acts_as_its_products_added_to_the_weights(unet: Any, tmp_path: Path) -> None:
    tensors = released(unet)
    torch.save(tensors, tmp_path / "lora.pt")
    pipe = tiny_pipeline("sd")
    inputs = (
        torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1)),
        torch.tensor([500]),
        torch.ones(1, 7, 16),
    )
    with torch.no_grad():
        before = unet(*inputs).sample
        merged_by_hand(unet, tensors)
        expected = unet(*inputs).sample
        with pytest.raises(ValueError, match="holds pickled weights only"):
            load_aligned(pipe, tmp_path / "lora.pt")
        assert load_aligned(pipe, tmp_path / "lora.pt", allow_pickle=True) == "aligned"
        torch.testing.assert_close(pipe.unet(*inputs).sample, expected, rtol=0, atol=1e-4)
        pipe.set_adapters(["aligned"], [0.0])
        torch.testing.assert_close(pipe.unet(*inputs).sample, before, rtol=0, atol=1e-4)
    assert float((expected - before).abs().max()) > 0.01


def test_names_and_lists_are_there_and_back(unet: Any) -> None:
    tensors = released(unet)
    weights, config = named_weights(unet, tensors)
    assert config["r"] == config["lora_alpha"] == RANK and len(weights) == len(tensors)
    for one, other in zip(listed_weights(unet, weights), tensors, strict=True):
        assert torch.equal(one, other)
    kinds = ("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "conv1", "conv2", "time_emb_proj", "conv_shortcut")
    assert {kind for kind in kinds if any(f".{kind}.lora_A" in key for key in weights)} == set(kinds)
    assert not any(".ff.net.2." in key or ".proj_in." in key for key in weights)


def test_the_named_file_loads_in_plain_diffusers(unet: Any, tmp_path: Path) -> None:
    from mmalign.training.weights import save_lora

    tensors = released(unet)
    weights, config = named_weights(unet, tensors)
    save_lora("unet", weights, config, tmp_path)
    plain = tiny_pipeline("sd")
    plain.load_lora_weights(tmp_path)
    merged_by_hand(unet, tensors)
    inputs = torch.ones(1, 4, 8, 8), torch.tensor([500]), torch.ones(1, 7, 16)
    with torch.no_grad():
        torch.testing.assert_close(plain.unet(*inputs).sample, unet(*inputs).sample, rtol=0, atol=1e-4)


def test_lists_of_another_network_are_refused(unet: Any, tmp_path: Path) -> None:
    tensors = released(unet)
    with pytest.raises(ValueError, match="was trained on another network"):
        named_weights(unet, tensors[2:])
    swapped = [tensors[1], tensors[0], *tensors[2:]]
    with pytest.raises(ValueError, match="down_blocks.0.resnets.0.conv1 have shapes"):
        named_weights(unet, swapped)
    torch.save([*tensors[:-1], "x"], tmp_path / "lora.pt")
    with pytest.raises(ValueError, match="holds no state dict"):
        load_aligned(tiny_pipeline("sd"), tmp_path / "lora.pt", allow_pickle=True)


def test_the_order_in_stable_diffusion_is_that_of_the_released_files() -> None:
    """SD 1.5's own layout, weights left out: attention before residual blocks, the middle last, 32 wide everywhere it can be."""
    from accelerate import init_empty_weights
    from diffusers import UNet2DConditionModel

    from mmalign.training.lora_list import _layers

    with init_empty_weights():
        unet = UNet2DConditionModel(cross_attention_dim=768)
    names = [name for name, _ in _layers(unet)]
    attention = "down_blocks.0.attentions.0.transformer_blocks.0"
    assert names[:4] == [f"{attention}.attn1.{part}" for part in ("to_q", "to_k", "to_v", "to_out.0")]
    assert names[4] == f"{attention}.attn2.to_q"
    first = {
        block: next(place for place, name in enumerate(names) if name.startswith(block))
        for block in ("down", "up", "mid")
    }
    assert first["down"] < first["up"] < first["mid"]
    assert len(names) == 16 * (8 + 1) + 22 * 3 + 14
