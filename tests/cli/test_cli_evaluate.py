"""`mmalign evaluate` and `make-pairs`: what is told before anything is loaded or drawn, and what their options reach."""

import json

import numpy as np
import pytest
import torch
from tiny import tiny_pipeline

from mmalign import cli
from mmalign.cli.models import BASE_CLASS, load_pipeline
from mmalign.cli.options import Given, UsageError

EVALUATE = ["evaluate", "--model", "a", "--base", "b", "--prompt", "a red bag", "a blue bag", "--steps", "1"]


class Channel:
    """A scorer that is called by its kind, whatever file it was read from."""

    def __init__(self, name, fingerprint, channel):
        self.name, self.fingerprint, self.channel = name, fingerprint, channel

    def score(self, images, prompts):
        return torch.tensor([float(np.asarray(image)[..., self.channel].mean()) for image in images])


@pytest.fixture
def made(monkeypatch, tmp_path):
    """What was loaded, in order: tiny models and scorers of a colour in place of the real ones."""
    loaded = []

    def load(given, *, model=None, **_):
        loaded.append(model or given["model"])
        return tiny_pipeline("sd", seed=len(loaded))

    def named(name, device):
        if name == "pikscore":
            raise ValueError("no scorer 'pikscore'")
        loaded.append(name)
        return Channel(name.partition(":")[0], name, len(loaded) % 3)

    for verb in ("evaluate", "make_pairs"):
        monkeypatch.setattr(f"mmalign.cli.{verb}.load_pipeline", load)
        monkeypatch.setattr(f"mmalign.cli.{verb}.scorer_named", named)
    monkeypatch.chdir(tmp_path)
    return loaded


def report():
    with open("evaluation/report.json", encoding="utf-8") as file:
        return json.load(file)


@pytest.mark.parametrize("called", ["aesthetic:/my/file", "aesthetic"])
def test_a_scorer_from_a_file_may_be_marked_and_tell_retention_by_either_name(made, called):
    words = ["--scorers", "red", "aesthetic:/my/file", "--device", "cpu"]
    assert cli.main([*EVALUATE, *words, "--trained-on", called]) == 0
    assert [(row["name"], row["seen_in_training"]) for row in report()["scorers"]] == [
        ("red", False),
        ("aesthetic", True),
    ]
    assert made.count("aesthetic:/my/file") == 1 and "aesthetic" not in made
    with open("other.txt", "w", encoding="utf-8") as file:
        file.write("a hat")
    retention = ["--retention-prompts", "other.txt", "--retention-tolerance", "300", "--retention-scorer", called]
    assert cli.main([*EVALUATE, *words, *retention]) == 0
    assert report()["retention"]["scorer"] == "aesthetic"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--num-samples", "-1"], "--num-samples must be 0 or more, got -1"),
        (["--history", "history.json"], "history.json is no history: it holds no list of mappings"),
        (["--scorers", "pikscore"], "no scorer 'pikscore'"),
        (["--num-prompts", "-1"], "--num-prompts must be at least 1"),
    ],
)
def test_mistakes_are_told_before_a_model_is_loaded(made, words, message, capsys):
    with open("history.json", "w", encoding="utf-8") as file:
        file.write("[1, 2]")
    assert cli.main([*EVALUATE, "--scorers", "red", *words]) == 2
    assert message in capsys.readouterr().err
    assert "a" not in made and "b" not in made


def test_make_pairs_takes_what_alignment_made_and_names_a_wrong_scorer_first(made, capsys):
    words = [
        "make-pairs",
        "--model",
        "a",
        "--aligned",
        "runs/x",
        "--prompt",
        "a red bag",
        "--steps",
        "1",
        "--device",
        "cpu",
    ]
    assert cli.main([*words, "--scorer", "pikscore"]) == 2
    assert "no scorer 'pikscore'" in capsys.readouterr().err and made == []
    assert cli.main([*words, "--scorer", "red", "--images-per-prompt", "2"]) == 0
    assert "1 pairs in my-pairs/metadata.jsonl" in capsys.readouterr().out


def test_retention_prompts_of_a_folder_are_those_of_the_split(made, tmp_path):
    for split in ("train", "test"):
        (tmp_path / f"{split}-0.json").write_text(json.dumps([f"a {split} bag"]))
    words = ["evaluate", "--model", "a", "--base", "b", "--steps", "1", "--scorers", "red", "--device", "cpu"]
    words += ["--prompts", str(tmp_path), "--prompts-split", "train", "--num-samples", "0"]
    assert cli.main([*words, "--retention-prompts", str(tmp_path), "--retention-tolerance", "300"]) == 0
    assert report()["retention"]["difference"]["num_comparisons"] == 1


@pytest.mark.parametrize(
    ("verb", "said"), [("evaluate", "own seed"), ("make-pairs", "own seed"), ("generate", "count up")]
)
def test_help_tells_what_the_seed_is(verb, said, capsys):
    assert cli.main([verb, "--help"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert said in shown.partition("--seed ")[2].partition("--height")[0]


@pytest.mark.parametrize("kept", [True, False])
def test_the_safety_checker_stays_unless_it_is_sent_away(kept, monkeypatch):
    from mmalign.training import loading

    pipe, checker = tiny_pipeline("sd"), object()
    pipe.safety_checker = checker
    monkeypatch.setattr(loading, "load_base", lambda name, **options: pipe)
    options = dict.fromkeys(("revision", "variant", "vae", "device"))
    given = Given({"model": "a", "base_class": BASE_CLASS, "dtype": "float32", "safety_checker": kept, **options})
    assert load_pipeline(given, device="cpu").safety_checker is (checker if kept else None)


def test_the_class_of_a_single_file_is_refused_only_where_there_is_no_such_file():
    options = dict.fromkeys(("revision", "variant", "vae"))
    given = Given({"model": "a.safetensors", "base": "folder", "base_class": "Flux", "dtype": "float32", **options})
    with pytest.raises((OSError, ValueError), match="folder") as told:
        load_pipeline(given, model="folder")
    assert "--base-class" not in str(told.value)
    given.values["model"] = "folder"
    with pytest.raises(UsageError, match="--base-class belongs to a single .safetensors file"):
        load_pipeline(given)
