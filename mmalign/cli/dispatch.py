"""Which verb runs, and what a user sees when one cannot: one line, exit code 2, no traceback unless `--debug`."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module

from mmalign.cli.options import UsageError, nearest
from mmalign.cli.terminal import Interrupted, one_line, rank_prefix


@dataclass(frozen=True)
class Verb:
    """One line of the overview; `module` has `run(argv) -> exit code` and is imported when the verb is used."""

    name: str
    summary: str
    example: str
    module: str


VERBS = {
    verb.name: verb
    for verb in (
        Verb(
            "quickstart",
            "align the embedded tiny Stable Diffusion and prove that it worked; minutes on a laptop",
            "mmalign quickstart",
            "mmalign.cli.quickstart",
        ),
        Verb(
            "train",
            "align a model of pictures or clips: smpo, inpo, dpo, sft, self-npo, diffusion-npo, longalign, or ppd; "
            "one that answers: rrpo, lfm2-vl, or token-dpo",
            "mmalign train smpo --model stabilityai/stable-diffusion-xl-base-1.0 --data my-pairs/ --preset sdxl",
            "mmalign.cli.train",
        ),
        Verb(
            "probe",
            "which beta and learning rate: short runs, measured on held-out pairs, and the command to train with",
            "mmalign probe dpo --model playground --data playground",
            "mmalign.cli.probe",
        ),
        Verb(
            "generate",
            "draw pictures, with or without a trained LoRA",
            'mmalign generate --model playground --lora runs/smpo --prompt "a red bag on a blue background"',
            "mmalign.cli.generate",
        ),
        Verb(
            "invert",
            "find the noise behind a picture, and see how well it is drawn again",
            'mmalign invert --model playground --image bag.png --prompt "a red bag on a blue background"',
            "mmalign.cli.invert",
        ),
        Verb(
            "evaluate",
            "win rate of an aligned model over its base, with its interval, as report.html",
            "mmalign evaluate --model playground --lora runs/smpo --prompts playground",
            "mmalign.cli.evaluate",
        ),
        Verb(
            "compare",
            "several evaluations of the same prompts against each other, refused where numbers may not be compared",
            "mmalign compare runs/smpo/evaluation runs/dpo/evaluation --names SmPO DPO",
            "mmalign.cli.compare",
        ),
        Verb(
            "answer",
            "a model's answers to questions about text, pictures or clips, kept line by line",
            "mmalign answer --model LiquidAI/LFM2-VL-450M --data questions.jsonl",
            "mmalign.cli.answer",
        ),
        Verb(
            "evaluate-answers",
            "how many answers are right, beside the base's, with intervals, as report.html",
            "mmalign evaluate-answers --model LiquidAI/LFM2-VL-450M --lora runs/token-dpo --data questions.jsonl",
            "mmalign.cli.evaluate_answers",
        ),
        Verb(
            "score",
            "what scorers say of pictures that are already there",
            "mmalign score --pictures pictures/ --scorers hpsv2.1 aesthetic",
            "mmalign.cli.score",
        ),
        Verb(
            "make-pairs",
            "preference pairs from your own prompts: drawn by a model, judged by a scorer",
            "mmalign make-pairs --model playground --prompts playground --scorer playground --num-prompts 8",
            "mmalign.cli.make_pairs",
        ),
        Verb(
            "make-answer-pairs",
            "preference pairs of a model's own mistakes about clips that are hard to see, for rrpo",
            "mmalign make-answer-pairs --model MODEL --data videos/questions.jsonl --output videos/pairs.jsonl",
            "mmalign.cli.make_answer_pairs",
        ),
        Verb(
            "embed-users",
            "who compared the pairs of a data set, as tokens for `train ppd`; --probe: can they be told apart?",
            "mmalign embed-users --data playground --encoder playground --output users.safetensors",
            "mmalign.cli.embed_users",
        ),
        Verb(
            "probe-users",
            "can the users of a file be told apart? a classifier on their groups, beside chance",
            "mmalign probe-users --users users.safetensors",
            "mmalign.cli.probe_users",
        ),
        Verb(
            "train-reward",
            "a CLIP that judges pictures of long prompts sentence by sentence (Denscore), from preference pairs",
            "mmalign train-reward --model clip/ --data my-pairs/ --output-dir runs/denscore",
            "mmalign.cli.train_reward",
        ),
        Verb(
            "export",
            "an aligned model as other tools load it: diffusers, peft, kohya, ComfyUI, or merged",
            "mmalign export runs/smpo --format kohya --output aligned.safetensors",
            "mmalign.cli.export",
        ),
        Verb(
            "merge",
            "several fine-tuned models of one base as one: soup, task arithmetic, TIES, DARE, DELLA",
            "mmalign merge runs/dpo runs/ln-pref --base LiquidAI/LFM2-VL-450M --method ties --output merged",
            "mmalign.cli.merge",
        ),
        Verb(
            "validate-data",
            "read every preference pair as training would; problems by row, bad_rows.jsonl, a contact sheet",
            "mmalign validate-data my-pairs/",
            "mmalign.cli.validate_data",
        ),
        Verb(
            "cache",
            "where encoded data sets and downloads lie, how large they are; --clear removes ours",
            "mmalign cache",
            "mmalign.cli.cache",
        ),
        Verb(
            "env",
            "versions, devices and known conflicts, for yourself or a bug report",
            "mmalign env",
            "mmalign.cli.environment",
        ),
    )
}

_HELP = """usage: mmalign VERB [options]

