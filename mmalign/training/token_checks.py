"""Which options of a token model's training go together: told when the config is made, before a model is loaded."""

from typing import Any

import torch

from mmalign import losses
from mmalign.data.prompt_tokens import check_keywords
from mmalign.losses.info import LossInfo
from mmalign.training.config_checks import check_beta, check_modality, check_reference, refuse


def check_tokens(args: Any) -> None:
    """Options that are out of range, or would have no effect."""
    if not isinstance(args.processor_kwargs, dict):
        raise ValueError(f"processor_kwargs must be a mapping of names to values, got {args.processor_kwargs!r}")
    check_keywords(args.processor_kwargs)
    refuse(
        {
            "beta must be positive": not args.beta > 0,
            "logps='ld' and ld_alpha go together": (args.logps == "ld") != (args.ld_alpha is not None),
            "ld_alpha must lie in 0 … 1": args.ld_alpha is not None and not 0 <= args.ld_alpha <= 1,
            "joint counts the prompt's words, and logps='ld' the answers' lengths: choose one": args.joint
            and args.logps == "ld",
            "joint needs prompts that are read with their answers: leave share_prompt out": args.joint
            and args.share_prompt,
            "max_length must be positive": args.max_length is not None and args.max_length < 1,
            "truncate needs max_length": args.truncate is not None and args.max_length is None,
            "num_frames must be positive": args.num_frames is not None and args.num_frames < 1,
            "share_prompt keeps a cache, which gradient checkpointing would throw away: set gradient_checkpointing=False": (
                args.share_prompt and args.gradient_checkpointing
            ),
            "reference_cache keeps log-probabilities and no distributions, of which this method needs the KL": (
                args.reference_cache and args.needs_kl
            ),
            "f_alpha_divergence_coef belongs to f_divergence_type='alpha_divergence'": args.f_alpha_divergence_coef
            is not None
            and args.f_divergence_type != "alpha_divergence",
        }
    )


def divides_by_lengths(info: LossInfo) -> bool:
    """Whether the loss divides by the answers' lengths, which a pair of answers always has."""
    return "chosen_length" in info.inputs + info.optional


def check_token_losses(args: Any) -> None:
    """Refuses, before a model is loaded, what the losses would refuse at the first step."""
    infos = [losses.get(key) for key in args.loss_type]
    check_modality(infos, "token", "models that answer in tokens")
    single = [info.key for info in infos if info.unpaired]
    if single and len(single) < len(infos):
        paired = next(info.key for info in infos if not info.unpaired)
        raise ValueError(f"loss_type {single[0]!r} reads single answers and {paired!r} pairs: drop one")
    if single and args.logps == "ld":
        raise ValueError(f"logps='ld' compares the lengths of a pair, and loss_type {single[0]!r} reads single answers")
    for name in ("desirable_weight", "undesirable_weight"):
        if not single and getattr(args, name) != args.default(name):
            raise ValueError(f"{name} has no effect with loss_type={'+'.join(args.loss_type)!r}, which reads pairs")
    for info in infos:
        if args.logps == "mean" and divides_by_lengths(info):
            raise ValueError(f"loss_type {info.key!r} divides by the answers' lengths itself: leave logps='mean' out")
    check_beta(args, infos)
    check_reference(args, needed=args.needs_kl)
    one = torch.ones(2)
    pairs = losses.PairLogProbs(-one, -one, -one, -one, one, one)
    singles = losses.UnpairedLogProbs(-one, -one, torch.tensor([True, False]), one)
    losses.compute(args.loss_type, singles if single else pairs, loss_weights=args.loss_weights, **args.loss_options())
