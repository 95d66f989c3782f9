"""Several processes: `mmalign train` starts itself again through `accelerate launch`."""

from __future__ import annotations

import logging
import os
import shlex
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mmalign.cli.options import Option, UsageError, flag, switch, text, whole
from mmalign.cli.terminal import command, without_options

GROUP = "several processes: handed to `accelerate launch`"
_LAUNCHED = "MMALIGN_LAUNCHED"
_NOT_YET = "several GPUs run with plain data parallelism; sharded training is not supported yet"


def _option(name: str, help: str, convert: Any = text, metavar: str = "TEXT", hidden: bool = True) -> Option:
    return Option(
        name=name, help=help, convert=convert, metavar=metavar, group=GROUP, nullable=True, hidden=hidden, printed=False
    )


OPTIONS = [
    _option("num_processes", "how many processes, one a GPU", whole, "N", hidden=False),
    _option(
        "accelerate_config",
        "single_gpu, multi_gpu, or a file that `accelerate config` wrote",
        metavar="NAME|FILE",
        hidden=False,
    ),
    _option("multi_gpu", "all GPUs of this machine", switch, "BOOL"),
    _option("gpu_ids", "which GPUs, as 0,1,3"),
    _option("num_machines", "how many machines", whole, "N"),
    _option("machine_rank", "which machine this is", whole, "N"),
    _option("main_process_ip", "address of machine 0"),
    _option("main_process_port", "port of machine 0", whole, "N"),
    _option("same_network", "whether the machines share a network", switch, "BOOL"),
    _option("rdzv_backend", "rendezvous backend"),
    _option("rdzv_conf", "rendezvous configuration"),
    _option("max_restarts", "restarts of a failed worker group", whole, "N"),
    _option("monitor_interval", "seconds between looks at the workers"),
    _option("num_cpu_threads_per_process", "threads a process", whole, "N"),
    _option("enable_cpu_affinity", "bind processes to cores", switch, "BOOL"),
    _option("log_dir", "where the workers' output is kept"),
    _option("role", "name of the workers in logs"),
]
NAMES = [option.name for option in OPTIONS]
REFUSED = {
    **dict.fromkeys(("use_fsdp", "use_deepspeed", "use_megatron_lm", "use_parallelism_config", "zero_stage"), _NOT_YET),
    "config_file": "give the file to --accelerate-config",
    "dynamo_backend": "training is not compiled",
    "tpu": "TPUs are not supported",
    "cpu": "write --use-cpu",
}
_SHARDED = ("fsdp1", "fsdp2", "zero1", "zero2", "zero3")


def relaunch(argv: Sequence[str], chosen: Mapping[str, Any]) -> int | None:
    """Runs `mmalign train argv` under `accelerate launch` and returns its exit code; None when this process is to train itself."""
    chosen = {name: value for name, value in chosen.items() if value is not None and value is not False}
    if not chosen or os.environ.get(_LAUNCHED):
        return None
    if "WORLD_SIZE" in os.environ:
        names = ", ".join(flag(name) for name in chosen)
        raise UsageError(
            f"{names}: a launcher has already started these processes; give the option to that launcher instead"
        )
    words = [*launch_words(chosen), "-m", "mmalign", "train", *without_options(argv, NAMES)]
    os.environ[_LAUNCHED] = command(*argv)
    return start(words)


def typed(words: Sequence[str]) -> list[str]:
    """What the user typed after `mmalign train`: `words`, or, in a process that `relaunch` started, what that one was given."""
    launched = os.environ.get(_LAUNCHED)
    return shlex.split(launched) if launched else list(words)


def start(words: Sequence[str]) -> int:
    """`accelerate launch words`; the exit code of the process that failed first, which has said why on the terminal."""
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    # Says at length that a process has failed, after the process has said why.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    try:
        launch_command(launch_command_parser().parse_args(list(words)))
    except ChildFailedError as error:
        _, failure = error.get_first_failure()
        return int(failure.exitcode) if failure.exitcode > 0 else 1
    except subprocess.CalledProcessError as error:
        return int(error.returncode) if error.returncode > 0 else 1
    except (SignalException, KeyboardInterrupt):
        # It went to the processes too; the first of them says how to go on.
        return 130
    return 0


def launch_words(chosen: Mapping[str, Any]) -> list[str]:
    """The options of `accelerate launch`; more than one process always means separate ones, on a CPU too."""
    chosen = dict(chosen)
    words = _config_words(chosen.pop("accelerate_config", None))
    if "--multi_gpu" in words:
        chosen.pop("multi_gpu", None)
    several = (chosen.get("num_processes") or 1) > 1
    if several and not words:
        # Without it, accelerate runs one process on a machine without GPUs and does not say so.
        chosen["multi_gpu"] = True
    for name, value in chosen.items():
        words += [f"--{name}"] if value is True else [f"--{name}", str(value)]
    if "--config_file" not in words:
        stated = {"num_machines": "1", "mixed_precision": "no", "dynamo_backend": "no"}
        words += [word for name, value in stated.items() if name not in chosen for word in (f"--{name}", value)]
    return words


def _config_words(name: str | None) -> list[str]:
    if name is None:
        return []
    if name in _SHARDED:
        raise UsageError(f"--accelerate-config {name} is refused: {_NOT_YET}")
    if name == "single_gpu":
        return ["--num_processes", "1"]
    if name == "multi_gpu":
        return ["--multi_gpu"]
    if not Path(name).is_file():
        raise UsageError(f"--accelerate-config takes single_gpu, multi_gpu or a file; there is no file {name}")
    return ["--config_file", name]
