"""What every image pipeline of ours adds to the diffusers pipeline it is: `align`, `invert`, and saving for plain diffusers."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import torch

from mmalign.denoisers.cascade_decoder import with_decoder
from mmalign.denoisers.long_prompts import LongPrompts, long_prompts_of, read_long_prompts
from mmalign.training.aligned import load_aligned
from mmalign.training.export import ExportFormat, export
from mmalign.training.loading import load_base, plain_class, single_file
from mmalign.training.merging import flags, merged, plain_components
from mmalign.training.run_config import RunConfig
from mmalign.training.weights import ADAPTER, aligned_network, has_adapter, save_trained


@dataclass(frozen=True)
class AlignResult:
    """What `align` returns: final metrics, every logged entry, and the folder with checkpoints, history and card."""

    metrics: dict[str, float]
    history: list[dict[str, float]]
    output_dir: Path


class AlignPipeline:
    """Mixed into a diffusers pipeline class: alignment, inversion, and saving that plain diffusers reads."""

    config_class: ClassVar[type[RunConfig]]
    trainer_class: ClassVar[type]

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike[str], **options: Any) -> Self:
        """Loads any supported text-to-image or text-to-video pipeline, with diffusers' keywords.

        The name is a hub id, a folder, "playground" or "playground-scenes".
        """
        return cls._adopt(load_base(pretrained_model_name_or_path, **options))

    @classmethod
    def from_single_file(cls, link_or_path: str, *, base: str = "StableDiffusionPipeline", **options: Any) -> Self:
        """Loads one .safetensors checkpoint; `base` names its diffusers class ("StableDiffusionXLPipeline" for SDXL)."""
        return cls._adopt(single_file(link_or_path, base, **options))

    @classmethod
    def from_pipe(cls, pipeline: Any, **options: Any) -> Self:
        """This pipeline around the components of another one. They are shared, as in diffusers: aligning one aligns both."""
        base = plain_class(type(pipeline))
        made = cls._adopt(base(**plain_components(pipeline) | options, **flags(pipeline, options)))
        if (reader := long_prompts_of(pipeline)) is not None:
            read_long_prompts(made, reader.config, reader.tail)
        return made

    @classmethod
    def _adopt(cls, pipe: Any) -> Self:
        from mmalign.denoisers import adapter_for

        adapter_for(pipe)
        pipe.__class__ = _class_for(cls, plain_class(type(pipe)))  # type: ignore[arg-type]
        return pipe

    def align(
        self,
        train_dataset: Any,
        *,
        output_dir: str | os.PathLike[str],
        eval_dataset: Any = None,
        peft_config: Any = "default",
        ref_model: Any = None,
        preset: str | None = None,
        **options: Any,
    ) -> AlignResult:
        """Aligns this pipeline in place: builds the method's config from `options`, trains, and returns the result.

        `preset`: published settings under `options`; "playground" data have their own, which need not be named.
        `peft_config`: a `peft.LoraConfig`; "default" is a LoRA of rank 16 on the attention projections; None trains all weights.
        `output_dir` then holds the weights, `README.md` and `history.json`. The pipeline stays on its device, ready to draw.
        """
        options |= {"output_dir": str(output_dir)}
        preset = preset or ("playground" if train_dataset == "playground" else None)
        args = self.config_class.preset(preset, **options) if preset else self.config_class(**options)
        with self._being_trained(peft_config):
            trainer = self.trainer_class(
                model=self,
                args=args,
                train_dataset=train_dataset,
                eval_dataset=eval_dataset,
                peft_config=_default_lora(self.config_class) if peft_config == "default" else peft_config,
                ref_model=ref_model,
            )
            trained = trainer.train()
            trainer.save_model()
        return AlignResult(trainer.last_metrics() | trained.metrics, list(trainer.state.log_history), Path(output_dir))

    @contextmanager
    def _being_trained(self, peft_config: Any) -> Iterator[None]:
        """A block in which `align` trains: what a method keeps of the pipeline, and makes of what was trained."""
        yield

    def save_pretrained(self, save_directory: str | os.PathLike[str], **options: Any) -> None:
        """Saves a folder that plain diffusers loads. An active adapter is merged into a copy, and also written as a LoRA file.

        ValueError for an adapter on quantised weights.
        """
        from mmalign.files import staged

        network, folder = aligned_network(self)[1], Path(save_directory)
        if options.get("push_to_hub"):
            options.setdefault("repo_id", folder.name)
        with staged(folder) as part:
            if has_adapter(network) and ADAPTER in network.peft_config:  # type: ignore[operator]
                save_trained(self, network, part)
            self._save_more(part)
            merged(self).save_pretrained(str(part), **options)

    def read_long_prompts(self, layout: Literal["segments", "concatenate"] | None = "segments", **options: Any) -> None:
        """From now on prompts beyond CLIP's 77 positions are read in segments (None: cut), in drawing and in training.

        options: fields of `mmalign.denoisers.long_prompts.LongPrompts`. A folder that is saved does not tell it: call it again.
        """
        before = long_prompts_of(self)
        config = None if layout is None else LongPrompts(layout=layout, **options)
        read_long_prompts(self, config, None if before is None else before.tail)

    def _save_more(self, folder: Path) -> None:
        """Writes what a method has besides a plain pipeline."""

    def load_aligned(
        self, path: str | os.PathLike[str], *, adapter_name: str = "aligned", allow_pickle: bool = False
    ) -> None:
        """Puts what an alignment released onto this pipeline, its base: a whole network, or a LoRA. See `training.aligned`."""
        load_aligned(self, path, adapter_name=adapter_name, allow_pickle=allow_pickle)

    def export(
        self, path: str | os.PathLike[str], *, format: ExportFormat = "diffusers", dtype: torch.dtype | None = None
    ) -> Path:
        """Writes this pipeline or its LoRA as other tools load it, and returns where. See `training.export`."""
        return export(self, path, format=format, dtype=dtype)

    @torch.no_grad()
    def invert(
        self,
        image: Any,
        prompt: str | list[str],
        *,
        timestep: int | None = None,
        generator: list[torch.Generator] | None = None,
        **options: Any,
    ) -> Any:
        """Inverts pictures to the noised latents from which this pipeline would draw them, and reports how well that worked.

        `image`: one PIL picture or a list; for a video model one clip (a tuple of frames) or a list of clips, of which as many frames
        are used as the model draws. `prompt`: one text or a list. `timestep`: up to which timestep, the last one by default.
        `options`: fields of `mmalign.likelihood.config.InversionConfig`; by default 10 steps with one averaged ReNoise correction.
        `generator`: with eta > 0, one a picture.

        Returns a `mmalign.likelihood.inversion.RoundTrip`: the inversion (x_t, target), what sampling back over the same grid gives,
        and the root-mean-square error and PSNR of that round trip in latent space, one number a picture.
        """
        from mmalign.data.clips import fitted, read_clip
        from mmalign.data.images import to_rgb
        from mmalign.denoisers import adapter_for
        from mmalign.denoisers.parts import evaluating
        from mmalign.likelihood.config import InversionConfig
        from mmalign.likelihood.inversion import round_trip
        from mmalign.training.devices import storable

        images = image if isinstance(image, list) else [image]
        prompts = [prompt] * len(images) if isinstance(prompt, str) else list(prompt)
        if not images or len(prompts) != len(images):
            raise ValueError(f"{len(images)} pictures need one prompt or {len(images)}, got {len(prompts)}")
        config = InversionConfig(**({"renoise_steps": int(options.get("solver") != "heun")} | options))
        denoiser = adapter_for(self)
        frames = denoiser.native_frames
        read = [to_rgb(picture) if frames is None else read_clip(picture, frames) for picture in images]
        pixels, sizes = zip(*(fitted(picture, *denoiser.native_size) for picture in read), strict=True)
        latents = denoiser.encode_image(torch.stack(pixels))
        conditioning = denoiser.with_sizes(denoiser.encode_prompt(prompts), torch.tensor(sizes))
        schedule = denoiser.schedule = storable(denoiser.schedule, latents.device)
        t = torch.full((len(images),), schedule.max_timestep if timestep is None else timestep)

        def predict(x: torch.Tensor, time: torch.Tensor, active: torch.Tensor) -> torch.Tensor:
            return denoiser.predict(denoiser.module, x, time, conditioning[active])

        with evaluating([denoiser.module]):
            return round_trip(predict, schedule, latents, t, config, generator)


def _default_lora(config_class: type[RunConfig]) -> Any:
    return default_lora() if config_class.takes_lora else None


def default_lora() -> Any:
    """A LoRA of rank 16, α 16, on the attention projections, starting at the base model."""
    from peft import LoraConfig

    return LoraConfig(
        r=16, lora_alpha=16, init_lora_weights="gaussian", target_modules=["to_q", "to_k", "to_v", "to_out.0"]
    )


@cache
def _class_for(ours: type, base: type) -> type:
    """Our pipeline class on top of a diffusers class, under the latter's name, so that model_index.json names a class of diffusers."""
    bases = (ours, with_decoder(base))
    return type(base.__name__, bases, {"__module__": base.__module__, "_plain_class": base})
