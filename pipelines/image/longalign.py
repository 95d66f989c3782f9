"""LongAlign: long prompts in segments, and a reward that counts style less (Liu et al., ICLR 2025, arXiv:2410.11817).

    supervised:   L = ‖ε − ε_θ(x_t, t, [CLIP by segments; T5])‖²,   or LCM distillation on the same pictures
    reward:       L = ½ (1 − R_ω(x̂_0, prompt)),   R_ω = C_X·C_P^⊥ + ω·η·C_X·V

The second stage draws whole pictures and trains on a few of their steps, one network call in memory (`mmalign.likelihood.rollout`).
"""

import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal, Self, cast

import torch
from accelerate.utils import broadcast_object_list
from torch import Tensor, nn

from mmalign.data import ComparisonConfig
from mmalign.data.texts import EncodedPrompts, encode_prompts, load_prompts
from mmalign.denoisers import Conditioning
from mmalign.denoisers.base import module_dtype
from mmalign.denoisers.long_prompts import SETTINGS, LongPrompts, long_prompts_of, read_long_prompts
from mmalign.denoisers.parts import evaluating, frozen
from mmalign.denoisers.text_adapter import T5Tail, load_adapter_weights, load_tail, save_adapter
from mmalign.files import write_json
from mmalign.likelihood import draws
from mmalign.likelihood.consistency import consistency_losses, draw_times, teacher_step
from mmalign.likelihood.denoising import forward_points, prediction_error
from mmalign.likelihood.grids import draw_timesteps
from mmalign.likelihood.reference import Reference, make_reference
from mmalign.likelihood.rollout import RolloutConfig, draw_start, exact_losses, graph_losses
from mmalign.rewards import CommonDirection, NetworkScorer, ReweightedScorer, scorer
from mmalign.rewards.decomposed import FEWEST_CAPTIONS, embedding_of
from mmalign.training import health
from mmalign.training.aligned import load_aligned
from mmalign.training.devices import on_device
from mmalign.training.pipeline import AlignPipeline
from mmalign.training.prepare import Prepared, batch_of, prepare
from mmalign.training.run_config import RunConfig
from mmalign.training.run_trainer import Losses, RunTrainer
from mmalign.training.weights import has_adapter

DIRECTION, ADAPTER = "common_direction.safetensors", "text_adapter"
T5_ENCODER, T5_TOKENIZER = "t5_encoder", "t5_tokenizer"
# What the authors released, in the order in which it acts.
_RELEASED_ADAPTER, _RELEASED_LORAS = "s28750_adapter", ("s28750_lora_vis.pt", "sd15-reward-3750.pt")
_OF_REWARD = (
    "scorer segment_reward omega direction rollout_steps grad_steps rollout_guidance_scale grad_cond_only rollout_solver step_weights "
    "gradient reward_crop"
).split()


