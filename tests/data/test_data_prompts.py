"""Prompts are read from what people have, each once, and a file that cannot be used says which row is at fault."""

import json

import pyarrow as pa
import pyarrow.parquet
import pytest

from mmalign.data.prompts import read_prompts

ROWS = ["a red shirt", "a blue bag, on white"]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("p.txt", "a red shirt\n\n  a blue bag, on white  \na red shirt\n"),
        ("p.json", json.dumps(ROWS)),
        ("p.json", json.dumps([{"Prompt": row, "image_path": ["a.jpg"], "rank": [1]} for row in ROWS])),
        ("p.jsonl", "\n".join(json.dumps({"caption": row}) for row in [*ROWS, ROWS[0]])),
        ("p.csv", '\ufeffcaption,id\na red shirt,1\n"a blue bag, on white",2\n,3\n'),
        ("P.CSV", 'id,TEXT\n1,a red shirt\n2,"a blue bag, on white"\n'),
    ],
)
def test_every_prompt_once_in_order(tmp_path, name, content):
    (tmp_path / name).write_text(content, encoding="utf-8")
    assert read_prompts(tmp_path / name) == ROWS


def test_partis_table_keeps_quotation_marks_and_rows_apart(tmp_path):
    """Its prompts and notes begin with, hold, or leave open a quotation mark, none of which quotes a field."""
    prompts = ['"G I G G L E" painted as graffiti', 'a sign that says "Hello', "a frog", "a 5' cactus"]
    lines = ["Prompt\tCategory\tChallenge\tNote", *(f'{row}\tAnimals\tBasic\t"Dogs" and' for row in prompts)]
    (tmp_path / "parti.tsv").write_text("\n".join(lines) + "\n")
    assert read_prompts(tmp_path / "parti.tsv") == prompts


def test_a_csv_field_may_hold_a_line_break_and_other_files_another_separator(tmp_path):
    (tmp_path / "p.csv").write_text('prompt\n"two\nlines"\n')
    (tmp_path / "p.jsonl").write_text(json.dumps({"prompt": "a\u2028b"}, ensure_ascii=False), encoding="utf-8")
    (tmp_path / "p.txt").write_text("a\u2028b\r\nc\n", encoding="utf-8")
    assert read_prompts(tmp_path / "p.txt") == ["a\u2028b", "c"]
    assert read_prompts(tmp_path / "p.csv") == ["two\nlines"]
    assert read_prompts(tmp_path / "p.jsonl") == ["a\u2028b"]


def test_a_split_of_a_folder_of_parquet_files(tmp_path):
    folder = tmp_path / "pickapic" / "data"
    folder.mkdir(parents=True)
    shards = {"train-00000-of-00001": ["t"], "validation_unique-00000-of-00002": ["a", "b", "a"]}
    shards["validation_unique-00001-of-00002"] = ["c", "b"]
    for name, captions in shards.items():
        table = pa.table({"caption": captions, "jpg_0": [b"no picture"] * len(captions)})
        pyarrow.parquet.write_table(table, folder / f"{name}.parquet")
    assert read_prompts(tmp_path / "pickapic", split="validation_unique") == ["a", "b", "c"]
    assert read_prompts(tmp_path / "pickapic") == ["t", "a", "b", "c"]
    with pytest.raises(ValueError, match="no split 'test'; it has train, validation_unique"):
        read_prompts(tmp_path / "pickapic", split="test")
    with pytest.raises(ValueError, match="is one file, so it has no split"):
        read_prompts(folder / "train-00000-of-00001.parquet", split="train")


def test_a_folder_of_benchmark_lists(tmp_path):
    for style in ("anime", "photo"):
        (tmp_path / f"benchmark_{style}.json").write_text(json.dumps([f"{style} 1", f"{style} 2"]))
    assert read_prompts(tmp_path) == ["anime 1", "anime 2", "photo 1", "photo 2"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.json", '{"prompt": "x"}', "must hold a list"),
        ("p.json", "[1", "p.json is not valid JSON"),
        ("p.jsonl", '{"prompt": "x"}\n\n{"image": "x"}', "row 2 has no column prompt, caption or text; it has image"),
        ("p.jsonl", '{"prompt": "x"}\n{', "line 2 is not valid JSON"),
        ("p.json", '["x", 3]', "row 2: the prompt must be text, got 3"),
        ("p.csv", "id\n1\n", "row 1 has no column"),
        ("p.csv", f"prompt\n{'x' * 140_000}\n", "p.csv is no table that can be read: field larger than field limit"),
        ("p.txt", "\n \n", "holds no prompts"),
        ("p.xlsx", "x", "prompts are read from .txt"),
        ("p.parquet", "x", "is no parquet file"),
        ("q/README.md", "x", "holds no .parquet, .json or .jsonl"),
    ],
)
def test_what_is_refused(tmp_path, name, content, message):
    file = tmp_path / name
    file.parent.mkdir(exist_ok=True)
    file.write_text(content)
    with pytest.raises(ValueError, match=message):
        read_prompts(file.parent if "/" in name else file)


def test_a_file_in_another_encoding_or_that_is_not_there_says_so(tmp_path):
    (tmp_path / "p.txt").write_bytes("café".encode("latin-1"))
    with pytest.raises(ValueError, match=r"not UTF-8 text \(byte 3\)"):
        read_prompts(tmp_path / "p.txt")
    with pytest.raises(ValueError, match="no such prompt file"):
        read_prompts(tmp_path / "other.txt")