Preference alignment for models that draw pictures or clips, and for models that answer.

{verbs}

Every verb explains itself:        mmalign VERB --help
Options can stand in a YAML file:  mmalign VERB --config run.yaml   (the command line wins)

  --version   the version of mmalign
  --debug     a full traceback where an error would be one line
"""


def overview() -> str:
    """What `mmalign --help` prints."""
    width = max(map(len, VERBS))
    lines = [f"  {verb.name:<{width}}  {verb.summary}\n  {'':<{width}}    $ {verb.example}" for verb in VERBS.values()]
    return _HELP.format(verbs="\n".join(lines))


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one verb and returns the exit code: 0, 2 for what the user can mend, 130 when interrupted."""
    words, debug = _without_debug(list(sys.argv[1:] if argv is None else argv))
    try:
        return _run(words)
    except KeyboardInterrupt as stop:
        if not rank_prefix():
            print(f"\nmmalign: {stop if isinstance(stop, Interrupted) else 'stopped'}", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # Whoever read our output has gone, as with `mmalign env | head`.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (ValueError, OSError, ImportError, FloatingPointError, RuntimeError) as error:
        message = one_line(error)
        if debug or message is None:
            raise
        hint = "" if isinstance(error, UsageError) else " (--debug shows where)"
        print(f"mmalign: error: {rank_prefix()}{message}{hint}", file=sys.stderr)
        return 2


def _run(words: list[str]) -> int:
    if not words or words[0] in ("-h", "--help", "help"):
        print(overview(), end="")
        return 0
    if words[0] in ("--version", "-V"):
        from mmalign import __version__

        print(f"mmalign {__version__}")
        return 0
    name = words[0]
    if name not in VERBS:
        known = f"the verbs are {', '.join(VERBS)}"
        raise UsageError(f"no verb {name!r}{nearest(name, VERBS)}; {known}")
    with _log_to_stderr():
        return int(import_module(VERBS[name].module).run(words[1:]))


def _without_debug(words: list[str]) -> tuple[list[str], bool]:
    """Takes a bare `--debug` away; `--debug underflow_overflow` is an option of the trainer and stays."""
    for at, word in enumerate(words):
        if word == "--debug":
            bare = at + 1 == len(words) or words[at + 1].startswith("-") or at == 0
            return (words[:at] + words[at + 1 :] if bare else words), True
    return words, False


@contextmanager
def _log_to_stderr() -> Iterator[None]:
    """Shows what the package has to say, from the first process only, while a verb runs."""
    logger = logging.getLogger("mmalign")
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(message)s"))
    before = logger.level, logger.propagate
    logger.addHandler(handler)
    logger.setLevel(logging.WARNING if rank_prefix() else logging.INFO)
    logger.propagate = False
    # Its six lines about a compiled part that does not load come with every import of diffusers; `mmalign env` has them.
    logging.getLogger("xformers").setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before[0])
        logger.propagate = before[1]
