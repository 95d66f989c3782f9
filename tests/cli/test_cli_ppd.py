"""PPD on the command line: users made, trained on, and drawn for; what does not belong together is refused."""

import json

import numpy as np
import pytest
import torch
from tiny import tiny_pipeline

from mmalign import PPDPipeline, cli
from mmalign.cli import embed_users, generate, train, trained
from mmalign.cli.options import UsageError
from mmalign.cli.users import user_of
from mmalign.data.users import Group, UserEmbeddings
from mmalign.denoisers.user_attention import UserAttentionConfig, add_user_attention
from mmalign.pipelines.image.ppd import PPDConfig


def read(*words):
    return generate.VERB.read(["--model", "m", "--prompt", "p", *words])


def test_embed_users_writes_a_file_that_tells_users_and_pairs(tmp_path, capsys):
    path = tmp_path / "u.safetensors"
    words = ["--data", "playground", "--encoder", "playground", "--max-users", "2", "--per-user", "2", "--shots", "3"]
    assert cli.main(["embed-users", *words, "--output", str(path)]) == 0
    assert "2 users, 4 groups of 3 pairs" in capsys.readouterr().out
    users = UserEmbeddings.load(path)
    assert len(users) == 2 and users.tokens.shape == (4, 3, 96)
    assert users.made_by["encoder"] == "clip-patch-difference" and users.made_by["data"] == "playground"
    assert cli.main(["embed-users", *words, "--user", "me", "--output", str(path)]) == 0
    assert list(UserEmbeddings.load(path).of_user) == ["me"]


def test_a_scorer_that_is_no_clip_cannot_read_users(capsys):
    assert cli.main(["embed-users", "--data", "playground", "--encoder", "nonsense"]) == 2
    given = embed_users.VERB.read(["--data", "d", "--encoder", "playground", "--layers", "last"])
    with pytest.raises(UsageError, match="--layers belongs to --encoder llava"):
        embed_users.encoder_of(given)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ([], {}),
        (["--user", "ann"], {"user": "ann", "user_scale": 1.0}),
        (["--user", "ann", "--user-scale", "0.5"], {"user": "ann", "user_scale": 0.5}),
        (["--user", "a=0.3", "b=-1"], {"user": {"a": 0.3, "b": -1.0}, "user_scale": 1.0, "user_mix": "tokens"}),
        (["--user", "a=1", "--user-mix", "scores"], {"user": {"a": 1.0}, "user_scale": 1.0, "user_mix": "scores"}),
    ],
)
def test_users_are_told_to_the_call(words, told):
    assert user_of(read(*words, *(["--users", "u.safetensors"] if words else []))) == told


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--user", "ann"], "--users FILE"),
        (["--users", "u.safetensors"], "--users belongs to --user"),
        (["--user-scale", "2"], "--user-scale belongs to --user"),
        (["--user", "ann", "bob", "--users", "u"], "NAME=WEIGHT"),
        (["--user", "ann=much", "--users", "u"], "no number"),
    ],
)
def test_options_of_users_that_do_not_fit_are_refused(words, message):
    with pytest.raises(UsageError, match=message):
        user_of(read(*words))


def test_ppd_has_its_options_and_takes_no_lora():
    def given(*words):
        return train.make_command("ppd", PPDConfig).read(["--model", "m", "--data", "playground", *words])

    assert train.adapter_of(given(), PPDConfig) is None
    options = train.config_options(given("--user-shots", "2"), PPDConfig)
    assert options["users"] == "playground" and options["user_shots"] == 2
    options = train.config_options(given("--user-scorers", "a", "b"), PPDConfig)
    assert options["user_scorers"] == ["a", "b"] and "users" not in options
    for words in (["--full"], ["--lora-r", "4"]):
        with pytest.raises(UsageError, match="no LoRA"):
            train.adapter_of(given(*words), PPDConfig)
    assert cli.main(["probe", "ppd", "--model", "m", "--data", "d"]) == 2


