"""Which options go together, of a denoiser's training above all: told when the config is made, before anything is read or moved."""

import typing
from functools import cache
from typing import Any, Literal

import torch
from transformers import TrainingArguments

from mmalign import losses
from mmalign.losses.info import LossInfo

_INVERTED = ("ddim", "renoise")
# Option → the latents or comparisons that read it.
READ_BY: dict[str, tuple[str, ...]] = {
    "inversion_steps": _INVERTED,
    "inversion_renoise_steps": ("renoise",),
    "inversion_combine": ("renoise",),
    "inversion_solver": _INVERTED,
    "inversion_eta": _INVERTED,
    "inversion_eta_form": _INVERTED,
    "inversion_share_eta_noise": _INVERTED,
    "inversion_compat": _INVERTED,
    "inversion_fp16_alphas": _INVERTED,
    "inversion_landings": _INVERTED,
    "inversion_refresh": _INVERTED,
    "smoothing_gamma": ("smoothed",),
    "smoothing_normalizer": ("smoothed",),
}
# Options that sample pictures alone read.
OF_SAMPLES = ("validation_seed", "validation_inference_steps", "validation_guidance_scale")


def check_choices(args: Any) -> None:
    """What Literal types promise."""
    for name, allowed in _choices(type(args)).items():  # type: ignore[arg-type]
        if getattr(args, name) not in allowed:
            raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}; got {getattr(args, name)!r}")


def check_alignment(args: Any) -> None:
    """Options of any alignment that are out of range, or would have no effect."""
    refuse(
        {
            "fp16 has no effect on a CPU: use bf16=True there, or fp16=False": args.fp16 and args.device.type == "cpu",
            "ema_decay must be 0 or more and below 1": args.ema_decay is not None and not 0 <= args.ema_decay < 1,
        }
    )


def check_run(args: Any) -> None:
    """Options of any run of a denoiser that are out of range, or would have no effect."""
    refuse(
        {
            "prompt_dropout must lie in 0 … 1": not 0 <= args.prompt_dropout <= 1,
            "num_frames must be positive": args.num_frames is not None and args.num_frames < 1,
            "resolution must be positive": args.resolution is not None and args.resolution < 1,
            "validation_steps must be 0 or more": args.validation_steps < 0,
            "validation_inference_steps must be at least 1": args.validation_inference_steps < 1,
            "validation_steps needs validation_prompts": args.validation_steps > 0 and not args.validation_prompts,
            "validation_prompts have no effect without validation_steps": args.validation_steps == 0
            and bool(args.validation_prompts),
        }
    )
    if not args.validation_steps:
        for name in OF_SAMPLES:
            if getattr(args, name) != args.default(name):
                raise ValueError(f"{name} has no effect with validation_steps=0")


def check_axes(args: Any) -> None:
    """Options of the pair methods that contradict each other, or would have no effect beside the others."""
    graded = args.comparison in ("smoothed", "bradley_terry")
    checks = {
        "beta must be positive": not args.starting_beta > 0,
        "min_abs_strength must be 0 or more": not args.min_abs_strength >= 0,
        "smoothing_gamma must be positive": not args.smoothing_gamma > 0,
        "aspect_buckets needs dataloader_drop_last=True: a short batch would stand in the middle of an epoch": (
            args.aspect_buckets and not args.dataloader_drop_last
        ),
        "share_noise=False belongs to latents='forward'": not args.share_noise and args.latents != "forward",
        "inversion_model='reference' needs latents 'ddim' or 'renoise'": args.inversion_model == "reference"
        and args.latents == "forward",
        "reference_cache needs points that the policy does not choose: latents='forward' or inversion_model='reference'": (
            args.reference_cache and args.latents != "forward" and args.inversion_model == "policy"
        ),
        "reference_cache keeps one point a pair: leave inversion_landings out": args.reference_cache
        and args.inversion_landings != "last",
        f"inversion_landings={args.inversion_landings!r} needs exact landings: leave inversion_compat out": (
            args.inversion_landings != "last" and args.inversion_compat is not None
        ),
        "inversion_refresh belongs to inversion_landings='in_turn' with inversion_model='policy', and they need it": (
            (args.inversion_refresh is not None)
            != (args.inversion_landings == "in_turn" and args.inversion_model == "policy")
        ),
        "inversion_refresh must be at least 1": args.inversion_refresh is not None and args.inversion_refresh < 1,
        "checkpoints must lie where paths are renewed, so that a resumed run sees the same ones: make save_steps a multiple of "
        "inversion_refresh, with save_strategy 'steps' or 'no'": args.inversion_refresh is not None
        and not _saves_where_paths_are_renewed(args),
        f"comparison={args.comparison!r} needs a scorer": args.comparison != "human" and args.scorer is None,
        "scorer has no effect with comparison='human'": args.comparison == "human" and args.scorer is not None,
        "keep_human_ties needs a comparison by a scorer": args.keep_human_ties and args.comparison == "human",
        "min_abs_strength needs comparison 'smoothed' or 'bradley_terry'": args.min_abs_strength > 0 and not graded,
        "strength_sampling must lie between 0 and 1": args.strength_sampling is not None
        and not 0 < args.strength_sampling < 1,
        "aspect_buckets keeps every pair for its bucket: leave strength_sampling out": args.aspect_buckets
        and args.strength_sampling is not None,
        "strength_sampling needs comparison 'smoothed' or 'bradley_terry', where pairs differ in strength": (
            args.strength_sampling is not None and not graded
        ),
        "smoothing_normalizer='official' fits the cosines of scorer='pickscore' only": args.comparison == "smoothed"
        and args.smoothing_normalizer == "official"
        and args.scorer != "pickscore",
        "f_alpha_divergence_coef belongs to f_divergence_type='alpha_divergence'": args.f_alpha_divergence_coef
        is not None
        and args.f_divergence_type != "alpha_divergence",
    }
    refuse(checks)
    for name, readers in READ_BY.items():
        read = args.latents in readers or args.comparison in readers
        if not read and getattr(args, name) != args.default(name):
            raise ValueError(f"{name} has no effect with latents={args.latents!r} and comparison={args.comparison!r}")


