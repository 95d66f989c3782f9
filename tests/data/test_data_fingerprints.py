"""Whatever training would read differently gives a source another fingerprint, and nothing else does."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import torch
from datasets import Dataset, IterableDataset
from PIL import Image
from tiny import tiny_pipeline

from mmalign.data import encode_pairs, fingerprints, load_pairs
from mmalign.denoisers import adapter_for

Rows = Callable[..., list[dict[str, Any]]]
Picture = Callable[..., Image.Image]
Packed = Callable[..., bytes]
NAMED = [{"prompt": "x", "chosen": "a.png", "rejected": "b.png"}]


@pytest.fixture
def folders(tmp_path: Path, picture: Picture) -> list[Path]:
    """Two folders with pictures of the same names that differ."""
    made = [tmp_path / "one", tmp_path / "other"]
    for place, folder in enumerate(made):
        folder.mkdir()
        for side, name in enumerate(("a.png", "b.png")):
            picture(seed=2 * place + side).save(folder / name)
    return made


def streamed(rows: list[dict[str, Any]]) -> IterableDataset:
    return IterableDataset.from_generator(lambda: iter(rows))


def test_a_stream_s_latents_are_those_of_the_folder_it_points_into(folders: list[Path], tmp_path: Path) -> None:
    options: dict[str, Any] = {"resolution": 16, "progress": False, "latent_mode": "mean", "cache_dir": tmp_path / "c"}
    denoiser, index = adapter_for(tiny_pipeline("sd")), torch.tensor([0])
    for root in folders:
        found = encode_pairs(load_pairs(streamed(NAMED), root=root, max_rows=1), denoiser, **options)
        right = encode_pairs(load_pairs(NAMED, root=root), denoiser, **options)
        assert torch.equal(found.latents(index), right.latents(index))
    before = load_pairs(streamed(NAMED), root=folders[0], max_rows=1).fingerprint
    shutil.copy(folders[1] / "a.png", folders[0] / "a.png")
    assert load_pairs(streamed(NAMED), root=folders[0], max_rows=1).fingerprint != before


def test_a_hub_stream_is_keyed_by_its_root_and_the_pictures_in_it(
    folders: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets
    import huggingface_hub

    monkeypatch.setattr(datasets, "load_dataset", lambda name, **options: streamed(NAMED))
    monkeypatch.setattr(
        huggingface_hub.HfApi, "dataset_info", lambda self, name, revision: type("Info", (), {"sha": "c1"})
    )
    keys = [load_pairs("some/pairs", streaming=True, max_rows=1, root=root).fingerprint for root in folders]
    shutil.copy(folders[1] / "a.png", folders[0] / "a.png")
    keys.append(load_pairs("some/pairs", streaming=True, max_rows=1, root=folders[0]).fingerprint)
    assert len(set(keys)) == 3


def test_pictures_in_memory_are_hashed_as_they_are_read() -> None:
    indices = np.arange(64, dtype=np.uint8).reshape(8, 8)
    pictures = {}
    for name, step in (("a", 1), ("b", 3)):
        pictures[name] = Image.frombytes("P", (8, 8), indices.tobytes())
        pictures[name].putpalette([(place * step) % 256 for place in range(768)])
    pictures["clear"] = pictures["a"].copy()
    pictures["clear"].info["transparency"] = 5
    pictures["turned"] = pictures["a"].copy()
    pictures["turned"].getexif()[0x0112] = 3
    other = Image.new("RGB", (8, 8), "red")
    sources = [load_pairs([{"prompt": "x", "chosen": image, "rejected": other}]) for image in pictures.values()]
    assert len({np.asarray(source[0].image_0).tobytes() for source in sources}) == len(pictures)
    assert len({source.fingerprint for source in sources}) == len(pictures)
    same = [{"prompt": "x", "chosen": pictures["a"].convert("RGB"), "rejected": other}]
    assert load_pairs(same).fingerprint == sources[0].fingerprint


@pytest.mark.parametrize("kind", ["paths", "structs", "structs in lists"])
def test_pictures_that_parquet_names_count_and_those_it_holds_are_not_looked_for(
    kind: str, folders: list[Path], packed: Packed, picture: Picture
) -> None:
    struct = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    held = {"bytes": packed(picture(seed=7)), "path": "held.png"}

    def table(*pictures: Any) -> pa.Table:
        if kind == "structs in lists":
            columns = {"prompt": ["x"], "image_path": pa.array([list(pictures)], pa.list_(struct)), "rank": [[1, 2]]}
            return pa.table(columns)
        return pa.table({"prompt": ["x"]} | {
            name: [value] if kind == "paths" else pa.array([value], struct)
            for name, value in zip(("chosen", "rejected"), pictures, strict=True)
        })  # fmt: skip

    named = [name if kind == "paths" else {"bytes": None, "path": name} for name in ("a.png", "b.png")]
    rows = [table(*named)] if kind == "paths" else [table(*named), table(held, named[1])]
    pa.parquet.write_table(pa.concat_tables(rows), folders[0] / "x.parquet", row_group_size=1)
    picture(seed=8).save(folders[0] / "held.png")
    before = load_pairs(folders[0] / "x.parquet")
    seen = before[0].image_0.tobytes()
    picture(seed=9).save(folders[0] / "held.png")
    assert load_pairs(folders[0] / "x.parquet").fingerprint == before.fingerprint
    shutil.copy(folders[1] / "a.png", folders[0] / "a.png")
    after = load_pairs(folders[0] / "x.parquet")
    assert after[0].image_0.tobytes() != seen and after.fingerprint != before.fingerprint


def test_a_large_dataset_s_pictures_elsewhere_count_too(folders: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fingerprints, "READ_WHOLE", 0)
    dataset = Dataset.from_list(NAMED)
    before = load_pairs(dataset, root=folders[0]).fingerprint
    assert load_pairs(dataset, root=folders[0]).fingerprint == before
    shutil.copy(folders[1] / "a.png", folders[0] / "a.png")
    assert load_pairs(dataset, root=folders[0]).fingerprint != before


def test_where_a_line_cannot_be_read_counts(tmp_path: Path) -> None:
    good = [json.dumps({"prompt": name, "chosen": f"{name}0.png", "rejected": f"{name}1.png"}) for name in "ab"]
    found = []
    for lines in ([good[0], "{", good[1]], ["{", *good], [*good, "{"]):
        (tmp_path / "metadata.jsonl").write_text("\n".join(lines))
        found.append(load_pairs(tmp_path).fingerprint)
    assert len(set(found)) == 3


def test_neighbouring_values_do_not_run_together() -> None:
    row = {"prompt": "x", "file_path": [b"0", b"1"]}
    votes = ([1.5, 20.5], [1.52, 0.5])
    assert len({load_pairs([row | {"human_preference": given}]).fingerprint for given in votes}) == 2


def test_the_order_of_files_counts(tmp_path: Path, pickapic_rows: Rows) -> None:
    for place, name in enumerate(("a/x", "b/y")):
        (tmp_path / name).parent.mkdir()
        rows = pickapic_rows(4)[2 * place : 2 * place + 2]
        pa.parquet.write_table(pa.Table.from_pylist(rows), tmp_path / f"{name}.parquet")
    before = load_pairs(tmp_path)
    assert before.fingerprint == load_pairs(tmp_path).fingerprint
    (tmp_path / "a/x.parquet").rename(tmp_path / "b/x.parquet")
    (tmp_path / "b/y.parquet").rename(tmp_path / "a/y.parquet")
    after = load_pairs(tmp_path)
    assert after.prompts() != before.prompts() and after.fingerprint != before.fingerprint
