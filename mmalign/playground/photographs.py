"""Real product photographs: the source of every picture in the playground.

They are Fashion-MNIST's (Zalando, MIT licence). Eight of its ten classes are used: "shirt" and "coat" are left out, because people
disagree on them too. Rows are permuted once with a fixed seed, so that a run that reads the first n rows reads the same
photographs whether it has the full set or the part that ships with the package.
"""

import gzip
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from zipfile import ZIP_LZMA, ZipFile

import numpy as np

from mmalign.files import written_aside
from mmalign.playground.paths import ASSETS

GARMENTS = ("t-shirt", "trousers", "pullover", "dress", "sandal", "sneaker", "bag", "boot")
_FASHION_MNIST_CLASS = (0, 1, 2, 3, 5, 7, 8, 9)
_FOLDER_VARIABLE = "MMALIGN_FASHION_MNIST"
_DEBIAN_FOLDER = Path("/usr/share/datasets/fashion-mnist")
_SHIPPED = ASSETS / "photographs.npz"
_ORDER_SEED = 20_200_523

Split = Literal["train", "test"]
Half = Literal["A", "B"]


@dataclass(frozen=True)
class Photographs:
    """`images` (N, 28, 28) uint8, bright garment on black; `labels` (N,) index into `GARMENTS`."""

    images: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.images)

    def half(self, name: Half) -> "Photographs":
        """Every other photograph: judge A learns from one half, judge B from the other."""
        start = {"A": 0, "B": 1}[name]
        return Photographs(self.images[start::2], self.labels[start::2])


def load(split: Split = "train", *, require_all: bool = False) -> Photographs:
    """The photographs of `split` (48,000 train, 8,000 test), else the first ones, which ship with the package.

    The full set is read from the folder in `MMALIGN_FASHION_MNIST`, or from where Debian's `dataset-fashion-mnist` puts it.
    `require_all` raises FileNotFoundError, naming both, where neither is there.
    """
    folder = full_set_folder()
    if folder is not None:
        return _read_idx(folder, split)
    if require_all:
        raise FileNotFoundError(
            f"the full photograph set was not found: `apt-get install dataset-fashion-mnist`, or set {_FOLDER_VARIABLE} "
            "to a folder that holds Fashion-MNIST's four *-ubyte.gz files"
        )
    with np.load(_SHIPPED) as shipped:
        return Photographs(shipped[f"{split}_images"], shipped[f"{split}_labels"])


def full_set_folder() -> Path | None:
    """Where the full Fashion-MNIST lies on this machine, or None."""
    named = os.environ.get(_FOLDER_VARIABLE)
    if named and not (Path(named) / "train-images-idx3-ubyte.gz").is_file():
        raise FileNotFoundError(f"{_FOLDER_VARIABLE}={named} holds no train-images-idx3-ubyte.gz")
    folder = Path(named) if named else _DEBIAN_FOLDER
    return folder if (folder / "train-images-idx3-ubyte.gz").is_file() else None


def write_shipped(num_train: int = 4000, num_test: int = 2000) -> Path:
    """Writes the part that ships with the package: the first rows of each split."""
    train, test = load("train", require_all=True), load("test", require_all=True)
    parts = {"train": (train, num_train), "test": (test, num_test)}
    # numpy reads LZMA but writes only deflate, which takes a sixth more.
    with written_aside(_SHIPPED) as part, ZipFile(part, "w", ZIP_LZMA) as file:
        for split, (data, number) in parts.items():
            for name, values in (("images", data.images), ("labels", data.labels)):
                with file.open(f"{split}_{name}.npy", "w") as entry:
                    np.lib.format.write_array(entry, np.ascontiguousarray(values[:number]), allow_pickle=False)
    return _SHIPPED


def _read_idx(folder: Path, split: Split) -> Photographs:
    stem = {"train": "train", "test": "t10k"}[split]
    with gzip.open(folder / f"{stem}-images-idx3-ubyte.gz") as file:
        images = np.frombuffer(file.read(), np.uint8, offset=16).reshape(-1, 28, 28)
    with gzip.open(folder / f"{stem}-labels-idx1-ubyte.gz") as file:
        classes = np.frombuffer(file.read(), np.uint8, offset=8)
    label_of_class = np.full(10, -1)
    label_of_class[list(_FASHION_MNIST_CLASS)] = range(len(GARMENTS))
    labels = label_of_class[classes]
    kept = np.flatnonzero(labels >= 0)
    kept = np.random.default_rng(_ORDER_SEED).permutation(kept)
    return Photographs(images[kept], labels[kept].astype(np.int64))
