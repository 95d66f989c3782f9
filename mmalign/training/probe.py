"""Which β, which learning rate: a short run a learning rate from one start, and what each did to pairs it did not see.

Every run ("cell") starts alike: the LoRA is drawn from the same seed and taken off again, or all weights are put back. Pairs are
encoded as the later run encodes them, so that it finds them in the cache; some of their prompts are held out here. What is kept of a
cell are single pairs, so that the advice can be told anew from `probe.json`.
"""

import copy
import json
import logging
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mmalign.data import PreferenceDataset
from mmalign.data.splitting import place_of_prompt
from mmalign.denoisers import adapter_for
from mmalign.denoisers.parts import networks
from mmalign.files import write_json
from mmalign.training.checkpoints import check_facts
from mmalign.training.config import DenoiserConfig
from mmalign.training.devices import on_device
from mmalign.training.estimate import duration
from mmalign.training.pipeline import default_lora
from mmalign.training.prepare import Prepared, prepare
from mmalign.training.probe_advice import Advice, advise
from mmalign.training.weights import has_adapter

logger = logging.getLogger("mmalign")
FILE = "probe.json"
_STEPS_APART = 3.0  # between neighbours of the default grid
# What a cell neither does nor reports: saving, evaluation, pictures, the Hub, trackers.
_LEFT_OUT = """
    beta_saturation beta_calibration_steps eval_strategy eval_steps eval_on_start eval_delay eval_split save_strategy
    save_steps save_total_limit load_best_model_at_end metric_for_best_model greater_is_better push_to_hub hub_model_id hub_token
    report_to run_name validation_prompts validation_steps validation_seed validation_inference_steps
    validation_guidance_scale num_train_epochs lr_scheduler_kwargs resume_from_checkpoint
""".split()


@dataclass(frozen=True)
class Cell:
    """A short run and, point by point, what it did to held-out pairs; lists of points are empty where the run diverged.

    loss, gradient_norm: every step's. gap: strength · (ρ_w − ρ_l). chosen, rejected: policy's error minus the reference's on each side.
    reference: the reference's error on the preferred side. row, prompt: numbers of the point's pair and prompt. diverged: why the run
    stopped.
    """

    learning_rate: float
    steps: int
    seconds: float
    loss: list[float]
    gradient_norm: list[float]
    gap: list[float] = field(default_factory=list)
    chosen: list[float] = field(default_factory=list)
    rejected: list[float] = field(default_factory=list)
    reference: list[float] = field(default_factory=list)
    row: list[int] = field(default_factory=list)
    prompt: list[int] = field(default_factory=list)
    diverged: str = ""


@dataclass(frozen=True)
class Probe:
    """What was measured, what follows from it, and where it is kept."""

    cells: list[Cell]
    advice: Advice
    path: Path


