"""A split keeps a prompt's rows together, and neither order nor company moves a prompt."""

from typing import Any

import pytest

from mmalign.data import load_pairs, split_by_prompt


def _rows(number: int, each: int = 3) -> list[dict[str, Any]]:
    return [{"prompt": f"prompt {i % number}", "chosen": b"", "rejected": b""} for i in range(number * each)]


def _prompts(part: Any) -> set[str]:
    return {prompt.casefold() for prompt in part.prompts()}


def test_no_prompt_is_in_both_parts_and_no_row_is_lost() -> None:
    source = load_pairs(_rows(400))
    rest, held = split_by_prompt(source, 0.25)
    assert not _prompts(rest) & _prompts(held) and len(rest) + len(held) == 1200
    # 400 draws at 0.25: four standard deviations are 35.
    assert abs(len(_prompts(held)) - 100) < 35
    assert rest.name == "list[without 0.25 of prompts]" and held.name == "list[0.25 of prompts]"


def test_order_and_company_move_no_prompt() -> None:
    rows = _rows(50)
    _, held = split_by_prompt(load_pairs(rows), 0.3)
    for other in (rows[::-1], rows + _rows(90), rows[:50]):
        again = _prompts(split_by_prompt(load_pairs(other), 0.3)[1])
        assert again & _prompts(load_pairs(rows)) == _prompts(held)
    assert _prompts(split_by_prompt(load_pairs(rows), 0.3, seed=1)[1]) != _prompts(held)
    # A larger share holds out what a smaller one did, and more.
    assert _prompts(held) < _prompts(split_by_prompt(load_pairs(rows), 0.6)[1])


def test_capitals_and_white_space_make_no_other_prompt() -> None:
    rows = _rows(30, each=1)
    varied = [row | {"prompt": f"  {row['prompt'].upper().replace(' ', chr(10))} "} for row in rows]
    for part in split_by_prompt(load_pairs(rows + varied), 0.5):
        words = [" ".join(prompt.casefold().split()) for prompt in part.prompts()]
        assert all(words.count(word) == 2 for word in words)


def test_rankings_stay_whole_and_unreadable_rows_stay_in_the_first_part(picture: Any) -> None:
    rows: list[dict[str, Any]] = [
        {"prompt": f"p{i}", "generations": [picture(seed=j) for j in range(3)], "ranking": [1, 2, 3]} for i in range(12)
    ]
    rest, held = split_by_prompt(load_pairs([{"prompt": None, "generations": [], "ranking": []}, *rows]), 0.4)
    assert rest.prompts()[0] is None and None not in held.prompts()
    assert all(part.prompts().count(prompt) == 3 for part in (rest, held) for prompt in set(part.prompts()) - {None})


def test_a_part_reads_its_own_rows_and_has_its_own_fingerprint(pickapic_rows: Any) -> None:
    items = pickapic_rows(10)
    source = load_pairs(items)
    rest, held = split_by_prompt(source, 0.5, seed=0)
    read = [part[row] for part in (rest, held) for row in range(len(part))]
    assert sorted(record.prompt for record in read) == sorted(item["caption"] for item in items)
    assert [record.row for record in read] == [*range(len(rest)), *range(len(held))]
    assert len({source.fingerprint, rest.fingerprint, held.fingerprint}) == 3
    assert split_by_prompt(source, 0.5, seed=0)[1].fingerprint == held.fingerprint
    with pytest.raises(IndexError):
        held[len(held)]


@pytest.mark.parametrize(("held_out", "says"), [(0.0, "between 0 and 1"), (1.0, "between"), (1e-9, "held-out part")])
def test_what_cannot_be_split_is_refused(held_out: float, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        split_by_prompt(load_pairs(_rows(5)), held_out)
