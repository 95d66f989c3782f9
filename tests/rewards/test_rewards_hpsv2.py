"""HPSv2Scorer on a small checkpoint in the published layout against a straight-line computation."""

import json
import logging
from pathlib import Path

import pytest
import torch
from PIL import Image
from rewards.reference import (
    MEAN,
    PROMPTS,
    STD,
    Weights,
    attend,
    check_gradients,
    check_scorer,
    double,
    gelu,
    linear,
    norm,
    part,
    patches,
    pictures,
    random_weights,
)
from torchvision.transforms import functional as tv

from mmalign import rewards
from mmalign.rewards import HPSv2Scorer, scorer

WIDTH, SIZE, PATCH, OUT, LAYERS = 16, 28, 14, 8, 2
CONFIG = {
    "embed_dim": OUT,
    "vision_cfg": {"image_size": SIZE, "layers": LAYERS, "width": WIDTH, "head_width": 8, "patch_size": PATCH},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": WIDTH, "heads": 4, "layers": LAYERS},
}


def _shapes() -> dict[str, tuple[int, ...]]:
    """The names in HPS_v2_compressed.pt, at small sizes."""
    shapes: dict[str, tuple[int, ...]] = {
        "positional_embedding": (77, WIDTH),
        "text_projection": (WIDTH, OUT),
        "logit_scale": (),
        "token_embedding.weight": (49408, WIDTH),
        "visual.class_embedding": (WIDTH,),
        "visual.positional_embedding": (5, WIDTH),
        "visual.proj": (WIDTH, OUT),
        "visual.conv1.weight": (WIDTH, 3, PATCH, PATCH),
    }
    norms = ["ln_final", "visual.ln_pre", "visual.ln_post"]
    for tower in ("visual.transformer", "transformer"):
        for layer in range(LAYERS):
            block = f"{tower}.resblocks.{layer}"
            norms += [f"{block}.ln_1", f"{block}.ln_2"]
            shapes |= {f"{block}.attn.in_proj_weight": (3 * WIDTH, WIDTH), f"{block}.attn.in_proj_bias": (3 * WIDTH,)}
            shapes |= {f"{block}.attn.out_proj.weight": (WIDTH, WIDTH), f"{block}.attn.out_proj.bias": (WIDTH,)}
            shapes |= {f"{block}.mlp.c_fc.weight": (4 * WIDTH, WIDTH), f"{block}.mlp.c_fc.bias": (4 * WIDTH,)}
            shapes |= {f"{block}.mlp.c_proj.weight": (WIDTH, 4 * WIDTH), f"{block}.mlp.c_proj.bias": (WIDTH,)}
    return shapes | {f"{name}.{kind}": (WIDTH,) for name in norms for kind in ("weight", "bias")}


