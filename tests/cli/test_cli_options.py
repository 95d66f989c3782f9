"""Options from the command line and from YAML: one meaning, three sources, nothing ignored."""

import os

import pytest

from mmalign.cli import options
from mmalign.cli.options import Alias, Command, Option, UsageError, number, one_of, read_yaml, switch, text, whole


def verb():
    return Command(
        prog="mmalign verb",
        description="A verb.",
        example="mmalign verb --beta 2",
        options=[
            Option(name="beta", help="scale, 100 % of it", convert=number, default=1.0),
            Option(name="max_steps", convert=whole, default=-1),
            Option(name="bf16", convert=switch, default=False),
            Option(name="fp16", convert=switch, default=False),
            Option(name="scorer", convert=text, default="pickscore", nullable=True),
            Option(name="loss_type", convert=text, default=["sigmoid"], many=True),
            Option(name="strategy", convert=one_of("no", "steps"), default="no"),
            Option(name="rare", convert=whole, default=0, hidden=True),
        ],
        aliases=[
            Alias("beta_dpo", "is beta", lambda value: {"beta": value}),
            Alias("mixed_precision", "sets both", lambda value: {"bf16": value == "bf16", "fp16": value == "fp16"}),
            Alias("random_crop", "pictures are cropped in the centre"),
        ],
    )


def write(folder, content):
    path = folder / "run.yaml"
    path.write_text(content)
    return str(path)


def test_defaults_yaml_and_command_line_in_that_order(tmp_path):
    file = write(tmp_path, "beta: 2\nmax_steps: 5\n")
    given = verb().read(["--config", file, "--max_steps", "7"])
    assert (given["beta"], given["max_steps"], given["bf16"]) == (2.0, 7, False)
    assert given.explicit == {"beta", "max_steps"}


@pytest.mark.parametrize("word", ["--max-steps=7", "--max_steps=7"])
def test_both_spellings(word):
    assert verb().read([word])["max_steps"] == 7


def test_hyphens_in_values_stay():
    assert verb().read(["--scorer=clip:a_b-c"])["scorer"] == "clip:a_b-c"


def test_keys_may_have_hyphens_in_yaml_too(tmp_path):
    assert verb().read(["--config", write(tmp_path, "max-steps: 3\n")])["max_steps"] == 3


@pytest.mark.parametrize(
    ("words", "expected"),
    [(["--bf16"], True), (["--bf16", "false"], False), (["--no-bf16"], False), (["--bf16", "--beta", "3"], True)],
)
def test_switches(words, expected):
    assert verb().read(words)["bf16"] is expected


def test_a_switch_that_yaml_turned_on_can_be_turned_off(tmp_path):
    assert verb().read(["--config", write(tmp_path, "bf16: true\n"), "--no-bf16"])["bf16"] is False


def test_none_and_null(tmp_path):
    assert verb().read(["--scorer", "none"])["scorer"] is None
    assert verb().read(["--config", write(tmp_path, "scorer: null\n")])["scorer"] is None
    with pytest.raises(UsageError, match="--beta takes a number"):
        verb().read(["--beta", "none"])


def test_none_for_a_list():
    names = Option(name="names", many=True, nullable=True)
    assert names.read(["none"]) is None and names.read("none") is None and names.read(["none", "b"]) == ["none", "b"]


def test_lists(tmp_path):
    assert verb().read(["--loss-type", "a", "b", "--loss-type", "c"])["loss_type"] == ["a", "b", "c"]
    assert verb().read(["--config", write(tmp_path, "loss_type: [a, b]\n")])["loss_type"] == ["a", "b"]
    assert verb().read(["--config", write(tmp_path, "loss_type: a\n")])["loss_type"] == ["a"]


