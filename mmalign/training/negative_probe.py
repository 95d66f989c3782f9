"""What a negative side knows and does: whether it prefers what people rejected, and what guidance away from it makes of a prediction.

The implicit preference of a network is its log-ratio to the base, −½ · (its error − the base's), at one (t, noise) of both pictures
of a pair. θ_npo alone should prefer the rejected one; mixed with the positive side it prefers it less often (Diff-SNPO). What is drawn
with hangs on how far the two branches are apart: ε_pos with the prompt, ε_neg without.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity
from tqdm.auto import tqdm

from mmalign.data import collate
from mmalign.denoisers import adapter_for
from mmalign.denoisers.adapters import acting_adapters
from mmalign.denoisers.parts import evaluating
from mmalign.evaluation import WinRate, win_rate
from mmalign.files import write_json
from mmalign.likelihood import draws as keyed
from mmalign.likelihood.denoising import forward_points, mean_squared_error
from mmalign.likelihood.grids import draw_timesteps
from mmalign.training.config import DenoiserConfig
from mmalign.training.negative import acting_as_negative, has_negative
from mmalign.training.prepare import Prepared, prepare
from mmalign.training.probe_advice import aligned
from mmalign.training.weights import aligned_network

FILE = "negative.json"
PARTS = 4
ONE, ALONE, MERGED, POSITIVE = "negative side", "negative side, alone", "negative side, merged", "positive side"


@dataclass(frozen=True)
class Branches:
    """Means over points of one part of the schedule, or of all.

    cosine: of ε_pos with the prompt and ε_neg without; plain_cosine: the same with the positive network in both branches.
    spread: standard deviation of the guided prediction over that of plain guidance. points: how many there were.
    """

    cosine: float
    plain_cosine: float
    spread: float
    points: int


@dataclass(frozen=True)
class NegativeProbe:
    """prefers_rejected: by network, how often it prefers the rejected picture. branches: "all", then from little noise to much."""

    prefers_rejected: dict[str, WinRate]
    branches: dict[str, Branches]
    guidance_scale: float
    num_pairs: int
    draws: int

    def table(self) -> str:
        """Two tables as aligned text."""
        known = [["", "prefers the rejected picture", ""]]
        known += [
            [name, f"{rate.rate:.1%}", f"({rate.low:.0%}–{rate.high:.0%})"]
            for name, rate in self.prefers_rejected.items()
        ]
        apart = [["noise", "cosine", "of plain guidance", f"spread at guidance {self.guidance_scale:g}"]]
        apart += [
            [name, f"{part.cosine:.4f}", f"{part.plain_cosine:.4f}", f"× {part.spread:.3f}"]
            for name, part in self.branches.items()
        ]
        return f"{aligned(known)}\n\n{aligned(apart)}"

    def save(self, folder: str | Path) -> Path:
        """Writes `negative.json`."""
        return write_json(Path(folder) / FILE, {"format": 1, **asdict(self)})


@torch.no_grad()
def probe_negative(
    alone: Any,
    data: Any,
    *,
    merged: Any = None,
    guidance_scale: float = 7.5,
    draws: int = 4,
    max_pairs: int = 512,
    batch_size: int = 8,
    seed: int = 0,
    split: str | None = None,
    resolution: int | None = None,
    num_frames: int | None = None,
    cache_dir: str | None = None,
    progress: bool = True,
) -> NegativeProbe:
    """Measures pairs with the negative side of `alone`, a base without anything aligned, and with that of `merged`.

    merged: the same base with its positive side and the same negative side, at the α and β that are drawn with; None where nothing is
    aligned, so that both are one. data: whatever `load_pairs` reads, of which at most max_pairs are measured, evenly spaced, each at
    `draws` timesteps and noises that its row decides. split, resolution, num_frames, cache_dir: as in training.
    """
    _check(alone, merged, guidance_scale, draws=draws, max_pairs=max_pairs, batch_size=batch_size)
    args = DenoiserConfig(
        output_dir="unused",
        train_split=split,
        resolution=resolution,
        num_frames=num_frames,
        cache_dir=cache_dir,
        disable_tqdm=not progress,
        use_cpu=True,
        report_to="none",
    )
    prepared = prepare(data, adapter_for(alone), args)
    number = min(max_pairs, len(prepared.dataset))
    items = torch.linspace(0, len(prepared.dataset) - 1, number).round().long().tolist()
    columns: dict[str, list[Tensor]] = {}
    batches = [items[at : at + batch_size] for at in range(0, number, batch_size)]
    nets = [aligned_network(pipe)[1] for pipe in (alone, merged) if pipe is not None]
    with evaluating(nets), tqdm(total=draws * number, desc="Measuring", unit="pair", disable=not progress) as bar:
        for draw in range(draws):
            for batch in batches:
                for name, column in _points(alone, merged, prepared, batch, (seed, draw), guidance_scale).items():
                    columns.setdefault(name, []).append(column.double().cpu())
                bar.update(len(batch))
    return _told({name: torch.cat(parts) for name, parts in columns.items()}, guidance_scale, number, draws)


def _points(
    alone: Any, merged: Any, prepared: Prepared, items: Sequence[int], key: tuple[int, int], scale: float
) -> dict[str, Float[Tensor, " B"]]:
    """Columns of a batch of pairs, a point each: log-ratios rejected less chosen, and how the branches lie."""
    denoiser, (seed, draw) = adapter_for(alone), key
    device, batch = next(denoiser.module.parameters()).device, collate([prepared.dataset[item] for item in items])
    schedule, rows = denoiser.schedule, batch["row"].tolist()
    x0 = torch.cat([batch["chosen"], batch["rejected"]]).to(device)
    t = draw_timesteps(schedule, keyed.row_generators(seed, draw, rows, "timestep")).repeat(2).to(device)
    noise = keyed.randn(keyed.row_generators(seed, draw, rows, "noise"), x0.shape[1:], x0.dtype, device).repeat(
        2, *[1] * (x0.ndim - 1)
    )
    point = forward_points(schedule.to(device), x0, t, noise)
    text = prepared.encoded.conditioning(batch["prompt_index"])
    empty = text.where(torch.zeros(len(rows), dtype=torch.bool), prepared.encoded.empty)
    sizes = torch.cat([batch["size_chosen"], batch["size_rejected"]])
    told, untold = (denoiser.with_sizes(part.repeat_pair().to(device), sizes) for part in (text, empty))

    def direction(network: nn.Module, conditioning: Any, number: int = 2 * len(rows)) -> Tensor:
        x, time = point.x_t[:number], point.timestep[:number]
        output = denoiser.predict(network, x, time, conditioning[slice(number)])
        return schedule.to(device).to_direction(output, x, time)

    def gap(found: Tensor) -> Tensor:
        chosen, rejected = (mean_squared_error(found, point.target) - base).chunk(2)
        return (chosen - rejected) / 2

    positive = aligned_network(alone if merged is None else merged)[1]
    base = mean_squared_error(direction(aligned_network(alone)[1], told), point.target)
    columns = {"time": t[: len(rows)] / (schedule.max_timestep + 1), "prompt": batch["prompt_index"]}
    with acting_as_negative(alone, alone.negative) as negative:
        columns[ONE if merged is None else ALONE] = gap(direction(negative, told))
        away = direction(negative, untold, len(rows))
    if merged is not None:
        with acting_as_negative(merged, merged.negative) as negative:
            columns[MERGED] = gap(direction(negative, told))
            away = direction(negative, untold, len(rows))
        columns[POSITIVE] = gap(direction(positive, told))
    towards, plain = direction(positive, told, len(rows)), direction(positive, untold, len(rows))
    guided, usual = (origin + scale * (towards - origin) for origin in (away, plain))
    columns["cosine"] = cosine_similarity(towards.flatten(1), away.flatten(1))
    columns["plain_cosine"] = cosine_similarity(towards.flatten(1), plain.flatten(1))
    columns["spread"] = guided.flatten(1).std(1) / usual.flatten(1).std(1)
    return columns


def _told(columns: dict[str, Tensor], scale: float, pairs: int, draws: int) -> NegativeProbe:
    prompts, zero = columns["prompt"].tolist(), torch.zeros(len(columns["prompt"]))
    known = {name: win_rate(columns[name], zero, prompts) for name in (ONE, ALONE, MERGED, POSITIVE) if name in columns}
    part = (columns["time"] * PARTS).long().clamp(max=PARTS - 1)
    chosen = {"all": torch.ones_like(part, dtype=torch.bool)}
    chosen |= {f"{place + 1} of {PARTS}": part == place for place in range(PARTS)}

    def branches(where: Tensor) -> Branches:
        means = {name: float(columns[name][where].mean()) for name in ("cosine", "plain_cosine", "spread")}
        return Branches(**means, points=int(where.sum()))

    apart = {name: branches(where) for name, where in chosen.items() if where.any()}
    return NegativeProbe(known, apart, scale, pairs, draws)


def _check(alone: Any, merged: Any, scale: float, **counts: int) -> None:
    for name, count in counts.items():
        if count < 1:
            raise ValueError(f"{name} must be at least 1, got {count}")
    if not scale > 1:
        raise ValueError(f"guidance_scale must be above 1, got {scale:g}: at 1 the negative branch is not run")
    for pipe in (alone, merged):
        if pipe is not None and not has_negative(pipe):
            raise ValueError("the pipeline has no negative side to measure: load_negative first")
    if acting_adapters(aligned_network(alone)[1]):
        raise ValueError("alone must be the base, on which no LoRA acts: pass the aligned pipeline as merged")
