"""`mmalign train self-npo`, and --negative where pictures are drawn."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tiny import save_tiny

from mmalign import cli

TRAIN = ["train", "self-npo", "--model", "model", "--data", "prompts.txt", "--use-cpu", "--max-steps", "2"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A base, prompts, and the folder of a run on them."""
    folder = tmp_path_factory.mktemp("self-npo")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        save_tiny("sd", "model")
        Path("prompts.txt").write_text("a red shirt\na blue bag\na green dress\n")
        words = ["--output-dir", "run", "--learning-rate", "0.05", "--lora-r", "2", "--train-batch-size", "2"]
        assert cli.main([*TRAIN, *words, "--solver-steps", "2"]) == 0
        yield folder


def picture(name: str, *words: str) -> Any:
    common = ["generate", "--model", "model", "--prompt", "a red shirt", "--steps", "2", "--no-grid"]
    assert cli.main([*common, "--output-dir", name, *words]) == 0
    return np.asarray(Image.open(next(Path(name).glob("*.png")))).astype(int)


def test_a_run_from_prompts_is_drawn_away_from(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plain = picture("plain")
    assert np.abs(picture("guided", "--negative", "run", "--guidance-scale", "20") - plain).max() > 0
    assert np.abs(picture("none", "--negative", "run", "--negative-beta", "0") - plain).max() <= 1
    one = picture("one", "--guidance-scale", "1")
    assert np.array_equal(picture("unguided", "--negative", "run", "--guidance-scale", "1"), one)
    assert "A negative side of model by Self-NPO" in Path("run/README.md").read_text()


def test_flux_is_drawn_away_from_a_negative_side_by_its_true_guidance(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    save_tiny("flux", "model")
    Path("prompts.txt").write_text("a red shirt\na blue bag\n")
    words = ["--output-dir", "run", "--learning-rate", "0.05", "--lora-r", "2", "--train-batch-size", "2"]
    assert cli.main([*TRAIN, *words, "--solver-steps", "1", "--resolution", "16"]) == 0
    small = ["--height", "16", "--width", "16"]
    plain = picture("plain", *small, "--true-cfg-scale", "8")
    assert np.abs(picture("guided", *small, "--true-cfg-scale", "8", "--negative", "run") - plain).max() > 0
    capsys.readouterr()
    drawing = ["generate", "--model", "model", "--prompt", "x", "--negative", "run", "--output-dir", "none"]
    assert cli.main([*drawing, *small]) == 2
    assert "only with true_cfg_scale above 1" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([*TRAIN, "--beta_dpo", "2000"], "self-npo has no beta"),
        ([*TRAIN, "--choice_model", "pickscore"], "self-npo compares nothing"),
        ([*TRAIN, "--target-decay", "0.9"], "target_decay has no effect with target_model='frozen'"),
        (["probe", "self-npo"], "self-npo compares nothing, so there is nothing to probe"),
        (
            ["generate", "--model", "model", "--prompt", "x", "--negative-beta", "0.5"],
            "--negative-beta acts on --negative",
        ),
        (
            ["evaluate", "--model", "model", "--prompt", "x"],
            "nothing to compare with: give --base, --lora or --negative, to compare the model with and without it, or --user",
        ),
    ],
)
def test_mistakes_are_one_line(words: list[str], message: str, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert cli.main(words) == 2
    shown = capsys.readouterr().err
    assert message in shown and shown.count("\n") == 1
