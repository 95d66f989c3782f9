"""Which prompts, guidance and device are taken where none is said."""

import pytest

from mmalign.cli import models
from mmalign.cli.options import Given, UsageError
from mmalign.files import slug


def test_prompts_of_the_command_line_come_first_and_are_cut(tmp_path):
    path = tmp_path / "p.txt"
    path.write_text("b\nc\n")
    given = Given({"prompt": ["a"], "prompts": str(path), "prompts_split": None, "num_prompts": 2})
    assert models.read_prompts(given) == ["a", "b"]


@pytest.mark.parametrize("number", [0, -1])
def test_fewer_than_one_prompt_is_refused(number):
    given = Given({"prompt": ["a", "b"], "prompts": None, "prompts_split": None, "num_prompts": number})
    with pytest.raises(UsageError, match=f"--num-prompts must be at least 1, got {number}"):
        models.read_prompts(given)


def test_a_split_needs_a_folder_of_prompt_files():
    for prompts, message in (("playground", "not to the playground"), (None, "belongs to --prompts")):
        given = Given({"prompt": ["a"], "prompts": prompts, "prompts_split": "test", "num_prompts": None})
        with pytest.raises(UsageError, match=message):
            models.read_prompts(given)


def test_the_playgrounds_prompts_are_its_held_out_ones():
    given = Given({"prompt": None, "prompts": "playground", "prompts_split": None, "num_prompts": 3})
    from mmalign.playground.pairs import prompts

    assert models.read_prompts(given) == prompts().test[:3]


def test_guidance():
    assert models.guidance_of(Given({"guidance_scale": 3.0, "model": "m"})) == 3
    assert models.guidance_of(Given({"guidance_scale": None, "model": "m"})) == 7.5


def test_file_names():
    assert slug("A photo: of a RED bag, on blue!") == "a-photo-of-a-red-bag-on-blue"
    assert slug("犬") == "prompt" and len(slug("word " * 40)) <= 40
