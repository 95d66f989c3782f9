"""What a user sees: an overview, one-line errors with exit code 2, a traceback only when asked."""

import subprocess
import sys
from types import SimpleNamespace

import pytest

import mmalign
from mmalign.cli import dispatch as cli
from mmalign.cli.terminal import Interrupted, one_line, size, without_options


@pytest.fixture
def fails(monkeypatch):
    """A verb that raises what it is told to."""

    def install(error):
        def run(argv):
            raise error

        monkeypatch.setattr(cli, "import_module", lambda name: SimpleNamespace(run=run))

    return install


def test_the_overview_has_an_example_for_every_verb(capsys):
    assert cli.main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert all(
        f"$ {verb.example}" in shown and verb.example.startswith(f"mmalign {verb.name}") for verb in cli.VERBS.values()
    )
    assert cli.main([]) == 0


def test_version(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"mmalign {mmalign.__version__}\n"


def test_an_unknown_verb_names_the_nearest(capsys):
    assert cli.main(["evalute"]) == 2
    assert (
        "no verb 'evalute' (did you mean evaluate or evaluate-answers?); the verbs are quickstart"
        in capsys.readouterr().err
    )


@pytest.mark.parametrize(
    ("error", "shown"),
    [
        (ValueError("beta must be positive"), "mmalign: error: beta must be positive (--debug shows where)"),
        (ValueError("no adapter:\n  Found: a\nSupported: b"), "no adapter: Found: a Supported: b"),
        (FileNotFoundError(2, "No such file or directory", "x.png"), "x.png: No such file or directory"),
        (OSError(28, "no space left on the disk: free some"), "error: no space left on the disk: free some"),
        (ImportError('pip install "mmalign[audio]"'), 'pip install "mmalign[audio]"'),
        (FloatingPointError("the loss is not finite"), "the loss is not finite"),
    ],
)
def test_errors_that_a_user_can_mend_are_one_line(error, shown, fails, capsys):
    fails(error)
    assert cli.main(["env"]) == 2
    output = capsys.readouterr()
    assert shown in output.err and output.err.count("\n") == 1 and output.out == ""


def test_running_out_of_memory_says_what_to_lower(fails, capsys):
    fails(type("OutOfMemoryError", (RuntimeError,), {})("CUDA out of memory. Tried to allocate 2 GiB"))
    assert cli.main(["env"]) == 2
    assert "out of GPU memory (CUDA out of memory): lower --per-device-train-batch-size" in capsys.readouterr().err


@pytest.mark.parametrize("error", [RuntimeError("a bug"), KeyError("a bug"), NotImplementedError("a bug")])
def test_our_own_mistakes_keep_their_traceback(error, fails):
    fails(error)
    with pytest.raises(type(error)):
        cli.main(["env"])


def test_debug_keeps_the_traceback(fails):
    fails(ValueError("beta must be positive"))
    with pytest.raises(ValueError, match="beta"):
        cli.main(["env", "--debug"])


@pytest.mark.parametrize(
    ("words", "left", "debug"),
    [
        (["train", "--debug"], ["train"], True),
        (["--debug", "train", "smpo"], ["train", "smpo"], True),
        (["train", "--debug", "--beta", "1"], ["train", "--beta", "1"], True),
        (["train", "--debug", "underflow_overflow"], ["train", "--debug", "underflow_overflow"], True),
        (["train"], ["train"], False),
    ],
)
def test_a_bare_debug_is_ours_and_one_with_a_value_is_the_trainers(words, left, debug):
    assert cli._without_debug(words) == (left, debug)


def test_interrupted(fails, capsys):
    fails(Interrupted("stopped; go on with --resume-from-checkpoint latest"))
    assert cli.main(["train"]) == 130
    assert "mmalign: stopped; go on with --resume-from-checkpoint latest" in capsys.readouterr().err


def test_other_processes_say_who_they_are(fails, capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    fails(ValueError("wrong"))
    assert cli.main(["env"]) == 2
    assert "[process 1] wrong" in capsys.readouterr().err


def test_help_is_light():
    """`mmalign --help` loads neither torch nor YAML: it answers at once."""
    program = (
        "import sys; from mmalign.cli import main; main(['--help']);"
        "heavy = {'torch', 'numpy', 'yaml', 'transformers', 'diffusers', 'PIL'} & set(sys.modules);"
        "sys.exit(repr(heavy) if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_module_runs_as_the_command_does():
    done = subprocess.run([sys.executable, "-m", "mmalign", "nonsense"], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("mmalign: error: no verb 'nonsense'")


def test_sizes_are_readable():
    assert [size(n) for n in (0, 1023, 1024, 5 * 2**20, 3 * 2**40)] == [
        "0 B",
        "1023 B",
        "1.0 KiB",
        "5.0 MiB",
        "3072.0 GiB",
    ]


def test_dropping_options_drops_their_values_in_either_spelling():
    words = ["--beta", "2", "--gpu-ids", "0,1", "--loss_type", "a", "b", "--bf16", "--gpu_ids=3"]
    assert without_options(words, ["gpu_ids", "loss_type"]) == ["--beta", "2", "--bf16"]


def test_empty_messages_name_the_error():
    assert one_line(ValueError()) == "ValueError"
