"""Merged models: what each method is on paper, what is left alone, and folders that plain transformers loads."""

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tiny_vlm import picture, tiny_vlm
from torch import Tensor

from mmalign import cli
from mmalign.training.model_merging import Recipe, merge_models, merge_tensor, merged_tensors


def tensors(count: int, seed: int = 0, shape: tuple[int, ...] = (6, 8)) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for _ in range(count)]


def merged(base: Tensor, models: list[Tensor], name: str = "w", **options: Any) -> Tensor:
    return merge_tensor(name, base, models, Recipe(**options))


@settings(max_examples=25, deadline=None)
@given(weights=st.lists(st.floats(0.1, 3.0), min_size=1, max_size=4), seed=st.integers(0, 99))
def test_a_soup_is_the_weighted_mean_whatever_it_starts_from(weights: list[float], seed: int) -> None:
    base, *models = tensors(len(weights) + 1, seed)
    expected = sum(w * m.double() for w, m in zip(weights, models, strict=True)) / sum(weights)
    for start in (base, models[0]):
        found = merged(start, models, method="soup", weights=tuple(weights))
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)


def test_task_arithmetic_adds_what_each_model_learned() -> None:
    base, a, b = tensors(3)
    expected = base + 0.7 * (a - base) - 0.4 * (b - base)
    torch.testing.assert_close(merged(base, [a, b], method="task_arithmetic", weights=(0.7, -0.4)), expected)
    torch.testing.assert_close(merged(base, [a], method="task_arithmetic", weights=(1.0,)), a)
    assert torch.equal(merged(base, [a, b], method="task_arithmetic", weights=(0.0, 0.0)), base)


def test_ties_by_hand() -> None:
    """Two of five entries stay in each; the sign with the larger sum wins; agreeing entries are averaged, lone ones stand alone."""
    base = torch.tensor([10.0, 10, 10, 10, 10])
    deltas = [
        torch.tensor([4.0, -3, 1, 0.5, 0]),
        torch.tensor([-6.0, 0.1, 0, 2, 1]),
        torch.tensor([-1.0, -2, 0.2, 0.3, -9]),
    ]
    found = merged(base, [base + delta for delta in deltas], method="ties", density=0.4)
    torch.testing.assert_close(found - base, torch.tensor([-6.0, -2.5, 0, 2, -9]))
    doubled = merged(base, [base + delta for delta in deltas], method="ties", density=0.4, weights=(2.0, 2.0, 2.0))
    torch.testing.assert_close(doubled - base, 2 * (found - base))


@pytest.mark.parametrize("density", [0.05, 0.2, 0.5])
def test_ties_agrees_with_peft(density: float) -> None:
    from peft.utils.merge_utils import ties

    base, *models = tensors(4, shape=(20, 30))
    weights = torch.tensor([1.0, 0.5, 2.0])
    expected = base + ties([model - base for model in models], weights, density)
    found = merged(base, models, method="ties", density=density, weights=tuple(weights.tolist()))
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("method", ["ties", "dare_ties"])
def test_one_model_kept_whole_is_itself(method: Any) -> None:
    base, model = tensors(2)
    torch.testing.assert_close(merged(base, [model], method=method, density=1.0), model)


def test_ties_keeps_a_scale_that_is_one_number() -> None:
    base = torch.tensor([1.0])
    assert merged(base, [torch.tensor([1.5])], method="ties", density=0.1).item() == 1.5


def test_dare_drops_at_its_rate_scales_the_rest_and_keeps_the_mean() -> None:
    base = torch.zeros(400, 50)
    delta = torch.linspace(0.5, 2, 20000).reshape(400, 50)
    found = merged(base, [delta], method="dare", weights=(1.0,), density=0.3)
    kept = found != 0
    torch.testing.assert_close(found[kept], (delta / 0.3)[kept])
    assert kept.float().mean().item() == pytest.approx(0.3, abs=4 * (0.3 * 0.7 / 20000) ** 0.5)
    runs = torch.stack([merged(base[:4], [delta[:4]], method="dare", density=0.3, seed=seed) for seed in range(400)])
    assert (runs.mean(0) / delta[:4] - 1).abs().max() < 5 * (0.7 / 0.3 / 400) ** 0.5
    base, a, b = tensors(3)
    whole = merged(base, [a, b], method="dare", density=1.0, weights=(0.3, 0.9))
    torch.testing.assert_close(whole, merged(base, [a, b], method="task_arithmetic", weights=(0.3, 0.9)))


