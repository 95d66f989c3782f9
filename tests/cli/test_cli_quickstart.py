"""`mmalign quickstart`: what it hands on, and that a real model takes the same two verbs a user would type."""

from pathlib import Path

import pytest

from mmalign import cli
from mmalign.cli import evaluate, train


@pytest.fixture
def playground(monkeypatch):
    """The quickstart itself is not run: it trains for minutes."""
    import mmalign.evaluation
    from mmalign.playground import quickstart

    calls = []

    def run(output_dir, **options):
        calls.append((output_dir, options))
        return "the result", Path(output_dir) / "report.html"

    monkeypatch.setattr(quickstart, "run", run)
    monkeypatch.setattr(mmalign.evaluation, "headline", lambda result: f"headline of {result}")
    return calls


@pytest.fixture
def verbs(monkeypatch):
    """Catches the words that `mmalign train` and `mmalign evaluate` would get."""
    calls = []
    monkeypatch.setattr(train, "run", lambda words: calls.append(["train", *words]) or 0)
    monkeypatch.setattr(evaluate, "run", lambda words: calls.append(["evaluate", *words]) or 0)
    return calls


def test_the_playground(playground, capsys):
    words = ["quickstart", "--method", "dpo", "--max-steps", "5", "--num-prompts", "9", "--output-dir", "out"]
    assert cli.main(words) == 0
    assert playground == [("out", {"method": "dpo", "max_steps": 5, "seed": 0, "num_prompts": 9})]
    shown = capsys.readouterr().out
    assert "headline of the result" in shown and "report       out/report.html" in shown
    assert 'DiffusionPipeline.from_pretrained("out/pipeline")' in shown


def test_defaults_are_the_quickstarts_own(playground):
    assert cli.main(["quickstart"]) == 0
    assert playground == [("runs/quickstart", {"method": "smpo", "seed": 0})]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--model", "m"], "give both --model and --data, or neither"),
        (["--data", "d"], "give both --model and --data, or neither"),
        (["--model", "m", "--data", "d"], "--prompts is missing"),
        (["--preset", "sdxl"], "--preset belongs to a real model"),
        (["--method", "ppo"], "--method takes one of smpo, inpo, dpo, sft"),
    ],
)
def test_what_is_refused(words, message, playground, verbs, capsys):
    assert cli.main(["quickstart", *words]) == 2
    assert message in capsys.readouterr().err and not playground and not verbs


def test_a_real_model_is_trained_and_evaluated(verbs):
    words = ["--model", "m", "--data", "d", "--prompts", "p.txt", "--preset", "sdxl", "--num-prompts", "7"]
    assert cli.main(["quickstart", *words, "--output-dir", "out"]) == 0
    trained, judged = verbs
    assert trained[:2] == ["train", "smpo"] and "--save-pipeline" in trained and "sdxl" in trained
    assert judged[0] == "evaluate" and judged[judged.index("--trained-on") + 1] == "pickscore"
    # Both read what they are given.
    assert evaluate.VERB.read(judged[1:])["lora"] == "out"
    from mmalign.pipelines.image.smpo import SmPOConfig

    given = train.make_command("smpo", SmPOConfig).read(trained[2:])
    assert (given["model"], given["data"], given["max_steps"], given["seed"]) == ("m", "d", 200, 0)
