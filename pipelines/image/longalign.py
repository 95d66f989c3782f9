"""LongAlign: long prompts in segments, and a reward that counts style less (Liu et al., ICLR 2025, arXiv:2410.11817).

    supervised:   L = ‖ε − ε_θ(x_t, t, [CLIP by segments; T5])‖²,   or LCM distillation on the same pictures
    reward:       L = ½ (1 − R_ω(x̂_0, prompt)),   R_ω = C_X·C_P^⊥ + ω·η·C_X·V

The second stage draws whole pictures and trains on a few of their steps, one network call in memory (`mmalign.likelihood.rollout`).
"""

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal, Self, cast

import torch
from accelerate.utils import broadcast_object_list
from torch import Tensor, nn

from mmalign.denoisers import Conditioning
from mmalign.denoisers.long_prompts import SETTINGS, LongPrompts, long_prompts_of, read_long_prompts
from mmalign.denoisers.text_adapter import T5Tail, load_adapter_weights, load_tail, save_adapter
from mmalign.files import write_json
from mmalign.likelihood import draws
from mmalign.likelihood.consistency import consistency_losses, draw_times, teacher_step
from mmalign.likelihood.denoising import forward_points, prediction_error
from mmalign.likelihood.grids import draw_timesteps
from mmalign.likelihood.reference import Reference, make_reference
from mmalign.rewards import CommonDirection, NetworkScorer, ReweightedScorer
from mmalign.rewards.decomposed import FEWEST_CAPTIONS, embedding_of
from mmalign.training import health
from mmalign.training.align_trainer import Losses
from mmalign.training.aligned import load_aligned
from mmalign.training.devices import on_device
from mmalign.training.pipeline import AlignPipeline
from mmalign.training.prepare import Prepared
from mmalign.training.reward_trainer import OF_REWARD, RewardConfig, RewardTrainer

DIRECTION, ADAPTER = "common_direction.safetensors", "text_adapter"
T5_ENCODER, T5_TOKENIZER = "t5_encoder", "t5_tokenizer"
# What the authors released, in the order in which it acts.
_RELEASED_ADAPTER, _RELEASED_LORAS = "s28750_adapter", ("s28750_lora_vis.pt", "sd15-reward-3750.pt")
_OF_REWARD = (*OF_REWARD, "segment_reward", "omega", "direction")


@dataclass
class LongAlignConfig(RewardConfig):
    """Defaults of LongAlign's reward stage; see `RewardConfig` for the options of any. The presets are the released launchers'.

    stage              "supervised": pictures with long captions, or the preferred sides of pairs; "reward": prompts alone
    segment_reward     the reward reads prompts in segments, and is the mean of their scores; it is then a cosine of two embeddings
    omega              ω, how much the text-irrelevant part of the reward counts: 1 is the plain reward, 0 leaves it out; below 1 the
                       reward is a cosine of two embeddings
    direction          V, a file that `CommonDirection.save` wrote; none estimates it from the training prompts
    train_adapter      supervised: train the text adapter too, where the pipeline has one
    prompt_dropout     supervised: share of captions that become empty
    distill_guidance_scale   supervised: instead of denoising, distil the model as it is, guided so (7.5 as published), into one that
                       draws in 4 steps of diffusers' LCMScheduler without guidance; a text adapter stays as it is
    """

    method: ClassVar[str] = "longalign"
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
    train_adapter: bool = True
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
        self.check_reward()
        problems = {
            "omega must lie in 0 … 1": not 0 <= self.omega <= 1,
            "direction has no effect with omega=1": self.omega == 1 and self.direction is not None,
            "distill_guidance_scale has no effect with stage='reward': distil first, then use rollout_solver='renoise'": (
                self.distill_guidance_scale is not None
            ),
            "train_adapter=False has no effect with stage='reward', which trains the network alone": not self.train_adapter,
        }
        for message, violated in problems.items():
            if violated:
                raise ValueError(message)

    @property
    def trained_on(self) -> str | None:
        """The reward, in the stage that has one."""
        return self.scorer if self.stage == "reward" else None

    @property
    def reads_pictures(self) -> bool:
        """In the stage that has no reward."""
        return self.stage == "supervised"

    def about(self) -> str:
        """Which stage, and of which reward."""
        if self.distill_guidance_scale is not None:
            return f"LCM distillation at guidance {self.distill_guidance_scale:g}: draw with LCMScheduler, 4 steps, no guidance"
        if self.stage == "supervised":
            return "denoising error on long captions"
        segments = ", prompts in segments" if self.segment_reward else ""
        return f"reward {self.scorer} at omega {self.omega:g}{segments}; {self.rollout()}"


