"""Where preference data may be, of pictures and of answers alike: opened as a table of raw rows, of which nothing is decoded yet."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.resources import files
from pathlib import Path
from typing import Any

from mmalign.data.columns import TAKE_CAPTIONED
from mmalign.data.named import holds_pairs, holds_pictures, named_pairs, named_pictures
from mmalign.data.rows import DatasetRows, ListRows, ParquetRows, Rows, json_rows
from mmalign.data.splits import choose_split, files_of_split
from mmalign.data.streams import StreamRows, known_length
from mmalign.data.tars import TAR_ENDINGS, TarRows, tar_files

PLAYGROUND = "playground"
_TABLES = (
    "a Hub data set id, a parquet file or a folder of them, a datasets save_to_disk folder, a folder with metadata.jsonl, "
    "a .json or .jsonl file, a datasets.Dataset, or a list of dicts"
)
_FORMS = (
    '"playground", a folder of pictures named x_chosen.png and x_rejected.png with x.txt, WebDataset shards (a .tar, a '
    f"folder of them, or x-{{000..011}}.tar), {_TABLES}"
)


def open_rows(
    source: Any,
    *,
    split: str | None = None,
    revision: str | None = None,
    root: str | Path | None = None,
    max_rows: int | None = None,
    streaming: bool = False,
    captioned: bool = False,
    pictures: bool = True,
) -> tuple[Rows, str]:
    """The rows of a source and what it is called; options as in load_pairs. Raises ValueError where there is no such source.

    pictures: also layouts of files that hold pictures and prompts and nothing else: folders of named pictures, and tar files.
    """
    asked, forms = {"streaming": streaming or None}, _FORMS if pictures else _TABLES
    folder = None if root is None else Path(root).expanduser()
    if not isinstance(source, str | Path):
        refuse("data in memory", revision=revision, **asked)
        return _in_memory(source, split, folder, max_rows, forms), type(source).__name__
    name = str(source)
    local = Path(source).expanduser()
    if name == PLAYGROUND:
        refuse("the playground", revision=revision, root=root, **asked)
        rows: Rows = _playground(split or "train")
    elif local.exists():
        refuse("a local path, which is read in place", revision=revision, **asked)
        rows = _local(local, split, folder, captioned, pictures)
    elif pictures and (shards := tar_files(name)) is not None:
        refuse("tar files", split=split, revision=revision, root=root, **asked)
        rows = TarRows(shards)
    elif (
        isinstance(source, Path)
        or name.startswith((".", "/", "~"))
        or name.endswith((".parquet", ".json", ".jsonl", "/", *TAR_ENDINGS))
    ):
        raise ValueError(f"{name}: no such file or folder. A source is {forms}")
    elif streaming:
        rows = _streamed(name, split or "train", revision, folder, max_rows)
    else:
        rows = _from_hub(name, split or "train", revision, folder)
    return rows, name if split is None else f"{name}[{split}]"


def _in_memory(
    source: Any, split: str | None, root: Path | None, max_rows: int | None = None, forms: str = _FORMS
) -> Rows:
    if isinstance(source, Mapping):
        return _in_memory(choose_split(source, split), None, root, max_rows, forms)
    if split is not None:
        raise ValueError(f"split={split!r} does not apply to {type(source).__name__}: pass the split itself")
    if isinstance(source, Sequence):
        return ListRows(source, root)
    from datasets import Dataset, IterableDataset

    if isinstance(source, Dataset):
        return DatasetRows(source, () if root is None else (root,))
    if isinstance(source, IterableDataset):
        return _stream(source, "the stream", max_rows, root)
    raise ValueError(f"cannot read rows from {type(source).__name__}. A source is {forms}")


def _playground(split: str) -> Rows:
    folder = Path(str(files("mmalign"))) / "assets" / "pairs"
    if split not in ("train", "test"):
        raise ValueError(f"the playground has the splits 'train' and 'test', not {split!r}")
    if not (folder / f"{split}.parquet").is_file():
        raise ValueError(
            f"{folder / split}.parquet is missing: reinstall mmalign, or build it with "
            "`python -m mmalign.playground.build pairs`"
        )
    return ParquetRows([folder / f"{split}.parquet"], folder)


def _local(path: Path, split: str | None, root: Path | None, captioned: bool, pictures: bool) -> Rows:
    """What lies at a path that exists; only a save_to_disk DatasetDict and split-named parquet files know splits."""
    if path.is_dir() and (path / "metadata.jsonl").is_file():
        refuse("a folder with metadata.jsonl", root=root)
        path = path / "metadata.jsonl"
    if path.is_file() and path.suffix in (".json", ".jsonl"):
        refuse("a JSON file", split=split)
        return json_rows(path, root or path.parent)
    if path.is_dir() and any((path / name).is_file() for name in ("dataset_dict.json", "state.json")):
        from datasets import load_from_disk

        loaded = load_from_disk(str(path))
        return _in_memory(loaded, split, root or path)
    if path.is_file() and path.suffix == ".parquet":
        refuse("a single parquet file", split=split)
        return ParquetRows([path], root or path.parent)
    if pictures and path.is_file() and path.name.endswith(TAR_ENDINGS):
        refuse("a tar file", split=split, root=root)
        return TarRows([path])
    found = sorted(path.rglob("*.parquet")) if path.is_dir() else []
    if not found and not pictures:
        raise ValueError(f"{path}: neither .json, .jsonl nor parquet, nor metadata.jsonl, nor a save_to_disk folder")
    if not found and path.is_dir() and holds_pairs(path):
        refuse("a folder of pictures", split=split, root=root)
        return named_pairs(path)
    if not found and (tars := sorted(path.rglob("*.tar"))):
        refuse("a folder of tar files", root=root)
        return TarRows(files_of_split(tars, split, path))
    if not found and path.is_dir() and holds_pictures(path):
        if not captioned:
            raise ValueError(f"{path} holds pictures, none of them named as rejected: {TAKE_CAPTIONED}")
        refuse("a folder of pictures", split=split, root=root)
        return named_pictures(path)
    if not found:
        raise ValueError(
            f"{path}: neither parquet, nor metadata.jsonl, nor a save_to_disk folder, nor pictures named in pairs, nor "
            f"tar files. A source is {_FORMS}"
        )
    return ParquetRows(files_of_split(found, split, path), root or path)


def _from_hub(name: str, split: str, revision: str | None, root: Path | None) -> Rows:
    from datasets import config, load_dataset
    from huggingface_hub import constants

    with _hub_explained(name):
        dataset = load_dataset(name, split=split, revision=revision)
    caches = (Path(constants.HF_HUB_CACHE), Path(config.HF_DATASETS_CACHE))
    return DatasetRows(dataset, caches if root is None else (root,))


def _streamed(name: str, split: str, revision: str | None, root: Path | None, max_rows: int | None) -> Rows:
    """A Hub data set at the commit that the name stands for now, which is what a cache of it is keyed by."""
    from datasets import load_dataset
    from huggingface_hub import HfApi

    with _hub_explained(name):
        commit = HfApi().dataset_info(name, revision=revision).sha
        dataset = load_dataset(name, split=split, revision=commit, streaming=True)
    key = f"{name}@{commit}[{split}]"
    return _stream(dataset, name, max_rows, root, key=key, total=known_length(dataset))


def _stream(
    dataset: Any,
    name: str,
    max_rows: int | None,
    root: Path | None,
    *,
    key: str | None = None,
    total: int | None = None,
) -> Rows:
    """total: what the data set's card says; of a stream that was cut or filtered it would be wrong."""
    if max_rows is None and total is None:
        raise ValueError(f"{name} does not tell its length: pass max_rows=… (the first so many rows of it are read)")
    if max_rows is not None and max_rows < 1:
        raise ValueError(f"max_rows must be at least 1, got {max_rows}")
    length = min(number for number in (max_rows, total) if number is not None)
    return StreamRows(dataset, length, () if root is None else (root,), key=key)


@contextmanager
def _hub_explained(name: str) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, RuntimeError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(f"{name!r} is no local path and could not be loaded from the Hub: {reason}") from error


def refuse(what: str, **options: Any) -> None:
    """ValueError for the first option that is given, which `what` knows nothing of."""
    for option, value in options.items():
        if value is not None:
            raise ValueError(f"{option}={value!r} does not apply to {what}; leave it out")
