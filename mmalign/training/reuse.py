"""What a run need not compute twice: errors of the reference and inversion paths, kept between visits of a pair and between runs."""

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from mmalign.data import default_cache_dir
from mmalign.denoisers import Denoiser, Schedule
from mmalign.denoisers.base import module_dtype
from mmalign.likelihood.denoising import DenoisingPoint
from mmalign.likelihood.reference import Reference
from mmalign.training.config import DenoiserConfig
from mmalign.training.in_turn import LandingsInTurn, compute_paths
from mmalign.training.measurement import Draws, Method, Pairs
from mmalign.training.prepare import Prepared
from mmalign.training.reference_cache import ReferenceErrors

logger = logging.getLogger("mmalign")


class Reuse:
    """Looks up, for `reference_cache` and `inversion_landings="in_turn"`, what is known of a batch, and keeps what is new."""

    def __init__(
        self,
        args: DenoiserConfig,
        denoiser: Denoiser,
        reference: Reference,
        *,
        method: Method,
        schedule: Schedule,
        autocast: Callable[[], AbstractContextManager],
    ) -> None:
        self._args, self._denoiser, self._reference, self._schedule = args, denoiser, reference, schedule
        self._folder = Path(args.cache_dir) if args.cache_dir else default_cache_dir()
        self._errors: dict[str, ReferenceErrors] = {}
        self._in_turn = LandingsInTurn(
            partial(
                compute_paths,
                denoiser,
                denoiser.module,
                reference,
                method=method,
                schedule=schedule,
                autocast=autocast,
            ),
            cache_dir=self._folder if args.inversion_model == "reference" else None,
            num_landings=args.inversion_steps,
            seed=args.seed,
        )

    def find(
        self, data: Prepared, pairs: Pairs, drawn: Draws, *, round_: int, epoch: int
    ) -> tuple[DenoisingPoint | None, Float[Tensor, " S*B"] | None]:
        """Where to measure the batch, and the reference's errors there, as far as they need not be computed now.

        round_: how often paths were renewed, below 0 in evaluation.
        """
        if self._args.inversion_landings == "in_turn":
            about = partial(self._points, data)
            return self._in_turn.next(
                pairs, drawn, self._schedule, data=data.fingerprint, round_=round_, visit=epoch, about=about
            )
        if not self._args.reference_cache:
            return None, None
        known = self._errors_of(data).find(epoch, pairs.rows)
        return None, None if known is None else known.to(pairs.x0.device, pairs.x0.dtype)

    def keep(self, data: Prepared, rows: list[int], epoch: int, errors: Float[Tensor, " S*B"] | None) -> None:
        """Remembers the reference's errors that were computed for a batch."""
        if self._args.reference_cache and errors is not None:
            self._errors_of(data).keep(epoch, rows, errors)

    def write(self) -> None:
        """Brings what is new to the cache folder. Every process must call it."""
        self._in_turn.write()
        for errors in self._errors.values():
            errors.write(self._args.world_size, self._args.process_index)
            logger.info("reference errors: %d of %d were known; kept in %s", errors.found, errors.asked, errors.path)

    def _errors_of(self, data: Prepared) -> ReferenceErrors:
        if data.fingerprint not in self._errors:
            number = int(data.encoded.rows.max()) + 1
            self._errors[data.fingerprint] = ReferenceErrors(self._folder, self._points(data), num_rows=number, sides=2)
        return self._errors[data.fingerprint]

    def _points(self, data: Prepared) -> dict[str, Any]:
        """Everything that points and the reference's errors on them depend on, where the policy does not choose them."""
        args = self._args
        drawn = ("seed", "share_noise", "prompt_dropout", "loss_space", "latents")
        precision = [str(module_dtype(self._denoiser.module)), args.fp16, args.bf16, bool(args.tf32)]
        return {
            "format": 1,
            "reference": self._reference.fingerprint(),
            "data": data.points,
            "schedule": self._denoiser.schedule.fingerprint(),
            "precision": precision,
            "made on": [args.device.type, torch.__version__],
            **{name: getattr(args, name) for name in drawn},
            "inversion": repr(args.inversion()),
        }
