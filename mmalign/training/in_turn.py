"""Landings used in turn: a pair is inverted once over a whole grid, and each of its visits trains on another landing of that path."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from mmalign.denoisers import Denoiser, Schedule
from mmalign.likelihood import draws
from mmalign.likelihood.denoising import DenoisingPoint, landing_points
from mmalign.likelihood.reference import Reference
from mmalign.training.kept_paths import KeptPath, KeptPaths
from mmalign.training.measurement import Draws, Method, Pairs, inversion_paths, reference_errors


class LandingsInTurn:
    """Knows every pair's path, computes it where it does not, and hands out one landing a visit.

    compute: the paths of a batch, by row. cache_dir: where paths lie for this run and later ones; None keeps those of the latest round
    in memory.
    """

    def __init__(
        self,
        compute: Callable[[Pairs, Draws], dict[int, KeptPath]],
        *,
        cache_dir: Path | None,
        num_landings: int,
        seed: int,
    ) -> None:
        self._compute, self._cache_dir = compute, cache_dir
        self._num_landings, self._seed = num_landings, seed
        self._paths: dict[tuple[str, int], KeptPaths] = {}

    def next(
        self,
        pairs: Pairs,
        drawn: Draws,
        schedule: Schedule,
        *,
        data: str,
        round_: int,
        visit: int,
        about: Callable[[], dict[str, Any]],
    ) -> tuple[DenoisingPoint, Float[Tensor, " S*B"] | None]:
        """Each pair's landing of this visit, and the reference's errors there.

        data: names the rows; round_: how often paths were renewed, below 0 for paths that are not kept in memory; about: everything
        they depend on, asked for once.
        """

        def compute(rows: list[int]) -> dict[int, KeptPath]:
            places = [pairs.rows.index(row) for row in rows]
            return self._compute(pairs.take(places), drawn.take(places))

        paths = self._of(data, round_, about)
        paths.check(pairs.rows, compute)
        if missing := [row for row in pairs.rows if row not in paths]:
            for row, path in compute(missing).items():
                paths.add(row, path)
        start = draws.randint(
            draws.row_generators(self._seed, round_, pairs.rows, "first landing"), 0, self._num_landings
        )
        turn = (start + visit) % self._num_landings
        return landing_of_each([paths[row] for row in pairs.rows], turn, pairs.x0, schedule)

    def write(self) -> None:
        """Brings what is only in memory to the cache folder, if there is one."""
        for paths in self._paths.values():
            paths.write()

    def _of(self, data: str, round_: int, about: Callable[[], dict[str, Any]]) -> KeptPaths:
        if self._cache_dir is None and round_ < 0:
            return KeptPaths(None, {})
        if (data, round_) not in self._paths:
            if self._cache_dir is None:
                self._paths = {}
            parts = about() | {"round": round_, "landings": self._num_landings}
            self._paths[data, round_] = KeptPaths(self._cache_dir, parts)
        return self._paths[data, round_]


def compute_paths(
    denoiser: Denoiser,
    network: nn.Module,
    reference: Reference,
    pairs: Pairs,
    drawn: Draws,
    *,
    method: Method,
    schedule: Schedule,
    autocast: Callable[[], AbstractContextManager],
) -> dict[int, KeptPath]:
    """Inverts every pair over its strided grid of N moves and asks the reference for its error at every landing, by row.

    Costs N · (calls of a move + 1) forward passes of the batch.
    """
    size = len(pairs.rows)
    targets, timesteps, errors = [], [], []
    for landing in inversion_paths(denoiser, network, reference, pairs, drawn, method, autocast):
        exact = landing.target.dtype == torch.float64
        target = landing.target if exact else landing.target.half()
        point = landing_points(schedule, pairs.x0, target, landing.timestep)
        error = reference_errors(
            denoiser, network, reference, point, pairs.conditioning, schedule, method.loss_space, autocast
        )
        targets.append(target.cpu().unflatten(0, (pairs.sides, size)))
        timesteps.append(landing.timestep[:size].cpu())
        if error is not None:
            errors.append(error.cpu().unflatten(0, (pairs.sides, size)))
    target, timestep = torch.stack(targets, dim=2), torch.stack(timesteps, dim=1)
    error = torch.stack(errors, dim=2) if errors else None
    return {
        row: KeptPath(target[:, i].clone(), timestep[i].clone(), None if error is None else error[:, i].clone())
        for i, row in enumerate(pairs.rows)
    }


def landing_of_each(
    paths: list[KeptPath], turn: Int[Tensor, " B"], x0: Float[Tensor, "S*B ..."], schedule: Schedule
) -> tuple[DenoisingPoint, Float[Tensor, " S*B"] | None]:
    """One landing a path, its latent rebuilt from the clean one, laid out [chosen…, rejected…]; and the reference's errors there."""
    landings = [path.at(place) for path, place in zip(paths, turn.tolist(), strict=True)]
    target = torch.stack([landing.target for landing in landings], dim=1).flatten(0, 1)
    timestep = torch.stack([landing.timestep for landing in landings]).repeat(len(landings[0].target))
    point = landing_points(schedule, x0, target.to(x0.device), timestep.to(x0.device))
    errors = [landing.error for landing in landings if landing.error is not None]
    return point, torch.stack(errors, dim=1).flatten().to(x0.device) if errors else None