def test_della_keeps_large_entries_more_often_and_the_mean_of_all() -> None:
    """Probabilities rise evenly with the rank within a row, from density − ε/2 to density + ε/2."""
    row = torch.tensor([0.5, -4.0, 1.0, 2.0, -3.0])
    base, delta = torch.zeros(4000, 5), row.expand(4000, 5)
    found = merged(base, [delta], method="della", density=0.5, epsilon=0.4)
    expected = torch.tensor([0.3, 0.7, 0.4, 0.5, 0.6])
    torch.testing.assert_close((found != 0).float().mean(0), expected, rtol=0, atol=0.035)
    torch.testing.assert_close(found.abs().amax(0), row.abs() / expected)
    torch.testing.assert_close(found.mean(0), row, rtol=0.12, atol=0)


def test_double_precision_stays() -> None:
    base, model = (x.double() for x in tensors(2))
    for method in ("soup", "task_arithmetic", "ties", "dare", "dare_ties", "della"):
        assert merged(base, [model], method=method).dtype == torch.float64


def test_della_elects_signs_as_ties_does() -> None:
    base, a, b = tensors(3)
    found = merged(base, [a, b], method="della", density=0.9, epsilon=0.0)
    torch.testing.assert_close(found, merged(base, [a, b], method="dare_ties", density=0.9))


def test_chance_hangs_on_seed_name_and_place_alone() -> None:
    base, a = tensors(2, shape=(30, 30))
    first = merged(base, [a, a], method="dare")
    torch.manual_seed(5)
    assert torch.equal(first, merged(base, [a, a], method="dare"))
    assert not torch.equal(first, merged(base, [a, a], method="dare", seed=1))
    assert not torch.equal(first, merged(base, [a, a], method="dare", name="v"))
    # Were both drawn alike, the sum would hold 0 and 1/density times δ only.
    ratio = (first - base) / (a - base)
    assert ((ratio - 1).abs() < 1e-3).any()


def test_what_is_no_weight_is_the_base_s_or_a_mean() -> None:
    count = torch.tensor(7)
    assert merged(count, [torch.tensor(9)], method="task_arithmetic", weights=(1.0,)) is count
    base, a, b = torch.tensor([1.0]), torch.tensor([0.5]), torch.tensor([0.2])
    for name in ("norm.running_var", "norm.running_mean"):
        found = merged(base, [a, b], method="task_arithmetic", weights=(3.0, 3.0), name=name)
        assert found.item() == pytest.approx(0.35)


def test_half_precision_is_summed_in_float32_and_equal_weights_stay() -> None:
    base, *models = (x.bfloat16() for x in tensors(8, shape=(50, 50)))
    exact = torch.stack([model.double() for model in models]).mean(0)
    found = merged(base, models, method="soup")
    assert found.dtype == torch.bfloat16
    assert (found.double() - exact).abs().max() <= exact.abs().max() * 2**-8
    for method in ("soup", "task_arithmetic", "ties", "dare", "dare_ties", "della"):
        assert torch.equal(merged(base, [base, base.clone(), base.clone()], method=method), base)


def test_inputs_are_left_as_they_are() -> None:
    base, *models = tensors(3)
    before = [x.clone() for x in (base, *models)]
    for method in ("soup", "task_arithmetic", "ties", "dare", "della"):
        merged(base, models, method=method)
    assert all(torch.equal(x, y) for x, y in zip((base, *models), before, strict=True))


def test_tensors_are_read_one_at_a_time() -> None:
    read: list[str] = []

    class Spy(dict[str, Tensor]):
        def __getitem__(self, name: str) -> Tensor:
            read.append(name)
            return super().__getitem__(name)

    states = [Spy(a=x, b=x + 1) for x in tensors(3)]
    for seen, (name, _) in enumerate(merged_tensors(states[0], states[1:], Recipe(method="soup")), 1):
        assert read == ["a"] * 3 + ["b"] * 3 * (seen - 1) and name == "ab"[seen - 1]


