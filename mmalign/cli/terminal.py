"""What is said on the terminal: errors in one line, commands that can be pasted, sizes that can be read."""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence


class Interrupted(KeyboardInterrupt):
    """Ctrl-C, with what to type to go on."""


def one_line(error: BaseException) -> str | None:
    """The message of an error that a user can mend; None for one that is ours and deserves its traceback."""
    if isinstance(error, RuntimeError):
        # torch's own class, named rather than imported: torch may not be loaded. NotImplementedError is ours.
        if type(error).__name__ != "OutOfMemoryError":
            return None
        return (
            f"out of GPU memory ({str(error).split('.')[0]}): lower --per-device-train-batch-size and raise "
            "--gradient-accumulation-steps by the same factor, or add --gradient-checkpointing or --dtype bfloat16"
        )
    if isinstance(error, UnicodeError):
        return None
    text = str(error)
    if isinstance(error, OSError) and error.strerror:
        text = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    lines = [line.strip() for line in text.splitlines()]
    return " ".join(line for line in lines if line) or type(error).__name__


def rank_prefix() -> str:
    """What error lines start with in every process but the first one: "[process 1] "."""
    rank = os.environ.get("RANK", "0")
    return "" if rank == "0" else f"[process {rank}] "


def command(*words: str) -> str:
    """A command line that can be pasted into a shell."""
    return shlex.join(words)


def without_options(words: Sequence[str], names: Sequence[str]) -> list[str]:
    """The words of a command line less the options called `names` (in either spelling) and their values."""
    kept: list[str] = []
    dropping = False
    for word in words:
        if word.startswith("--"):
            dropping = word[2:].split("=")[0].replace("-", "_") in names
        if not dropping:
            kept.append(word)
    return kept


def size(number: int) -> str:
    """Bytes as people read them."""
    value = float(number)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024 or unit == "GiB":
            break
        value /= 1024
    return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