def test_probe_users_tells_how_often_users_are_found(tmp_path, capsys):
    tokens = torch.eye(3).repeat_interleave(12, 0)[:, None] + 0.01 * torch.randn(36, 1, 3)
    path = UserEmbeddings([Group(f"u{i // 12}", (), ()) for i in range(36)], tokens, {}).save(
        tmp_path / "u.safetensors"
    )
    assert cli.main(["probe-users", "--users", str(path), "--epochs", "40"]) == 0
    assert "4 held-out groups of 3 users: top-1 100.0% (chance 33.3%)" in capsys.readouterr().out
    assert cli.main(["probe-users", "--users", str(path), "--token", "first"]) == 2
    assert cli.main(["probe-users", "--users", str(path), "--min-groups", "13"]) == 2


def test_evaluate_draws_for_a_user_and_keeps_their_pictures_apart(tmp_path, monkeypatch):
    class Redness:
        name = fingerprint = "red"

        def score(self, images, prompts):
            return torch.tensor([float(np.asarray(image)[..., 0].mean()) for image in images])

    pipe = PPDPipeline._adopt(tiny_pipeline("sd"))
    with torch.no_grad():
        for parameter in add_user_attention(pipe.unet, UserAttentionConfig(width=3)).parameters():
            parameter.add_(0.5 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(4)))
    pipe.save_pretrained(tmp_path / "model")
    users = UserEmbeddings([Group("ann", (), ()), Group("bob", (), ())], torch.eye(3)[:2, None], {})
    users.save(tmp_path / "u.safetensors")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("mmalign.cli.evaluate.scorer_named", lambda name, device: Redness())

    def evaluated(*words):
        given = ["--prompt", "a red bag", "a blue bag", "--steps", "1", "--scorers", "red", "--device", "cpu"]
        assert cli.main(["evaluate", "--model", "model", *given, "--num-samples", "0", *words]) == 0
        told = json.loads((tmp_path / "evaluation" / "report.json").read_text())
        return [(row["base_scores"]["red"], row["aligned_scores"]["red"]) for row in told["rows"]], told["settings"]

    ann, settings = evaluated("--user", "ann", "--users", "u.safetensors")
    bob, _ = evaluated("--user", "bob", "--users", "u.safetensors")
    none, _ = evaluated("--user", "ann", "--users", "u.safetensors", "--user-scale", "0")
    assert settings["aligned_call"] == {"user": "ann", "user_scale": 1.0}
    assert all(base == aligned for base, aligned in none)
    assert [base for base, _ in ann] == [base for base, _ in none]
    assert ann != none and bob != ann
    # Another person by the same name draws other pictures.
    UserEmbeddings(users.groups, users.tokens.flip(0), {}).save(tmp_path / "u.safetensors")
    assert evaluated("--user", "ann", "--users", "u.safetensors")[0] == bob
    assert cli.main(["evaluate", "--model", "model", "--prompt", "a", "b", "--user", "ann"]) == 2


def test_training_says_how_to_draw_for_somebody(tmp_path):
    def told(*words, **options):
        given = train.make_command("ppd", PPDConfig).read(["--model", "m", "--data", "my-pairs", *words])
        return trained._next_for_users(given, tmp_path, PPDConfig(output_dir=str(tmp_path), use_cpu=True, **options))

    read, generate, evaluate = told("--root", "pictures", users="clip:mine", user_shots=3)[-3:]
    assert read.split()[2:] == ["--data", "my-pairs", "--encoder", "clip:mine", "--shots", "3", "--root", "pictures"]
    assert "--users users.safetensors --user NAME" in generate and "mmalign evaluate" in evaluate
    assert "embed-users" not in "".join(told(users="mine.safetensors"))
    assert f"--users {tmp_path / 'users.safetensors'}" in told(user_scorers=["a", "b"])[-1]