def probe(
    pipe: Any,
    data: Any,
    *,
    output_dir: str | Path,
    learning_rates: Sequence[float] | None = None,
    steps: int = 50,
    held_out: float = 0.2,
    max_held_out: int = 512,
    draws: int = 4,
    peft_config: Any = "default",
    preset: str | None = None,
    **options: Any,
) -> Probe:
    """Trains `steps` steps at each learning rate and measures held-out pairs; the pipeline is afterwards as it was.

    pipe: one of our pipelines; its class says which method. options, preset: as in `align`; beta is that of the cells, beta_saturation
    what the advised one aims at. learning_rates: by default five around the config's, each three times the one before. held_out: share
    of the prompts that no cell trains on, of whose pairs at most max_held_out are measured, each at `draws` timesteps and noises.
    Finished cells in `output_dir/probe.json` are not run again. ValueError where that file tells of other settings, for objectives
    without a reference, and where nothing is held out.
    """
    short = _short(pipe.config_class, preset or ("playground" if data == "playground" else None), options, steps)
    args = pipe.config_class(**short)
    saturation = options.get("beta_saturation", args.beta_saturation)
    rates = sorted(learning_rates or _around(args.learning_rate))
    _check(args, rates, saturation, held_out, steps=steps, max_held_out=max_held_out, draws=draws)
    denoiser = adapter_for(pipe)
    with on_device(list(networks(pipe).values()), args.device):
        prepared = prepare(data, denoiser, args)
    training, held = _split(prepared, held_out, max_held_out, args.seed)
    folder = Path(output_dir)
    known, cells = _read(folder), []
    logger.info(
        "probing %d learning rates with %d steps of %d pairs each, %d pairs held out",
        len(rates),
        steps,
        args.rows_per_step,
        len(held.dataset),
    )
    lora = default_lora() if peft_config == "default" else peft_config
    for rate in rates:
        with untouched(denoiser.module, trains_all=lora is None), tempfile.TemporaryDirectory() as scratch:
            trainer = pipe.trainer_class(
                model=pipe,
                args=pipe.config_class(**short | {"learning_rate": rate, "output_dir": scratch}),
                train_dataset=training,
                peft_config=copy.deepcopy(lora),
            )
            facts = {**trainer.facts, "steps": steps, "held-out pairs": held.fingerprint, "draws": draws}
            if rate in known:
                check_facts(known[rate]["facts"], facts, folder / FILE)
                cells.append(Cell(**known[rate]["cell"]))
            else:
                cells.append(_run(trainer, held, rate, steps, draws))
                known[rate] = {"facts": facts, "cell": asdict(cells[-1])}
                _write(folder, known, None)
    advice = advise(cells, args, saturation)
    return Probe(cells, advice, _write(folder, known, advice))


@contextmanager
def untouched(network: nn.Module, *, trains_all: bool) -> Iterator[None]:
    """After the block the network has its flags and mode back; a new LoRA is off, or where all weights train, they are back."""
    flags = [(parameter, parameter.requires_grad) for parameter in network.parameters()]
    mode = network.training
    carried = has_adapter(network)
    before = {name: value.detach().clone() for name, value in network.state_dict().items()} if trains_all else {}
    try:
        yield
    finally:
        if has_adapter(network) and not carried:
            network.unload_lora()  # type: ignore[operator]
        if before:
            network.load_state_dict(before)
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
            parameter.grad = None
        network.train(mode)


def _run(trainer: Any, held: Prepared, rate: float, steps: int, draws: int) -> Cell:
    start, diverged = time.perf_counter(), ""
    try:
        with _quiet():
            trainer.train()
    except FloatingPointError as error:
        diverged = str(error)
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    cell = Cell(
        learning_rate=rate,
        steps=steps,
        seconds=0.0,
        loss=[entry["loss"] for entry in logged],
        gradient_norm=[entry["grad_norm"] for entry in logged],
        diverged=diverged,
    )
    if not diverged:
        cell = replace(cell, **_measured(trainer, held, draws))
    cell = replace(cell, seconds=round(time.perf_counter() - start, 1))
    logger.info("learning rate %.3g: %s", rate, diverged or f"done in {duration(cell.seconds)}")
    return cell


@contextmanager
def _quiet() -> Iterator[None]:
    """Without a run's own lines and warnings: a window of five single steps is noise."""
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _measured(trainer: Any, held: Prepared, draws: int) -> dict[str, Any]:
    """The columns of a cell that stand for points of held-out pairs."""
    columns: dict[str, list[Any]] = {name: [] for name in ("gap", "chosen", "rejected", "reference", "row", "prompt")}
    prompts = {int(row): int(p) for row, p in zip(held.encoded.rows, held.encoded.prompt_index, strict=True)}
    for draw in range(draws):
        for _, measured, pairs in trainer.held_out_losses(held, draw):
            logps = measured.logps
            columns["gap"] += (pairs.strength * logps.margin).tolist()
            columns["chosen"] += (-2 * logps.chosen_logratio).tolist()
            columns["rejected"] += (-2 * logps.rejected_logratio).tolist()
            columns["reference"] += measured.reference_error[: len(pairs.rows)].tolist()
            columns["row"] += pairs.rows
            columns["prompt"] += [prompts[row] for row in pairs.rows]
    return columns


