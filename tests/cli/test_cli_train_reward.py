"""`mmalign train-reward` on a tiny CLIP and the playground's pairs."""

from pathlib import Path
from typing import Any

import pytest

from mmalign.cli.dispatch import main
from mmalign.rewards import scorer


def test_a_reward_is_trained_stopped_and_gone_on_with(
    clip_folder: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    words = ["train-reward", "--model", str(clip_folder), "--data", "playground", "--output-dir", str(tmp_path / "run")]
    words += ["--per-device-train-batch-size", "2", "--gradient-accumulation-steps", "1", "--use-cpu", "--disable-tqdm"]
    words += ["--learning-rate", "1e-2", "--warmup-steps", "0", "--report-to", "none", "--save-steps", "1"]
    words += ["--lr-scheduler-type", "constant"]
    assert main([*words, "--max-steps", "1"]) == 0
    assert f"denscore:{tmp_path / 'run'}" in capsys.readouterr().out
    trained = scorer(f"denscore:{tmp_path / 'run'}")
    assert trained.segmented and trained.fingerprint != scorer(f"denscore:{clip_folder}").fingerprint
    # Nothing of an earlier run is mixed with a new one unasked.
    assert main([*words, "--max-steps", "2"]) == 2
    assert "already holds checkpoint-1" in capsys.readouterr().err
    assert main([*words, "--max-steps", "2", "--resume-from-checkpoint", "latest"]) == 0
    assert (tmp_path / "run" / "checkpoint-2").is_dir()
    assert scorer(f"denscore:{tmp_path / 'run'}").fingerprint != trained.fingerprint


def test_what_would_have_no_effect_is_refused(clip_folder: Path, tmp_path: Path, capsys: Any) -> None:
    words = ["train-reward", "--model", str(clip_folder), "--data", "playground", "--output-dir", str(tmp_path)]
    assert main([*words, "--label-smoothing-factor", "0.1"]) == 2
    assert "label_smoothing_factor=0.1 is refused" in capsys.readouterr().err
    assert main(["train-reward", "--data", "playground"]) == 2
    assert "--model" in capsys.readouterr().err