@dataclass
class LongAlignConfig(RunConfig):
    """Defaults of LongAlign's reward stage; see `RunConfig` for the options of every run. The presets are the released launchers'.

    stage              "supervised": pictures with long captions, the preferred sides of pairs; "reward": prompts alone
    scorer             the reward, a name that `mmalign.rewards.scorer` knows; with omega below 1 a cosine of two embeddings
    segment_reward     the reward reads prompts in segments, and is the mean of their scores
    omega              ω, how much the text-irrelevant part of the reward counts: 1 is the plain reward, 0 leaves it out
    direction          V, a file that `CommonDirection.save` wrote; none estimates it from the training prompts
    rollout_steps      denoising steps of a picture in training
    grad_steps         how many of them, evenly spaced from a random offset, get a gradient
    rollout_guidance_scale   guidance of these pictures, inside the gradient; 1 is none
    grad_cond_only     no gradient through the empty prompt's branch
    rollout_solver     "ode": DDIM, for flow models Euler; "renoise": LCM, for distilled networks
    step_weights       "raw": the true gradient, in which early steps count most; "normalised": the same weight for every trained step
    gradient           "exact": step by step, memory of one network call; "graph": through the whole sampler, as published
    reward_crop        share of the side that is kept of a picture, cropped anew at random each time, so that nothing depends on blocks
    train_adapter      supervised: train the text adapter too, where the pipeline has one
    prompt_dropout     supervised: share of captions that become empty
    distill_guidance_scale   supervised: instead of denoising, distil the model as it is, guided so (7.5 as published), into one that
                       draws in 4 steps of diffusers' LCMScheduler without guidance; a text adapter stays as it is
    """

    method: ClassVar[str] = "longalign"
    unit: ClassVar[str] = "prompts"
    # Of pairs that serve as pictures: their sides are told apart by their labels, and all have one shape.
    comparison: ClassVar[str] = "human"
    aspect_buckets: ClassVar[bool] = False
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "sd15-supervised": {
            "stage": "supervised", "learning_rate": 3e-5, "warmup_steps": 2000, "max_steps": 28750, "max_grad_norm": 0.3, "bf16": True,
            "per_device_train_batch_size": 16, "gradient_accumulation_steps": 12, "prompt_dropout": 0.1,
        },
        "sd15": {
            "learning_rate": 3e-5, "warmup_steps": 2000, "max_steps": 3750, "max_grad_norm": 0.3, "bf16": True,
            "per_device_train_batch_size": 8, "gradient_accumulation_steps": 6,
        },
        "playground": {
            "scorer": "playground", "learning_rate": 3e-4, "max_steps": 60, "warmup_steps": 10, "per_device_train_batch_size": 8,
            "rollout_steps": 10, "grad_steps": 5, "rollout_guidance_scale": 3.0,
        },
    }  # fmt: skip

    stage: Literal["supervised", "reward"] = "reward"
    scorer: str = "denscore"
    segment_reward: bool = True
    omega: float = 0.3
    direction: str | None = None
    rollout_steps: int = 50
    grad_steps: int = 5
    rollout_guidance_scale: float = 7.5
    grad_cond_only: bool = False
    rollout_solver: Literal["ode", "renoise"] = "ode"
    step_weights: Literal["raw", "normalised"] = "raw"
    gradient: Literal["exact", "graph"] = "exact"
    reward_crop: float = 504 / 512
    train_adapter: bool = True
    prompt_dropout: float = 0.0
    distill_guidance_scale: float | None = None
    long_prompts: Literal["segments", "concatenate"] | None = "segments"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.stage == "supervised":
            unread = [name for name in _OF_REWARD if getattr(self, name) != self.default(name)]
            if unread:
                raise ValueError(f"{unread[0]} has no effect with stage='supervised', which has no reward")
            if self.distill_guidance_scale is not None and not self.distill_guidance_scale >= 1:
                raise ValueError("distill_guidance_scale must be at least 1")
            return
        self.rollout()
        problems = {
            "omega must lie in 0 … 1": not 0 <= self.omega <= 1,
            "direction has no effect with omega=1": self.omega == 1 and self.direction is not None,
            "reward_crop must be above 0 and at most 1": not 0 < self.reward_crop <= 1,
            "prompt_dropout has no effect with stage='reward': a reward needs the prompt": self.prompt_dropout != 0,
            "distill_guidance_scale has no effect with stage='reward': distil first, then use rollout_solver='renoise'": (
                self.distill_guidance_scale is not None
            ),
            "train_adapter=False has no effect with stage='reward', which trains the network alone": not self.train_adapter,
            "gradient='graph' needs step_weights='raw': others are no gradient of a sampler": self.gradient == "graph"
            and self.step_weights != "raw",
        }
        for message, violated in problems.items():
            if violated:
                raise ValueError(message)

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

    @property
    def trained_on(self) -> str | None:
        """The reward, in the stage that has one."""
        return self.scorer if self.stage == "reward" else None

    def comparison_config(self) -> ComparisonConfig:
        """The preferred side is the one that people preferred."""
        return ComparisonConfig()

    def about(self) -> str:
        """Which stage, and of which reward."""
        if self.distill_guidance_scale is not None:
            return f"LCM distillation at guidance {self.distill_guidance_scale:g}: draw with LCMScheduler, 4 steps, no guidance"
        if self.stage == "supervised":
            return "denoising error on long captions"
        segments = ", prompts in segments" if self.segment_reward else ""
        return f"reward {self.scorer} at omega {self.omega:g}{segments}; {self.rollout()}"


