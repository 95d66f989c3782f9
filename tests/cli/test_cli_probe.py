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
from mmalign.training import probe as probing

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


@pytest.fixture
def ran(monkeypatch):
    """The learning rates that were run; every run ranks 30 pairs of 40 right, and above 1e-4 it diverges."""
    rates = []

    def run(trainer, held, rate, steps, draws):
        rates.append(rate)
        gaps = [1e-4] * 30 + [-1e-4] * 10
        plain = {"steps": steps, "seconds": 0.0, "loss": [0.7], "gradient_norm": [1.0]}
        if rate > 1e-4:
            return probing.Cell(rate, **plain, diverged="the loss is not finite")
        columns = {"rejected": [0.0] * 40, "reference": [0.01] * 40, "row": [*range(40)], "prompt": [*range(40)]}
        return probing.Cell(rate, **plain, gap=gaps, chosen=[-2 * gap for gap in gaps], **columns)

    monkeypatch.setattr(probing, "_run", run)
    return rates


@pytest.mark.parametrize(
    ("typed", "beta"),
    [([], 4100.0), (["--beta-saturation", "0.5"], 11000.0), (["--beta", "auto"], "auto"), (["--beta_dpo", "70"], 70.0)],
)
def test_the_command_trains_with_what_was_advised_and_what_was_typed(place, ran, typed, beta, capsys, tmp_path):
    words = ["--learning-rates", "1e-5", "1e-4", "1e-3", "--output-dir", str(tmp_path), "--label-smoothing", "0.01"]
    assert probe(*words, "--loss-type", "cdpo", *typed) == 0 and ran == [1e-5, 1e-4, 1e-3]
    shown = capsys.readouterr().out
    assert "diverged" in shown and "This is a rule of thumb" in shown and str(tmp_path / "probe.json") in shown
    given = advised(shown)
    assert given["learning_rate"] == 1e-4 and given["loss_type"] == ["cdpo"] and given["label_smoothing"] == 0.01
    assert given["beta"] == (pytest.approx(beta, rel=0.05) if isinstance(beta, float) else beta)
    assert (given["lora_r"], given["per_device_train_batch_size"], given["output_dir"]) == (2, 2, "runs/dpo")
    DiffusionDPOConfig(**train.config_options(given, DiffusionDPOConfig))


def test_no_command_without_a_sound_rate(place, ran, capsys, tmp_path):
    assert probe("--learning-rates", "1e-3", "--output-dir", str(tmp_path)) == 1
    shown = capsys.readouterr().out
    assert "no learning rate of the grid is sound: 0.001 diverged" in shown and "mmalign train" not in shown


def test_a_finished_probe_is_told_again_unless_it_is_forgotten(place, ran, capsys, tmp_path):
    words = ["--learning-rates", "1e-5", "--output-dir", str(tmp_path)]
    assert probe(*words) == probe(*words) == 0 and ran == [1e-5]
    assert probe(*words, "--steps", "6") == 2 and "another steps" in capsys.readouterr().err
    assert probe(*words, "--steps", "6", "--forget") == 0 and ran == [1e-5, 1e-5]


def test_help_teaches_to_read_the_table(capsys):
    assert cli.main(["probe", "dpo", "--help"]) == 0
    shown = capsys.readouterr().out
    assert all(f"\n  {name} " in shown for name in ("accuracy", "margin", "saturation", "price", "spikes"))
    assert (
        "--learning-rates" in shown
        and "--beta " in shown
        and "--scale-lr " not in shown
        and "--num-processes" not in shown
    )
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
