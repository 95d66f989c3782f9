"""AestheticScorer on a small CLIP and head in the published layouts against a straight-line computation."""

from pathlib import Path

import pytest
import torch
from PIL import Image
from rewards.reference import (
    PROMPTS,
    Weights,
    attend,
    check_gradients,
    check_scorer,
    cropped,
    double,
    linear,
    norm,
    part,
    patches,
    pictures,
    random_weights,
)

from mmalign import rewards
from mmalign.rewards import AestheticScorer, scorer

WIDTH, SIZE, PATCH, OUT, LAYERS, HEADS = 32, 24, 8, 16, 2, 4


def _head() -> Weights:
    widths = (OUT, 12, 8, 6, 4, 1)
    shapes: dict[str, tuple[int, ...]] = {}
    for place, (one, two) in zip((0, 2, 4, 6, 7), zip(widths, widths[1:], strict=False), strict=True):
        shapes |= {f"layers.{place}.weight": (two, one), f"layers.{place}.bias": (two,)}
    return random_weights(shapes)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("head") / "sac+logos+ava1-l14-linearMSE.pth"
    torch.save(_head(), path)
    return path


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole CLIP, text half included, as OpenAI's repository on the Hub holds it."""
    from transformers import CLIPConfig, CLIPModel

    small = {"hidden_size": WIDTH, "intermediate_size": 64, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS}
    config = CLIPConfig(
        text_config=small | {"vocab_size": 50, "eos_token_id": 49},
        vision_config=small | {"image_size": SIZE, "patch_size": PATCH},
        projection_dim=OUT,
    )
    model = CLIPModel(config)
    model.load_state_dict(random_weights({name: tuple(value.shape) for name, value in model.state_dict().items()}))
    folder = tmp_path_factory.mktemp("clip")
    model.save_pretrained(folder)
    return folder


def _by_hand(folder: Path, image: Image.Image) -> float:
    from safetensors.torch import load_file

    w = double(load_file(folder / "model.safetensors"))
    tower = part(w, "vision_model.")
    x = patches(cropped(image, SIZE).double(), tower["embeddings.patch_embedding.weight"])
    x = torch.cat([tower["embeddings.class_embedding"][None], x]) + tower["embeddings.position_embedding.weight"]
    x = norm(tower, "pre_layrnorm", x)
    for layer in range(LAYERS):
        block = part(tower, f"encoder.layers.{layer}.")
        read = norm(block, "layer_norm1", x)
        q, k, v = (linear(block, f"self_attn.{name}_proj", read) for name in "qkv")
        x = x + linear(block, "self_attn.out_proj", attend(q, k, v, HEADS))
        wide = linear(block, "mlp.fc1", norm(block, "layer_norm2", x))
        x = x + linear(block, "mlp.fc2", wide / (1 + torch.exp(-1.702 * wide)))
    seen = w["visual_projection.weight"] @ norm(tower, "post_layernorm", x[0])
    rating = seen / seen.norm()
    for place in (0, 2, 4, 6, 7):
        rating = linear(double(_head()), f"layers.{place}", rating)
    return float(rating)


def test_scores_equal_a_computation_by_hand(file: Path, clip: Path) -> None:
    scores = AestheticScorer.from_file(file, clip=clip).score(pictures(), PROMPTS)
    expected = torch.tensor([_by_hand(clip, image) for image in pictures()])
    torch.testing.assert_close(scores, expected, rtol=0, atol=1e-5)
    assert expected.std() > 0.01


def test_a_score_is_the_picture_s_own(file: Path, clip: Path) -> None:
    aesthetic = AestheticScorer.from_file(file, clip=clip, batch_size=2)
    check_scorer(aesthetic)
    scores = aesthetic.score(pictures(), PROMPTS)
    assert torch.equal(aesthetic.score(pictures(), ["x"] * 5), scores), "prompts are not read"
    assert aesthetic.num_truncated_prompts == 0
    with pytest.raises(ValueError, match="trained on ratings"):
        aesthetic.score(pictures(), PROMPTS, scaled=True)


def test_pixels_give_the_same_scores_and_gradients(file: Path, clip: Path) -> None:
    check_gradients(AestheticScorer.from_file(file, clip=clip), SIZE, levels=1.1)


def test_fingerprint_follows_both_parts_and_dtype(file: Path, clip: Path) -> None:
    one, same = (AestheticScorer.from_file(file, clip=clip) for _ in range(2))
    assert one.fingerprint == same.fingerprint
    others = [AestheticScorer.from_file(file, clip=clip, dtype=torch.bfloat16)]
    others += [AestheticScorer.from_file(file, clip=clip) for _ in range(2)]
    others[1].head[-1].bias.add_(1)
    others[2].projection.weight.add_(1)
    assert len({one.fingerprint, *(other.fingerprint for other in others)}) == 4
    assert others[0].head[0].weight.dtype == torch.float32 and others[0].projection.weight.dtype == torch.bfloat16
    torch.testing.assert_close(others[0].score(pictures(), PROMPTS), same.score(pictures(), PROMPTS), rtol=0, atol=0.05)


def test_the_name_leads_to_the_published_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rewards, "hub_file", lambda repo, file, name: f"{repo}/{file}")
    monkeypatch.setattr(AestheticScorer, "from_file", lambda path, **options: path)
    assert [scorer(name) for name in ("aesthetic", "aesthetic:own.pth")] == [
        "trl-lib/ddpo-aesthetic-predictor/aesthetic-model.pth",
        "own.pth",
    ]


def test_what_does_not_fit_is_refused(file: Path, clip: Path, tmp_path: Path) -> None:
    narrow, relu = tmp_path / "narrow.pth", tmp_path / "relu.pth"
    torch.save(_head() | {"layers.0.weight": torch.zeros(12, OUT - 1)}, narrow)
    with pytest.raises(ValueError, match="reads 15 numbers and .* gives 16: pass clip='openai/clip-vit-large-patch14'"):
        AestheticScorer.from_file(narrow, clip=clip)
    torch.save({name.replace(".2.", ".3."): value for name, value in _head().items()}, relu)
    with pytest.raises(ValueError, match="five linear layers, found 4"):
        AestheticScorer.from_file(relu, clip=clip)