def test_yaml_traps(tmp_path):
    """YAML 1.1 reads 1e-5 as text and a bare no as false."""
    given = verb().read(["--config", write(tmp_path, "beta: 1e-5\nstrategy: no\n")])
    assert (given["beta"], given["strategy"]) == (1e-5, "no")
    with pytest.raises(UsageError, match="--scorer takes text: write 'no' in quotes"):
        verb().read(["--config", write(tmp_path, "scorer: no\n")])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("bta: 2\n", r"run.yaml: unknown key 'bta' \(did you mean beta\?\)"),
        ("beta: [1, 2]\n", r"--beta takes a number, not \[1, 2\]"),
        ("max_steps: 2.5\n", "--max-steps takes a whole number, not 2.5"),
        ("max_steps: true\n", "--max-steps takes a whole number, not True"),
        ("bf16: maybe\n", "--bf16 takes true or false, not 'maybe'"),
        ("strategy: step\n", r"--strategy takes one of no, steps, not 'step' \(did you mean steps\?\)"),
        ("beta: 1\nbeta: 2\n", "run.yaml: 'beta' is written twice"),
        ("- beta\n", "write one `option: value` a line"),
        ("beta: {\n", "is not valid YAML"),
        ("env: [A]\n", "env: takes"),
        ("random_crop: true\n", "--random-crop is refused: pictures are cropped in the centre"),
        ("beta: 1\nbeta_dpo: 2\n", "--beta and --beta-dpo both set beta"),
    ],
)
def test_yaml_that_is_refused(tmp_path, content, message):
    with pytest.raises(UsageError, match=message):
        verb().read(["--config", write(tmp_path, content)])


def test_a_missing_file_is_an_os_error():
    with pytest.raises(FileNotFoundError):
        verb().read(["--config", "nowhere.yaml"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--max-step", "3"], r"unknown option --max-step \(did you mean --max-steps"),
        (["--nonsense"], r"unknown option --nonsense; see mmalign verb --help"),
        (["beta"], "unexpected 'beta'"),
        (["--beta"], "expected one argument"),
        (["--random_crop"], "--random-crop is refused"),
        (["--beta-dpo", "1", "--beta", "2"], "both set beta"),
        (["--beta", "much"], "--beta takes a number, not 'much'"),
    ],
)
def test_words_that_are_refused(words, message):
    with pytest.raises(UsageError, match=message):
        verb().read(words)


def test_aliases_reach_our_options_from_both_sources(tmp_path):
    assert verb().read(["--beta_dpo", "5000"])["beta"] == 5000
    given = verb().read(["--config", write(tmp_path, "beta_dpo: 5000\nmixed_precision: bf16\n")])
    assert (given["beta"], given["bf16"], given["fp16"]) == (5000, True, False)


def test_the_command_line_wins_over_an_alias_in_yaml(tmp_path):
    assert verb().read(["--config", write(tmp_path, "beta_dpo: 5000\n"), "--beta", "2"])["beta"] == 2


def test_the_env_block_exports(tmp_path, monkeypatch):
    monkeypatch.setenv("MMALIGN_TEST_A", "before")
    content, path = read_yaml(write(tmp_path, "env:\n  MMALIGN_TEST_A: 4\nbeta: 3\n"))
    assert content == {"beta": 3} and path.endswith("run.yaml")
    assert os.environ["MMALIGN_TEST_A"] == "4"


def test_help_hides_the_rare_options_and_says_how_to_see_them(capsys):
    assert verb().read(["--help"]) is None
    short = capsys.readouterr().out
    assert "example: mmalign verb --beta 2" in short and "100 % of it (default: 1)" in short and "--rare" not in short
    verb().read(["--help-all"])
    assert "--rare" in capsys.readouterr().out


def test_a_printed_configuration_reads_back(tmp_path, capsys):
    words = ["--beta", "1e-5", "--scorer", "none", "--loss-type", "a", "b", "--strategy", "no"]
    assert verb().read([*words, "--print-config"]) is None
    printed = capsys.readouterr().out
    again = verb().read(["--config", write(tmp_path, printed)])
    assert again.values == verb().read(words).values
    assert again.explicit == {option.name for option in verb().options}


def test_required_options_say_what_they_want():
    needs = Command(
        prog="mmalign verb",
        description="",
        example="",
        options=[Option(name="model", help="a folder or a Hub id", required=True)],
    )
    with pytest.raises(UsageError, match="--model is missing: a folder or a Hub id"):
        needs.read([])


@pytest.mark.parametrize(
    ("value", "expected"), [("12", 12), ("1e3", 1000), (4.0, 4), ("-1", -1), ("12345678901234567", 12345678901234567)]
)
def test_whole_numbers_are_exact(value, expected):
    assert whole(value) == expected


def test_json_options():
    assert options.mapping_or_text('{"num_cycles": 2}') == {"num_cycles": 2}
    with pytest.raises(ValueError, match="is not valid JSON"):
        options.mapping_or_text('{"num_cycles": }')
