"""How a reward's scores are brought to the scale on which SmPO compares them: n = (s − low)/(high − low)."""

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from mmalign.files import write_json

NormalizerKind = Literal["extrema", "quantile", "official"]
# The extrema of PickScore_v1 cosines that the published SmPO code carries (spec/01, section 4.3).
OFFICIAL_LOW, OFFICIAL_HIGH = 0.11543526500463486, 0.28201571106910706


@dataclass(frozen=True)
class Normalizer:
    """Maps `low` to 0 and `high` to 1, and does not clamp, so that no two scores become equal.

    kind: "extrema" of the fitted scores, their "quantile"s (which outliers do not move), or the two "official"
    constants. scorer_name and scorer_fingerprint say whose scores it fits. num_scores: how many it was fitted on.
    """

    kind: NormalizerKind
    low: float
    high: float
    scorer_name: str
    scorer_fingerprint: str
    quantiles: tuple[float, float] | None = None
    num_scores: int = 0

    def __post_init__(self) -> None:
        if not self.low < self.high:
            raise ValueError(
                f"a normalizer needs low < high, got {self.low} and {self.high}: the scores it was fitted on are all "
                "equal or not finite"
            )

    @classmethod
    def fit(
        cls,
        scores: Float[Tensor, "..."],
        kind: Literal["extrema", "quantile"] = "extrema",
        *,
        scorer_name: str,
        scorer_fingerprint: str,
        quantiles: tuple[float, float] = (0.001, 0.999),
    ) -> "Normalizer":
        """From all scores of the training pairs, any shape; NaN (rows that were left out) is skipped."""
        values = scores.detach().double().flatten()
        values = values[~values.isnan()]
        if values.numel() < 2 or not torch.isfinite(values).all():
            raise ValueError(f"a normalizer needs at least two finite scores, got {values.numel()} that are not NaN")
        if kind == "extrema":
            low, high, used = values.min().item(), values.max().item(), None
        elif kind == "quantile":
            if not 0 <= quantiles[0] < quantiles[1] <= 1:
                raise ValueError(f"quantiles must be 0 ≤ low < high ≤ 1, got {quantiles}")
            # Sorted by hand: torch.quantile refuses more than 16 million values.
            values, used = values.sort().values, quantiles
            low, high = (_quantile(values, q) for q in quantiles)
        else:
            raise ValueError(f"kind must be 'extrema' or 'quantile', got {kind!r}; Normalizer.official() needs no fit")
        return cls(kind, low, high, scorer_name, scorer_fingerprint, used, values.numel())

    @classmethod
    def official(cls, scores: Float[Tensor, "..."] | None = None) -> "Normalizer":
        """The constants of the published SmPO code, for raw PickScore_v1 cosines only; `scores` are checked at once."""
        if scores is not None:
            _check_raw_cosines(scores[~scores.isnan()])
        return cls("official", OFFICIAL_LOW, OFFICIAL_HIGH, "pickscore", "")

    def __call__(self, scores: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """Normalised scores in float64, same shape."""
        scores = scores.double()
        if self.kind == "official":
            _check_raw_cosines(scores)
        return (scores - self.low) / (self.high - self.low)

    def check_scorer(self, name: str, fingerprint: str) -> None:
        """Refuse scores of another scorer than the one that this normalizer fits."""
        if name != self.scorer_name or (self.scorer_fingerprint and fingerprint != self.scorer_fingerprint):
            raise ValueError(
                f"this {self.kind} normalizer fits {self.scorer_name} ({self.scorer_fingerprint[:12] or 'any dtype'}), "
                f"the scores are of {name} ({fingerprint[:12]}): fit a new one with Normalizer.fit"
            )

    @property
    def sha256(self) -> str:
        """Of everything it holds: what a model card or a cache key records."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()

    def save(self, path: str | Path) -> Path:
        """Write JSON with its own sha256 in it."""
        return write_json(Path(path), asdict(self) | {"sha256": self.sha256})

    @classmethod
    def load(cls, path: str | Path) -> "Normalizer":
        """Read what `save` wrote; a file that was changed by hand is refused."""
        try:
            fields = json.loads(Path(path).read_text(encoding="utf-8"))
            expected = fields.pop("sha256")
            fields["quantiles"] = None if fields["quantiles"] is None else tuple(fields["quantiles"])
            loaded = cls(**fields)
        except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
            raise ValueError(f"{path} is not a saved normalizer: fit one and save it") from error
        if loaded.sha256 != expected:
            raise ValueError(f"{path} was changed after it was saved (its sha256 does not match): fit it again")
        return loaded


def _quantile(ordered: Float[Tensor, " N"], q: float) -> float:
    """Linear interpolation between neighbours, as numpy's default."""
    place = q * (len(ordered) - 1)
    below = int(place)
    low, high = ordered[below].item(), ordered[min(below + 1, len(ordered) - 1)].item()
    return low + (place - below) * (high - low)


def _check_raw_cosines(scores: Tensor) -> None:
    """PickScore_v1 cosines lie near 0.12 … 0.28; ×100 scores, probabilities or another model's cosines do not."""
    if (scores.abs() > 1).any():
        raise ValueError(
            f"the official normalizer wants raw PickScore cosines, but scores reach {scores.abs().max().item():.4g}: "
            "pass scorer.score(…) without scaled=True (or divide by logit_scale), or fit a Normalizer"
        )
    slack = (OFFICIAL_HIGH - OFFICIAL_LOW) / 2
    outside = (scores < OFFICIAL_LOW - slack) | (scores > OFFICIAL_HIGH + slack)
    if outside.sum() > 0.01 * scores.numel():
        raise ValueError(
            f"{int(outside.sum())} of {scores.numel()} scores lie far outside PickScore's {OFFICIAL_LOW:.3f} … "
            f"{OFFICIAL_HIGH:.3f}: they look like another scorer's. Fit a Normalizer on them instead"
        )
