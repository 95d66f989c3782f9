"""One cache of encoded pairs for all trainer tests, and a scorer that needs no download."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))


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
