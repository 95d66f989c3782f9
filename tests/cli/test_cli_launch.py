"""Several processes: the words that `accelerate launch` gets, and when this process trains by itself."""

import os

import pytest
from accelerate.commands.launch import launch_command_parser

from mmalign import cli
from mmalign.cli import launch
from mmalign.cli.options import UsageError


@pytest.fixture
def started(monkeypatch):
    """Catches what would be started."""
    calls = []

    def start(words):
        calls.append((words, os.environ["MMALIGN_LAUNCHED"]))
        return 7

    monkeypatch.setattr(launch, "start", start)
    for name in ("WORLD_SIZE", "MMALIGN_LAUNCHED"):
        # Set first, so that what the test sets is undone.
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    return calls


def test_every_option_is_one_of_accelerates_and_takes_what_it_takes():
    """Read off the installed accelerate, so that a renamed flag is noticed."""
    theirs = launch_command_parser()._option_string_actions
    for option in launch.OPTIONS:
        if option.name == "accelerate_config":
            continue
        action = theirs[f"--{option.name}"]
        assert (action.nargs == 0) == option.is_switch, option.name


@pytest.mark.parametrize(
    ("chosen", "words"),
    [
        ({"num_processes": 2}, ["--num_processes", "2", "--multi_gpu"]),
        ({"num_processes": 1}, ["--num_processes", "1"]),
        ({"accelerate_config": "multi_gpu", "multi_gpu": True}, ["--multi_gpu"]),
        ({"accelerate_config": "single_gpu"}, ["--num_processes", "1"]),
        ({"gpu_ids": "0,1", "num_processes": 2}, ["--gpu_ids", "0,1", "--num_processes", "2", "--multi_gpu"]),
    ],
)
def test_launch_words(chosen, words):
    """More than one process always means separate ones: accelerate alone would start one on a machine without GPUs."""
    stated = ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    made = launch.launch_words(chosen)
    assert made[-6:] == stated and sorted(made[:-6]) == sorted(words)


def test_a_file_of_accelerates_is_passed_on(tmp_path):
    file = tmp_path / "accelerate.yaml"
    file.write_text("num_processes: 2\n")
    assert launch.launch_words({"accelerate_config": str(file)}) == ["--config_file", str(file)]


@pytest.mark.parametrize(("name", "message"), [("fsdp2", "not supported yet"), ("nowhere.yaml", "there is no file")])
def test_configurations_that_are_refused(name, message):
    with pytest.raises(UsageError, match=message):
        launch.launch_words({"accelerate_config": name})


def test_train_starts_itself_again(started):
    words = ["--model", "m", "--data", "d", "--max-steps", "3"]
    assert cli.main(["train", "--num_processes", "2", "smpo", *words]) == 7
    (command, launched), *more = started
    assert not more
    # For the line that says how to go on after a stop.
    assert launched == "smpo --num_processes 2 --model m --data d --max-steps 3"
    assert launch.typed(["other"]) == launched.split()
    at = command.index("mmalign")
    assert command[at - 1 :] == ["-m", "mmalign", "train", "smpo", *words]
    launch_command_parser().parse_args(command)


def test_launch_options_may_stand_in_yaml(started, tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("model: m\ndata: d\nnum_processes: 2\n")
    assert cli.main(["train", "smpo", "--config", str(file)]) == 7
    assert started[0][0][-4:] == ["train", "smpo", "--config", str(file)]


def test_mistakes_are_found_before_anything_starts(started, capsys):
    assert cli.main(["train", "smpo", "--num_processes", "2", "--model", "m", "--data", "d", "--beat", "1"]) == 2
    assert not started and "--beta" in capsys.readouterr().err


def test_a_started_process_trains_and_another_launchers_processes_refuse(started, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UsageError, match="--num-processes: a launcher has already started"):
        launch.relaunch(["smpo"], {"num_processes": 2})
    assert launch.relaunch(["smpo"], {}) is None
    monkeypatch.setenv("MMALIGN_LAUNCHED", "1")
    assert launch.relaunch(["smpo"], {"num_processes": 2}) is None
    assert not started


@pytest.mark.parametrize("code", [0, 2, 130])
def test_the_exit_code_of_the_process_that_failed_is_ours(code, monkeypatch, capfd):
    """One process, started for real, that does nothing but end."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    words = [
        "--num_processes",
        "1",
        "--num_machines",
        "1",
        "--mixed_precision",
        "no",
        "--dynamo_backend",
        "no",
        "--cpu",
    ]
    assert launch.start([*words, "--no_python", "bash", "-c", f"echo why >&2; exit {code}"]) == code
    shown = capfd.readouterr()
    assert "why" in shown.err and "Traceback" not in shown.err
