"""Several fine-tuned models of one base as one: soup, task arithmetic, TIES, DARE, DELLA, tensor by tensor.

    merge_models("base/", ["run-1/", "run-2/"], "merged/", method="ties", density=0.2)

δ_i = θ_i − θ_base is taken and combined in float32; at no time is more than one file of the result and one tensor of each
model in memory. Models are mappings of names to tensors: state dicts, or folders that are read as they are asked.
"""

import hashlib
import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor

from mmalign.files import absence_explained, staged, write_json
from mmalign.training.lora import Lora
from mmalign.training.token_loading import is_a_path

MergeMethod = Literal["soup", "task_arithmetic", "ties", "dare", "dare_ties", "della"]
# How much of each δ is kept: the fifth that TIES (arXiv:2306.01708) keeps, half where chance decides.
_DENSITY = {"ties": 0.2, "dare": 0.5, "dare_ties": 0.5, "della": 0.5}
_ELECT = ("ties", "dare_ties", "della")
_EPSILON = 0.2
_WEIGHTS, _INDEX = "model.safetensors", "model.safetensors.index.json"
_COPIED = (".json", ".txt", ".model", ".jinja")
_NOTICES = ("LICENSE", "NOTICE")
_RECORD, _ADAPTER, _LORA = "merge.json", "adapter_config.json", "adapter_model.safetensors"
# What of the base's folder would be told of the merged model, and is not true of it.
_NOT_COPIED = (_INDEX, _RECORD, "history.json", "trainer_state.json", "manifest.json")


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """How δ_1 … δ_n become one.

    soup             the weighted mean (arXiv:2203.05482); weights are divided by their sum
    task_arithmetic  Σ w_i δ_i (arXiv:2212.04089)
    ties             of each δ the `density` of largest magnitude; per entry a sign is elected, and the agreeing ones averaged
    dare             entries are dropped by chance and the others divided by `density`, then Σ w_i δ_i (arXiv:2311.03099)
    dare_ties        the same, then elected and averaged as in ties
    della            as dare_ties, the smallest of a row kept with probability density − ε/2, the largest with density + ε/2
                     (arXiv:2406.11617)

    weights: None is 1/n where a sum is taken, 1 where agreeing entries are averaged. seed: of what is dropped; with the name of the
    tensor and the place of the model it decides alone, so that neither files nor order of reading matter.
    """

    method: MergeMethod = "soup"
    weights: tuple[float, ...] | None = None
    density: float | None = None
    epsilon: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.method not in get_args(MergeMethod):
            raise ValueError(f"method must be one of {', '.join(get_args(MergeMethod))}, got {self.method!r}")
        if self.density is not None and self.method not in _DENSITY:
            raise ValueError(f"density has no effect on {self.method}, which drops nothing; leave it out")
        if self.epsilon is not None and self.method != "della":
            raise ValueError(f"epsilon acts on della alone, not on {self.method}; leave it out")
        if not 0 < self.kept <= 1:
            raise ValueError(f"density must lie in (0, 1], got {self.density}")
        low, high = self.kept - self.spread / 2, self.kept + self.spread / 2
        if not (self.spread >= 0 and low > 0 and high <= 1):
            raise ValueError(f"density ± epsilon/2 must lie in (0, 1], got {low:g} to {high:g}")
        if not all(map(math.isfinite, self.weights or ())):
            raise ValueError(f"weights must be finite numbers, got {', '.join(map(str, self.weights or ()))}")
        if self.method == "soup" and self.weights is not None and sum(self.weights) <= 0:
            raise ValueError(f"the weights of a soup must have a sum above 0, got {sum(self.weights):g}")

    @property
    def kept(self) -> float:
        """The share of each δ that stays, on average."""
        return _DENSITY.get(self.method, 1.0) if self.density is None else self.density

    @property
    def spread(self) -> float:
        """Between the likeliest and the least likely entry to be kept."""
        if self.method != "della":
            return 0.0
        return _EPSILON if self.epsilon is None else self.epsilon

    def weights_of(self, count: int) -> list[float]:
        """One weight a model."""
        if self.weights is None:
            return [1.0 if self.method in _ELECT else 1 / count] * count
        if len(self.weights) != count:
            raise ValueError(f"{len(self.weights)} weights for {count} models: give one a model")
        whole = sum(self.weights) if self.method == "soup" else 1.0
        return [weight / whole for weight in self.weights]


