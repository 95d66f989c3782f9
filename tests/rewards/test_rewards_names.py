"""One table of names: what it lists is made, and every list that users read is the table's."""

import pytest

from mmalign import rewards
from mmalign.cli import evaluate, score
from mmalign.cli.fields import options_of
from mmalign.pipelines.image.smpo import SmPOConfig
from mmalign.rewards import scorer
from mmalign.scorer_names import FROM_FILES, SCORERS


def test_files_are_known_for_the_listed_names() -> None:
    assert tuple(rewards._FILES) == FROM_FILES
    for name in SCORERS:
        assert name in FROM_FILES or name.partition(":")[0] in ("playground", "pickscore", "denscore", "clip")


@pytest.mark.parametrize("name", ["beauty", "clip", "clip:", "hpsv3:", "pickscore:own.pt"])
def test_unknown_names_get_the_list(name: str) -> None:
    with pytest.raises(
        ValueError, match=f"no scorer {name!r}; there are {', '.join(SCORERS)}, and hpsv2, .* ':<file>'"
    ):
        scorer(name)


def test_the_command_line_lists_the_same() -> None:
    options = [*score.VERB.options, *evaluate.VERB.options, *options_of(SmPOConfig, refused=())]
    helps = [option.help for option in options if option.name in ("scorer", "scorers")]
    assert len(helps) == 3 and all(", ".join(SCORERS) in text for text in helps)
