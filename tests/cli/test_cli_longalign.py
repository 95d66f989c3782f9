"""LongAlign and long prompts from the command line, on tiny models."""

import json
from pathlib import Path
from typing import Any

import pytest
from denoisers.test_long_prompts import LONG
from tiny import save_tiny

from mmalign.cli.dispatch import main
from mmalign.rewards import ClipScorer


@pytest.fixture(autouse=True)
def tiny_reward(monkeypatch: pytest.MonkeyPatch, clip_folder: Path) -> None:
    from mmalign.training import reward_trainer

    monkeypatch.setattr(
        reward_trainer, "scorer", lambda name, **options: ClipScorer.from_pretrained(clip_folder, name=name)
    )


def test_a_reward_run_from_prompts_to_pictures(tmp_path: Path, capsys: Any) -> None:
    model, prompts, out = save_tiny("sd", tmp_path / "base"), tmp_path / "prompts.txt", tmp_path / "run"
    prompts.write_text("\n".join(f"A bag. It is number {number}." for number in range(120)))
    command = [
        "train",
        "longalign",
        "--model",
        str(model),
        "--data",
        str(prompts),
        "--output-dir",
        str(out),
        "--max-steps",
        "1",
    ]
    command += [
        "--rollout-steps",
        "2",
        "--grad-steps",
        "2",
        "--scorer",
        "tiny",
        "--per-device-train-batch-size",
        "2",
        "--use-cpu",
    ]
    assert main([*command, "--save-strategy", "no", "--save-pipeline", "--disable-tqdm"]) == 0
    told = capsys.readouterr().out
    assert "--long-prompts segments" in told and "--trained-on tiny" in told
    assert (out / "common_direction.safetensors").is_file()
    assert json.loads((out / "pipeline" / "long_prompts.json").read_text())["layout"] == "segments"
    assert json.loads((out / "history.json").read_text())[0]["reward/style"] != 0
    drawn = {}
    size = ["--num-inference-steps", "1", "--height", "16", "--width", "16", "--no-grid", "--device", "cpu"]
    for name, chosen in (("cut", []), ("read", ["--long-prompts", "segments"])):
        folder = tmp_path / name
        assert (
            main(["generate", "--model", str(model), "--prompt", LONG, "--output-dir", str(folder), *size, *chosen])
            == 0
        )
        drawn[name] = next(folder.glob("*.png")).read_bytes()
    saved = tmp_path / "saved"
    assert (
        main(["generate", "--model", str(out / "pipeline"), "--prompt", LONG, "--output-dir", str(saved), *size]) == 0
    )
    # The saved folder says itself how it reads prompts.
    assert drawn["read"] != drawn["cut"] and next(saved.glob("*.png")).read_bytes() != drawn["cut"]