def merge_models(
    base: str | os.PathLike[str] | None,
    models: Sequence[str | os.PathLike[str]],
    output: str | os.PathLike[str],
    *,
    method: MergeMethod = "soup",
    weights: Sequence[float] | None = None,
    density: float | None = None,
    epsilon: float | None = None,
    seed: int = 0,
) -> Path:
    """Writes the merged model as a folder that plain transformers loads, whole or not at all, and returns its path.

    Folders or Hub ids with safetensors, of whole models or of a run's LoRA on the base. `base` is what the models were trained from;
    a soup of whole models can do without. Config, tokenizer and the like are the base's, and so is the precision. What is done is told
    in `Recipe`. ValueError names the first tensor that differs in name or shape.
    """
    recipe = Recipe(
        method=method, weights=None if weights is None else tuple(weights), density=density, epsilon=epsilon, seed=seed
    )
    if isinstance(models, (str, os.PathLike)):
        raise ValueError("models is a list of folders or Hub ids, also where there is one")
    if not models or (base is None and method != "soup"):
        raise ValueError("name at least one model" if not models else f"{method} needs the base that the models share")
    recipe.weights_of(len(models))
    output = Path(output).expanduser()
    if output.is_dir() and any(output.iterdir()):
        raise ValueError(f"{output} is not empty: choose a new folder for the merged model")
    start = None if base is None else _open(base)
    opened = [_open(model, start) for model in models]
    anchor = start or opened[0]
    _check_same(anchor, opened)
    with staged(output) as part:
        _copy_settings(anchor.path, part)
        _write(anchor, opened, recipe, part)
        told = {"base": None if base is None else os.fspath(base), "models": [os.fspath(model) for model in models]}
        write_json(part / _RECORD, told | asdict(recipe))
    return output


def merged_tensors(
    base: Mapping[str, Tensor], models: Sequence[Mapping[str, Tensor]], recipe: Recipe
) -> Iterator[tuple[str, Tensor]]:
    """Name and merged tensor, in the base's order and precision, one at a time."""
    for name in base:
        yield name, merge_tensor(name, base[name], [model[name] for model in models], recipe)


def merge_tensor(name: str, base: Tensor, tensors: Sequence[Tensor], recipe: Recipe) -> Tensor:
    """The merged tensor in the base's precision.

    What counts (integers, booleans) is the base's; statistics of a BatchNorm are averaged, for extrapolated they could be negative.
    """
    if not base.is_floating_point():
        return base
    start = base.to(torch.promote_types(base.dtype, torch.float32))
    deltas = [tensor.to(start.dtype) - start for tensor in tensors]
    if name.endswith(("running_mean", "running_var")):
        return (start + torch.stack(deltas).mean(0)).to(base.dtype)
    kept = [_thinned(delta, recipe, _generator(recipe.seed, place, name)) for place, delta in enumerate(deltas)]
    weights = recipe.weights_of(len(kept))
    if recipe.method in _ELECT:
        return (start + _agreed(kept, weights)).to(base.dtype)
    return (start + sum(weight * delta for delta, weight in zip(kept, weights, strict=True))).to(base.dtype)


def _thinned(delta: Tensor, recipe: Recipe, generator: torch.Generator) -> Tensor:
    """What the method keeps of one δ."""
    if recipe.method not in _DENSITY or delta.numel() == 0:
        return delta
    if recipe.method == "ties":
        from peft.utils.merge_utils import magnitude_based_pruning

        # At least one entry: a scale that is a single number must not be lost.
        return magnitude_based_pruning(delta, max(recipe.kept, 1 / delta.numel()))
    probability = _rising(delta, recipe) if recipe.method == "della" else torch.full_like(delta, recipe.kept)
    return delta * torch.bernoulli(probability, generator=generator) / probability


