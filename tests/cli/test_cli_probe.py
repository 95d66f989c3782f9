"""`mmalign probe METHOD` on a tiny model: the command it ends with is one that `mmalign train` reads."""

import json
import shlex

import numpy as np
import pytest
from PIL import Image
from tiny import save_tiny

from mmalign import cli
from mmalign.cli import train
from mmalign.pipelines.image.dpo import DiffusionDPOConfig

SMALL = ["--steps", "5", "--held-out", "0.4", "--per-device-train-batch-size", "2", "--lora-r", "2", "--use-cpu"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("probe")
    rng = np.random.default_rng(0)
    (folder / "pairs").mkdir()
    rows = []
    for i in range(16):
        for side in ("chosen", "rejected"):
            Image.fromarray(rng.integers(0, 255, (16, 16, 3), dtype=np.uint8)).save(folder / f"pairs/{i}-{side}.png")
        rows.append({"prompt": f"a red shirt {i}", "chosen": f"{i}-chosen.png", "rejected": f"{i}-rejected.png"})
    (folder / "pairs" / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    save_tiny("sd", folder / "model")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("MMALIGN_CACHE", str(folder / "cache"))
        patch.delenv("WORLD_SIZE", raising=False)
        yield folder


def probe(*words):
    return cli.main(["probe", "dpo", "--model", "model", "--data", "pairs", *SMALL, *words])


def advised(shown):
    """What `mmalign train dpo` makes of the command that was printed last."""
    verb, command, method, *words = shlex.split(shown.rstrip().splitlines()[-1])
    assert [verb, command, method] == ["mmalign", "train", "dpo"]
    return train.make_command("dpo", DiffusionDPOConfig).read(words)


@pytest.mark.parametrize("beta", [None, "auto"])
def test_the_command_trains_with_what_was_advised_and_what_was_typed(place, beta, capsys):
    folder = f"probes/{beta}"
    typed = ["--beta", beta] if beta else ["--beta-saturation", "0.3"]
    words = ["--learning-rates", "1e-6", "1e-5", "--output-dir", folder, "--loss-type", "hinge", *typed]
    exit_code = probe(*words)
    shown = capsys.readouterr().out
    told = json.loads((place / folder / "probe.json").read_text())["advice"]
    if told["learning_rate"] is None:
        assert exit_code == 1 and "no learning rate of the grid is sound" in shown
        return
    assert exit_code == 0 and "This is a rule of thumb" in shown and "every number: " in shown
    given = advised(shown)
    assert given["learning_rate"] == told["learning_rate"] and given["loss_type"] == ["hinge"]
    assert given["beta"] == (beta or told["beta"])
    assert (given["lora_r"], given["per_device_train_batch_size"], given["output_dir"]) == (2, 2, "runs/dpo")
    DiffusionDPOConfig(**train.config_options(given, DiffusionDPOConfig))


def test_a_finished_probe_is_told_again_unless_it_is_forgotten(place, capsys, monkeypatch):
    words = ["--learning-rates", "1e-5", "--output-dir", "probes/again"]
    probe(*words)
    before = json.loads((place / "probes/again/probe.json").read_text())
    probe(*words)
    assert json.loads((place / "probes/again/probe.json").read_text()) == before
    assert probe(*words, "--steps", "6") == 2
    assert "another steps" in capsys.readouterr().err
    probe(*words, "--steps", "6", "--forget")
    assert json.loads((place / "probes/again/probe.json").read_text())["cells"][0]["cell"]["steps"] == 6


def test_help_teaches_to_read_the_table(capsys):
    assert cli.main(["probe", "dpo", "--help"]) == 0
    shown = capsys.readouterr().out
    assert all(f"\n  {name} " in shown for name in ("accuracy", "margin", "saturation", "price", "spikes"))
    assert "--learning-rates" in shown and "--beta " in shown and "--scale-lr " not in shown
    for words in (["probe"], ["probe", "--help"]):
        assert cli.main(words) == 0
        assert "mmalign probe dpo --model playground" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["probe", "sft", "--model", "m", "--data", "d"], "sft compares nothing"),
        (["probe", "--model", "m"], "the method stands after the verb: mmalign probe smpo"),
        (["probe", "dpo", "--model", "m", "--data", "d", "--num-processes", "2"], "a probe runs on one process"),
        (["probe", "dpo", "--model", "m", "--data", "d", "--scale-lr"], "unknown option --scale-lr"),
        (["probe", "dpo", "--data", "d"], "--model is missing"),
    ],
)
def test_mistakes_are_one_line(words, message, capsys):
    assert cli.main(words) == 2
    shown = capsys.readouterr().err
    assert message in shown and shown.count("\n") == 1
