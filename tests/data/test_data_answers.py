"""Sources of answers: the same pairs from every kind of file, what names their content, splits, and what is refused."""

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset, DatasetDict, load_dataset
from PIL import Image

from mmalign.data import AnswerSource, InvalidRow, load_answers, split_by_prompt, validate_answers
from mmalign.data.answer_forms import REQUIRED
from mmalign.data.answer_records import Picture
from mmalign.data.answers import untied
from mmalign.data.kinds import kind_of

Row = dict[str, Any]


def rows(number: int = 4) -> list[Row]:
    """Messages whose pictures lie in files, in the messages themselves and in the row."""
    made = []
    for at in range(number):
        parts = [{"type": "image", "image": "0.png"}, {"type": "text", "text": f"what {at}?"}, {"type": "image"}]
        made.append(
            {
                "prompt": [{"role": "user", "content": parts}],
                "chosen": [{"role": "assistant", "content": "a bag"}],
                "rejected": [{"role": "assistant", "content": "a shoe"}],
                "images": [f"{at % 2}.png"],
                "user_id": at % 2,
                "chosen_score": 1.0,
                "rejected_score": at / 10,
            }
        )
    return made


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for at in range(2):
        Image.new("RGB", (4, 3), (at, 0, 0)).save(tmp_path / f"{at}.png")
    return tmp_path


def read(source: AnswerSource) -> list[Any]:
    found = []
    for at in range(len(source)):
        pair = source[at]
        colours = [medium.image.getpixel((0, 0)) for medium in pair.media if isinstance(medium, Picture)]
        found.append(
            (pair.prompt[-1].parts[1], colours, pair.chosen, pair.rejected, pair.user_id, pair.scores, pair.row)
        )
    return found


def test_every_kind_of_source_gives_the_same_pairs(folder: Path) -> None:
    items = rows()
    (folder / "rows.json").write_text(json.dumps(items))
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, items)))
    dataset = Dataset.from_list(items)
    dataset.to_parquet(folder / "rows.parquet")
    (folder / "split").mkdir()
    dataset.to_parquet(folder / "split" / "train-00000-of-00001.parquet")
    DatasetDict({"train": dataset, "test": dataset.select([0])}).save_to_disk(folder / "saved")
    expected = read(load_answers(items, root=folder))
    assert [colours for _, colours, *_ in expected] == [[(0, 0, 0), (at % 2, 0, 0)] for at in range(4)]
    assert expected[3][2:6] == ("a bag", "a shoe", "1", {"score": (1.0, 0.3)})
    for source in (folder, folder / "rows.json", folder / "rows.parquet", folder / "split", folder / "saved", dataset):
        options = {"root": folder} if source is dataset or source in (folder / "split", folder / "saved") else {}
        assert read(load_answers(source, **options)) == expected, source
    assert len(load_answers(folder / "saved", split="test", root=folder)) == 1
    assert len(load_answers(folder, max_rows=9)) == 4
    source = load_answers(folder, max_rows=2)
    assert len(source) == 2 and load_answers(source) is source and source.sides == 2 and source.unit == "pair"
    assert load_answers([{"prompt": "x", "completion": "y", "label": True}]).sides == 1


def test_a_source_goes_to_another_process(folder: Path) -> None:
    """As workers take it where processes are not forked."""
    Dataset.from_list(rows()).to_parquet(folder / "rows.parquet")
    source = load_answers(folder / "rows.parquet", max_rows=3).select([2, 0], "two")
    there = pickle.loads(pickle.dumps(source))
    assert read(there) == read(source) and there.fingerprint() == source.fingerprint()


