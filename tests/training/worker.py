"""Runs in other processes: killed ones, and several that share a step; forked from a server that imports everything once."""

import json
import multiprocessing
import os
import signal
import socket
from pathlib import Path
from typing import Any

import diffusers
import torch
from training.runs import Watch, trained, trainer
from transformers import TrainerCallback

from mmalign import DiffusionDPOTrainer

PRELOADED = (
    DiffusionDPOTrainer,
    diffusers.UNet2DConditionModel,
    diffusers.StableDiffusionPipeline,
    diffusers.AutoencoderKL,
)
# The server is started without this process's sys.path.
_TESTS = str(Path(__file__).parents[1])
if _TESTS not in os.environ.get("PYTHONPATH", "").split(os.pathsep):
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [_TESTS, os.environ.get("PYTHONPATH")]))
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["training.worker"])


class Journal(TrainerCallback):
    """Appends step and loss to a file as they are logged, so that they outlive a kill."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if logs and "loss" in logs and state.is_world_process_zero:
            with self.path.open("a") as file:
                file.write(json.dumps([state.global_step, logs["loss"]]) + "\n")


class Kill(TrainerCallback):
    """SIGKILL to this very process when a step ends, before anything is logged or saved."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def read(journal: Path) -> dict[int, float]:
    """Step → loss."""
    return dict(map(json.loads, journal.read_text().splitlines())) if journal.exists() else {}


def train(
    folder: str, journal: str, options: dict[str, Any], *, kill_at: int = 0, kill_in: str = "", resume: Any = None
) -> None:
    """A run that may kill itself: at the end of step `kill_at`, or when it first calls `kill_in` of the saving module."""
    torch.set_num_threads(1)
    if kill_in:
        from mmalign.training import saving

        setattr(saving, kill_in, lambda *args, **kwargs: os.kill(os.getpid(), signal.SIGKILL))
    callbacks: list[Any] = [Journal(Path(journal))]
    run = trainer(folder, callbacks=[Kill(kill_at), *callbacks] if kill_at else callbacks, **options)
    run.train(resume_from_checkpoint=resume)


def share(rank: int, world: int, port: int, folder: str, options: dict[str, Any], resume: Any = None) -> None:
    """One of `world` processes; writes its per-row losses, the gradients of every step and the weights at the end."""
    torch.set_num_threads(1)
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    watch = Watch()
    run = trainer(folder, callbacks=[watch], **options)
    assert run.args.world_size == world
    rows = recorded(run)
    run.train(resume_from_checkpoint=resume)
    metrics = run.evaluate() if run._eval is not None else {}
    result = {"rows": rows, "gradients": watch.gradients, "history": run.state.log_history, "metrics": metrics}
    result["trained"] = trained(run)
    torch.save(result, Path(folder) / f"rank-{rank}.pt")
    torch.distributed.destroy_process_group()


def share_rewards(rank: int, world: int, port: int, folder: str, options: dict[str, Any], resume: Any = None) -> None:
    """`share` of LongAlign's reward stage, whose losses are of prompts; also its common direction, and how often that was estimated."""
    from training.test_training_longalign import run as rewarded

    from mmalign.rewards import CommonDirection

    torch.set_num_threads(1)
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )

    watch, estimated, estimate = Watch(), [], CommonDirection.estimate
    CommonDirection.estimate = lambda *args, **kwargs: (estimated.append(rank), estimate(*args, **kwargs))[1]  # type: ignore[assignment]
    run = rewarded(Path(folder), **options)
    run.add_callback(watch)
    assert run.args.world_size == world
    run.train(resume_from_checkpoint=resume)
    run.save_model()
    result = {"gradients": watch.gradients, "history": run.state.log_history, "estimated": len(estimated)}
    result |= {"direction": run._reward.direction.vector, "trained": trained(run)}
    torch.save(result, Path(folder) / f"rank-{rank}.pt")
    torch.distributed.destroy_process_group()


def share_answers(rank: int, world: int, port: int, folder: str, options: dict[str, Any], resume: Any = None) -> None:
    """`share` of a model that answers."""
    from training.token_runs import trainer as answering

    torch.set_num_threads(1)
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    run = answering(Path(folder), "lfm2_vl", **options)
    assert run.args.world_size == world
    run.train(resume_from_checkpoint=resume)
    result = {"history": run.state.log_history, "metrics": run.evaluate(), "trained": trained(run)}
    torch.save(result, Path(folder) / f"rank-{rank}.pt")
    torch.distributed.destroy_process_group()


def recorded(run: Any) -> list[tuple[int, int, float]]:
    """(epoch, row, loss) of every pair from now on."""
    rows: list[tuple[int, int, float]] = []
    plain = run.pair_losses

    def pair_losses(model: Any, inputs: dict[str, Any], *, epoch: int, data: Any = None) -> Any:
        answer = plain(model, inputs, epoch=epoch, data=data)
        rows.extend((epoch, row, loss) for row, loss in zip(answer[2].rows, answer[0].tolist(), strict=True))
        return answer

    run.pair_losses = pair_losses
    return rows


def start(target: Any, *args: Any, **kwargs: Any) -> Any:
    """A process, started."""
    process = FORKS.Process(target=target, args=args, kwargs=kwargs)
    process.start()
    return process


def together(
    world: int, folder: Path, options: dict[str, Any], resume: Any = None, target: Any = share
) -> list[dict[str, Any]]:
    """What each of `world` processes saw."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    folder.mkdir(parents=True, exist_ok=True)
    processes = [start(target, rank, world, port, str(folder), options, resume) for rank in range(world)]
    for process in processes:
        process.join(240)
    assert [process.exitcode for process in processes] == [0] * world
    return [torch.load(folder / f"rank-{rank}.pt", weights_only=False) for rank in range(world)]