def _short(kind: type[DenoiserConfig], preset: str | None, options: dict[str, Any], steps: int) -> dict[str, Any]:
    """The later run's options as far as a short run reads them: a fifth of the steps warms up, nothing is saved."""
    chosen = (kind.preset_options(preset, options) if preset else {}) | options
    chosen = {name: value for name, value in chosen.items() if name not in _LEFT_OUT}
    if chosen.get("beta") == "auto":
        del chosen["beta"]
    return chosen | {
        "max_steps": steps,
        "warmup_steps": steps // 5,
        "lr_scheduler_type": "constant_with_warmup",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "output_dir": "unused",
    }


def _around(rate: float) -> list[float]:
    return [float(f"{rate * _STEPS_APART**k:.2g}") for k in (-2, -1, 0, 1, 2)]


def _check(
    args: DenoiserConfig, rates: list[float], saturation: float, held_out: float, *, steps: int, **counts: int
) -> None:
    if not args.needs_pairs:
        raise ValueError(
            f"{args.method} compares nothing: it has no beta, and held-out preferences say nothing about it"
        )
    if args.is_reference_free:
        raise ValueError(
            f"loss_type {'+'.join(args.loss_type)!r} has no reference, and a probe reads log-ratios to one: take its paper's settings"
        )
    if steps < 5:
        raise ValueError(f"steps must be at least 5, got {steps}")
    if not all(rate > 0 for rate in rates) or len(set(rates)) < len(rates):
        raise ValueError(f"learning_rates must be positive and differ, got {rates}")
    if not 0 < held_out < 1:
        raise ValueError(f"held_out must lie between 0 and 1, got {held_out}")
    if not 0 < saturation < 1:
        raise ValueError(f"beta_saturation must lie between 0 and 1, got {saturation}")
    for name, count in counts.items():
        if count < 1:
            raise ValueError(f"{name} must be at least 1, got {count}")
    if args.world_size > 1:
        raise ValueError(
            f"a probe runs on one process, and {args.world_size} were started: multiply gradient_accumulation_steps by their number "
            "instead"
        )


def _split(prepared: Prepared, held_out: float, max_held_out: int, seed: int) -> tuple[Prepared, Prepared]:
    """Pairs that cells train on, and at most `max_held_out` of those whose prompts they never see."""
    encoded, compared = prepared.encoded, prepared.dataset.compared
    held_prompt = torch.tensor([place_of_prompt(prompt, seed) < held_out for prompt in encoded.prompts])
    held = held_prompt[encoded.prompt_index[compared.kept]]
    if held.all() or not held.any():
        lacking = "left to train on" if held.all() else "held out"
        raise ValueError(f"no prompt of {prepared.name} is {lacking} with held_out={held_out:g}: choose another share")

    def part(items: torch.Tensor, name: str) -> Prepared:
        columns = {column: getattr(compared, column)[items] for column in ("kept", "first", "strength")}
        dataset = PreferenceDataset(encoded, replace(compared, **columns))
        fingerprint = f"{prepared.fingerprint}/{name} of {held_out:g} by {seed}"
        # The points stay: a row's reference errors are the same in every part, and in the later run.
        return replace(prepared, dataset=dataset, fingerprint=fingerprint)

    chosen = held.nonzero().flatten()
    spread = torch.linspace(0, len(chosen) - 1, min(max_held_out, len(chosen))).round().long()
    return part((~held).nonzero().flatten(), "rest"), part(chosen[spread], f"{len(spread)} held out")


def _read(folder: Path) -> dict[float, dict[str, Any]]:
    path = folder / FILE
    if not path.is_file():
        return {}
    return {entry["cell"]["learning_rate"]: entry for entry in json.loads(path.read_text(encoding="utf-8"))["cells"]}


def _write(folder: Path, known: dict[float, dict[str, Any]], advice: Advice | None) -> Path:
    told = {} if advice is None else {"advice": asdict(advice)}
    return write_json(folder / FILE, {"format": 1, **told, "cells": [known[rate] for rate in sorted(known)]})