def _rising(delta: Tensor, recipe: Recipe) -> Tensor:
    """The probability that an entry is kept, by the rank of its magnitude among those of its row."""
    rows = delta.reshape(delta.shape[0], -1) if delta.ndim > 1 else delta.reshape(1, -1)
    count = rows.shape[1]
    if count == 1:
        return torch.full_like(delta, recipe.kept)
    steps = torch.linspace(recipe.kept - recipe.spread / 2, recipe.kept + recipe.spread / 2, count, dtype=delta.dtype)
    order = rows.abs().argsort(dim=1)
    return torch.empty_like(rows).scatter_(1, order, steps.expand_as(rows)).reshape(delta.shape)


def _agreed(deltas: list[Tensor], weights: list[float]) -> Tensor:
    """The mean over the entries that have the elected sign, that of the sum; entries that were dropped have no vote."""
    from peft.utils.merge_utils import calculate_majority_sign_mask, disjoint_merge, reshape_weight_task_tensors

    stacked = torch.stack(deltas)
    elected = calculate_majority_sign_mask(stacked)
    return disjoint_merge(stacked * reshape_weight_task_tensors(stacked, torch.tensor(weights)), elected)


def _generator(seed: int, place: int, name: str) -> torch.Generator:
    digest = hashlib.sha256(f"{seed}|{place}|{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big"))


# Folders.


@contextmanager
def _reading(file: Path) -> Iterator[Any]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as opened:
            yield opened
    except SafetensorError as error:
        raise ValueError(f"{file} is damaged ({error}): save or download it again") from error


class _Folder(Mapping[str, Tensor]):
    """The weights of a transformers folder, each read when it is asked for; a head that is tied to the embedding is not among them."""

    def __init__(self, path: Path, files: dict[str, str]) -> None:
        self.path, self.files = path, files

    def __getitem__(self, name: str) -> Tensor:
        with _reading(self.path / self.files[name]) as file:
            return cast(Tensor, file.get_tensor(name))

    def __iter__(self) -> Iterator[str]:
        return iter(self.files)

    def __len__(self) -> int:
        return len(self.files)

    def shape(self, name: str) -> list[int]:
        """Without reading the values."""
        with _reading(self.path / self.files[name]) as file:
            return cast(list[int], file.get_slice(name).get_shape())