def test_a_hub_data_set_is_loaded_by_datasets(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As RLAIF-V lies there: pictures in the table."""
    Dataset.from_list(
        [{"question": "what?", "chosen": "a", "rejected": "b", "image": str(folder / "1.png")}]
    ).to_parquet(folder / "rlaif.parquet")
    local = load_dataset(
        "parquet", data_files=str(folder / "rlaif.parquet"), split="train", cache_dir=str(folder / "hub")
    )
    from datasets import Image as Feature

    pictures = local.cast_column("image", Feature())
    monkeypatch.setattr("datasets.load_dataset", lambda name, split, revision: pictures)
    source = load_answers("openbmb/RLAIF-V-Dataset", root=folder)
    assert source.form == "rlaif-v" and source[0].media[0].image.getpixel((0, 0)) == (1, 0, 0)  # type: ignore[union-attr]


def test_the_fingerprint_tells_content_and_reading_apart(folder: Path) -> None:
    def prints(source: Any, **options: Any) -> str:
        return load_answers(source, **options).fingerprint()

    (folder / "clip").mkdir()
    items = [row | {"images": ["1.png"], "video": "clip"} for row in rows()]
    Dataset.from_list(items).to_parquet(folder / "rows.parquet")
    (folder / "rows.json").write_text(json.dumps(items))
    for source in (folder / "rows.parquet", folder / "rows.json"):
        whole = prints(source)
        assert whole == prints(source) == prints(source, frame_cache=folder / "cache")
        others = [
            prints(source, num_frames=3),
            prints(source, fps=3),
            prints(source, longest_side=9),
            prints(source, max_rows=2),
        ]
        # A picture that only a message names, and a frame.
        Image.new("RGB", (4, 3), (9, 9, 9)).save(folder / "0.png")
        others.append(prints(source))
        Image.new("RGB", (4, 3), (0, 0, 0)).save(folder / "0.png")
        assert prints(source) == whole
        Image.new("RGB", (4, 3)).save(folder / "clip" / "0.png")
        assert len({whole, *others, prints(source)}) == 7
        (folder / "clip" / "0.png").unlink()


def test_parts_have_no_picture_in_common(folder: Path) -> None:
    """Rows that ask the same of other pictures may be parted, rows that ask otherwise of the same may not."""
    items = []
    for at in range(40):
        picture = Image.new("RGB", (4, 3), (at, 0, 0))
        items += [{"prompt": text, "chosen": "a", "rejected": "b", "image": picture} for text in ("what?", "where?")]
    items += [{"prompt": "what?", "chosen": "a", "rejected": "b"}]
    rest, held = split_by_prompt(load_answers(items), 0.3)
    assert len(rest) + len(held) == 81 and 10 < len(held) < 40
    seen = [{pair.media[0].image.getpixel((0, 0)) for pair in part if pair.media} for part in (rest, held)]  # type: ignore[union-attr]
    assert not seen[0] & seen[1] and len(seen[0] | seen[1]) == 40
    assert [pair.row for pair in held] == list(range(len(held)))


def test_rows_are_selected_from_those_that_were_selected(folder: Path) -> None:
    whole = load_answers(rows(), root=folder)
    part = whole.select([3, 2, 0], "three").select([2, 0], "two")
    assert [found[0] for found in read(part)] == ["what 0?", "what 3?"] and part[1].row == 1
    assert [part.table_row(at) for at in (0, 1)] == [0, 3] and part.num_table_rows == 4
    assert part.prompts() == [whole.prompts()[at] for at in (0, 3)]


def test_a_tie_teaches_nothing() -> None:
    row = {"prompt": "x", "chosen": "a", "rejected": "b"}
    source = load_answers([row | {"chosen_votes": votes, "rejected_votes": 2} for votes in (2, 3)])
    with pytest.raises(InvalidRow, match="row 0, label: a tie"):
        untied(source[0])
    assert untied(source[1]).label == 0.6
    single = load_answers([{"prompt": "x", "completion": "a", "label": 0}])[0]
    assert untied(single) is single


def test_prompts_differ_in_who_says_what() -> None:
    said = [{"role": "user", "content": "a"}, {"role": "system", "content": "b"}, {"role": "user", "content": "c"}]
    other = [said[0], said[1] | {"role": "assistant"}, said[2]]
    one, two = load_answers([{"prompt": prompt, "chosen": "a", "rejected": "b"} for prompt in (said, other)]).prompts()
    assert one != two


def test_one_picture_under_two_names_is_one_prompt(folder: Path) -> None:
    """As in tables that hold their pictures, from sets that were put together."""
    data = [(folder / f"{at}.png").read_bytes() for at in (0, 0, 1)]
    pictures = [{"bytes": held, "path": f"{at}.png"} for at, held in enumerate(data)]
    source = load_answers([{"question": "x", "chosen": "a", "rejected": "b", "image": one} for one in pictures])
    one, other, different = source.prompts()
    assert one == other != different and validate_answers(source, progress=False).num_prompts == 2


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"audio": np.zeros(2)}, "row 0, audio: holds ndarray, and sound is not read"),
        ({"image": np.zeros((4, 4, 3), np.uint8)}, "row 0, image: expected an image, its bytes or a path, got ndarray"),
        ({"chosen": np.array(["a", "b"])}, "row 0, chosen: expected text, got ndarray"),
        ({"label": np.array([1, 0])}, "row 0, label: expected true or false, got ndarray"),
    ],
)
def test_arrays_where_none_belong_are_bad_rows(change: Row, told: str) -> None:
    """Arrays do not say whether they are empty, or equal to anything."""
    row = {"prompt": "x", **({"completion": "a"} if "label" in change else {"chosen": "a", "rejected": "b"})}
    with pytest.raises(InvalidRow, match=told):
        load_answers([row | change])[0]
    liked = {"prompt": "x", "completion": "y"}
    assert [load_answers([liked | {"label": one}])[0].label for one in (np.bool_(True), np.int64(0))] == [1, 0]


def placed(row: Row, folder: Path) -> list[list[str]]:
    """What stands in each turn: texts, and the kinds of media."""
    (folder / "clip").mkdir(exist_ok=True)
    Image.new("RGB", (4, 3)).save(folder / "clip" / "0.png")
    answers = {"chosen": "a", "rejected": "b"} if "prompt" in row else {"answer": "a", "pred": "b"}
    prompt = load_answers([answers | row], root=folder)[0].prompt
    return [[part if isinstance(part, str) else type(part).__name__ for part in turn.parts] for turn in prompt]


def test_media_stand_where_they_are_asked_for_or_before_the_first_user(folder: Path) -> None:
    both = {"image": "0.png", "video": "clip"}
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "what?"}]
    more = [{"role": "assistant", "content": "this"}, {"role": "user", "content": "and?"}]
    expected = [["Be brief."], ["Picture", "VideoClip", "what?"], ["this"], ["and?"]]
    assert placed({"prompt": chat + more, **both}, folder) == expected
    assert placed({"prompt": "a <video> b <image> c", **both}, folder) == [["a ", "VideoClip", " b ", "Picture", " c"]]
    assert placed({"prompt": "a <video> b", **both}, folder) == [["Picture", "a ", "VideoClip", " b"]]
    # Of RRPO's rows only those without a picture of their own mean the clip.
    rrpo = {"question": "<image>\nwhat?"}
    assert placed(rrpo | {"video": "clip"}, folder) == [["VideoClip", "what?"]]
    assert placed(rrpo | {"media_path": ["0.png", "1.png"]}, folder) == [["VideoClip", "what?"]]
    assert placed(rrpo | both, folder) == [["VideoClip", "Picture", "what?"]]


def test_a_mark_and_a_part_are_the_same_place(folder: Path) -> None:
    """Where answers bring the conversation with them, written otherwise than the prompt."""
    asked = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what?"}]}
    answers = {side: [asked, {"role": "assistant", "content": side}] for side in ("chosen", "rejected")}
    assert placed({"prompt": "<image>what?", "image": "0.png", **answers}, folder) == [["Picture", "what?"]]


@pytest.mark.parametrize("name", ["image", "path", "url"])
def test_a_part_may_hold_its_own_picture(name: str, folder: Path) -> None:
    # Arrow fills what others hold with structs of nothing.
    waiting = {"type": "image", "image": {"bytes": None, "path": None}}
    content = [{"type": "image", name: "1.png"}, waiting, {"type": "text", "text": "?"}]
    row = {"prompt": [{"role": "user", "content": content}], "chosen": "a", "rejected": "b", "image": "0.png"}
    media = load_answers([row], root=folder)[0].media
    assert [one.image.getpixel((0, 0)) for one in media] == [(1, 0, 0), (0, 0, 0)]  # type: ignore[union-attr]


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_a_line_break_beside_a_mark_belongs_to_it(end: str, folder: Path) -> None:
    row = {"prompt": f"Look:{end}<image>{end}what?{end}Say.", "chosen": "a", "rejected": "b", "image": "0.png"}
    before, picture, after = load_answers([row], root=folder)[0].prompt[0].parts
    assert (before, type(picture), after) == ("Look:", Picture, f"what?{end}Say.")


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"caption": "x", "jpg_0": b"", "jpg_1": b"", "label_0": 1}, "not preference data of answers. Expected one of"),
        ({"prompt": "x", "question": "x", "chosen": "a", "rejected": "b"}, "both preference and rlaif-v"),
        ({"messages": [], "rejected_response": "a", "rejected_messages": []}, "both ms-swift and ms-swift messages"),
    ],
)
def test_columns_that_are_none_of_the_forms_are_refused(row: Row, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        load_answers([row])


def test_layouts_that_hold_pictures_only_are_refused(folder: Path) -> None:
    for name in ("x_chosen.png", "x_rejected.png"):
        Image.new("RGB", (4, 3)).save(folder / name)
    (folder / "x.txt").write_text("a bag")
    assert kind_of(folder) == "pairs"
    (folder / "shard.tar").write_bytes(b"")
    for source in (folder, folder / "shard.tar"):
        with pytest.raises(ValueError, match=r"neither .json, .jsonl nor parquet"):
            load_answers(source)
    for absent in ("shards/none.tar", iter(rows())):
        with pytest.raises(ValueError, match="A source is a Hub data set id") as caught:
            load_answers(absent)
        assert "WebDataset" not in str(caught.value) and "playground" not in str(caught.value)
    with pytest.raises(ValueError, match="not from streams"):
        load_answers(Dataset.from_list(rows()).to_iterable_dataset(), max_rows=2)
    for options in ({"num_frames": 2}, {"fps": 2.0}, {"split": "test"}, {"frame_cache": folder}, {"max_pixels": 9}):
        with pytest.raises(ValueError, match="does not apply to an AnswerSource"):
            load_answers(load_answers(rows(), root=folder), **options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("row", "kind"),
    [
        ({"prompt": "x", "chosen": "a bag.", "rejected": "a shoe"}, "answers"),
        ({"prompt": "x", "chosen": "a.jpg", "rejected": "b.jpg"}, "pairs"),
        ({"prompt": "x", "chosen": "a.mp4", "rejected": "b.mp4"}, "pairs"),
        ({"prompt": "x", "chosen": "clip", "rejected": "clip"}, "pairs"),
        ({"prompt": "x", "chosen": b"...", "rejected": b""}, "pairs"),
        ({"prompt": "x", "chosen": {"bytes": b"", "path": None}, "rejected": None}, "pairs"),
        ({"prompt": "x", "chosen": ["0.png", "1.png"], "rejected": None}, "pairs"),
        ({"prompt": "x", "chosen": rows()[0]["chosen"], "rejected": None}, "answers"),
        ({"prompt": "x", "chosen": [{"role": "assistant", "content": [{"type": "image"}]}], "rejected": None}, "pairs"),
        ({"caption": "x", "jpg_0": b"", "jpg_1": b"", "label_0": 1}, "pairs"),
        ({"prompt": "x", "image": "0.png"}, "pairs"),
        ({"question": "x", "answer": "a", "pred": "b"}, "answers"),
        ({"prompt": "x", "completion": "a", "label": True}, "answers"),
    ],
)
def test_answers_are_told_from_pictures(row: Row, kind: str, folder: Path) -> None:
    (folder / "clip").mkdir()
    assert kind_of([{**row, "chosen": None} if "chosen" in row else row, row], root=folder) == kind


def test_every_example_of_the_documentation_is_read(folder: Path) -> None:
    text = (Path(__file__).parents[2] / "docs" / "answer-data.md").read_text(encoding="utf-8")
    examples, clip = (block.partition("```")[0].strip() for block in text.split("```json\n")[1:])
    found = []
    while examples:
        row, end = json.JSONDecoder().raw_decode(examples)
        found.append(row)
        examples = examples[end:].strip()
    for name in ("bag.png", "shoe.png"):
        Image.new("RGB", (4, 3)).save(folder / name)
    frames = json.loads(clip)
    (folder / frames["frames"]).mkdir()
    for at in range(4):
        Image.new("RGB", (4, 3), (at, 0, 0)).save(folder / frames["frames"] / f"{at}.png")
    forms = []
    for row in found:
        source = load_answers([row | ({"video": frames} if "video" in row else {})], root=folder)
        forms.append(source.form)
        images = row.get("images", [])
        assert source[0].rejected or source.form == "unpaired"
        assert len(source[0].media) == (
            2 if "shoe.png" in str(row) else len(images) + ("image" in row) + ("video" in row)
        )
    assert sorted(set(forms)) == sorted(set(REQUIRED) - {"ms-swift messages"})
