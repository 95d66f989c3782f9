"""Ensemble: the weighted mean in closed form, on scores that can be told beforehand."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from mmalign.rewards import ClipScorer, Ensemble, Member, Scorer, standardised
from mmalign.rewards.pixels import to_pixels


@dataclass
class Grey:
    """scale · (mean level of the picture) + length of the prompt."""

    name: str = "grey"
    scale: float = 1.0

    @property
    def fingerprint(self) -> str:
        return f"{self.name} {self.scale}"

    def score(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> Float[Tensor, " N"]:
        levels = torch.tensor([to_pixels(image).mean().item() for image in images])
        return self.scale * levels + torch.tensor([float(len(prompt)) for prompt in prompts])


LEVELS = (0, 51, 102, 255)
IMAGES = [Image.new("RGB", (4, 4), (level, level, level)) for level in LEVELS]
PROMPTS = ["", "a", "ab", ""]


def test_raw_scores_are_weighed() -> None:
    both = Ensemble([Member(Grey("one"), 3.0), Member(Grey("two", 10.0), 1.0)])
    expected = [
        (3 * (level / 255 + n) + 10 * level / 255 + n) / 4 for level, n in zip(LEVELS, (0, 1, 2, 0), strict=True)
    ]
    scores = both.score(IMAGES, PROMPTS)
    torch.testing.assert_close(scores, torch.tensor(expected))
    assert isinstance(both, Scorer) and both.name == "one+two" and scores.dtype == torch.float32


def test_standardised_scores_count_equally_whatever_their_scale() -> None:
    members = [standardised(Grey("one"), IMAGES, [""] * 4), standardised(Grey("two", 1000.0), IMAGES, [""] * 4)]
    scores = Ensemble(members).score(IMAGES, [""] * 4)
    levels = torch.tensor(LEVELS) / 255
    torch.testing.assert_close(scores, (levels - levels.mean()) / levels.std(correction=0))
    assert members[1].std == pytest.approx(1000 * members[0].std, rel=1e-5)
    torch.testing.assert_close(Ensemble(members).score(IMAGES[1:2], [""]), scores[1:2])


def test_one_member_of_weight_one_is_the_scorer_itself() -> None:
    assert torch.equal(Ensemble([Member(Grey(), 7.0)]).score(IMAGES, PROMPTS), Grey().score(IMAGES, PROMPTS))
    nested = Ensemble([Member(Ensemble([Member(Grey())]))], name="again")
    assert torch.equal(nested.score(IMAGES, PROMPTS), Grey().score(IMAGES, PROMPTS)) and nested.name == "again"


def test_fingerprint_follows_members_weights_and_scales() -> None:
    prints = [
        Ensemble([Member(Grey())]),
        Ensemble([Member(Grey(scale=2.0))]),
        Ensemble([Member(Grey(), 2.0)]),
        Ensemble([Member(Grey(), mean=1.0)]),
        Ensemble([Member(Grey(), std=2.0)]),
        Ensemble([Member(Grey()), Member(Grey())]),
    ]
    assert len({ensemble.fingerprint for ensemble in prints}) == 6
    assert Ensemble([Member(Grey())], name="x").fingerprint == prints[0].fingerprint


def test_gradients_pass_through_all_members(clip_folder: Path) -> None:
    one, two = ClipScorer.from_pretrained(clip_folder, name="one"), ClipScorer.from_pretrained(clip_folder, name="two")
    two.model.visual_projection.weight.mul_(torch.linspace(0.1, 2, 8)[:, None])
    both = Ensemble([Member(one, 1.0, std=0.5), Member(Ensemble([Member(two, mean=1.0)]), 3.0)])
    images = [Image.effect_noise((24, 24), sigma).convert("RGB") for sigma in (20, 90)]
    pixels = torch.cat([to_pixels(image) for image in images]).requires_grad_()
    scores = both.score_pixels(pixels, ["a red shirt", "a bag"])
    torch.testing.assert_close(scores.detach(), both.score(images, ["a red shirt", "a bag"]), rtol=0, atol=1e-5)
    (whole,) = torch.autograd.grad(scores.sum(), pixels)
    parts = [torch.autograd.grad(x.score_pixels(pixels, ["a red shirt", "a bag"]).sum(), pixels)[0] for x in (one, two)]
    torch.testing.assert_close(whole, parts[0] / 4 / 0.5 + parts[1] * 3 / 4)


def test_errors_name_the_remedy() -> None:
    with pytest.raises(ValueError, match="at least one member"):
        Ensemble([])
    for wrong in ({"weight": 0.0}, {"std": 0.0}, {"std": float("nan")}):
        with pytest.raises(ValueError, match="grey: weight and std must be positive"):
            Member(Grey(), **wrong)
    with pytest.raises(ValueError, match="standardise on more pictures"):
        standardised(Grey(), IMAGES[:1] * 3, [""] * 3)
    with pytest.raises(ValueError, match="grey passes no gradient"):
        Ensemble([Member(Grey())]).score_pixels(torch.zeros(1, 3, 4, 4), [""])
