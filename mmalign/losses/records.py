"""The records that losses read: log-probabilities of pairs, and of single labelled samples.

Shapes: B pairs or samples, K mismatched samples. A log-probability is one number per sample: the sum over completion
tokens for a token model, −½ · mean squared error for a denoiser. Half precision becomes float32 on entry, float64
stays; NaN is never repaired. Whatever belongs to the reference is a constant: it is detached on entry.
"""

from dataclasses import dataclass, fields

from jaxtyping import Bool, Float, Integer, Real
from torch import Tensor


@dataclass(frozen=True, slots=True, eq=False)
class PairLogProbs:
    """log π(y_w|x) and log π(y_l|x) of policy and reference for B comparisons; lengths are counts of tokens.

    `reference_*` may be left out for reference-free losses. `*_length` serve the losses that divide by length:
    denoisers, whose squared error is a mean already, leave them out or pass ones.
    """

    policy_chosen: Float[Tensor, " B"]
    policy_rejected: Float[Tensor, " B"]
    reference_chosen: Float[Tensor, " B"] | None = None
    reference_rejected: Float[Tensor, " B"] | None = None
    chosen_length: Real[Tensor, " B"] | None = None
    rejected_length: Real[Tensor, " B"] | None = None

    def __post_init__(self) -> None:
        for field in fields(self):
            if field.name.startswith("policy") or getattr(self, field.name) is not None:
                _store_vector(self, field.name, like=self.policy_chosen)

    def __len__(self) -> int:
        return self.policy_chosen.shape[0]

    @property
    def chosen_logratio(self) -> Float[Tensor, " B"]:
        """ρ_w = log π_θ(y_w|x) − log π_ref(y_w|x)."""
        return self.policy_chosen - present(self, "reference_chosen")

    @property
    def rejected_logratio(self) -> Float[Tensor, " B"]:
        """ρ_l = log π_θ(y_l|x) − log π_ref(y_l|x)."""
        return self.policy_rejected - present(self, "reference_rejected")

    @property
    def margin(self) -> Float[Tensor, " B"]:
        """ρ_w − ρ_l."""
        return self.chosen_logratio - self.rejected_logratio

    @property
    def policy_margin(self) -> Float[Tensor, " B"]:
        """log π_θ(y_w|x) − log π_θ(y_l|x), without a reference."""
        return self.policy_chosen - self.policy_rejected


@dataclass(frozen=True, slots=True, eq=False)
class UnpairedLogProbs:
    """log π(y|x) of policy and reference for B single samples, each liked or not.

    `label` is boolean, or an integer: above 0 is desirable, 0 and −1 are not. `kl` is the baseline of KTO: K log-ratios
    of mismatched prompts and completions, or one number (their mean over all ranks, or a running estimate).
    """

    policy: Float[Tensor, " B"]
    reference: Float[Tensor, " B"]
    label: Bool[Tensor, " B"] | Integer[Tensor, " B"]
    kl: Float[Tensor, "*K"] | float | None = None

    def __post_init__(self) -> None:
        _store_vector(self, "policy", like=self.policy)
        _store_vector(self, "reference", like=self.policy)
        _store_vector(self, "label", like=self.policy)
        if self.kl is not None:
            kl = self.kl if isinstance(self.kl, Tensor) else self.policy.new_tensor(self.kl)
            kl = _at_least_float32(kl).detach()
            if kl.ndim > 1 or kl.numel() == 0:
                raise ValueError(
                    f"UnpairedLogProbs: kl has shape {tuple(kl.shape)}, expected one number or (K,), K ≥ 1"
                )
            object.__setattr__(self, "kl", kl)

    def __len__(self) -> int:
        return self.policy.shape[0]

    @property
    def logratio(self) -> Float[Tensor, " B"]:
        """ρ = log π_θ(y|x) − log π_ref(y|x)."""
        return self.policy - self.reference

    @property
    def desirable(self) -> Bool[Tensor, " B"]:
        """True where the sample is liked."""
        return self.label > 0


LogProbs = PairLogProbs | UnpairedLogProbs


def present(logps: LogProbs, name: str, *, loss: str = "") -> Tensor:
    """The tensor `logps.<name>`, or an error that says what to pass."""
    value = getattr(logps, name)
    if value is None:
        who = repr(loss) if loss else "this loss"
        raise ValueError(f"{who} needs {name}, which {type(logps).__name__} was not given: {_remedy(name)}")
    return value


def _remedy(name: str) -> str:
    if name.startswith("reference"):
        return "pass it, or choose a reference-free loss (losses.get(key).reference_free)"
    if name.endswith("length"):
        return "pass the number of completion tokens (ones for a denoiser, whose error is a mean already)"
    return "pass the log-ratios of mismatched samples, or one number"


def _at_least_float32(x: Tensor) -> Tensor:
    return x.float() if x.is_floating_point() and x.dtype.itemsize < 4 else x


def _store_vector(record: LogProbs, name: str, *, like: Tensor) -> None:
    value, owner = getattr(record, name), type(record).__name__
    if not isinstance(value, Tensor):
        raise ValueError(f"{owner}: {name} must be a tensor of shape (B,), got {type(value).__name__}")
    if value.ndim != 1 or value.shape != like.shape:
        expected = tuple(like.shape) if like.ndim == 1 else "(B,)"
        raise ValueError(f"{owner}: {name} has shape {tuple(value.shape)}, expected {expected}: one number per sample")
    if name == "label" and value.is_floating_point():
        raise ValueError(f"{owner}: label must be boolean or integer (1 desirable, 0 or −1 not), got {value.dtype}")
    if name != "label" and not name.endswith("length") and not value.is_floating_point():
        raise ValueError(f"{owner}: {name} must be floating point, got {value.dtype}")
    value = _at_least_float32(value)
    object.__setattr__(record, name, value if name.startswith("policy") else value.detach())
