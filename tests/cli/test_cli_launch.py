"""Several processes: the words that `accelerate launch` gets, and when this process trains by itself."""

import sys

import pytest
from accelerate.commands.launch import launch_command_parser

from mmalign import cli
from mmalign.cli import launch
from mmalign.cli.options import UsageError


@pytest.fixture
def started(monkeypatch):
    """Catches what would be started."""
    calls = []

    class Process:
        def __init__(self, words, env):
            calls.append((words, env))

        def wait(self):
            return 7

    monkeypatch.setattr(launch.subprocess, "Popen", Process)
    for name in ("WORLD_SIZE", "MMALIGN_LAUNCHED"):
        monkeypatch.delenv(name, raising=False)
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
    words = ["train", "--num_processes", "2", "smpo", "--model", "m", "--data", "d", "--max-steps", "3"]
    assert cli.main(words) == 7
    (command, environment), *more = started
    assert not more and environment["MMALIGN_LAUNCHED"] == "1"
    assert command[:3] == [sys.executable, "-m", "accelerate.commands.launch"]
    at = command.index("mmalign.cli")
    assert command[at - 1 :] == [
        "-m",
        "mmalign.cli",
        "train",
        "smpo",
        "--model",
        "m",
        "--data",
        "d",
        "--max-steps",
        "3",
    ]
    launch_command_parser().parse_args(command[3:])


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
