"""ClipScorer against an independent computation on a tiny random CLIP."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from rewards.reference import check_gradients, check_scorer

from mmalign import rewards
from mmalign.rewards import ClipScorer, Scorer, scorer

PROMPTS = ["a red shirt", "a blue bag on a black background", "", "a red shirt", "sneaker " * 20]


@pytest.fixture
def folder(clip_folder: Path) -> Path:
    return clip_folder


@pytest.fixture(scope="module")
def images() -> list[Image.Image]:
    rng = np.random.default_rng(0)
    shapes = [(24, 24), (40, 30), (25, 60), (24, 24), (33, 33)]
    return [Image.fromarray(rng.integers(0, 256, (*shape, 3), dtype=np.uint8)) for shape in shapes]


def _by_hand(folder: Path, image: Image.Image, prompt: str) -> float:
    """One picture, one prompt: Pillow's bicubic resize and centre crop, no padding, projections as matrices."""
    from transformers import AutoTokenizer, CLIPModel

    model = CLIPModel.from_pretrained(folder).double().eval()
    short = 24 / min(image.size)
    resized = image.resize((int(image.width * short), int(image.height * short)), Image.Resampling.BICUBIC)
    left, top = (resized.width - 24) // 2, (resized.height - 24) // 2
    values = np.asarray(resized.crop((left, top, left + 24, top + 24)), dtype=np.float64) / 255
    mean, std = np.array([0.48145466, 0.4578275, 0.40821073]), np.array([0.26862954, 0.26130258, 0.27577711])
    pixels = torch.from_numpy(((values - mean) / std).transpose(2, 0, 1))[None]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(prompt, truncation=False, verbose=False).input_ids
    ids = ids if len(ids) <= 16 else [*ids[:15], tokenizer.eos_token_id]
    with torch.no_grad():
        seen = model.visual_projection.weight @ model.vision_model(pixels).pooler_output[0]
        hidden = model.text_model(torch.tensor([ids])).last_hidden_state[0]
        read = model.text_projection.weight @ hidden[ids.index(tokenizer.eos_token_id)]
    return float(seen @ read / (seen.norm() * read.norm()))


@pytest.mark.parametrize("batch_size", [1, 2, 32])
def test_scores_equal_a_computation_by_hand(folder: Path, images: list[Image.Image], batch_size: int) -> None:
    clip = ClipScorer.from_pretrained(folder, batch_size=batch_size)
    scores = clip.score(images, PROMPTS)
    expected = [_by_hand(folder, image, prompt) for image, prompt in zip(images, PROMPTS, strict=True)]
    assert scores.shape == (5,) and scores.dtype == torch.float32 and not scores.requires_grad
    torch.testing.assert_close(scores.double(), torch.tensor(expected).double(), rtol=0, atol=1e-6)
    torch.testing.assert_close(clip.score(images, PROMPTS, scaled=True), scores * clip.logit_scale)
    assert clip.logit_scale == pytest.approx(float(np.exp(2.6592)), rel=1e-5)


def test_a_score_is_the_pair_s_own(folder: Path, images: list[Image.Image]) -> None:
    clip = scorer(f"clip:{folder}")
    scores = clip.score(images, PROMPTS)
    order = [3, 0, 4, 2, 1]
    mixed = clip.score([images[i] for i in order], [PROMPTS[i] for i in order])
    torch.testing.assert_close(mixed, scores[order], rtol=0, atol=1e-6)
    assert clip.score([], []).shape == (0,) and isinstance(clip, Scorer) and clip.name == f"clip:{folder}"


def test_truncated_prompts_are_counted(folder: Path, images: list[Image.Image]) -> None:
    clip = ClipScorer.from_pretrained(folder)
    assert clip.count_truncated(PROMPTS) == 1 and clip.num_truncated_prompts == 0
    clip.score(images, PROMPTS)
    assert clip.num_truncated_prompts == 1


def test_pixels_give_the_same_scores_and_gradients(folder: Path) -> None:
    check_gradients(ClipScorer.from_pretrained(folder), 24, levels=1.1)
    check_scorer(ClipScorer.from_pretrained(folder, batch_size=2))


def test_pixels_follow_the_processor_s_own_sizes_or_are_refused(folder: Path, images: list[Image.Image]) -> None:
    from mmalign.rewards.pixels import to_pixels

    clip = ClipScorer.from_pretrained(folder)
    clip.image_processor.size = {"shortest_edge": 31}
    clip.image_processor.image_mean = [0.1, 0.2, 0.3]
    for image in images:
        off = clip.preprocess_pixels(to_pixels(image)) - clip.preprocess([image])
        assert off.abs().max() <= 1.1 / 255 / 0.26
    clip.image_processor.size, clip.image_processor.do_center_crop = {"height": 24, "width": 24}, False
    for image in images:
        if image.size == (30, 40):
            # Pillow resizes some shapes the other way round, columns before rows, which here no picture to be trained on has.
            continue
        off = clip.preprocess_pixels(to_pixels(image)) - clip.preprocess([image])
        assert off.shape == (1, 3, 24, 24) and off.abs().max() <= 1.1 / 255 / 0.26
    for change in ({"size": {"height": 24, "width": 24}}, {"size": {"shortest_edge": 9}}, {"do_normalize": False}):
        clip = ClipScorer.from_pretrained(folder)
        for name, value in change.items():
            setattr(clip.image_processor, name, value)
        with pytest.raises(ValueError, match="gradients pass only through CLIP's own preprocessing"):
            clip.score_pixels(torch.zeros(1, 3, 24, 24), ["x"])


