"""ImageRewardScorer on a small checkpoint in the published layout against a straight-line computation."""

import logging
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
    gelu,
    linear,
    norm,
    part,
    patches,
    pictures,
    random_weights,
)

from mmalign import rewards
from mmalign.rewards import ImageRewardScorer, scorer

# Heads are 64 wide, so that these are three in the picture half and two in the text half.
SEEN, READ, SIZE, PATCH, LAYERS = 192, 128, 16, 8, 2
WORDS = "[PAD] [UNK] [CLS] [SEP] [MASK] a red blue shirt bag on black background sneaker".split()


def _shapes() -> dict[str, tuple[int, ...]]:
    """The names in ImageReward.pt, at small sizes."""
    shapes: dict[str, tuple[int, ...]] = {"cls_token": (1, 1, SEEN), "pos_embed": (1, 5, SEEN)}
    shapes |= {"patch_embed.proj.weight": (SEEN, 3, PATCH, PATCH), "patch_embed.proj.bias": (SEEN,)}
    shapes |= {"norm.weight": (SEEN,), "norm.bias": (SEEN,)}
    for layer in range(LAYERS):
        sizes = {"attn.qkv": (3 * SEEN, SEEN), "attn.proj": (SEEN, SEEN), "mlp.fc1": (64, SEEN), "mlp.fc2": (SEEN, 64)}
        for name, size in sizes.items() | {("norm1", (SEEN,)), ("norm2", (SEEN,))}:
            shapes |= {f"blocks.{layer}.{name}.weight": size, f"blocks.{layer}.{name}.bias": size[:1]}
    shapes = {f"blip.visual_encoder.{name}": size for name, size in shapes.items()}
    text: dict[str, tuple[int, ...]] = {
        "embeddings.word_embeddings": (len(WORDS) + 2, READ),
        "embeddings.position_embeddings": (40, READ),
        "embeddings.LayerNorm": (READ,),
    }
    for layer in range(LAYERS):
        for kind, width in (("attention", READ), ("crossattention", SEEN)):
            block = f"encoder.layer.{layer}.{kind}"
            text |= {f"{block}.self.query": (READ, READ), f"{block}.output.dense": (READ, READ)}
            text |= {f"{block}.self.key": (READ, width), f"{block}.self.value": (READ, width)}
            text |= {f"{block}.output.LayerNorm": (READ,)}
        block = f"encoder.layer.{layer}"
        text |= {f"{block}.intermediate.dense": (96, READ), f"{block}.output.dense": (READ, 96)}
        text |= {f"{block}.output.LayerNorm": (READ,)}
    for name, size in text.items():
        shapes[f"blip.text_encoder.{name}.weight"] = size
        if not name.endswith("_embeddings"):
            shapes[f"blip.text_encoder.{name}.bias"] = size[:1]
    widths = (READ, 12, 8, 6, 4, 1)
    for place, (one, two) in zip((0, 2, 4, 6, 7), zip(widths, widths[1:], strict=False), strict=True):
        shapes |= {f"mlp.layers.{place}.weight": (two, one), f"mlp.layers.{place}.bias": (two,)}
    # In the file, though the reward does not use them.
    return shapes | {"blip.vision_proj.weight": (4, SEEN), "blip.text_proj.weight": (4, READ)}


@pytest.fixture(scope="module")
def weights() -> Weights:
    weights = random_weights(dict(sorted(_shapes().items())))
    return weights | {"blip.text_encoder.embeddings.position_ids": torch.arange(40)[None]}


