"""Prompt files, and which guidance and device are taken where none is said."""

import json

import pytest

from mmalign.cli import models
from mmalign.cli.options import Given

ROWS = ["a red shirt", "a blue bag, on white"]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("p.txt", "a red shirt\n\n  a blue bag, on white  \n"),
        ("p.json", json.dumps(ROWS)),
        ("p.json", json.dumps([{"Prompt": row} for row in ROWS])),
        ("p.jsonl", "\n".join(json.dumps({"caption": row}) for row in ROWS)),
        ("p.tsv", "Prompt\tCategory\na red shirt\tx\na blue bag, on white\ty\n"),
        ("p.csv", 'id,caption\n1,a red shirt\n2,"a blue bag, on white"\n'),
    ],
)
def test_prompt_files(tmp_path, name, content):
    path = tmp_path / name
    path.write_text(content)
    assert models.prompts_in(path) == ROWS


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.json", '{"prompt": "x"}', "must hold a list"),
        ("p.jsonl", '{"image": "x"}', "a row has no column prompt, caption or text"),
        ("p.csv", "id\n1\n", "a row has no column"),
    ],
)
def test_prompt_files_that_are_refused(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        models.prompts_in(path)


def test_prompts_of_the_command_line_come_first_and_are_cut(tmp_path):
    path = tmp_path / "p.txt"
    path.write_text("b\nc\n")
    given = Given({"prompt": ["a"], "prompts": str(path), "num_prompts": 2})
    assert models.read_prompts(given) == ["a", "b"]


def test_the_playgrounds_prompts_are_its_held_out_ones():
    given = Given({"prompt": None, "prompts": "playground", "num_prompts": 3})
    from mmalign.playground.pairs import prompts

    assert models.read_prompts(given) == prompts().test[:3]


def test_guidance():
    assert models.guidance_of(Given({"guidance_scale": 3.0, "model": "m"})) == 3
    assert models.guidance_of(Given({"guidance_scale": None, "model": "m"})) == 7.5


def test_file_names():
    assert models.slug("A photo: of a RED bag, on blue!") == "a-photo-of-a-red-bag-on-blue"
    assert models.slug("犬") == "prompt" and len(models.slug("word " * 40)) <= 40