def test_pixels_are_checked(folder: Path) -> None:
    clip = ClipScorer.from_pretrained(folder)
    for shape in ((2, 3, 24, 24), (1, 4, 24, 24), (3, 24, 24)):
        with pytest.raises(ValueError, match=r"pixels must be \(1, 3, H, W\) for 1 prompts"):
            clip.score_pixels(torch.zeros(shape), ["x"])
    for outside in (-1.0, 1.01):
        with pytest.raises(ValueError, match=r"pass \(x / 2 \+ 0.5\).clamp\(0, 1\)"):
            clip.score_pixels(torch.full((1, 3, 24, 24), outside), ["x"])
    assert clip.score_pixels(torch.zeros(0, 3, 24, 24), []).shape == (0,)
    scaled = clip.score_pixels(torch.ones(1, 3, 24, 24), ["x " * 20], scaled=True)
    torch.testing.assert_close(scaled, clip.score_pixels(torch.ones(1, 3, 24, 24), ["x " * 20]) * clip.logit_scale)
    assert clip.num_truncated_prompts == 2


def test_fingerprint_follows_weights_dtype_tokenizer_and_preprocessing(folder: Path) -> None:
    one, same = ClipScorer.from_pretrained(folder), ClipScorer.from_pretrained(folder, name="other name")
    assert one.fingerprint == same.fingerprint
    one.score([Image.new("RGB", (24, 24))], ["a red shirt"])
    del one.__dict__["fingerprint"]
    assert one.fingerprint == same.fingerprint, "scoring changes nothing"
    changed = [ClipScorer.from_pretrained(folder, dtype=torch.float16)]
    for change in (
        lambda clip: clip.model.logit_scale.data.add_(1),
        lambda clip: setattr(clip.tokenizer, "model_max_length", 9),
        lambda clip: setattr(clip.image_processor, "do_center_crop", False),
    ):
        changed.append(ClipScorer.from_pretrained(folder))
        change(changed[-1])
    assert len({one.fingerprint, *(clip.fingerprint for clip in changed)}) == 5


def test_the_processor_may_lie_elsewhere(folder: Path, images: list[Image.Image], tmp_path: Path) -> None:
    from transformers import CLIPModel

    CLIPModel.from_pretrained(folder).save_pretrained(tmp_path)
    apart = ClipScorer.from_pretrained(tmp_path, folder)
    assert torch.equal(apart.score(images, PROMPTS), ClipScorer.from_pretrained(folder).score(images, PROMPTS))
    with pytest.raises(ValueError, match="processor_revision has no effect"):
        ClipScorer.from_pretrained(folder, processor_revision="x")


def test_errors_name_the_remedy(
    folder: Path, images: list[Image.Image], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clip = ClipScorer.from_pretrained(folder)
    with pytest.raises(ValueError, match="5 images and 1 prompts"):
        clip.score(images, ["x"])
    with pytest.raises(ValueError, match="batch_size"):
        ClipScorer.from_pretrained(folder, batch_size=0)
    clip.model.visual_projection.weight.data.fill_(float("nan"))
    with pytest.raises(ValueError, match="NaN or infinite scores"):
        clip.score(images, PROMPTS)
    for unknown in ("hpsv9", "clip:"):
        with pytest.raises(
            ValueError, match="there are pickscore, .*clip:<Hub id or folder>, denscore:<Hub id or folder>, playground"
        ):
            scorer(unknown)
    monkeypatch.setattr(rewards, "files", lambda package: tmp_path)
    with pytest.raises(ValueError, match="mmalign.playground.build reward"):
        scorer("playground")


def test_names_lead_to_the_right_places(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple] = []
    record: Callable = lambda *names, **options: asked.append((names, options["name"]))  # noqa: E731
    monkeypatch.setattr(ClipScorer, "from_pretrained", record)
    scorer("pickscore")
    assert asked == [(("yuvalkirstain/PickScore_v1", "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"), "pickscore")]
    (tmp_path / "assets").mkdir()
    (tmp_path / "assets" / "reward-clip").symlink_to(folder)
    monkeypatch.setattr(rewards, "files", lambda package: tmp_path)
    scorer("playground")
    assert asked[1] == ((tmp_path / "assets" / "reward-clip",), "playground")


def test_imports_are_light() -> None:
    code = (
        "import sys, mmalign.data, mmalign.rewards;"
        "heavy = {'datasets', 'transformers', 'diffusers', 'pyarrow', 'peft', 'open_clip'} & set(sys.modules);"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_fingerprint_follows_active_adapters(folder: Path) -> None:
    from peft import LoraConfig, inject_adapter_in_model

    from mmalign.rewards.fingerprints import module_hash

    clip = ClipScorer.from_pretrained(folder)
    model = inject_adapter_in_model(LoraConfig(r=2, target_modules=["q_proj"]), clip.model)
    layers = [layer for layer in model.modules() if type(layer).__name__ == "Linear" and "lora_A" in dir(layer)]
    on = module_hash(model)
    for layer in layers:
        layer.enable_adapters(False)
    assert layers and module_hash(model) != on
