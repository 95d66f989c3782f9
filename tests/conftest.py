"""One thread, and one cache of encoded pairs, for every test; scorers that need no download."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

# Tiny models gain nothing from two, and a sum split among threads rounds otherwise in another process.
torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="session")
def shared_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MMALIGN_CACHE", str(folder))
        yield folder


@pytest.fixture
def brightness(monkeypatch: pytest.MonkeyPatch) -> Any:
    from training.runs import Brightness

    from mmalign.training import prepare

    monkeypatch.setattr(prepare, "scorer", lambda name, **options: Brightness())
    return Brightness()


@pytest.fixture(scope="session")
def cascade_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The prior of Stable Cascade with its encoder beside it."""
    from tiny import save_cascade

    return save_cascade(tmp_path_factory.mktemp("cascade"))


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small CLIP in the layout of transformers."""
    from tiny import tiny_tokenizer
    from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel

    tokenizer = tiny_tokenizer()
    tokenizer.model_max_length = 16
    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    special = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    text = small | special | {"vocab_size": len(tokenizer), "max_position_embeddings": 16}
    torch.manual_seed(0)
    config = CLIPConfig(text_config=text, vision_config=small | {"image_size": 24, "patch_size": 8}, projection_dim=8)
    place = tmp_path_factory.mktemp("clip")
    CLIPModel(config).save_pretrained(place)
    tokenizer.save_pretrained(place)
    size = {"height": 24, "width": 24}
    CLIPImageProcessorPil(size={"shortest_edge": 24}, crop_size=size).save_pretrained(place)
    return place
