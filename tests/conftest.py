"""One thread, and one cache of encoded pairs, for every test; a scorer that needs no download."""

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