# Folders.


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base in several files, and two models of it in one: each of LFM2-VL with its processor."""
    folder = tmp_path_factory.mktemp("merging")
    model, processor = tiny_vlm("lfm2_vl")
    model.save_pretrained(folder / "base", max_shard_size="60KB")
    processor.save_pretrained(folder / "base")
    (folder / "base" / "LICENSE").write_text("Theirs.")
    for number in (1, 2):
        trained = copy.deepcopy(model)
        generator = torch.Generator().manual_seed(number)
        with torch.no_grad():
            for parameter in trained.model.language_model.parameters():
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
        trained.save_pretrained(folder / f"run-{number}")
    return folder


def states(place: Path) -> list[dict[str, Tensor]]:
    from transformers import AutoModelForImageTextToText

    return [
        AutoModelForImageTextToText.from_pretrained(place / name).state_dict() for name in ("base", "run-1", "run-2")
    ]


@pytest.mark.parametrize(
    "how",
    [{"method": "soup"}, {"method": "ties", "density": 0.3}, {"method": "della", "seed": 3}],
    ids=lambda how: how["method"],
)
def test_a_merged_folder_loads_in_plain_transformers(place: Path, tmp_path: Path, how: dict[str, Any]) -> None:
    from transformers import AutoModelForImageTextToText, AutoProcessor

    out = merge_models(place / "base", [place / "run-1", place / "run-2"], tmp_path / "out", **how)
    model, notes = AutoModelForImageTextToText.from_pretrained(out, output_loading_info=True)
    assert not notes["missing_keys"] and not notes["unexpected_keys"]
    files = {path.name for path in out.glob("*.safetensors")}
    assert files == {path.name for path in (place / "base").glob("*.safetensors")} and len(files) > 2
    stored = {name for file in files for name in load_file(out / file)}
    assert "lm_head.weight" not in stored
    index = json.loads((out / "model.safetensors.index.json").read_text())
    sizes = {name: value.nbytes for file in files for name, value in load_file(out / file).items()}
    assert index["metadata"]["total_size"] == sum(sizes.values()) and index["weight_map"].keys() == sizes.keys()
    assert (out / "LICENSE").read_text() == "Theirs."
    base, *runs = states(place)
    if how["method"] != "della":  # whose draws hang on the names in the files, which are not those in memory
        expected = {name: merge_tensor(name, base[name], [run[name] for run in runs], Recipe(**how)) for name in base}
        for name, value in model.state_dict().items():
            torch.testing.assert_close(value, expected[name], rtol=0, atol=0)
    processor = AutoProcessor.from_pretrained(out)
    inputs = processor(images=[[picture().image]], text=["<image>What is it?"], return_tensors="pt")
    assert model(**inputs).logits.isfinite().all()
    told = json.loads((out / "merge.json").read_text())
    assert told["method"] == how["method"] and told["models"] == [str(place / "run-1"), str(place / "run-2")]


def test_files_do_not_matter(place: Path, tmp_path: Path) -> None:
    """The same base in one file gives the same weights, drawn by chance or not."""
    from transformers import AutoModelForImageTextToText

    AutoModelForImageTextToText.from_pretrained(place / "base").save_pretrained(tmp_path / "whole")
    runs = [place / "run-1", place / "run-2"]
    a = merge_models(place / "base", runs, tmp_path / "a", method="dare")
    b = merge_models(tmp_path / "whole", runs, tmp_path / "b", method="dare")
    parts: dict[str, Tensor] = {}
    for file in a.glob("*.safetensors"):
        parts |= load_file(file)
    whole = load_file(b / "model.safetensors")
    assert parts.keys() == whole.keys() and all(torch.equal(parts[name], whole[name]) for name in whole)


def test_the_index_of_an_earlier_save_is_not_read(place: Path, tmp_path: Path) -> None:
    """transformers leaves it there when it saves a model in one file, and reads the file."""
    from transformers import AutoModelForImageTextToText

    shutil.copytree(place / "base", tmp_path / "base")
    AutoModelForImageTextToText.from_pretrained(place / "run-1").save_pretrained(tmp_path / "base")
    assert (tmp_path / "base" / "model.safetensors.index.json").is_file()
    for told in ("history.json", "trainer_state.json", "manifest.json"):
        (tmp_path / "base" / told).write_text("[]")
    out = merge_models(tmp_path / "base", [place / "run-2"], tmp_path / "out")
    about_the_base = {"model.safetensors.index.json", "history.json", "trainer_state.json", "manifest.json"}
    assert not about_the_base & {path.name for path in out.iterdir()}
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (out, place / "run-2"))
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        torch.testing.assert_close(value, theirs[name])


def test_a_soup_needs_no_base(place: Path, tmp_path: Path) -> None:
    found = load_file(merge_models(None, [place / "run-1", place / "run-2"], tmp_path / "out") / "model.safetensors")
    runs = [load_file(place / f"run-{number}" / "model.safetensors") for number in (1, 2)]
    for name, value in found.items():
        torch.testing.assert_close(value, (runs[0][name] + runs[1][name]) / 2)


def test_a_tied_head_that_was_stored_is_left_out(place: Path, tmp_path: Path) -> None:
    state = load_file(place / "run-1" / "model.safetensors")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text((place / "run-1" / "config.json").read_text())
    head = {"lm_head.weight": state["model.language_model.embed_tokens.weight"].clone()}
    save_file(state | head, tmp_path / "run" / "model.safetensors", {"format": "pt"})
    out = merge_models(place / "run-1", [tmp_path / "run"], tmp_path / "out")
    assert "lm_head.weight" not in load_file(out / "model.safetensors")


def adapted(folder: Path, **how: Any) -> Any:
    """The folder of a run with a LoRA on the language model; returns the model with the LoRA on it."""
    from peft import LoraConfig, get_peft_model

    pattern = r".*language_model.*\.(q_proj|in_proj|w1)"
    config = LoraConfig(r=4, lora_alpha=12, target_modules=pattern, init_lora_weights=False, **how)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model = get_peft_model(copy.deepcopy(tiny_vlm("lfm2_vl")[0]), config)
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("how", [{}, {"use_rslora": True}, {"alpha_pattern": {"w1": 3}}], ids=str)
def test_a_run_s_lora_is_merged_as_the_model_it_makes(place: Path, tmp_path: Path, how: dict[str, Any]) -> None:
    whole = adapted(tmp_path / "run", **how).merge_and_unload()
    whole.save_pretrained(tmp_path / "whole")
    found, expected = (
        merge_models(place / "base", [tmp_path / name, place / "run-1"], tmp_path / f"{name}-merged", weights=[1, 3])
        for name in ("run", "whole")
    )
    moved = set()
    for file in expected.glob("*.safetensors"):
        ours, base = load_file(found / file.name), load_file(place / "base" / file.name)
        for name, value in load_file(file).items():
            torch.testing.assert_close(ours[name], value, rtol=1e-5, atol=1e-6)
            moved |= set() if torch.equal(value, base[name]) else {name.split(".")[-2]}
    assert {"q_proj", "in_proj", "w1"} <= moved and "fc1" not in moved


def test_a_lora_that_has_no_place_is_refused(place: Path, tmp_path: Path) -> None:
    adapted(tmp_path / "run")
    with pytest.raises(ValueError, match="run holds a LoRA: name its base"):
        merge_models(None, [tmp_path / "run"], tmp_path / "out")
    adapted(tmp_path / "dora", use_dora=True)
    with pytest.raises(
        ValueError, match="lora_magnitude_vector, which is more than a low-rank pair: save the whole model"
    ):
        merge_models(place / "base", [tmp_path / "dora"], tmp_path / "out")
    (tmp_path / "dora" / "adapter_model.safetensors").unlink()
    with pytest.raises(ValueError, match="dora holds no adapter_model.safetensors"):
        merge_models(place / "base", [tmp_path / "dora"], tmp_path / "out")
    path = tmp_path / "run" / "adapter_config.json"
    plain = path.read_text()
    path.write_text(json.dumps(json.loads(plain) | {"fan_in_fan_out": True}))
    with pytest.raises(ValueError, match="which is no linear layer"):
        merge_models(place / "base", [tmp_path / "run"], tmp_path / "out")
    path.write_text(plain)
    state = load_file(tmp_path / "run" / "adapter_model.safetensors")
    odd = {name.replace("language_model", "speech_model"): value for name, value in state.items()}
    save_file(odd, tmp_path / "run" / "adapter_model.safetensors")
    with pytest.raises(ValueError, match="has a LoRA on model.speech_model.*save the whole model"):
        merge_models(place / "base", [tmp_path / "run"], tmp_path / "out")


def changed(place: Path, folder: Path, change: Any) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text((place / "run-1" / "config.json").read_text())
    state = load_file(place / "run-1" / "model.safetensors")
    change(state)
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    return folder


NORM = "model.language_model.embedding_norm.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop(NORM), f"odd lacks {NORM}, which .*run-2 has"),
        (lambda state: state.update(more=torch.zeros(1)), "run-2 lacks more, which .*odd has"),
        (lambda state: state.update({NORM: torch.zeros(3)}), rf"{NORM} has shape \[32\] in .*run-2 and \[3\] in .*odd"),
    ],
)
def test_other_models_are_refused_and_nothing_is_written(
    place: Path, tmp_path: Path, change: Any, message: str
) -> None:
    odd = changed(place, tmp_path / "odd", change)
    with pytest.raises(ValueError, match=message):
        merge_models(place / "run-2", [place / "run-1", odd], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_folders_that_cannot_be_merged_say_why(place: Path, tmp_path: Path) -> None:
    nothing, coded, empty, outside = (tmp_path / name for name in ("nothing", "coded", "empty", "outside"))
    for folder in (nothing, coded, empty, outside):
        folder.mkdir()
    config = json.loads((place / "run-1" / "config.json").read_text())
    (coded / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "awq"}}))
    for folder in (empty, outside):
        (folder / "config.json").write_text(json.dumps(config))
    (outside / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"a": "../run-1/model.safetensors"}})
    )
    for folder, message in (
        (nothing, "nothing has no config.json: give a folder that save_pretrained wrote"),
        (coded, "is quantised"),
        (empty, "holds neither model.safetensors nor"),
        (outside, "which is not a file of its folder"),
    ):
        with pytest.raises(ValueError, match=message):
            merge_models(place / "base", [folder], tmp_path / "out")
    (empty / "model.safetensors").write_bytes((place / "run-1" / "model.safetensors").read_bytes()[:500])
    with pytest.raises(ValueError, match="empty/model.safetensors is damaged"):
        merge_models(place / "base", [empty], tmp_path / "out")
    with pytest.raises(ValueError, match="absent: no such folder"):
        merge_models(place / "base", [tmp_path / "absent"], tmp_path / "out")
    with pytest.raises(ValueError, match="models is a list"):
        merge_models(place / "base", str(place / "run-1"), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match="base is not empty: choose a new folder"):
        merge_models(place / "base", [place / "run-1"], place / "base")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "tie"}, "method must be one of soup, task_arithmetic, ties"),
        ({"method": "soup", "density": 0.5}, "density has no effect on soup"),
        ({"method": "dare", "epsilon": 0.1}, "epsilon acts on della alone, not on dare"),
        ({"method": "ties", "density": 0.0}, r"density must lie in \(0, 1\], got 0.0"),
        (
            {"method": "della", "density": 0.95, "epsilon": 0.2},
            r"density ± epsilon/2 must lie in \(0, 1\], got 0.85 to 1.05",
        ),
        ({"method": "della", "epsilon": float("nan")}, "density ± epsilon/2 must lie in"),
        ({"method": "ties", "weights": (1.0, float("nan"))}, "weights must be finite numbers, got 1.0, nan"),
        ({"method": "soup", "weights": (1.0, -1.0)}, "must have a sum above 0, got 0"),
        ({"method": "ties", "weights": (1.0,)}, "1 weights for 2 models"),
    ],
)
def test_recipes_that_cannot_be(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        merged(*(lambda base, *models: (base, models))(*tensors(3)), **options)


def test_the_verb_merges(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from typing import get_args

    from mmalign.cli import merge
    from mmalign.training.model_merging import MergeMethod

    assert get_args(MergeMethod) == merge._METHODS
    words = [
        str(place / "run-1"),
        str(place / "run-2"),
        "--base",
        str(place / "base"),
        "--output",
        str(tmp_path / "out"),
    ]
    assert cli.main(["merge", *words, "--method", "task_arithmetic", "--weights", "0.5", "0.25"]) == 0
    assert f"written: {tmp_path / 'out'}" in capsys.readouterr().out
    told = json.loads((tmp_path / "out" / "merge.json").read_text())
    assert told["weights"] == [0.5, 0.25] and told["base"] == str(place / "base")
    assert cli.main(["merge", str(place / "run-1"), "--method", "ties", "--output", str(tmp_path / "x")]) == 2
    assert "ties needs the base that the models share" in capsys.readouterr().err
    assert cli.main(["merge", "--help"]) == 0
    shown = capsys.readouterr().out
    assert all(method in shown for method in get_args(MergeMethod)) and "evaluate each" in shown
