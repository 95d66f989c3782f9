"""What every image pipeline of ours adds to the diffusers pipeline it is: `align`, `invert`, and saving for plain diffusers."""

import copy
import os
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, ClassVar, Self

import torch

from mmalign.training.config import DenoiserConfig
from mmalign.training.weights import component_name, has_adapter, save_trained


@dataclass(frozen=True)
class AlignResult:
    """What `align` returns: final metrics, every logged entry, and the folder with checkpoints, history and card."""

    metrics: dict[str, float]
    history: list[dict[str, float]]
    output_dir: Path


def load_base(name_or_path: str | os.PathLike[str], **options: Any) -> Any:
    """A diffusers pipeline from a hub id, a folder, or "playground". Weights must be safetensors unless asked otherwise."""
    from diffusers import DiffusionPipeline

    options.setdefault("use_safetensors", True)
    folder = playground_folder() if str(name_or_path) == "playground" else name_or_path
    if isinstance(folder, Path) or Path(folder).exists():
        check_folder(Path(folder))
    if "dtype" in options:
        options["torch_dtype"] = options.pop("dtype")
    return DiffusionPipeline.from_pretrained(folder, **options)


def playground_folder() -> Path:
    """Where the embedded Stable Diffusion lies."""
    from importlib.resources import files

    return Path(str(files("mmalign"))) / "assets" / "stable-diffusion"


def check_folder(folder: Path) -> None:
    """ValueError, in one line with the remedy, for a folder that is no diffusers pipeline."""
    if not (folder / "model_index.json").is_file():
        inside = ", ".join(sorted(p.name for p in folder.iterdir())[:6]) if folder.is_dir() else "not a folder"
        raise ValueError(
            f"{folder} is no diffusers pipeline: it has no model_index.json (found: {inside or 'nothing'}). Name the folder that "
            "holds unet/, vae/ and text_encoder/; for one .safetensors file use from_single_file"
        )