class _Adapted(_Folder):
    """The base's weights with a LoRA, added in float32."""

    def __init__(self, base: _Folder, folder: Path) -> None:
        super().__init__(folder, base.files)
        if not (folder / _LORA).is_file():
            raise ValueError(f"{folder} holds no {_LORA}: save the LoRA with safetensors")
        config = json.loads((folder / _ADAPTER).read_text(encoding="utf-8"))
        with _reading(folder / _LORA) as file:
            bare = {name.removeprefix("base_model.model."): file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        remedy = "save the whole model with its pipeline's save_pretrained, and merge that"
        odd = next((name for name in bare if not name.endswith((".lora_A.weight", ".lora_B.weight"))), None)
        if odd is not None:
            raise ValueError(f"{folder} holds {odd}, which is more than a low-rank pair: {remedy}")
        self._base, self._layers = base, Lora("model", None, config, bare).layers()
        for module, layer in self._layers.items():
            if f"{module}.weight" not in base.files or layer.down.ndim != 2 or config.get("fan_in_fan_out"):
                raise ValueError(
                    f"{folder} has a LoRA on {module}, which is no linear layer in the files of {base.path}: {remedy}"
                )

    def __getitem__(self, name: str) -> Tensor:
        layer = self._layers.get(name.removesuffix(".weight"))
        if layer is None:
            return self._base[name]
        return self._base[name].float() + layer.scale * (layer.up.float() @ layer.down.float())

    def shape(self, name: str) -> list[int]:
        """The base's; of a LoRA's factors their product's."""
        layer = self._layers.get(name.removesuffix(".weight"))
        return self._base.shape(name) if layer is None else [len(layer.up), layer.down.shape[1]]


def _open(source: str | os.PathLike[str], base: _Folder | None = None) -> _Folder:
    """A whole model, or one of the base with a LoRA."""
    from transformers import AutoConfig

    path = Path(source).expanduser()
    if not path.is_dir():
        if is_a_path(source):
            raise ValueError(f"{path}: no such folder. Name one that save_pretrained or a run wrote, or a Hub id")
        path = _downloaded(os.fspath(source))
    if not (path / "config.json").is_file():
        if not (path / _ADAPTER).is_file():
            raise ValueError(f"{path} has no config.json: give a folder that save_pretrained wrote")
        if base is None:
            raise ValueError(f"{path} holds a LoRA: name its base")
        return _Adapted(base, path)
    config = AutoConfig.from_pretrained(path)
    if "quantization_config" in config.to_dict():
        raise ValueError(f"{path} is quantised, and means of its codes mean nothing: merge unquantised models")
    # In transformers' order: it leaves the index of an earlier save beside a whole file.
    if (path / _WEIGHTS).is_file():
        with _reading(path / _WEIGHTS) as file:
            files = dict.fromkeys(file.keys(), _WEIGHTS)
    elif (path / _INDEX).is_file():
        files = json.loads((path / _INDEX).read_text(encoding="utf-8"))["weight_map"]
        strange = next((file for file in files.values() if Path(file).name != file), None)
        if strange is not None:
            raise ValueError(f"{path / _INDEX} names {strange!r}, which is not a file of its folder")
    else:
        raise ValueError(f"{path} holds neither {_WEIGHTS} nor {_INDEX}: save the model with safetensors")
    tied = bool(config.tie_word_embeddings)
    return _Folder(path, {name: file for name, file in files.items() if not (tied and _is_head(name))})


def _is_head(name: str) -> bool:
    return name == "lm_head.weight" or name.endswith(".lm_head.weight")


def _downloaded(repo: str) -> Path:
    from huggingface_hub import snapshot_download

    patterns = ["*.safetensors", *(f"*{ending}" for ending in _COPIED), *(f"{name}*" for name in _NOTICES)]
    with absence_explained(f"{repo} is no folder here; download it where the Hub is reached, and give its folder"):
        return Path(snapshot_download(repo, allow_patterns=patterns))


def _check_same(anchor: _Folder, models: Sequence[_Folder]) -> None:
    for model in models:
        for ours, theirs in ((anchor, model), (model, anchor)):
            lacking = next((name for name in ours if name not in theirs.files), None)
            if lacking is not None:
                raise ValueError(
                    f"{theirs.path} lacks {lacking}, which {ours.path} has: merge models that were trained from the same base"
                )
        for name in anchor:
            if anchor.shape(name) != model.shape(name):
                raise ValueError(
                    f"{name} has shape {anchor.shape(name)} in {anchor.path} and {model.shape(name)} in {model.path}: merge models "
                    "that were trained from the same base"
                )


def _copy_settings(source: Path, target: Path) -> None:
    """What stands beside the weights: configs, tokenizer, processor, chat template, licence."""
    for path in sorted(source.iterdir()):
        wanted = path.suffix in _COPIED and path.name not in _NOT_COPIED
        if path.is_file() and (wanted or path.name.startswith(_NOTICES)):
            shutil.copyfile(path, target / path.name)


def _write(anchor: _Folder, models: Sequence[_Folder], recipe: Recipe, target: Path) -> None:
    """The base's files by their names, each with the same tensors, and the index of them if there is one."""
    from safetensors.torch import save_file

    total = 0
    for file in dict.fromkeys(anchor.files.values()):
        names = [name for name, home in anchor.files.items() if home == file]
        part = {name: merge_tensor(name, anchor[name], [model[name] for model in models], recipe) for name in names}
        total += sum(tensor.nbytes for tensor in part.values())
        save_file(part, target / file, {"format": "pt"})
    if _WEIGHTS not in anchor.files.values():
        write_json(target / _INDEX, {"metadata": {"total_size": total}, "weight_map": anchor.files})
