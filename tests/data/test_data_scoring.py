"""Scores of pairs: right ones, for right rows, kept and gone on with."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from mmalign.data import cache_size, clear_cache, load_pairs, score_pairs, scoring

Rows = Callable[..., list[dict[str, Any]]]


class Brightness:
    """A scorer that anyone can check: mean brightness, and a little for the prompt's length."""

    name = "brightness"

    def __init__(self, fingerprint: str = "one", fail_at: int | None = None) -> None:
        self.fingerprint, self.fail_at, self.sizes = fingerprint, fail_at, []

    def score(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> torch.Tensor:
        if len(self.sizes) == self.fail_at:
            raise KeyboardInterrupt
        self.sizes.append(len(images))
        return torch.tensor([self.of(image, prompt) for image, prompt in zip(images, prompts, strict=True)])

    @staticmethod
    def of(image: Image.Image, prompt: str) -> float:
        return float(np.asarray(image).mean()) / 255 + len(prompt) / 1000


def test_scores_stand_at_their_rows_and_bad_rows_have_none(tmp_path: Path, pickapic_rows: Rows) -> None:
    items = pickapic_rows(7)
    items[2]["jpg_0"] = b"broken"
    source = load_pairs(items)
    scores = score_pairs(source, Brightness(), batch_size=3, cache_dir=tmp_path, progress=False)
    assert scores.shape == (7, 2) and scores[2].isnan().all()
    for row in (0, 1, 3, 4, 5, 6):
        record = source[row]
        expected = [Brightness.of(image, record.prompt) for image in (record.image_0, record.image_1)]
        torch.testing.assert_close(scores[row], torch.tensor(expected))


def test_scores_are_kept_by_source_and_scorer(
    tmp_path: Path, pickapic_rows: Rows, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = load_pairs(pickapic_rows(4))
    first = Brightness()
    scores = score_pairs(source, first, batch_size=2, cache_dir=tmp_path, progress=False)
    assert first.sizes == [4, 4]
    again, other = Brightness(), Brightness("two")
    assert torch.equal(score_pairs(source, again, cache_dir=tmp_path, progress=False), scores) and again.sizes == []
    score_pairs(source, other, cache_dir=tmp_path, progress=False)
    score_pairs(load_pairs(pickapic_rows(3)), again, cache_dir=tmp_path, progress=False)
    assert other.sizes == [8] and again.sizes == [6]
    monkeypatch.setenv("HOME", str(tmp_path.parent))
    assert cache_size(f"~/{tmp_path.name}") == cache_size(tmp_path)
    assert cache_size(tmp_path) > 0 and clear_cache(tmp_path) > 0 and list(tmp_path.iterdir()) == []


def test_an_interrupted_pass_goes_on(tmp_path: Path, pickapic_rows: Rows, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scoring, "_SAVE_EVERY", 3)
    items = pickapic_rows(8)
    items[1]["jpg_0"] = b"broken"
    source = load_pairs(items)
    whole = score_pairs(source, Brightness("whole"), batch_size=2, cache_dir=tmp_path, progress=False)
    with pytest.raises(KeyboardInterrupt):
        score_pairs(source, Brightness(fail_at=2), batch_size=2, cache_dir=tmp_path, progress=False)
    rest = Brightness()
    scores = score_pairs(source, rest, batch_size=2, cache_dir=tmp_path, progress=False)
    torch.testing.assert_close(scores, whole, equal_nan=True)
    assert sum(rest.sizes) == 2 * 5


@pytest.mark.parametrize("answer", [torch.zeros(3), torch.full((4,), torch.nan)])
def test_a_scorer_s_answer_is_checked(answer: torch.Tensor, tmp_path: Path, pickapic_rows: Rows) -> None:
    broken = Brightness()
    broken.score = lambda images, prompts: answer  # type: ignore[method-assign]
    with pytest.raises(ValueError, match="brightness must give one finite score a picture"):
        score_pairs(load_pairs(pickapic_rows(2)), broken, cache_dir=tmp_path, progress=False)
    assert cache_size(tmp_path) == 0
