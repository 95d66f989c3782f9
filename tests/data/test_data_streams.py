"""A stream gives the pairs of its first rows, is read forward, and its latents are keyed by what is known beforehand."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from data.faults import bad_rows
from datasets import Dataset, Image, IterableDataset
from tiny import tiny_pipeline

from mmalign.data import PairSource, encode_pairs, load_pairs, score_pairs
from mmalign.denoisers import Denoiser, adapter_for

Rows = Callable[..., list[dict[str, Any]]]


@pytest.fixture(scope="module")
def denoiser() -> Denoiser:
    return adapter_for(tiny_pipeline("sd"))


def generated(rows: list[dict[str, Any]], read: list[int]) -> IterableDataset:
    """A stream of unknown length and columns; `read` collects which rows were handed out."""

    def rows_of() -> Iterator[dict[str, Any]]:
        for number, row in enumerate(rows):
            read.append(number)
            yield row

    return IterableDataset.from_generator(rows_of)


class Widths:
    """A scorer that gives a picture its width."""

    name, fingerprint = "widths", "w"

    def score(self, images: Any, prompts: Any) -> torch.Tensor:
        return torch.tensor([float(image.width) for image in images])


def same(one: PairSource, other: PairSource) -> bool:
    pairs = [(one[row], other[row]) for row in range(len(one))]
    return len(one) == len(other) and all(
        (a.prompt, a.label, a.user_id) == (b.prompt, b.label, b.user_id)
        and np.array_equal(np.asarray(a.image_0), np.asarray(b.image_0))
        and np.array_equal(np.asarray(a.image_1), np.asarray(b.image_1))
        for a, b in pairs
    )


def test_the_first_rows_of_a_stream_are_the_pairs_of_a_list(pickapic_rows: Rows) -> None:
    items = pickapic_rows(10)
    table = Dataset.from_list(items).cast_column("jpg_0", Image()).cast_column("jpg_1", Image())
    for stream in (generated(items, []), table.to_iterable_dataset(), table.to_iterable_dataset(num_shards=3)):
        source = load_pairs(stream, max_rows=7)
        assert same(source, load_pairs(items[:7])) and source.prompts() == [item["caption"] for item in items[:7]]
    assert same(load_pairs({"train": generated(items, [])}, max_rows=3), load_pairs(items[:3]))


def test_rows_are_read_forward_and_only_as_far_as_asked(
    pickapic_rows: Rows, denoiser: Denoiser, tmp_path: Path
) -> None:
    items = pickapic_rows(12)
    items[3]["jpg_1"] = items[3]["jpg_1"][:100]
    read: list[int] = []
    source = load_pairs(generated(items, read), max_rows=8)
    assert read == [0] and source.fingerprint == load_pairs(generated(items, []), max_rows=8).fingerprint
    read.clear()
    options: dict[str, Any] = {"resolution": 16, "progress": False, "latent_mode": "mean", "cache_dir": tmp_path}
    encoded = encode_pairs(source, denoiser, **options)
    assert read == list(range(8))
    whole = encode_pairs(load_pairs(items[:8]), denoiser, **options)
    assert encoded.rows.tolist() == [0, 1, 2, 4, 5, 6, 7] and [bad.row for bad in encoded.bad_rows] == [3]
    assert torch.equal(encoded.latents(torch.arange(7)), whole.latents(torch.arange(7))) and encoded.key != whole.key
    read.clear()
    assert encode_pairs(source, denoiser, **options).key == encoded.key and read == []


def test_an_interrupted_encoding_goes_on_where_it_was(
    pickapic_rows: Rows, denoiser: Denoiser, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    items, calls = pickapic_rows(8), []
    genuine = type(denoiser).encode_image

    def interrupted(self: Denoiser, *arguments: Any) -> torch.Tensor:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return genuine(self, *arguments)

    options: dict[str, Any] = {"resolution": 16, "progress": False, "batch_size": 2, "shard_rows": 2}
    monkeypatch.setattr(type(denoiser), "encode_image", interrupted)
    with pytest.raises(KeyboardInterrupt):
        encode_pairs(load_pairs(generated(items, []), max_rows=8), denoiser, cache_dir=tmp_path / "cut", **options)
    encoded = encode_pairs(
        load_pairs(generated(items, []), max_rows=8), denoiser, cache_dir=tmp_path / "cut", **options
    )
    assert len(calls) == 5, "the two shards that were whole are not made again"
    whole = encode_pairs(load_pairs(items), denoiser, cache_dir=tmp_path / "whole", **options)
    assert torch.equal(encoded.latents(torch.arange(8)), whole.latents(torch.arange(8)))


def test_a_row_behind_the_held_ones_starts_the_stream_again(
    pickapic_rows: Rows, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mmalign.data import streams

    monkeypatch.setattr(streams, "_HELD", 2)
    items, read = pickapic_rows(6), []
    source = load_pairs(generated(items, read), max_rows=6)
    order = [4, 3, 5, 0, 0, 2]
    assert [source[row].prompt for row in order] == [items[row]["caption"] for row in order]
    assert read == [0, *range(6), 0, 1, 2]


@pytest.mark.parametrize("first", ["check", "prompts", "encode", "score", "far row", "row"])
def test_a_stream_that_ends_early_ends_the_source_and_says_so_once(
    first: str, pickapic_rows: Rows, denoiser: Denoiser, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    items = pickapic_rows(3)
    source = load_pairs(generated(items, []), max_rows=5000)
    key = load_pairs(generated(items, []), max_rows=5000).fingerprint
    options: dict[str, Any] = {"progress": False, "cache_dir": tmp_path}

    def encoded() -> list[int]:
        found = encode_pairs(source, denoiser, resolution=16, shard_rows=2, **options)
        assert found.bad_rows == []
        return found.rows.tolist()

    def read(row: int) -> Any:
        with pytest.raises(IndexError, match=f"row {row} of 3"):
            source[row]

    uses: dict[str, Callable[[], Any]] = {
        "check": lambda: bad_rows(source) == [],
        "prompts": lambda: source.prompts() == [item["caption"] for item in items],
        "encode": lambda: encoded() == [0, 1, 2],
        "score": lambda: score_pairs(source, Widths(), **options)[:3].tolist() == [[24.0, 18.0]] * 3,
        "far row": lambda: read(4000) is None,
        "row": lambda: read(3) is None,
    }
    assert len(source) == 5000
    for name in [first, *uses]:
        assert uses[name](), name
    assert len(source) == 3 and source.fingerprint == key
    said = [record.message for record in caplog.records if "stream" in record.message]
    assert said == ["the stream ended after 3 rows, before the 5000 that were asked for"]


@pytest.mark.parametrize("kind", ["torch", "numpy"])
def test_a_formatted_stream_is_read_as_a_plain_one(kind: str, pickapic_rows: Rows) -> None:
    rows = [
        {"prompt": item["caption"], "file_path": [item["jpg_0"], item["jpg_1"]], "human_preference": [1, 0]}
        for item in pickapic_rows(3)
    ]
    stream = Dataset.from_list(rows).to_iterable_dataset().with_format(kind)
    assert same(load_pairs(stream, max_rows=3), load_pairs(rows))


def test_the_card_s_length_is_not_that_of_a_stream_that_was_cut(pickapic_rows: Rows) -> None:
    import datasets

    whole = generated(pickapic_rows(4), [])
    split = datasets.SplitInfo("train", num_examples=4)
    whole._info.splits, whole._split = datasets.SplitDict({"train": split}), datasets.Split.TRAIN
    for stream in (whole.take(1), whole.skip(3), whole.filter(lambda row: row["label_0"] == 1.0)):
        with pytest.raises(ValueError, match="does not tell its length: pass max_rows"):
            load_pairs(stream)


def test_a_broken_connection_is_no_end(pickapic_rows: Rows) -> None:
    items, tries = pickapic_rows(4), []

    def rows_of() -> Iterator[dict[str, Any]]:
        tries.append(1)
        yield from items[:2]
        if len(tries) == 2:
            raise ConnectionError("reset")
        yield from items[2:]

    source = load_pairs(IterableDataset.from_generator(rows_of), max_rows=4)
    with pytest.raises(ConnectionError):
        source[3]
    assert source[3].prompt == items[3]["caption"]


def test_the_key_follows_the_first_rows_and_the_number(pickapic_rows: Rows) -> None:
    items = pickapic_rows(4)
    changed = [items[0] | {"label_0": 0.0, "label_1": 1.0}, *items[1:]]
    found = [
        load_pairs(generated(rows, []), max_rows=n).fingerprint for rows, n in ((items, 4), (items, 3), (changed, 4))
    ]
    assert len(set(found)) == 3


def test_a_hub_data_set_is_streamed_at_its_commit(pickapic_rows: Rows, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets
    import huggingface_hub

    items, read, asked = pickapic_rows(6), [], []
    commits = {None: "c1", "v2": "c2"}

    def load_dataset(name: str, **options: Any) -> IterableDataset:
        asked.append((name, options))
        stream = generated(items, read)
        if name == "some/card":
            split = datasets.SplitInfo(name="test", num_examples=4)
            stream._info.splits, stream._split = datasets.SplitDict({"test": split}), datasets.NamedSplit("test")
        return stream

    def dataset_info(self: Any, name: str, revision: str | None) -> Any:
        if name == "not/there":
            raise ConnectionError("Couldn't reach the Hub")
        return datasets.DatasetInfo() if name is None else type("Info", (), {"sha": commits[revision]})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", dataset_info)
    source = load_pairs("some/pairs", streaming=True, max_rows=5)
    assert asked == [("some/pairs", {"split": "train", "revision": "c1", "streaming": True})]
    assert same(source, load_pairs(items[:5]))
    read.clear()
    keys = {source.fingerprint, load_pairs("some/pairs", streaming=True, max_rows=5).fingerprint}
    keys.add(load_pairs("some/pairs", streaming=True, max_rows=5, revision="v2").fingerprint)
    keys.add(load_pairs("some/pairs", streaming=True, max_rows=4).fingerprint)
    assert len(keys) == 3 and read == [0] * 3, "the key is known before the stream is read"
    assert len(load_pairs("some/card", split="test", streaming=True)) == 4
    with pytest.raises(ValueError, match="some/pairs does not tell its length: pass max_rows"):
        load_pairs("some/pairs", streaming=True)
    with pytest.raises(ValueError, match="'not/there' is no local path and could not be loaded from the Hub"):
        load_pairs("not/there", streaming=True, max_rows=5)


def test_what_cannot_be_streamed_is_refused(pickapic_rows: Rows, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="streaming=True does not apply to data in memory"):
        load_pairs(pickapic_rows(2), streaming=True)
    with pytest.raises(ValueError, match="streaming=True does not apply to a local path, which is read in place"):
        load_pairs(tmp_path, streaming=True)
    with pytest.raises(ValueError, match="the stream does not tell its length"):
        load_pairs(generated(pickapic_rows(2), []))
    with pytest.raises(ValueError, match="max_rows must be at least 1"):
        load_pairs(generated(pickapic_rows(2), []), max_rows=0)
    with pytest.raises(ValueError, match="has no rows"):
        load_pairs(generated([], []), max_rows=3)
    ranking = {"prompt": "x", "generations": [b"a", b"b"], "ranking": [1, 2]}
    with pytest.raises(ValueError, match="rankings, which must all be known before the first pair"):
        load_pairs(generated([ranking], []), max_rows=3)
