"""PPD on the command line: users made, trained on, and drawn for; what does not belong together is refused."""

import pytest

from mmalign import cli
from mmalign.cli import embed_users, generate, train
from mmalign.cli.options import UsageError
from mmalign.data.users import UserEmbeddings
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
    assert generate.user_of(read(*words, *(["--users", "u.safetensors"] if words else []))) == told


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
        generate.user_of(read(*words))


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
