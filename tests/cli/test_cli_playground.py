"""Every verb on the playground itself, by the words that the documentation shows: train, generate, make-pairs, evaluate."""

from pathlib import Path

import pytest
import torch

from mmalign import cli
from mmalign.training.loading import load_base


@pytest.mark.parametrize("name", ["dtype", "torch_dtype"])
def test_its_weights_work_in_the_precision_that_is_asked(name: str) -> None:
    assert load_base("playground").unet.dtype == torch.float32
    assert load_base("playground", **{name: torch.bfloat16}).unet.dtype == torch.bfloat16


def test_the_verbs_on_the_playground(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    few = ["--num-inference-steps", "2", "--num-prompts", "2"]

    def verb(*words: str) -> None:
        assert cli.main(list(words)) == 0, words

    pairs = ["--prompts", "playground", "--scorer", "playground", "--images-per-prompt", "2", "--output-dir", "pairs"]
    verb("make-pairs", "--model", "playground", *pairs, *few)
    verb("validate-data", "pairs")
    steps = ["--max-steps", "1", "--per-device-train-batch-size", "2", "--use-cpu", "--output-dir", "run"]
    verb("train", "dpo", "--model", "playground", "--data", "pairs", *steps)
    verb("generate", "--model", "playground", "--lora", "run", "--prompt", "a red bag", "--num-inference-steps", "2")
    scorers = ["--scorers", "judge-B", "--output-dir", "evaluation"]
    verb("evaluate", "--model", "playground", "--lora", "run", "--prompts", "playground", *scorers, *few)
    assert (tmp_path / "evaluation" / "report.html").is_file() and (tmp_path / "pictures" / "metadata.jsonl").is_file()