class LongAlignTrainer(RewardTrainer):
    """Trains one of LongAlign's stages; arguments as in `DenoiserTrainer`.

    train_dataset: for stage "reward" prompts (a list, a prompt file, or the prompts of whatever `load_pairs` reads); for "supervised"
    pictures with captions, or pairs, of which the preferred side is used.
    """

    config_class = LongAlignConfig
    args: LongAlignConfig

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

    def make_reference(self, ref_model: nn.Module | None) -> Reference:
        """What is distilled: the network without its LoRA, or a frozen copy; no reference elsewhere."""
        if self.args.distill_guidance_scale is None:
            return super().make_reference(ref_model)
        return make_reference(self.network, ref_model)

    def set_up(self) -> None:
        """The reward, or the adapter that is trained beside the network."""
        super().set_up()
        if self._trained_tail is not None:
            # The optimiser sees what the trained module holds.
            self._trained_tail.adapter.requires_grad_(True).to(self.args.device)
            self.model.adapter = self._trained_tail.adapter

    def make_reward(self) -> NetworkScorer:
        """The scorer, reading in segments, its text-irrelevant part counting less."""
        args, reward = self.args, super().make_reward()
        if args.segment_reward:
            embedding_of(reward).in_segments()
        if args.omega == 1:
            return reward
        direction = self._direction(reward) if args.direction is None else CommonDirection.load(args.direction)
        return ReweightedScorer(reward, direction, omega=args.omega)

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
        """Beside the network what the reward needs is on the device, or T5 and its adapter."""
        tail = [] if self._trained_tail is None else list(self._trained_tail.networks.values())
        with super()._at_work(), on_device(tail, self.args.device):
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
        if self.args.stage == "reward":
            return super().row_losses(model, inputs, epoch=epoch, data=data)
        if self.args.distill_guidance_scale is not None:
            return self._distilling(model, inputs, epoch, data)
        return self._denoising(model, inputs, epoch, data)

    def _denoising(self, model: nn.Module, inputs: dict[str, Any], epoch: int, data: Prepared) -> Losses:
        rows = inputs["row"]
        drawn = draw_timesteps(self._schedule, self._drawn(rows, epoch, "timestep"))
        with self._dropout_keyed(rows, epoch):
            x0, text = self._captioned(inputs, epoch, data)
            noise = draws.randn(self._drawn(rows, epoch, "noise"), x0.shape[1:], x0.dtype, x0.device)
            point = forward_points(self._schedule, x0, drawn.to(x0.device), noise)
            output = model(point.x_t, point.timestep, text)
        loss = prediction_error(output, point.x_t, point.target, point.timestep, self._schedule)
        values, times = {"loss": loss.detach()}, self._schedule.num_timesteps
        return Losses(loss, rows, health.plain_panel(values, {"loss_by_time": loss.detach()}, point.timestep, times))

    def _distilling(self, model: nn.Module, inputs: dict[str, Any], epoch: int, data: Prepared) -> Losses:
        rows, schedule = inputs["row"], self._schedule
        x0, text = self._captioned(inputs, epoch, data)
        empty = self._rows(inputs, data)[2]
        noise = draws.randn(self._drawn(rows, epoch, "noise"), x0.shape[1:], x0.dtype, x0.device)
        t = draw_times(schedule, self._drawn(rows, epoch, "timestep")).to(x0.device)
        x = schedule.add_noise(x0, noise, t)
        with self.reference.model(self.network) as teacher:

            def predict(x: Tensor, t: Tensor, conditioned: bool) -> Tensor:
                return self.denoiser.predict(teacher, x, t, text if conditioned else empty)

            x_later, later = teacher_step(predict, schedule, x, t, cast(float, self.args.distill_guidance_scale))
        with self._dropout_keyed(rows, epoch):
            losses = consistency_losses(lambda x, t: model(x, t, text), schedule, x, t, x_later, later)
        values, times = {"loss": losses.detach()}, schedule.num_timesteps
        return Losses(losses, rows, health.plain_panel(values, {"loss_by_time": losses.detach()}, t, times))

    def _captioned(self, inputs: dict[str, Any], epoch: int, data: Prepared) -> tuple[Tensor, Conditioning]:
        """The pictures' latents, and their captions, some of them dropped, through the adapter as it is now."""
        x0, text, empty = self._rows(inputs, data)
        dropped, tail = self._dropped(inputs["row"], epoch), self._trained_tail
        text = text.where(~dropped, empty)
        if tail is None:
            return x0, text
        pairs = zip(inputs["prompt_index"], dropped.tolist(), strict=True)
        texts = ["" if gone else data.encoded.prompts[place] for place, gone in pairs]
        clip = text.prompt_embeds[:, : -tail.max_tokens]
        return x0, replace(text, prompt_embeds=torch.cat([clip, tail(texts).to(clip)], dim=1))

    # What is told and kept.

    def forward_passes(self, steps: int) -> float:
        """Of the reward stage, or of one trained call; distilling adds the teacher's two branches and the target."""
        if self.args.stage == "reward":
            return super().forward_passes(steps)
        return self._trained_passes + 3 * (self.args.distill_guidance_scale is not None)

    def card_settings(self) -> dict[str, Any]:
        """The stage, and what of the reward and its pictures decides what is learnt."""
        args = self.args
        if args.stage == "supervised":
            return {name: getattr(args, name) for name in ("stage", "train_adapter", "distill_guidance_scale")}
        return super().card_settings() | {name: getattr(args, name) for name in ("stage", "segment_reward", "omega")}

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
