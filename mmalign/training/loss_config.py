"""What is minimised: losses of `mmalign.losses` by name, their weights and hyper-parameters, for every kind of model."""

from dataclasses import dataclass, field
from typing import Any

from mmalign import losses

_HYPER = (
    "label_smoothing",
    "f_divergence_type",
    "f_alpha_divergence_coef",
    "discopop_tau",
    "simpo_gamma",
    "cpo_alpha",
    "ln_pref_omega",
    "ln_pref_lambda",
    "ln_pref_margin",
)


@dataclass
class LossConfig:
    """Mixed into the configs of methods that minimise such a loss; `list_losses` stands first in their `__post_init__`."""

    loss_type: list[str] = field(default_factory=lambda: ["sigmoid"])
    loss_weights: list[float] | None = None
    label_smoothing: float | None = None
    f_divergence_type: str | None = None
    f_alpha_divergence_coef: float | None = None
    discopop_tau: float | None = None
    simpo_gamma: float | None = None
    cpo_alpha: float | None = None
    ln_pref_omega: float | None = None
    ln_pref_lambda: float | None = None
    ln_pref_margin: float | None = None

    def list_losses(self) -> None:
        """A single name, or weight, becomes a list of one."""
        if isinstance(self.loss_type, str):
            self.loss_type = [self.loss_type]
        if isinstance(self.loss_weights, int | float):
            self.loss_weights = [self.loss_weights]

    @property
    def starting_beta(self) -> float:
        """β at the first step."""
        raise NotImplementedError

    @property
    def is_reference_free(self) -> bool:
        """No loss of the sum needs a reference."""
        return all(losses.get(key).reference_free for key in self.loss_type)

    @property
    def takes_beta(self) -> bool:
        """Some loss of the sum has a β."""
        return any("beta" in losses.get(key).hyper for key in self.loss_type)

    def loss_options(self) -> dict[str, Any]:
        """The hyper-parameters that go to `losses.compute`: beta, and those that were set."""
        chosen = {name: getattr(self, name) for name in _HYPER if getattr(self, name) is not None}
        return chosen | {"beta": self.starting_beta} if self.takes_beta else chosen

    def objective(self) -> str:
        """What is minimised, in one word or a sum of them."""
        weights = self.loss_weights or [1.0] * len(self.loss_type)
        return " + ".join(
            key if weight == 1 else f"{weight:g}·{key}" for key, weight in zip(self.loss_type, weights, strict=True)
        )
