"""A small resumable training loop for the playground's own models.

Every draw of step s depends on (seed, s) alone, so a run that was stopped and resumed is the run that was not.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from mmalign.files import written_aside


@dataclass(frozen=True)
class FitConfig:
    """How one model is trained. `ema` 0 keeps the last weights.

    The learning rate warms up, then decays by a cosine to zero; or stays, with `constant`, so that a finished run can go on to more
    steps (the average of the weights does the decay's work).
    """

    steps: int
    batch_size: int = 64
    learning_rate: float = 1e-3
    warmup: int = 100
    weight_decay: float = 1e-4
    clip: float = 1.0
    ema: float = 0.0
    constant: bool = False
    seed: int = 0
    save_every: int = 250
    curve_every: int = 25


def step_generator(seed: int, step: int) -> torch.Generator:
    """The generator of one training step."""
    return torch.Generator().manual_seed(seed * 1_000_003 + step)


def fit(
    model: nn.Module,
    loss_of: Callable[[int, torch.Generator], Tensor],
    config: FitConfig,
    *,
    checkpoint: Path | None = None,
    stop_after: int | None = None,
    name: str = "fit",
) -> list[dict[str, float]]:
    """Minimises `loss_of(step, generator)` over `model`'s trainable parameters; returns the curve (mean loss per `curve_every`).

    With `checkpoint`, state is written there every `save_every` steps (to a temporary name, then renamed) and picked up again
    when the file exists. `stop_after` ends the sitting early with the schedule of the full run. The model ends up with the
    averaged weights where `ema` > 0.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=config.learning_rate, weight_decay=config.weight_decay)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _learning_rate_factor(step, config))
    average = [p.detach().clone() for p in parameters]
    curve: list[dict[str, float]] = []
    start = 0
    if checkpoint is not None and checkpoint.is_file():
        state = torch.load(checkpoint, weights_only=True)
        if _identity(state["config"]) != _identity(asdict(config)):
            raise ValueError(f"{checkpoint} belongs to other settings ({state['config']}); remove it or restore them")
        for parameter, saved in zip(parameters, state["parameters"], strict=True):
            parameter.data.copy_(saved)
        average, curve, start = state["average"], state["curve"], state["step"]
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
    last = min(config.steps, stop_after if stop_after is not None else config.steps)
    recent: list[float] = []
    model.train()
    for step in tqdm(range(start, last), initial=start, total=last, desc=name, mininterval=5, smoothing=0.05):
        loss = loss_of(step, step_generator(config.seed, step))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, config.clip)
        optimizer.step()
        schedule.step()
        if config.ema:
            decay = min(config.ema, (step + 1) / (step + 10))
            torch._foreach_lerp_(average, [p.detach() for p in parameters], 1 - decay)
        recent.append(loss.item())
        if (step + 1) % config.curve_every == 0:
            curve.append({"step": step + 1, "loss": sum(recent) / len(recent)})
            recent.clear()
        if checkpoint is not None and ((step + 1) % config.save_every == 0 or step + 1 == last):
            state = {
                "config": asdict(config),
                "step": step + 1,
                "parameters": [p.detach() for p in parameters],
                "average": average,
            }
            _save(
                state | {"curve": curve, "optimizer": optimizer.state_dict(), "schedule": schedule.state_dict()},
                checkpoint,
            )
    if config.ema:
        for parameter, smooth in zip(parameters, average, strict=True):
            parameter.data.copy_(smooth)
    model.eval()
    return curve


def _learning_rate_factor(step: int, config: FitConfig) -> float:
    if step < config.warmup:
        return (step + 1) / config.warmup
    if config.constant:
        return 1.0
    share = (step - config.warmup) / max(1, config.steps - config.warmup)
    return 0.5 * (1 + float(torch.cos(torch.tensor(share * torch.pi))))


def _identity(config: dict) -> dict:
    """What must be equal for a checkpoint to be continued; the number of steps only where the learning rate depends on it."""
    return {key: value for key, value in config.items() if key != "steps" or not config.get("constant")}


def _save(state: dict, path: Path) -> None:
    with written_aside(path) as part:
        torch.save(state, part)
