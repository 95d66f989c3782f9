"""What a comparison is worth: who wins each pair, and the signed strength that stands inside the link.

Shapes: N pairs in, M pairs kept. Sides keep their place in the data set: 0 is image_0, 1 is image_1.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mmalign.data.smoothing import Normalizer

ComparisonKind = Literal["human", "relabel", "smoothed", "bradley_terry"]


@dataclass(frozen=True, kw_only=True)
class ComparisonConfig:
    """How labels and scores become a winner and a strength.

    kind:
        human           the label's majority side wins, strength 1
        relabel         the higher score wins, strength 1
        smoothed        the higher score wins, strength γ(2p − 1) = γ·tanh((n_w − n_l)/2), n = normalizer(score);
                        p is the softmax over the two n (SmPO, arXiv:2506.02698)
        bradley_terry   the higher score wins, strength 2σ(k(s_w − s_l)) − 1, k = logit_scale
    keep_human_ties: pairs with label 0.5 are dropped, also where scores decide (as published), unless this is set.
    min_abs_strength: weaker pairs are dropped; they cost a full step and move little.
    An option that the chosen kind would not read is refused.
    """

    kind: ComparisonKind = "human"
    gamma: float = 10.0
    logit_scale: float | None = None
    normalizer: Normalizer | None = None
    keep_human_ties: bool = False
    min_abs_strength: float = 0.0

    def __post_init__(self) -> None:
        if self.kind not in ("human", "relabel", "smoothed", "bradley_terry"):
            raise ValueError(f"kind must be human, relabel, smoothed or bradley_terry, got {self.kind!r}")
        graded = self.kind in ("smoothed", "bradley_terry")
        if self.kind == "smoothed" and self.normalizer is None:
            raise ValueError("kind='smoothed' needs normalizer=Normalizer.fit(scores, …) or Normalizer.official()")
        if self.kind == "bradley_terry" and self.logit_scale is None:
            raise ValueError("kind='bradley_terry' needs logit_scale=scorer.logit_scale (about 100 for PickScore)")
        idle = {
            "normalizer": self.normalizer is not None and self.kind != "smoothed",
            "gamma": self.gamma != 10.0 and self.kind != "smoothed",
            "logit_scale": self.logit_scale is not None and self.kind != "bradley_terry",
            "keep_human_ties": self.keep_human_ties and self.kind == "human",
            "min_abs_strength": self.min_abs_strength != 0 and not graded,
        }
        for name, unread in idle.items():
            if unread:
                raise ValueError(f"{name}={getattr(self, name)!r} has no effect with kind={self.kind!r}; leave it out")
        if not self.gamma > 0 or (self.logit_scale is not None and not self.logit_scale > 0):
            raise ValueError(f"gamma and logit_scale must be positive, got {self.gamma} and {self.logit_scale}")
        if not self.min_abs_strength >= 0:
            raise ValueError(f"min_abs_strength must be 0 or more, got {self.min_abs_strength}")

    @property
    def needs_scores(self) -> bool:
        """Whether `compare` must be given scores."""
        return self.kind != "human"


@dataclass(frozen=True, eq=False)
class Compared:
    """The M pairs that are kept. kept: indices into the N given, ascending; first: the winning side, 0 or 1.

    num_pairs: N. Of the N − M dropped, num_human_ties have label 0.5, num_score_ties equal scores, and num_weak a
    strength below the threshold; each is counted once, in that order. num_flipped: kept pairs whose winner is not the
    human one.
    """

    kept: Int[Tensor, " M"]
    first: Int[Tensor, " M"]
    strength: Float[Tensor, " M"]
    num_pairs: int
    num_human_ties: int
    num_score_ties: int
    num_weak: int
    num_flipped: int

    def __len__(self) -> int:
        return len(self.kept)

    @property
    def num_ties(self) -> int:
        """Pairs dropped because neither side wins."""
        return self.num_human_ties + self.num_score_ties

    @property
    def num_dropped(self) -> int:
        """All pairs dropped."""
        return self.num_pairs - len(self.kept)

    def __str__(self) -> str:
        return (
            f"{len(self)} of {self.num_pairs} pairs kept ({self.num_human_ties} human ties, {self.num_score_ties} equal "
            f"scores and {self.num_weak} weak pairs dropped; {self.num_flipped} winners differ from the human one)"
        )


def compare(labels: Float[Tensor, " N"], scores: Float[Tensor, "N 2"] | None, config: ComparisonConfig) -> Compared:
    """Decide every pair. labels: how strongly image_0 is preferred; scores: of (image_0, image_1), raw.

    Exchanging the two images (1 − label, scores reversed) exchanges `first` and changes nothing else.
    """
    _check_labels(labels)
    human_tie = labels == 0.5
    dropped = human_tie & (not config.keep_human_ties)
    gap = torch.where(labels > 0.5, 1.0, -1.0).double()
    if config.needs_scores:
        gap[~dropped] = _strength(_checked_scores(scores, labels, ~dropped), config)
    score_tie = ~dropped & (gap == 0)
    weak = ~dropped & ~score_tie & (gap.abs() < config.min_abs_strength)
    kept = ~(dropped | score_tie | weak)
    first = (gap < 0).long()
    flipped = kept & ~human_tie & (first.bool() == (labels > 0.5))
    return Compared(
        kept=kept.nonzero().flatten(),
        first=first[kept],
        strength=gap.abs()[kept].float(),
        num_pairs=len(labels),
        num_human_ties=int(dropped.sum()),
        num_score_ties=int(score_tie.sum()),
        num_weak=int(weak.sum()),
        num_flipped=int(flipped.sum()),
    )


def _strength(scores: Float[Tensor, "U 2"], config: ComparisonConfig) -> Float[Tensor, " U"]:
    """Positive where image_0 wins; odd under exchange of the sides to the last bit."""
    if config.kind == "relabel":
        return (scores[:, 0] - scores[:, 1]).sign()
    if config.kind == "smoothed":
        assert config.normalizer is not None
        scores = config.normalizer(scores)
        return config.gamma * torch.tanh((scores[:, 0] - scores[:, 1]) / 2)
    assert config.logit_scale is not None
    # 2σ(x) − 1 = tanh(x/2), and tanh keeps its digits where the two sides are almost equal.
    return torch.tanh(config.logit_scale * (scores[:, 0] - scores[:, 1]) / 2)


def _check_labels(labels: Tensor) -> None:
    if labels.ndim != 1:
        raise ValueError(f"labels must be (N,), got {tuple(labels.shape)}")
    wrong = ~((labels >= 0) & (labels <= 1))
    if wrong.any():
        row = int(wrong.nonzero()[0])
        raise ValueError(
            f"label of pair {row} is {labels[row].item()}, outside [0, 1] (1 image_0 preferred, 0.5 a tie); "
            f"{int(wrong.sum())} such labels: drop these rows"
        )


def _checked_scores(scores: Tensor | None, labels: Tensor, used: Bool[Tensor, " N"]) -> Float[Tensor, "U 2"]:
    """The scores of the U pairs that are used, in float64."""
    if scores is None:
        raise ValueError(
            "this comparison needs scores (N, 2): a score column of the data, or score_pairs(source, scorer)"
        )
    if scores.shape != (len(labels), 2):
        raise ValueError(
            f"scores must be ({len(labels)}, 2), got {tuple(scores.shape)}: take those of the encoded rows, "
            "scores[encoded.rows]"
        )
    scores = scores.to(labels.device, torch.float64)
    missing = used & ~torch.isfinite(scores).all(1)
    if missing.any():
        raise ValueError(
            f"{int(missing.sum())} pairs have no finite score, the first is pair {int(missing.nonzero()[0])}: "
            "score them with score_pairs, or drop these rows"
        )
    return scores[used]