class AlignPipeline:
    """Mixed into a diffusers pipeline class: alignment, inversion, and saving that plain diffusers reads."""

    config_class: ClassVar[type[DenoiserConfig]]
    trainer_class: ClassVar[type]

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike[str], **options: Any) -> Self:
        """Loads any supported text-to-image pipeline (hub id, folder, or "playground"), with diffusers' keywords."""
        return cls._adopt(load_base(pretrained_model_name_or_path, **options))

    @classmethod
    def from_single_file(cls, link_or_path: str, *, base: str = "StableDiffusionPipeline", **options: Any) -> Self:
        """Loads one checkpoint file; `base` names its diffusers class ("StableDiffusionXLPipeline" for SDXL).

        Only .safetensors: a pickled .ckpt can run code when it is read, so convert it first with diffusers' own script.
        """
        if not str(link_or_path).endswith(".safetensors"):
            raise ValueError(
                f"{link_or_path} is no .safetensors file; pickled checkpoints are not read. Convert it to safetensors first"
            )
        import diffusers

        return cls._adopt(getattr(diffusers, base).from_single_file(link_or_path, **options))

    @classmethod
    def from_pipe(cls, pipeline: Any, **options: Any) -> Self:
        """This pipeline around the components of another one, which stays as it is."""
        base = _plain_class(type(pipeline))
        return cls._adopt(base(**pipeline.components, **_flags(pipeline), **options))

    @classmethod
    def _adopt(cls, pipe: Any) -> Self:
        from mmalign.denoisers import adapter_for

        adapter_for(pipe)
        pipe.__class__ = _class_for(cls, type(pipe))
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

        `peft_config`: a `peft.LoraConfig`; "default" is a LoRA of rank 16 on the attention projections; None trains all weights.
        """
        config_class = self.config_class
        options |= {"output_dir": str(output_dir)}
        args = config_class.preset(preset, **options) if preset else config_class(**options)
        trainer = self.trainer_class(
            model=self,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            peft_config=default_lora() if peft_config == "default" else peft_config,
            ref_model=ref_model,
        )
        trained = trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
        trainer.save_model()
        trainer.write_history()
        return AlignResult(dict(trained.metrics), list(trainer.state.log_history), Path(output_dir))

    def save_pretrained(self, save_directory: str | os.PathLike[str], **options: Any) -> None:
        """Saves a folder that plain diffusers loads. An active adapter is merged into a copy, and also written as a LoRA file."""
        network = getattr(self, "unet", None) or getattr(self, "transformer", None)
        plain = _plain_class(type(self))
        if network is None or not has_adapter(network):
            plain.save_pretrained(self, save_directory, **options)
            return
        name = component_name(self, network)
        merged = copy.deepcopy(network)
        merged.fuse_lora()
        merged.unload_lora()
        components = {**self.components, name: merged}  # type: ignore[attr-defined]
        _class_for(type(self).__mro__[1], plain)
        plain(**components, **_flags(self)).save_pretrained(save_directory, **options)
        save_trained(self, network, Path(save_directory))

    @torch.no_grad()
    def invert(self, image: Any, prompt: str | list[str], *, timestep: int | None = None, **options: Any) -> Any:
        """Inverts pictures to the noised latents from which this pipeline would draw them, and reports how well that worked.

        Args:
            image: one PIL picture or a list; prompt: one text or a list.
            timestep: up to which timestep, the last one by default.
            options: fields of `mmalign.likelihood.config.InversionConfig`; by default 10 steps with one averaged ReNoise correction.

        Returns a `mmalign.likelihood.inversion.RoundTrip`: the inversion (x_t, target), what sampling back over the same grid gives,
        and the root-mean-square error and PSNR of that round trip in latent space, one number a picture.
        """
        from mmalign.data.images import fit, to_pixels
        from mmalign.denoisers import adapter_for
        from mmalign.likelihood.config import InversionConfig
        from mmalign.likelihood.inversion import round_trip
        from mmalign.training.prepare import native_size

        images = image if isinstance(image, list) else [image]
        prompts = [prompt] * len(images) if isinstance(prompt, str) else prompt
        if len(prompts) != len(images):
            raise ValueError(f"{len(images)} pictures need one prompt or {len(images)}, got {len(prompts)}")
        denoiser = adapter_for(self)
        fitted = [fit(picture.convert("RGB"), *native_size(denoiser)) for picture in images]
        latents = denoiser.encode_image(torch.stack([to_pixels(picture) for picture, _ in fitted]))
        sizes = torch.tensor([size for _, size in fitted])
        conditioning = denoiser.with_sizes(denoiser.encode_prompt(prompts), sizes)
        t = torch.full((len(images),), denoiser.schedule.max_timestep if timestep is None else timestep)
        config = InversionConfig(**({"renoise_steps": 1} | options))

        def predict(x: torch.Tensor, time: torch.Tensor, active: torch.Tensor) -> torch.Tensor:
            return denoiser.predict(denoiser.module, x, time, conditioning[active])

        return round_trip(predict, denoiser.schedule, latents, t.to(latents.device), config)


def default_lora() -> Any:
    """A LoRA of rank 16, α 16, on the attention projections, starting at the base model."""
    from peft import LoraConfig

    return LoraConfig(
        r=16, lora_alpha=16, init_lora_weights="gaussian", target_modules=["to_q", "to_k", "to_v", "to_out.0"]
    )


@cache
def _class_for(ours: type, base: type) -> type:
    """Our pipeline class on top of a diffusers class, under the latter's name, so that model_index.json names a class of diffusers."""
    return type(base.__name__, (ours, base), {"__module__": base.__module__, "_plain_class": base})


def _plain_class(kind: type) -> Any:
    return getattr(kind, "_plain_class", kind)


def _flags(pipe: Any) -> dict[str, Any]:
    """The constructor's arguments that are no components (`requires_safety_checker`, …), as the pipeline was made with."""
    import inspect

    accepted = inspect.signature(_plain_class(type(pipe)).__init__).parameters
    return {key: value for key, value in pipe.config.items() if key in accepted and key not in pipe.components}