def refuse(checks: dict[str, Any]) -> None:
    """ValueError with the first message whose condition holds."""
    for message, violated in checks.items():
        if violated:
            raise ValueError(message)


def _saves_where_paths_are_renewed(args: Any) -> bool:
    strategy, every = args.save_strategy.value, args.inversion_refresh or 1
    return strategy == "no" or (strategy == "steps" and args.save_steps >= 1 and args.save_steps % every == 0)


def check_losses(args: Any) -> None:
    """Refuses, before any picture is encoded, what the losses would refuse at the first step."""
    infos = [losses.get(key) for key in args.loss_type]
    for info in infos:
        if info.unpaired:
            raise ValueError(f"loss_type {info.key!r} reads single labelled samples, and this trainer has pairs")
    check_modality(infos, "denoiser", "denoisers")
    if coupled := [info.key for info in infos if info.batch_coupled]:
        _check_batch_coupled(args, coupled[0])
    check_beta(args, infos)
    check_reference(args, needed=args.inversion_model == "reference")
    if ("sdpo" in args.loss_type) != (args.sdpo_mu is not None):
        raise ValueError("loss_type 'sdpo' and sdpo_mu go together; published: sdpo_mu=0.9 (SD 1.5), 0.6 (SDXL)")
    if args.sdpo_mu is not None and not 0 <= args.sdpo_mu <= 1:
        raise ValueError(f"sdpo_mu must lie in 0 … 1, got {args.sdpo_mu}")
    one = torch.ones(2)
    options = args.loss_options() | ({"rejected_scale": one} if args.sdpo_mu is not None else {})
    if args.comparison in ("smoothed", "bradley_terry"):
        options["strength"] = one
    losses.compute(
        args.loss_type,
        losses.PairLogProbs(-one, -one, -one, -one, one, one),
        loss_weights=args.loss_weights,
        **options,
    )


def check_modality(infos: list[LossInfo], modality: str, named: str) -> None:
    """ValueError for a loss that is not for this kind of models, which are `named` so."""
    for info in infos:
        if modality not in info.modalities:
            raise ValueError(f"loss_type {info.key!r} is for {' and '.join(info.modalities)} models, not {named}")


def check_beta(args: Any, infos: list[LossInfo]) -> None:
    """ValueError for a β that no loss takes, or that cannot be left at its default."""
    if not args.takes_beta and args.beta != args.default("beta"):
        raise ValueError(f"beta has no effect with loss_type={'+'.join(args.loss_type)!r}")
    _check_beta_of_reference_free(args, [info for info in infos if "beta" in info.hyper])


def check_reference(args: Any, *, needed: bool = False) -> None:
    """ValueError for options of a reference where no loss has one; `needed`: something else does."""
    if args.is_reference_free and args.reference != "auto" and not needed:
        raise ValueError(f"reference has no effect with loss_type={'+'.join(args.loss_type)!r}: it is reference-free")
    if args.is_reference_free and args.reference_cache:
        raise ValueError(
            f"reference_cache has no effect with loss_type={'+'.join(args.loss_type)!r}: it has no reference"
        )


def _check_batch_coupled(args: Any, key: str) -> None:
    if args.inversion_landings != "last":
        raise ValueError(
            f"loss_type {key!r} sorts its batch, which must not mix the noise levels of inversion_landings="
            f"{args.inversion_landings!r}"
        )
    if args.reference_cache:
        raise ValueError(
            f"loss_type {key!r} takes one timestep a batch, so that reference_cache would seldom find a point again"
        )


def _check_beta_of_reference_free(args: Any, infos: list[LossInfo]) -> None:
    alone = [info for info in infos if info.reference_free]
    if not alone:
        return
    published = f"set beta (published for it: {', '.join(f'{beta.here:g}' for beta in alone[0].betas) or 'none'})"
    if len(alone) < len(infos):
        raise ValueError(
            f"one beta cannot serve loss_type {alone[0].key!r}, which has no reference, and one that has: drop one"
        )
    if args.beta == args.default("beta"):
        raise ValueError(
            f"beta={args.beta:g} is a scale for log-ratios to a reference, and loss_type {alone[0].key!r} has none: {published}"
        )


@cache
def _choices(config_class: type) -> dict[str, tuple[Any, ...]]:
    """Field → the values that its Literal type allows."""
    result = {}
    for name, hint in typing.get_type_hints(config_class).items():
        parts = [hint, *typing.get_args(hint)]
        allowed = [value for part in parts if typing.get_origin(part) is Literal for value in typing.get_args(part)]
        if allowed and float not in parts and name not in TrainingArguments.__dataclass_fields__:
            result[name] = (*allowed, None) if type(None) in typing.get_args(hint) else tuple(allowed)
    return result
