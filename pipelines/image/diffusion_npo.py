"""Diffusion-NPO by reward: a negative side for guidance that learns what a scorer dislikes (Wang et al., ICLR 2025, arXiv:2505.11245).

    ε = ε_N(x, ∅) + g · (ε_P(x, c) − ε_N(x, ∅))

    guided:     L = ½ (1 − R(x̂_0)),  x̂_0 drawn by ε, gradient into N alone, where it arrives times (1 − g)
    inverted:   L = ½ R(x̂_0),        x̂_0 drawn by N in both branches: the reward 1 − R, as the paper puts it

P is what the pipeline draws with, and stays as it is; N starts as P. The released reward and SPO code is guided: above g = 1 its factor
is negative, so that the true reward of what is drawn makes N worse. On pairs Diffusion-NPO is `DiffusionDPOConfig(swap_pairs=True)`.
"""

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

from torch import Tensor, nn

from mmalign.denoisers import Conditioning
from mmalign.likelihood.reference import Reference, make_reference
from mmalign.likelihood.rollout import Predict, RolloutConfig
from mmalign.training.negative_pipeline import NegativePipeline
from mmalign.training.reward_trainer import RewardConfig, RewardTrainer


@dataclass
class DiffusionNPOConfig(RewardConfig):
    """Defaults of Diffusion-NPO by reward; see `RewardConfig` for the other options.

    mode   "guided": what N and the pipeline's own network draw together gets the reward, and N alone the gradient, with the scale that
           pictures are to be drawn with as rollout_guidance_scale; "inverted": N alone is trained towards a low reward
    """

    method: ClassVar[str] = "diffusion-npo"
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "playground": {
            "scorer": "playground", "learning_rate": 3e-4, "max_steps": 60, "warmup_steps": 10, "per_device_train_batch_size": 8,
            "rollout_steps": 10, "grad_steps": 5, "rollout_guidance_scale": 3.0,
        },
    }  # fmt: skip

    mode: Literal["guided", "inverted"] = "guided"
    rollout_steps: int = 25

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.mode == "guided" and self.grad_cond_only:
            raise ValueError("grad_cond_only has no effect with mode='guided', which trains the empty prompt's branch")
        if self.mode == "guided" and self.rollout_guidance_scale == 1:
            raise ValueError("mode='guided' needs rollout_guidance_scale above 1: at 1 the negative network is not run")
        self.check_reward()

    @property
    def trains_negative(self) -> bool:
        """True."""
        return True

    def rollout(self) -> RolloutConfig:
        """How pictures are drawn in training, and by which branch N learns."""
        return replace(super().rollout(), grad_uncond_only=self.mode == "guided")

    def about(self) -> str:
        """What is rewarded."""
        what = "what is guided away from it" if self.mode == "guided" else "what it draws, inverted"
        return f"a negative network by {self.scorer} of {what}; {self.rollout()}"


class DiffusionNPOTrainer(RewardTrainer):
    """Trains a negative network by a reward; arguments as in `DenoiserTrainer`, train_dataset as in `RewardTrainer`: prompts."""

    config_class = DiffusionNPOConfig
    args: DiffusionNPOConfig

    def make_reference(self, ref_model: Any) -> Reference:
        """P: the network with its adapter off, or a frozen copy; none where N draws alone."""
        if ref_model is not None:
            raise ValueError("Diffusion-NPO starts at what the pipeline draws with: leave ref_model out")
        return make_reference(self.network, kind="auto" if self.args.mode == "guided" else "none")

    def drawn_by(self, model: nn.Module, text: Conditioning, empty: Conditioning) -> Predict:
        """In mode "guided" P predicts with the prompt; N, which is trained, does all else."""
        own = super().drawn_by(model, text, empty)
        if self.args.mode == "inverted":
            return own

        def predict(x: Tensor, t: Tensor, row: Tensor, conditioned: bool) -> Tensor:
            if not conditioned:
                return own(x, t, row, False)
            with self.reference.model(self.network) as positive:
                return self.denoiser.predict(positive, x, t, text[row])

        return predict

    def loss_of(self, reward: Tensor) -> Tensor:
        """½ (1 − R), or ½ R."""
        return super().loss_of(reward if self.args.mode == "guided" else 1 - reward)

    def card_settings(self) -> dict[str, Any]:
        """Those of the reward, and in which way it is used."""
        return {"mode": self.args.mode, **super().card_settings()}


class DiffusionNPOPipeline(NegativePipeline):
    """A pipeline of any family whose negative branch has a side of its own, which `align` trains by a reward."""

    config_class = DiffusionNPOConfig
    trainer_class = DiffusionNPOTrainer
