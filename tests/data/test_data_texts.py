"""Prompts without pictures: where they are read from, and a cache that is made once and knows what it was made from."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny_pipeline
from training.runs import pairs

from mmalign.data import load_pairs
from mmalign.data.texts import encode_prompts, load_prompts
from mmalign.denoisers import adapter_for

PROMPTS = ["a red shirt", "a blue bag", "a red shirt", " ", "black"]


def test_every_source_gives_its_distinct_prompts_in_order(tmp_path: Path) -> None:
    expected = ["a red shirt", "a blue bag", "black"]
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    (tmp_path / "prompts.json").write_text(json.dumps([{"prompt": prompt} for prompt in PROMPTS if prompt.strip()]))
    for source in (PROMPTS, tuple(PROMPTS), tmp_path / "prompts.txt", str(tmp_path / "prompts.json")):
        assert load_prompts(source).prompts == expected
    rows = pairs()
    distinct = list(dict.fromkeys(row["prompt"] for row in rows))
    assert load_prompts(rows).prompts == load_prompts(load_pairs(rows)).prompts == distinct
    assert len(load_prompts("playground").prompts) > len(load_prompts("playground", split="test").prompts) > 50
    with pytest.raises(ValueError, match="holds no prompts"):
        load_prompts([" "])


@pytest.mark.parametrize("kind", ["sd", "sdxl", "sd3"])
def test_what_is_stored_is_what_the_text_encoder_says(kind: str, tmp_path: Path) -> None:
    denoiser = adapter_for(tiny_pipeline(kind))
    encoded = encode_prompts(load_prompts(PROMPTS), denoiser, cache_dir=tmp_path, batch_size=2, progress=False)
    assert len(encoded) == 3 and encoded[2] == {"row": 2}
    with pytest.raises(IndexError):
        encoded[3]
    for rows in ([2, 0], [1]):
        found, expected = (
            encoded.conditioning(torch.tensor(rows)),
            denoiser.encode_prompt([encoded.prompts[i] for i in rows]),
        )
        torch.testing.assert_close(found.prompt_embeds, expected.prompt_embeds)
        assert (found.pooled is None) == (expected.pooled is None)
        if expected.pooled is not None:
            torch.testing.assert_close(found.pooled, expected.pooled)
    torch.testing.assert_close(encoded.empty.prompt_embeds, denoiser.encode_prompt([""]).prompt_embeds)


def test_a_cache_is_made_once_for_a_model_and_its_prompts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    denoiser = adapter_for(tiny_pipeline("sd"))
    first = encode_prompts(load_prompts(PROMPTS), denoiser, cache_dir=tmp_path, progress=False)
    asked: list[Any] = []
    encode = type(denoiser).encode_prompt
    monkeypatch.setattr(type(denoiser), "encode_prompt", lambda self, texts: asked.append(texts) or encode(self, texts))
    again = encode_prompts(load_prompts(PROMPTS), denoiser, cache_dir=tmp_path, progress=False)
    assert again.fingerprint == first.fingerprint and asked == [[""]]
    other = encode_prompts(load_prompts(PROMPTS[:2]), denoiser, cache_dir=tmp_path, progress=False)
    stranger = encode_prompts(
        load_prompts(PROMPTS), adapter_for(tiny_pipeline("sd", seed=3)), cache_dir=tmp_path, progress=False
    )
    assert len({first.fingerprint, other.fingerprint, stranger.fingerprint}) == 3


def test_a_build_that_broke_off_leaves_nothing_that_is_taken_for_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    denoiser = adapter_for(tiny_pipeline("sd"))
    encode = type(denoiser).encode_prompt

    def broken(self: Any, texts: Any) -> Any:
        if texts != [""]:
            raise RuntimeError("interrupted")
        return encode(self, texts)

    with monkeypatch.context() as patch:
        patch.setattr(type(denoiser), "encode_prompt", broken)
        with pytest.raises(RuntimeError, match="interrupted"):
            encode_prompts(load_prompts(PROMPTS), denoiser, cache_dir=tmp_path, progress=False)
    assert len(encode_prompts(load_prompts(PROMPTS), denoiser, cache_dir=tmp_path, progress=False)) == 3
