"""Every form of preferences between answers, with faults between good rows: all named, the rest read whole."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
from data.answer_faults import FORMS, Row, interleaved, write_media

from mmalign.data import AnswerPair, InvalidRow, load_answers, validate_answers
from mmalign.data.answer_records import Picture


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures, clips, bad files, and half a video."""
    place = tmp_path_factory.mktemp("media")
    write_media(place)
    (place / "cut.mp4").write_bytes(b"\0\0\0\x18ftypmp42\0\0\0\0mp42isom")
    return place


def told(pair: AnswerPair) -> Any:
    """A pair as answer_faults.py writes it down."""
    prompt = []
    for turn in pair.prompt:
        names = [
            part if isinstance(part, str) else "image" if isinstance(part, Picture) else "clip" for part in turn.parts
        ]
        prompt.append((turn.role, names))
    chosen = [pair.chosen[start:stop] for start, stop in pair.chosen_marks or ()]
    rejected = [(pair.rejected or "")[start:stop] for start, stop in pair.rejected_marks or ()]
    return prompt, pair.chosen, pair.rejected, chosen, rejected


@pytest.mark.parametrize("form", FORMS)
def test_each_fault_is_named_once_and_costs_its_own_row_only(form: str, folder: Path) -> None:
    row, expected, faults = FORMS[form]
    rows = interleaved(row, faults)
    (folder / "rows.jsonl").write_text("".join(json.dumps(item) + "\n" for item in rows))
    source = load_answers(folder / "rows.jsonl", num_frames=3, max_pixels=50_000)
    report = validate_answers(source, progress=False)
    assert [bad.row for bad in report.bad_rows] == list(range(1, len(rows), 2)), [str(bad) for bad in report.bad_rows]
    for bad, (change, field, reason) in zip(report.bad_rows, faults, strict=True):
        assert bad.field == field and reason in bad.reason, f"{change}: {bad}"
        assert "\n" not in str(bad)
    assert len(report.usable) == len(faults) + 1
    for at in report.usable:
        assert told(source[at]) == expected and source[at].row == at
    media = [part for _, parts in expected[0] for part in parts]
    assert report.num_pictures == media.count("image") * len(report.usable)
    assert report.num_clips == media.count("clip") * len(report.usable)
    assert report.num_marked == (len(report.usable) if expected[3] or expected[4] else 0)


def _strange(rng: random.Random) -> Any:
    """A value that somebody's export may hold."""
    deep: Any = "x"
    for _ in range(rng.randrange(4)):
        deep = [deep] if rng.random() < 0.5 else {"role": "user", "content": deep, "type": "text", "text": deep}
    choices = (
        None,
        "",
        "x",
        "\ud800",
        "<image>",
        "<MASK>",
        "</MASK>x<MASK>",
        0,
        1,
        True,
        0.5,
        float("nan"),
        10**400,
        b"",
        {},
        [],
        [[]],
    )
    more = (
        [None],
        {"frames": None},
        {"frames": ["picture.png"], "fps": 1},
        {"bytes": None},
        {"role": "assistant"},
        [{"q": 1}],
        object,
        deep,
    )
    return rng.choice((*choices, *more))


@pytest.mark.parametrize("form", FORMS)
def test_fuzzed_rows_are_read_whole_or_named(form: str, folder: Path) -> None:
    """150 rows of each form, a third of them untouched."""
    rng = random.Random(form)
    row, expected, _ = FORMS[form]
    rows: list[Row] = []
    untouched = []
    for _ in range(150):
        fields = rng.sample(sorted(row), min(len(row), rng.choice((0, 1, 2))))
        rows.append({name: _strange(rng) if name in fields else value for name, value in row.items()})
        untouched.append(not fields)
    source = load_answers([*rows, row], root=folder, num_frames=3)
    assert len(source.prompts()) == len(source) and source.fingerprint()
    for at, clean in enumerate([*untouched, True]):
        try:
            pair = source[at]
        except InvalidRow as error:
            assert not clean, error
            assert error.bad_row.row == at and error.bad_row.field and "\n" not in str(error)
            continue
        assert pair.chosen.strip() and pair.prompt[-1].role == "user"
        if clean:
            assert told(pair) == expected
