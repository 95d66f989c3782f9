"""The tiny models that see are whole models: they learn, speak, and come back from their folder as they were."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_vlm import KINDS, TEXT_KINDS, VIDEO_KINDS, clip, picture, tiny_vlm

# Behind the layer whose states are taken, and, of clips, between the rows of pictures only.
UNUSED = {"llava_onevision": ("post_layernorm",), "llava_next_video": ("post_layernorm", "image_newline")}


def inputs(kind: str, processor: Any, **pixels: Any) -> Any:
    """The processor's tensors for a question about a picture, a clip, or nothing."""
    shown = {"images": "image", "videos": "video"}
    parts = [{"type": shown[key]} for key in pixels if key in shown]
    content: Any = [*parts, {"type": "text", "text": "What is there?"}]
    chat = [{"role": "user", "content": content if kind in KINDS else "What is there?"}]
    text = processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    return processor(text=[text], return_tensors="pt", **pixels)


def shown(kind: str) -> dict[str, Any]:
    if kind in TEXT_KINDS:
        return {}
    if kind not in VIDEO_KINDS:
        return {"images": [[picture(100, 60).image]]}
    film = clip()
    about = {"total_num_frames": 16, "fps": 8.0, "frames_indices": list(film.indices)}
    return {"videos": [list(film.frames)], "video_metadata": [about], "do_sample_frames": False}


@pytest.mark.parametrize("kind", KINDS + TEXT_KINDS)
def test_a_tiny_model_learns_speaks_and_comes_back_from_its_folder(kind: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer

    model, processor = tiny_vlm(kind)
    batch = inputs(kind, processor, **shown(kind))
    out = model(**batch, labels=batch["input_ids"])
    names, parameters = zip(*model.named_parameters(), strict=True)
    gradients = torch.autograd.grad(out.loss, parameters, allow_unused=True)
    still = [name for name, grad in zip(names, gradients, strict=True) if grad is None or not grad.any()]
    assert all(any(part in name for part in UNUSED.get(kind, ())) for name in still), still
    spoken = model.generate(**batch, max_new_tokens=2, do_sample=False)
    assert spoken.shape[1] > batch["input_ids"].shape[1]
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    loader, reader = (
        (AutoModelForCausalLM, AutoTokenizer) if kind in TEXT_KINDS else (AutoModelForImageTextToText, AutoProcessor)
    )
    again = inputs(kind, reader.from_pretrained(tmp_path), **shown(kind))
    assert again.keys() == batch.keys()
    torch.testing.assert_close(loader.from_pretrained(tmp_path)(**again).logits, out.logits, rtol=0, atol=0)


def test_the_tiny_lfm2_vl_counts_its_tokens_as_the_specification_does() -> None:
    _, processor = tiny_vlm("lfm2_vl")
    text = "<image>"
    images = [[picture(40, 24).image], [picture(100, 60).image]]
    batch = processor(text=[text, text], images=images, return_tensors="pt", padding=True)
    assert batch["pixel_values"].shape == (4, 64, 48)
    assert batch["spatial_shapes"].tolist() == [[6, 10], [8, 8], [8, 8], [6, 10]]
    assert (batch["input_ids"] == processor.image_token_id).sum(1).tolist() == [15, 47]
    assert processor.tokenizer.pad_token_id == 0
