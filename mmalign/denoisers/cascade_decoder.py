"""Pictures of Stable Cascade: its prior draws features of a picture, and a decoder that lies beside it makes the picture of them."""

import inspect
import json
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import cache, wraps
from pathlib import Path
from typing import Any

import torch

FOLDER = "decoder"
_PRIOR = "StableCascadePriorPipeline"


class DecodedPrior:
    """Mixed into the prior's pipeline: with a decoder its call returns pictures, without one the features, as in diffusers.

    decoder: a StableCascadeDecoderPipeline, which stays where it is; where none is set, that in decoder/ of the folder from which the
    prior was loaded, which follows the prior for every call.
    """

    decoder: Any = None
    _beside: Any = None

    def find_decoder(self: Any) -> Any:
        """The decoder, loaded when it is first asked for, in the prior's precision; None where there is none."""
        folder = Path(str(self.config.get("_name_or_path") or "")) / FOLDER
        if self.decoder is None and self._beside is None and (folder / "model_index.json").is_file():
            self._beside = load_decoder(folder, self.prior.dtype).to(self._execution_device)
        return self.decoder or self._beside


def load_decoder(folder: Path, dtype: torch.dtype) -> Any:
    """A StableCascadeDecoderPipeline of a folder in the published layout, without its CLIP, which is the prior's again.

    Part by part: model_index.json names a module for the VQGAN that diffusers has moved since (its issue 14008).
    """
    from diffusers import DDPMWuerstchenScheduler, StableCascadeDecoderPipeline
    from diffusers.models import StableCascadeUNet
    from diffusers.pipelines.deprecated.wuerstchen import PaellaVQModel

    weights: dict[str, Any] = {"dtype": dtype, "use_safetensors": True}
    index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    return StableCascadeDecoderPipeline(
        decoder=StableCascadeUNet.from_pretrained(folder, subfolder="decoder", **weights),
        tokenizer=None,
        text_encoder=None,
        scheduler=DDPMWuerstchenScheduler.from_pretrained(folder, subfolder="scheduler"),
        vqgan=PaellaVQModel.from_pretrained(folder, subfolder="vqgan", **weights),
        **{name: index[name] for name in ("latent_dim_scale",) if name in index},
    )


@cache
def with_decoder(base: type) -> type:
    """The pipeline class itself or, of the prior, one whose call draws pictures where there is a decoder."""
    if base.__name__ != _PRIOR:
        return base
    return type(base.__name__, (DecodedPrior, base), {"__call__": _call(base.__call__), "__module__": base.__module__})


def check_draws(pipe: Any) -> None:
    """ValueError for the prior without its decoder, whose call returns no pictures."""
    if type(pipe).__name__ == _PRIOR and not (isinstance(pipe, DecodedPrior) and pipe.find_decoder() is not None):
        raise ValueError(
            "Stable Cascade's prior draws features and no pictures: put the decoder into decoder/ of the prior's folder "
            "(hf download stabilityai/stable-cascade --local-dir FOLDER/decoder), or set pipe.decoder"
        )


def _call(prior: Any) -> Any:
    """The prior's call, and then the decoder's without guidance, its published setting, on the same generator."""
    signature = inspect.signature(prior)

    @wraps(prior)
    def call(self: Any, *args: Any, decoder_inference_steps: int = 10, **options: Any) -> Any:
        decoder, given = self.find_decoder(), signature.bind(self, *args, **options).arguments
        if decoder is None:
            return prior(self, *args, **options)
        shown, as_record = given.pop("output_type", "pil"), given.pop("return_dict", True)
        drawn = prior(**given, output_type="pt")
        decoder.set_progress_bar_config(**getattr(self, "_progress_bar_config", {}))
        with _following(decoder, self) if decoder is self._beside else nullcontext():
            place = {"device": decoder._execution_device, "dtype": decoder.decoder.dtype}
            return decoder(
                image_embeddings=drawn.image_embeddings.to(**place),
                prompt_embeds=drawn.prompt_embeds.to(**place),
                prompt_embeds_pooled=drawn.prompt_embeds_pooled.to(**place),
                num_inference_steps=decoder_inference_steps,
                guidance_scale=0.0,
                generator=given.get("generator"),
                output_type=shown,
                return_dict=as_record,
            )

    added = inspect.Parameter("decoder_inference_steps", inspect.Parameter.KEYWORD_ONLY, default=10)
    call.__signature__ = signature.replace(parameters=[*signature.parameters.values(), added])  # type: ignore[attr-defined]
    return call


@contextmanager
def _following(decoder: Any, prior: Any) -> Iterator[None]:
    home = decoder.device
    decoder.to(prior._execution_device)
    try:
        yield
    finally:
        decoder.to(home)