@pytest.fixture(scope="module")
def layout(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("layout")
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": CONFIG}))
    return f"local-dir:{folder}"


@pytest.fixture(scope="module")
def weights() -> Weights:
    return random_weights(_shapes()) | {"logit_scale": torch.tensor(100.0).log()}


@pytest.fixture(scope="module")
def file(weights: Weights, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("hps") / "HPS_v2_compressed.pt"
    torch.save({"epoch": 1, "name": "hps", "state_dict": weights}, path)
    return path


def _blocks(w: Weights, x: torch.Tensor, heads: int, causal: bool) -> torch.Tensor:
    for layer in range(LAYERS):
        block = part(w, f"resblocks.{layer}.")
        q, k, v = (norm(block, "ln_1", x) @ block["attn.in_proj_weight"].T + block["attn.in_proj_bias"]).chunk(3, 1)
        x = x + linear(block, "attn.out_proj", attend(q, k, v, heads, causal))
        x = x + linear(block, "mlp.c_proj", gelu(linear(block, "mlp.c_fc", norm(block, "ln_2", x))))
    return x


def _by_hand(weights: Weights, image: Image.Image, prompt: str, antialias: bool = True) -> float:
    import open_clip

    w = double(weights)
    pixels = tv.to_tensor(image)
    scale = SIZE / max(image.size)
    height, width = round(image.height * scale), round(image.width * scale)
    if scale != 1:
        pixels = tv.resize(pixels, [height, width], tv.InterpolationMode.BICUBIC, antialias=antialias)
    down, right = SIZE - height, SIZE - width
    pixels = tv.pad(pixels, [right // 2, down // 2, right - right // 2, down - down // 2], fill=0)
    x = patches(tv.normalize(pixels, MEAN, STD).double(), w["visual.conv1.weight"])
    x = torch.cat([w["visual.class_embedding"][None], x]) + w["visual.positional_embedding"]
    x = _blocks(part(w, "visual.transformer."), norm(w, "visual.ln_pre", x), 2, causal=False)
    seen = norm(w, "visual.ln_post", x[0]) @ w["visual.proj"]
    tokens = open_clip.get_tokenizer("ViT-H-14")([prompt])[0]
    tokens = tokens[: int(tokens.argmax()) + 1]
    x = w["token_embedding.weight"][tokens] + w["positional_embedding"][: len(tokens)]
    x = _blocks(part(w, "transformer."), x, 4, causal=True)
    read = norm(w, "ln_final", x[-1]) @ w["text_projection"]
    return float(seen @ read / (seen.norm() * read.norm()))


@pytest.mark.parametrize("antialias", [True, False])
def test_scores_equal_a_computation_by_hand(file: Path, layout: str, weights: Weights, antialias: bool) -> None:
    hps = HPSv2Scorer.from_file(file, layout=layout, antialias=antialias)
    scores = hps.score(pictures(), PROMPTS)
    pairs = zip(pictures(), PROMPTS, strict=True)
    expected = torch.tensor([_by_hand(weights, image, prompt, antialias) for image, prompt in pairs])
    torch.testing.assert_close(scores, expected, rtol=0, atol=1e-5)
    assert expected.std() > 0.05
    torch.testing.assert_close(hps.score(pictures(), PROMPTS, scaled=True), 100 * scores)
    assert hps.logit_scale == pytest.approx(100)


def test_a_score_is_the_pair_s_own(file: Path, layout: str) -> None:
    check_scorer(HPSv2Scorer.from_file(file, layout=layout, batch_size=2))


def test_pixels_give_the_same_scores_and_gradients(file: Path, layout: str) -> None:
    check_gradients(HPSv2Scorer.from_file(file, layout=layout), SIZE, levels=0)


def test_cut_prompts_are_counted_and_said_once(file: Path, layout: str, caplog: pytest.LogCaptureFixture) -> None:
    hps = HPSv2Scorer.from_file(file, layout=layout)
    words = ["sneaker " * 75, "sneaker " * 76]
    assert hps.count_truncated(words) == 1
    with caplog.at_level(logging.WARNING):
        hps.score(pictures(), PROMPTS)
        hps.score(pictures(), PROMPTS)
    assert hps.num_truncated_prompts == 2
    assert caplog.messages == [
        "hpsv2 reads the beginning of long prompts only: 1 of 5 were cut (said once; num_truncated_prompts counts on)"
    ]


def test_fingerprint_follows_weights_dtype_layout_and_resizing(file: Path, layout: str, weights: Weights) -> None:
    from safetensors.torch import save_file

    one = HPSv2Scorer.from_file(file, layout=layout)
    tensors = file.with_suffix(".safetensors")
    save_file(weights, tensors)
    again = HPSv2Scorer.from_file(tensors, layout=layout, name="hpsv2.1")
    assert again.fingerprint == one.fingerprint and again.name == "hpsv2.1"
    assert torch.equal(again.score(pictures(), PROMPTS), one.score(pictures(), PROMPTS))
    others = [HPSv2Scorer.from_file(file, layout=layout, dtype=torch.bfloat16)]
    others.append(HPSv2Scorer.from_file(file, layout=layout, antialias=False))
    others.append(HPSv2Scorer.from_file(file, layout=layout))
    others[-1].config = CONFIG | {"quick_gelu": True}
    others.append(HPSv2Scorer.from_file(file, layout=layout))
    others[-1].model.visual.proj.data.add_(1)
    assert len({one.fingerprint, *(other.fingerprint for other in others)}) == 5
    half = others[0].score(pictures(), PROMPTS)
    torch.testing.assert_close(half, one.score(pictures(), PROMPTS), rtol=0, atol=0.05)


def test_names_lead_to_the_published_files(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple] = []
    monkeypatch.setattr(rewards, "hub_file", lambda repo, file, name: f"{repo}/{file}")
    monkeypatch.setattr(HPSv2Scorer, "from_file", lambda path, **options: asked.append((path, options["name"])))
    for name in ("hpsv2", "hpsv2.1", "hpsv2:own.pt"):
        scorer(name)
    assert asked == [
        ("xswu/HPSv2/HPS_v2_compressed.pt", "hpsv2"),
        ("xswu/HPSv2/HPS_v2.1_compressed.pt", "hpsv2.1"),
        ("own.pt", "hpsv2"),
    ]


def test_the_default_layout_is_open_clip_s(file: Path) -> None:
    with pytest.raises(ValueError, match="not the weights of HPSv2 .ViT-H-14.: .* is missing"):
        scorer(f"hpsv2:{file}")
    with pytest.raises(ValueError, match="HPSv2's is 'ViT-H-14'"):
        HPSv2Scorer.from_file(file, layout="ViT-Z")