@pytest.fixture(scope="module")
def file(weights: Weights, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("imagereward") / "ImageReward.pt"
    torch.save(weights, path)
    return path


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import BertTokenizer

    folder = tmp_path_factory.mktemp("tokenizer")
    BertTokenizer(vocab={word: index for index, word in enumerate(WORDS)}).save_pretrained(folder)
    return folder


def _see(w: Weights, image: Image.Image) -> torch.Tensor:
    x = patches(cropped(image, SIZE).double(), w["patch_embed.proj.weight"]) + w["patch_embed.proj.bias"]
    x = torch.cat([w["cls_token"][0], x]) + w["pos_embed"][0]
    for layer in range(LAYERS):
        block = part(w, f"blocks.{layer}.")
        q, k, v = linear(block, "attn.qkv", norm(block, "norm1", x, 1e-6)).chunk(3, 1)
        x = x + linear(block, "attn.proj", attend(q, k, v, SEEN // 64))
        x = x + linear(block, "mlp.fc2", gelu(linear(block, "mlp.fc1", norm(block, "norm2", x, 1e-6))))
    return norm(w, "norm", x, 1e-6)


def _by_hand(weights: Weights, image: Image.Image, prompt: str) -> float:
    w = double(weights)
    seen = _see(part(w, "blip.visual_encoder."), image)
    text = part(w, "blip.text_encoder.")
    ids = [WORDS.index("[CLS]"), *(WORDS.index(word) for word in prompt.split()[:33]), WORDS.index("[SEP]")]
    x = text["embeddings.word_embeddings.weight"][ids] + text["embeddings.position_embeddings.weight"][: len(ids)]
    x = norm(text, "embeddings.LayerNorm", x, 1e-12)
    for layer in range(LAYERS):
        block = part(text, f"encoder.layer.{layer}.")
        for kind, source in (("attention", None), ("crossattention", seen)):
            read = x if source is None else source
            q, k, v = (
                linear(block, f"{kind}.self.query", x),
                *(linear(block, f"{kind}.self.{name}", read) for name in ("key", "value")),
            )
            x = x + linear(block, f"{kind}.output.dense", attend(q, k, v, READ // 64))
            x = norm(block, f"{kind}.output.LayerNorm", x, 1e-12)
        wide = gelu(linear(block, "intermediate.dense", x))
        x = norm(block, "output.LayerNorm", x + linear(block, "output.dense", wide), 1e-12)
    raw = x[0]
    for place in (0, 2, 4, 6, 7):
        raw = linear(w, f"mlp.layers.{place}", raw)
    return float((raw - 0.16717362830052426) / 1.0333394966054072)


def test_scores_equal_a_computation_by_hand(file: Path, tokenizer: Path, weights: Weights) -> None:
    reward = ImageRewardScorer.from_file(file, tokenizer=tokenizer)
    scores = reward.score(pictures(), PROMPTS)
    expected = torch.tensor(
        [_by_hand(weights, image, prompt) for image, prompt in zip(pictures(), PROMPTS, strict=True)]
    )
    torch.testing.assert_close(scores, expected, rtol=0, atol=1e-5)
    assert expected.std() > 0.1
    torch.testing.assert_close(reward.score(pictures(), PROMPTS, scaled=True), 1.0333394966054072 * scores)


def test_a_score_is_the_pair_s_own(file: Path, tokenizer: Path) -> None:
    check_scorer(ImageRewardScorer.from_file(file, tokenizer=tokenizer, batch_size=2))


def test_pixels_give_the_same_scores_and_gradients(file: Path, tokenizer: Path) -> None:
    check_gradients(ImageRewardScorer.from_file(file, tokenizer=tokenizer), SIZE, levels=1.1)


def test_cut_prompts_are_counted_and_said_once(file: Path, tokenizer: Path, caplog: pytest.LogCaptureFixture) -> None:
    reward = ImageRewardScorer.from_file(file, tokenizer=tokenizer)
    assert reward.count_truncated(["sneaker " * 33, "sneaker " * 34]) == 1
    with caplog.at_level(logging.WARNING):
        reward.score(pictures(), PROMPTS)
        reward.score(pictures(), PROMPTS)
    assert reward.num_truncated_prompts == 2
    assert caplog.messages == [
        "imagereward reads the beginning of long prompts only: 1 of 5 were cut (said once; num_truncated_prompts counts on)"
    ]
    images = [pictures()[0]] * 2
    one, two = reward.score(images, ["red " * 33 + "shirt", "red " * 33 + "bag"])
    assert one == two


def test_fingerprint_follows_weights_dtype_and_tokenizer(file: Path, tokenizer: Path) -> None:
    one, same = (ImageRewardScorer.from_file(file, tokenizer=tokenizer) for _ in range(2))
    assert one.fingerprint == same.fingerprint
    one.score(pictures(), PROMPTS)
    del one.__dict__["fingerprint"]
    assert one.fingerprint == same.fingerprint, "scoring changes nothing"
    prints = {one.fingerprint}
    for change in (
        lambda reward: reward.vision.to(torch.float16),
        lambda reward: reward.text.encoder.layer[0].output.dense.bias.add_(1),
        lambda reward: reward.head[0].bias.add_(1),
        lambda reward: setattr(reward.tokenizer, "model_max_length", 9),
    ):
        other = ImageRewardScorer.from_file(file, tokenizer=tokenizer)
        change(other)
        prints.add(other.fingerprint)
    assert len(prints) == 5


def test_half_precision_is_near(file: Path, tokenizer: Path) -> None:
    exact = ImageRewardScorer.from_file(file, tokenizer=tokenizer).score(pictures(), PROMPTS)
    half = ImageRewardScorer.from_file(file, tokenizer=tokenizer, dtype=torch.bfloat16)
    assert half.head[0].weight.dtype == torch.float32
    torch.testing.assert_close(half.score(pictures(), PROMPTS), exact, rtol=0, atol=0.1)


def test_the_name_leads_to_the_published_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rewards, "hub_file", lambda repo, file, name: f"{repo}/{file}")
    monkeypatch.setattr(ImageRewardScorer, "from_file", lambda path, **options: path)
    assert [scorer(name) for name in ("imagereward", "imagereward:own.pt")] == [
        "THUDM/ImageReward/ImageReward.pt",
        "own.pt",
    ]


def test_other_weights_are_refused(file: Path, tokenizer: Path, weights: Weights, tmp_path: Path) -> None:
    bad = tmp_path / "bad.pt"
    for change, words in (
        ({"blip.visual_encoder.norm.weight": None}, "picture encoder: post_layernorm.weight is missing"),
        ({"blip.text_encoder.pooler.weight": torch.zeros(1)}, "text encoder: pooler.weight is not part of it"),
        ({"blip.visual_encoder.norm.bias": torch.zeros(3)}, r"post_layernorm.bias has shape \(3,\) for \(192,\)"),
        ({"blip.visual_encoder.patch_embed.proj.weight": None}, "patch_embedding.weight is missing"),
        ({"mlp.layers.7.weight": None}, "five linear layers, found 4"),
        ({name: None for name in weights if name.startswith("mlp.")}, "nothing in it is called mlp"),
    ):
        changed = {name: value for name, value in (weights | change).items() if value is not None}
        torch.save(changed, bad)
        with pytest.raises(ValueError, match=words):
            ImageRewardScorer.from_file(bad, tokenizer=tokenizer)