class LongAlignTrainer(RunTrainer):
    """Trains one of LongAlign's stages; arguments as in `DenoiserTrainer`.

    train_dataset: for stage "reward" prompts (a list, a prompt file, or the prompts of whatever `load_pairs` reads); for "supervised"
    pairs, of which the preferred side is used.
    """

    config_class = LongAlignConfig
    args: LongAlignConfig
    # Encoded prompts or, in stage "supervised", encoded pairs.
    _train: Any
    _reward: NetworkScorer | None = None

    def check_arguments(self, args: LongAlignConfig, train_dataset: Any, eval_dataset: Any, peft_config: Any) -> None:
        """ValueError for what cannot work, before anything is read or moved."""
        super().check_arguments(args, train_dataset, eval_dataset, peft_config)
        reader = long_prompts_of(self.pipe)
        has_tail = reader is not None and reader.tail is not None
        if args.stage == "supervised":
            if has_tail and args.train_adapter and args.ema_decay is not None:
                raise ValueError("ema_decay averages the network alone: leave it out, or pass train_adapter=False")
            if not has_tail and not args.train_adapter:
                raise ValueError(
                    "train_adapter=False has no effect: the pipeline has no text adapter (load_text_adapter)"
                )
            if args.distill_guidance_scale is not None and self.denoiser.schedule.is_flow:
                raise ValueError(
                    "distill_guidance_scale is for models of diffusers' LCMScheduler, and flow models have none: leave it out"
                )
            return
        if self.denoiser.native_frames is not None:
            raise ValueError(f"rewards read pictures, and {type(self.pipe).__name__} draws clips")
        if getattr(peft_config, "lora_dropout", 0):
            raise ValueError("lora_dropout must be 0 in the reward stage: what is rewarded would not be what is drawn")

    def prepare_data(self, data: Any, args: LongAlignConfig, *, like: Any = None) -> Any:
        """Encoded prompts or, with pictures, encoded pairs."""
        if args.stage == "supervised":
            return prepare(data, self.denoiser, cast(Any, args), like=like)
        if isinstance(data, EncodedPrompts):
            return data
        source = load_prompts(data, split=args.train_split if like is None else args.eval_split)
        return encode_prompts(source, self.denoiser, cache_dir=args.cache_dir, progress=not args.disable_tqdm)

    @staticmethod
    def collate(items: list[Any]) -> dict[str, Any]:
        """Pairs as a batch, or the rows of prompts."""
        return batch_of(items) if "chosen" in items[0] else {"row": [item["row"] for item in items]}

    def make_reference(self, ref_model: nn.Module | None) -> Reference:
        """What is distilled: the network without its LoRA, or a frozen copy; no reference elsewhere."""
        if self.args.distill_guidance_scale is None:
            return super().make_reference(ref_model)
        return make_reference(self.network, ref_model)

    def set_up(self) -> None:
        """The reward with its common direction, or the adapter that is trained beside the network."""
        args = self.args
        if args.stage == "reward":
            self._rollout = args.rollout()
            reward = scorer(args.scorer, device=args.device)
            if args.segment_reward:
                embedding_of(reward).in_segments()
            if args.omega < 1:
                direction = self._direction(reward) if args.direction is None else CommonDirection.load(args.direction)
                reward = ReweightedScorer(reward, direction, omega=args.omega)
            self._reward = reward
        elif self._trained_tail is not None:
            # The optimiser sees what the trained module holds.
            self._trained_tail.adapter.requires_grad_(True).to(args.device)
            self.model.adapter = self._trained_tail.adapter

    def _direction(self, reward: NetworkScorer) -> CommonDirection:
        """V of all training prompts, estimated by one process for all."""
        prompts = self._train.prompts
        if len(prompts) < FEWEST_CAPTIONS:
            raise ValueError(
                f"{len(prompts)} prompts are too few for a common direction ({FEWEST_CAPTIONS} at least): pass direction=, "
                "a file that CommonDirection.estimate(…).save(…) wrote, or omega=1"
            )
        found = [CommonDirection.estimate(reward, prompts) if self.accelerator.is_main_process else None]
        (direction,) = broadcast_object_list(found)
        return direction

    @cached_property
    def _trained_tail(self) -> T5Tail | None:
        reader = long_prompts_of(self.pipe)
        denoises = self.args.stage == "supervised" and self.args.distill_guidance_scale is None
        trains = reader is not None and denoises and self.args.train_adapter
        return reader.tail if trains and reader is not None else None

    @cached_property
    def _has_dropout(self) -> bool:
        return any(isinstance(module, nn.Dropout) and module.p > 0 for module in self.model.modules())

    @contextmanager
    def _at_work(self) -> Iterator[None]:
        """Beside the network what the reward needs is on the device, frozen: VAE and scorer; or T5 and its adapter."""
        with super()._at_work():
            if self._reward is not None:
                with on_device([self.pipe.vae, self._reward.model], self.args.device), frozen(self.pipe.vae):
                    yield
                return
            tail = [] if self._trained_tail is None else list(self._trained_tail.networks.values())
            with on_device(tail, self.args.device):
                if self._trained_tail is not None:
                    self._trained_tail.adapter.train()
                try:
                    yield
                finally:
                    for part in tail:
                        part.eval()

    # One batch.

    def row_losses(self, model: nn.Module, inputs: dict[str, Any], *, epoch: int, data: Any) -> Losses:
        """½ (1 − R_ω) of a picture drawn for each prompt, or the denoising error of each picture."""
        if self.args.distill_guidance_scale is not None:
            return self._distilling(model, inputs, epoch, data)
        if self.args.stage == "supervised":
            return self._denoising(model, inputs, epoch, data)
        return self._rewarded(model, inputs["row"], epoch, data)

    def _rewarded(self, model: nn.Module, rows: list[int], epoch: int, data: EncodedPrompts) -> Losses:
        args, schedule = self.args, self._schedule
        text, empty, shape = self._drawn_for(rows, data)
        start = draw_start(args.seed, epoch, rows, shape, self._rollout, dtype=self._dtype, device=args.device)
        prompts, told = [data.prompts[row] for row in rows], dict[str, Tensor]()

        def predict(x: Tensor, t: Tensor, row: Tensor, conditioned: bool) -> Tensor:
            with self.accelerator.autocast():
                return model(x, t, (text if conditioned else empty)[row])

        def score(x0: Tensor) -> Tensor:
            pixels = (self.denoiser.decode_with_gradient(x0) / 2 + 0.5).clamp(0, 1)
            told.update(self._rewards(self._cropped(pixels, rows, epoch), prompts))
            return (1 - told["reward"].to(x0)) / 2

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
        generators = draws.row_generators(self.args.seed, epoch, rows, "crop")
        places = [
            [room // 2] * len(rows) if epoch < 0 else draws.randint(generators, 0, room + 1).tolist() for room in spare
        ]
        return torch.stack(
            [
                picture[:, top : top + sides[0], left : left + sides[1]]
                for picture, top, left in zip(pixels, *places, strict=True)
            ]
        )

    def _denoising(self, model: nn.Module, inputs: dict[str, Any], epoch: int, data: Prepared) -> Losses:
        args, rows = self.args, inputs["row"]
        x0 = inputs["chosen"].to(args.device, self._dtype)
        noise = draws.randn(draws.row_generators(args.seed, epoch, rows, "noise"), x0.shape[1:], x0.dtype, x0.device)
        drawn = draw_timesteps(self._schedule, draws.row_generators(args.seed, epoch, rows, "timestep"))
        point = forward_points(self._schedule, x0, drawn.to(args.device), noise)
        with self._dropout_keyed(rows, epoch):
            text = self._captions(inputs, epoch, data)
            output = model(point.x_t, point.timestep, self.denoiser.with_sizes(text, inputs["size_chosen"]))
        loss = prediction_error(output, point.x_t, point.target, point.timestep, self._schedule)
        values, times = {"loss": loss.detach()}, self._schedule.num_timesteps
        return Losses(loss, rows, health.plain_panel(values, {"loss_by_time": loss.detach()}, point.timestep, times))

    def _distilling(self, model: nn.Module, inputs: dict[str, Any], epoch: int, data: Prepared) -> Losses:
        args, rows, schedule = self.args, inputs["row"], self._schedule
        x0 = inputs["chosen"].to(args.device, self._dtype)
        noise = draws.randn(draws.row_generators(args.seed, epoch, rows, "noise"), x0.shape[1:], x0.dtype, x0.device)
        t = draw_times(schedule, draws.row_generators(args.seed, epoch, rows, "timestep")).to(args.device)
        x = schedule.add_noise(x0, noise, t)
        captions = self._captions(inputs, epoch, data)
        empty = data.encoded.empty.to(args.device)
        nothing = captions.where(torch.zeros(len(rows), dtype=torch.bool, device=args.device), empty)
        text, null = (self.denoiser.with_sizes(part, inputs["size_chosen"]) for part in (captions, nothing))
        with self.reference.model(self.network) as teacher:

            def predict(x: Tensor, t: Tensor, conditioned: bool) -> Tensor:
                return self.denoiser.predict(teacher, x, t, text if conditioned else null)

            x_later, later = teacher_step(predict, schedule, x, t, cast(float, args.distill_guidance_scale))
        with self._dropout_keyed(rows, epoch):
            losses = consistency_losses(lambda x, t: model(x, t, text), schedule, x, t, x_later, later)
        values = {"loss": losses.detach()}
        return Losses(
            losses, rows, health.plain_panel(values, {"loss_by_time": losses.detach()}, t, schedule.num_timesteps)
        )

    def _captions(self, inputs: dict[str, Any], epoch: int, data: Prepared) -> Conditioning:
        """The captions, some of them dropped, through the adapter as it is now."""
        args, index = self.args, torch.tensor(inputs["prompt_index"])
        share = args.prompt_dropout if epoch >= 0 else 0.0
        dropped = draws.rand(draws.row_generators(args.seed, epoch, inputs["row"], "prompt dropout")) < share
        encoded = data.encoded
        text = encoded.conditioning(index).where(~dropped, encoded.empty).to(args.device)
        tail = self._trained_tail
        if tail is None:
            return text
        texts = ["" if gone else encoded.prompts[place] for place, gone in zip(index, dropped.tolist(), strict=True)]
        clip = text.prompt_embeds[:, : -tail.max_tokens]
        return Conditioning(torch.cat([clip, tail(texts).to(clip)], dim=1))

    def _drawn_for(
        self, rows: Sequence[int], data: EncodedPrompts
    ) -> tuple[Conditioning, Conditioning, tuple[int, ...]]:
        """The prompts, the empty prompt beside the same sizes, a row each, and the shape of a latent."""
        args, number = self.args, len(rows)
        height, width = (args.resolution, args.resolution) if args.resolution else self.denoiser.native_size
        sizes = torch.tensor([[height, width, 0, 0, height, width]] * number)
        text = data.conditioning(torch.tensor(rows))
        empty = text.where(torch.zeros(number, dtype=torch.bool), data.empty)
        told = (self.denoiser.with_sizes(part.to(args.device), sizes) for part in (text, empty))
        return *told, self.denoiser.latent_shape(height, width)  # type: ignore[return-value]

    @property
    def _dtype(self) -> torch.dtype:
        return torch.float64 if module_dtype(self.network) == torch.float64 else torch.float32

    # What is told and kept.

    def forward_passes(self, steps: int) -> float:
        """Of the sampler, and of the trained steps again with their backward; VAE and scorer come on top."""
        student = (2.0 if has_adapter(self.network) else 3.0) + bool(self.args.gradient_checkpointing)
        if self.args.distill_guidance_scale is not None:
            # The teacher's two branches, and the target.
            return student + 3
        if self.args.stage == "supervised":
            return student
        branches = 1 if self._rollout.guidance_scale == 1 else 2
        trained = 1 if self._rollout.grad_cond_only else branches
        return self._rollout.num_steps * branches + self._rollout.grad_steps * trained * student

    def one_forward(self) -> Callable[[], Tensor]:
        """A call that runs the network once on a training batch, to be timed."""
        size = min(self.args.per_device_train_batch_size, len(self._train.dataset))
        inputs = self._prepare_inputs(self.collate([self._train.dataset[item] for item in range(size)]))
        if self.args.stage == "supervised":
            x = inputs["chosen"].to(self.args.device, self._dtype)
            text = self.denoiser.with_sizes(self._captions(inputs, -1, self._train), inputs["size_chosen"])
        else:
            text, _, shape = self._drawn_for(inputs["row"], self._train)
            x = torch.zeros(size, *shape, device=self.args.device, dtype=self._dtype)
        t = torch.zeros(size, dtype=torch.long, device=x.device)

        def forward() -> Tensor:
            with torch.no_grad(), evaluating([self.network]), self.accelerator.autocast():
                return self.denoiser.predict(self.network, x, t, text)

        return forward

    def card_settings(self) -> dict[str, Any]:
        """The stage, and what of the reward and its pictures decides what is learnt."""
        names = _OF_REWARD if self.args.stage == "reward" else ["train_adapter", "distill_guidance_scale"]
        return {"stage": self.args.stage} | {name: getattr(self.args, name) for name in names if name != "direction"}

    def _write(self, folder: Path) -> None:
        super()._write(folder)
        if isinstance(self._reward, ReweightedScorer):
            self._reward.direction.save(folder / DIRECTION)
        if self._trained_tail is not None:
            save_adapter(self._trained_tail.adapter, folder / ADAPTER)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        self._load_adapter(Path(resume_from_checkpoint))

    def _load_best_model(self) -> None:
        super()._load_best_model()
        self._load_adapter(Path(cast(str, self.state.best_model_checkpoint)))

    def _load_adapter(self, folder: Path) -> None:
        if self._trained_tail is not None:
            load_adapter_weights(self._trained_tail.adapter, folder / ADAPTER)


class LongAlignPipeline(AlignPipeline):
    """A text-to-image pipeline that reads long prompts, in CLIP's segments and, for SD 1.5, by T5 too, and that LongAlign trains.

    What `save_pretrained` writes draws the same in plain diffusers only for prompts that fit there; here all are read as they were.
    """

    config_class = LongAlignConfig
    trainer_class = LongAlignTrainer

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike[str], **options: Any) -> Self:
        """As `AlignPipeline.from_pretrained`; long prompts are read in segments, or as the folder's own settings say."""
        pipe = super().from_pretrained(pretrained_model_name_or_path, **options)
        folder = Path(pretrained_model_name_or_path).expanduser()
        if (folder / SETTINGS).is_file():
            config = LongPrompts(**json.loads((folder / SETTINGS).read_text(encoding="utf-8")))
            saved = (folder / ADAPTER, folder / T5_ENCODER, folder / T5_TOKENIZER)
            read_long_prompts(pipe, config, load_tail(*saved, config.max_tokens) if saved[0].is_dir() else None)
        else:
            pipe.read_long_prompts()
        return pipe

    def load_text_adapter(
        self,
        adapter: str | os.PathLike[str],
        *,
        t5: str | os.PathLike[str] = "google-t5/t5-large",
        max_tokens: int = 240,
    ) -> None:
        """Puts T5 behind CLIP, through the adapter in a folder: a run's, or a released one. `t5`: a folder or Hub id."""
        reader = long_prompts_of(self)
        config = LongPrompts(max_tokens=max_tokens) if reader is None else reader.config
        read_long_prompts(self, config, load_tail(Path(adapter), str(t5), str(t5), max_tokens))

    def load_released(
        self,
        folder: str | os.PathLike[str],
        *,
        t5: str | os.PathLike[str] = "google-t5/t5-large",
        stages: Sequence[int] = (1, 2),
    ) -> None:
        """Puts the released LongSD onto this pipeline, Stable Diffusion 1.5: its adapter, and the LoRAs of both stages, merged.

        folder: what `hf download luping-liu/LongSD` made, with the second stage's file in it. The LoRAs are pickled lists, of which
        tensors only are read. Prompts are then read as they were in its training.
        """
        place = Path(folder).expanduser()
        read_long_prompts(self, LongPrompts(compat="longalign"))
        self.load_text_adapter(place / _RELEASED_ADAPTER, t5=t5)
        for stage in stages:
            load_aligned(self, place / _RELEASED_LORAS[stage - 1], adapter_name="released", allow_pickle=True)
            network = cast(Any, self).unet
            network.fuse_lora()
            network.unload_lora()

    def _save_more(self, folder: Path) -> None:
        super()._save_more(folder)
        reader = long_prompts_of(self)
        if reader is None:
            return
        write_json(folder / SETTINGS, asdict(reader.config))
        if reader.tail is not None:
            save_adapter(reader.tail.adapter, folder / ADAPTER)
            reader.tail.encoder.save_pretrained(folder / T5_ENCODER)
            reader.tail.tokenizer.save_pretrained(folder / T5_TOKENIZER)
