"""A reward taken apart: the identities, by hand, and what may not be taken apart."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import WORDS

from mmalign.rewards import AestheticScorer, ClipScorer, CommonDirection, Ensemble, Member, ReweightedScorer, scorer

CAPTIONS = [f"a {one} {two}. on a {three}" for one in WORDS[:5] for two in WORDS[7:11] for three in WORDS[:6]]
PROMPTS = ["a red shirt. a blue bag", "a green dress", "a black sneaker on a white bag. a shirt. red"]


@pytest.fixture
def clip(clip_folder: Path) -> ClipScorer:
    return ClipScorer.from_pretrained(clip_folder, segmented=True)


@pytest.fixture(scope="module")
def images() -> list[Image.Image]:
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, (24, 24, 3), dtype=np.uint8)) for _ in range(3)]


def test_the_score_of_segments_is_the_mean_of_their_cosines(
    clip: ClipScorer, clip_folder: Path, images: list[Image.Image]
) -> None:
    whole = ClipScorer.from_pretrained(clip_folder)
    assert clip.segments(PROMPTS[2]) == ["a black sneaker on a white bag.", "a shirt.", "red"]
    for image, prompt in zip(images, PROMPTS, strict=True):
        each = whole.score([image] * len(clip.segments(prompt)), clip.segments(prompt))
        torch.testing.assert_close(clip.score([image], [prompt])[0], each.mean(), rtol=0, atol=1e-6)
    assert clip.fingerprint != whole.fingerprint and whole.in_segments().fingerprint == clip.fingerprint
    released = ClipScorer.from_pretrained(clip_folder, segmented=True, compat_segments=True)
    assert released.segments("3.5 m") == ["3.", "5 m."] and released.fingerprint != clip.fingerprint
    with pytest.raises(ValueError, match="compat_segments has no effect"):
        ClipScorer.from_pretrained(clip_folder, compat_segments=True)


def test_no_prompt_is_cut_in_segments(clip: ClipScorer, clip_folder: Path) -> None:
    long = "sneaker " * 40 + ". a bag"
    assert ClipScorer.from_pretrained(clip_folder).count_truncated([long, "a bag"]) == 1
    assert clip.count_truncated([long, "a bag"]) == 0
    assert [clip.num_tokens(piece) for piece in clip.segments(long)] == [16, 16, 15, 4]


def test_the_common_direction_is_the_unit_mean_of_all_captions(clip: ClipScorer) -> None:
    found = CommonDirection.estimate(clip, [*CAPTIONS, *CAPTIONS[:7]], batch_size=9)
    mean = torch.stack([clip.prompt_embeddings([caption])[0] for caption in CAPTIONS]).mean(0)
    torch.testing.assert_close(found.vector, mean / mean.norm(), rtol=0, atol=1e-6)
    assert found.num_captions == len(CAPTIONS) and found.scorer_fingerprint == clip.fingerprint
    with pytest.raises(ValueError, match="the common direction of 1 captions would be their own content"):
        CommonDirection.estimate(clip, [CAPTIONS[0]] * 500)


def test_r_omega_is_the_relevant_part_and_omega_times_the_rest(clip: ClipScorer, images: list[Image.Image]) -> None:
    direction = CommonDirection.estimate(clip, CAPTIONS)
    plain = clip.score(images, PROMPTS)
    scores = {omega: ReweightedScorer(clip, direction, omega=omega) for omega in (0.0, 0.3, 1.0)}
    relevant, style = scores[0.3].parts(clip.preprocess(images), PROMPTS)
    common = scores[0.3].commonness(PROMPTS)
    torch.testing.assert_close(scores[1.0].score(images, PROMPTS), plain, rtol=0, atol=1e-6)
    torch.testing.assert_close(scores[0.0].score(images, PROMPTS), relevant, rtol=0, atol=1e-6)
    torch.testing.assert_close(scores[0.3].score(images, PROMPTS), relevant + 0.3 * style, rtol=0, atol=1e-6)
    # The form in which it was published: C_X·(C_P − (1 − ω)·η·V).
    seen = clip.picture_embeddings(clip.preprocess(images))
    published = clip.prompt_embeddings(PROMPTS) - 0.7 * common[:, None] * direction.vector
    torch.testing.assert_close(scores[0.3].score(images, PROMPTS), (seen * published).sum(1), rtol=0, atol=1e-6)
    assert float(style.abs().min()) > 1e-3


def test_omega_zero_gives_pictures_no_gradient_along_the_common_direction(clip: ClipScorer) -> None:
    direction = CommonDirection.estimate(clip, CAPTIONS)
    features = torch.randn(3, 8, generator=torch.Generator().manual_seed(0), requires_grad=True)
    along = {}
    for omega in (0.0, 0.3, 1.0):
        reweighted = ReweightedScorer(clip, direction, omega=omega)
        reweighted.base.picture_embeddings = lambda inputs: features  # type: ignore[method-assign]
        (gradient,) = torch.autograd.grad(reweighted.reward(None, PROMPTS).sum(), features)
        along[omega] = gradient @ direction.vector
    torch.testing.assert_close(along[0.0], torch.zeros(3), rtol=0, atol=1e-6)
    torch.testing.assert_close(along[0.3], 0.3 * along[1.0], rtol=0, atol=1e-6)
    assert float(along[1.0].abs().min()) > 0.01


def test_pixels_give_the_same_scores_with_gradient(clip: ClipScorer, images: list[Image.Image]) -> None:
    from mmalign.rewards.pixels import to_pixels

    reweighted = ReweightedScorer(clip, CommonDirection.estimate(clip, CAPTIONS))
    pixels = torch.cat([to_pixels(image) for image in images]).requires_grad_()
    scores = reweighted.score_pixels(pixels, PROMPTS)
    torch.testing.assert_close(scores.detach(), reweighted.score(images, PROMPTS), rtol=0, atol=1e-5)
    scores.sum().backward()
    assert pixels.grad is not None and pixels.grad.abs().max() > 0
    with pytest.raises(ValueError, match="the model learnt to compare by the whole score"):
        reweighted.score(images, PROMPTS, scaled=True)


def test_a_direction_is_kept_with_what_it_was_made_of(clip: ClipScorer, clip_folder: Path, tmp_path: Path) -> None:
    direction = CommonDirection.estimate(clip, CAPTIONS)
    again = CommonDirection.load(direction.save(tmp_path / "v.safetensors"))
    assert torch.equal(again.vector, direction.vector)
    assert (again.num_captions, again.captions_sha256) == (direction.num_captions, direction.captions_sha256)
    ReweightedScorer(clip, again)
    with pytest.raises(ValueError, match="the common direction was made of clip:"):
        ReweightedScorer(ClipScorer.from_pretrained(clip_folder), again)
    (tmp_path / "x.safetensors").write_bytes(b"no")
    for wrong in ("x.safetensors", "none.safetensors"):
        with pytest.raises(ValueError, match="holds no common direction"):
            CommonDirection.load(tmp_path / wrong)
    with pytest.raises(ValueError, match="omega must lie in 0 … 1"):
        ReweightedScorer(clip, again, omega=1.5)


def test_scorers_without_two_embeddings_are_refused_with_the_reason(clip: ClipScorer) -> None:
    from mmalign.rewards import HPSv3Scorer, ImageRewardScorer

    for kind, reason in (
        (AestheticScorer, "it reads no prompt"),
        (HPSv3Scorer, "reads picture and prompt together"),
        (ImageRewardScorer, "attends to the picture"),
    ):
        other: Any = object.__new__(kind)
        other.name = "other"
        with pytest.raises(ValueError, match=f"other cannot be taken apart: .*{reason}"):
            CommonDirection.estimate(other, CAPTIONS)
    with pytest.raises(ValueError, match="re-weight each of them before"):
        CommonDirection.estimate(Ensemble([Member(clip)]), CAPTIONS)


def test_denscore_is_pickscores_clip_read_in_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(ClipScorer, "from_pretrained", lambda *names, **options: asked.append((names, options)))
    scorer("denscore")
    assert asked[0][0] == ("luping-liu/Denscore", "laion/CLIP-ViT-H-14-laion2B-s32B-b79K")
    assert asked[0][1]["segmented"] is True
