"""The trainer under methods with a reward: pictures are drawn for prompts, and a few of the steps that drew them learn from a scorer.

The gradient is that of likelihood/rollout.py. A method says what the reward is and what it is worth, and who predicts in which branch.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from mmalign.data.texts import EncodedPrompts
from mmalign.denoisers import Conditioning
from mmalign.denoisers.parts import frozen
from mmalign.likelihood import draws
from mmalign.likelihood.rollout import (
    Predict,
    RolloutConfig,
    draw_start,
    exact_losses,
    graph_losses,
    trained_branches,
)
from mmalign.rewards import NetworkScorer, ReweightedScorer, scorer
from mmalign.training.align_trainer import Losses
from mmalign.training.devices import on_device
from mmalign.training.prompt_trainer import PromptConfig, PromptTrainer

OF_REWARD = (
    *("scorer", "rollout_steps", "grad_steps", "rollout_guidance_scale", "grad_cond_only"),
    *("rollout_solver", "step_weights", "gradient", "reward_crop"),
)


@dataclass
class RewardConfig(PromptConfig):
    """Options of training by a reward; see `RunConfig` for the options of every run.

    scorer             the reward, a name that `mmalign.rewards.scorer` knows
    rollout_steps      denoising steps of a picture in training
    grad_steps         how many of them, evenly spaced from a random offset, get a gradient
    rollout_guidance_scale   guidance of these pictures, inside the gradient; 1 is none
    grad_cond_only     no gradient through the empty prompt's branch
    rollout_solver     "ode": DDIM, for flow models Euler; "renoise": LCM, for distilled networks
    step_weights       "raw": the true gradient, in which early steps count most; "normalised": the same weight for every trained step
    gradient           "exact": step by step, memory of one network call; "graph": through the whole sampler, as published
    reward_crop        share of the side that is kept of a picture, cropped anew at random each time, so that nothing depends on blocks
    """

    scorer: str = "pickscore"
    rollout_steps: int = 50
    grad_steps: int = 5
    rollout_guidance_scale: float = 7.5
    grad_cond_only: bool = False
    rollout_solver: Literal["ode", "renoise"] = "ode"
    step_weights: Literal["raw", "normalised"] = "raw"
    gradient: Literal["exact", "graph"] = "exact"
    reward_crop: float = 504 / 512
    prompt_dropout: float = 0.0

    @property
    def reads_pictures(self) -> bool:
        """False: prompts are all that a reward needs."""
        return False

    @property
    def trained_on(self) -> str | None:
        """The reward."""
        return self.scorer

    def rollout(self) -> RolloutConfig:
        """How pictures are drawn in training."""
        return RolloutConfig(
            num_steps=self.rollout_steps,
            grad_steps=self.grad_steps,
            guidance_scale=self.rollout_guidance_scale,
            grad_cond_only=self.grad_cond_only,
            solver=self.rollout_solver,
            weights=self.step_weights,
        )

    def check_reward(self) -> None:
        """ValueError for options of the reward that are out of range, or would have no effect."""
        self.rollout()
        problems = {
            "reward_crop must be above 0 and at most 1": not 0 < self.reward_crop <= 1,
            "prompt_dropout has no effect on training by a reward, which needs the prompt": self.prompt_dropout != 0,
            "gradient='graph' needs step_weights='raw': others are no gradient of a sampler": self.gradient == "graph"
            and self.step_weights != "raw",
        }
        for message, violated in problems.items():
            if violated:
                raise ValueError(message)


class RewardTrainer(PromptTrainer):
    """Trains by a reward, unless `reads_pictures`: a method may have a stage of another kind."""

    config_class: type[RewardConfig] = RewardConfig
    args: RewardConfig
    # Encoded prompts or, in a stage with pictures, encoded pictures.
    _train: Any
    _reward: NetworkScorer | None = None

    def check_arguments(self, args: Any, train_dataset: Any, eval_dataset: Any, peft_config: Any) -> None:
        """ValueError for what cannot work, before anything is read or moved."""
        super().check_arguments(args, train_dataset, eval_dataset, peft_config)
        if args.reads_pictures:
            return
        if self.denoiser.native_frames is not None:
            raise ValueError(f"rewards read pictures, and {type(self.pipe).__name__} draws clips")
        if getattr(self.pipe, "vae", None) is None:
            raise ValueError(f"rewards read pictures, and {type(self.pipe).__name__} has no VAE that makes them")
        if getattr(peft_config, "lora_dropout", 0):
            raise ValueError("lora_dropout must be 0 with a reward: what is rewarded would not be what is drawn")

    def set_up(self) -> None:
        """The reward, and how pictures are drawn for it."""
        if not self.args.reads_pictures:
            self._rollout, self._reward = self.args.rollout(), self.make_reward()

    def make_reward(self) -> NetworkScorer:
        """What judges the pictures."""
        return scorer(self.args.scorer, device=self.args.device)

    def drawn_by(self, model: nn.Module, text: Conditioning, empty: Conditioning) -> Predict:
        """Who predicts: `model`, in both branches."""

        def predict(x: Tensor, t: Tensor, row: Tensor, conditioned: bool) -> Tensor:
            return model(x, t, (text if conditioned else empty)[row])

        return predict

    def loss_of(self, reward: Tensor) -> Tensor:
        """½ (1 − R) of each picture, between 0 and 1 for a cosine."""
        return (1 - reward) / 2

    @contextmanager
    def _at_work(self) -> Iterator[None]:
        """Beside the network what a reward needs is on the device, frozen: VAE and scorer."""
        with super()._at_work():
            if self._reward is None:
                yield
                return
            with on_device([self.pipe.vae, self._reward.model], self.args.device), frozen(self.pipe.vae):
                yield

    def row_losses(self, model: nn.Module, inputs: dict[str, Any], *, epoch: int, data: EncodedPrompts) -> Losses:
        """`loss_of` the reward of a picture drawn for each prompt."""
        args, schedule, rows = self.args, self._schedule, inputs["row"]
        nothing, text, empty = self._rows(inputs, data)
        start = draw_start(
            args.seed, epoch, rows, nothing.shape[1:], self._rollout, dtype=self._precision, device=args.device
        )
        prompts, told = [data.prompts[row] for row in rows], dict[str, Tensor]()
        drawn_by = self.drawn_by(model, text, empty)

        def predict(x: Tensor, t: Tensor, row: Tensor, conditioned: bool) -> Tensor:
            with self.accelerator.autocast():
                return drawn_by(x, t, row, conditioned)

        def score(x0: Tensor) -> Tensor:
            pixels = (self.denoiser.decode_with_gradient(x0) / 2 + 0.5).clamp(0, 1)
            told.update(self._rewards(self._cropped(pixels, rows, epoch), prompts))
            return self.loss_of(told["reward"].to(x0))

        if args.gradient == "graph":
            losses = graph_losses(predict, schedule, start, self._rollout, score)
        else:
            trained = [parameter for parameter in self.network.parameters() if parameter.requires_grad]
            losses = exact_losses(predict, schedule, start, self._rollout, score, trained)
        values = {"loss": losses, **told}
        return Losses(losses, rows, {name: (float(value.detach().sum()), len(rows)) for name, value in values.items()})

    def _rewards(self, pixels: Tensor, prompts: list[str]) -> dict[str, Tensor]:
        """The reward (B,) with gradient, and its two parts where it has them."""
        reward = self._reward
        assert reward is not None
        if not isinstance(reward, ReweightedScorer):
            return {"reward": reward.score_pixels(pixels, prompts)}
        relevant, style = reward.parts(reward.preprocess_pixels(pixels.to(reward.device)), prompts)
        return {"reward": relevant + reward.omega * style, "reward/text": relevant, "reward/style": style}

    def _cropped(self, pixels: Tensor, rows: list[int], epoch: int) -> Tensor:
        """`reward_crop` of each side, at a place drawn for each row; the middle in evaluation."""
        sides = [max(1, round(side * self.args.reward_crop)) for side in pixels.shape[2:]]
        spare = [whole - kept for whole, kept in zip(pixels.shape[2:], sides, strict=True)]
        generators = self._drawn(rows, epoch, "crop")
        places = [
            [room // 2] * len(rows) if epoch < 0 else draws.randint(generators, 0, room + 1).tolist() for room in spare
        ]
        return torch.stack(
            [
                picture[:, top : top + sides[0], left : left + sides[1]]
                for picture, top, left in zip(pixels, *places, strict=True)
            ]
        )

    def forward_passes(self, steps: int) -> float:
        """Of the sampler, and of the trained steps again with their backward; VAE and scorer come on top."""
        branches = 1 if self._rollout.guidance_scale == 1 else 2
        trained = len(trained_branches(self._rollout)) * self._rollout.grad_steps
        return self._rollout.num_steps * branches + trained * self._trained_passes

    def card_settings(self) -> dict[str, Any]:
        """What of the reward and its pictures decides what is learnt."""
        return {name: getattr(self.args, name) for name in OF_REWARD}
