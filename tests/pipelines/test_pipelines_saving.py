"""What is saved loads in plain diffusers, with mmalign not importable, and draws the same picture."""

import errno
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import diffusers.pipelines.pipeline_utils
import numpy as np
import pytest
import torch
from peft import LoraConfig
from tiny import ASKED, KINDS, PICTURE_KINDS, tiny_pipeline
from training.runs import data_for, lora, pairs, pipeline

TRAINED = {f"{kind}-lora": (kind, True) for kind in KINDS} | {"sd-full": ("sd", False)}
RANK, ALPHA = 3, 12
# diffusers has no class that finds a video pipeline by its task.
LOADERS = {
    name: ("DiffusionPipeline", "AutoPipelineForText2Image")[: 2 if kind in PICTURE_KINDS else 1]
    for name, (kind, _) in TRAINED.items()
}

# Runs where mmalign cannot be imported. For every folder: what three ways of loading draw.
PLAIN = """
import json, sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "mmalign":
            raise ImportError(f"{name} is blocked")
sys.meta_path.insert(0, Blocked())
import numpy as np, torch
import diffusers
torch.set_num_threads(1)
def draw(pipe, asked):
    pipe.set_progress_bar_config(disable=True)
    options = dict(num_inference_steps=2, guidance_scale=2.0, output_type="np", height=16, width=16, return_dict=False)
    return pipe("a red shirt", generator=torch.Generator().manual_seed(0), **options, **asked)[0][0]
drawn = {}
for name, (folder, loaders, asked) in json.loads(sys.argv[1]).items():
    for kind in loaders:
        pipe = getattr(diffusers, kind).from_pretrained(folder + "/pipe", use_safetensors=True)
        drawn[f"{name}/{kind}"] = draw(pipe, asked)
        drawn[f"{name}/class/{type(pipe).__name__}"] = np.zeros(1)
    if name.endswith("lora"):
        pipe = diffusers.DiffusionPipeline.from_pretrained(folder + "/base", use_safetensors=True)
        drawn[f"{name}/base"] = draw(pipe, asked)
        pipe.load_lora_weights(folder + "/run")
        drawn[f"{name}/lora"] = draw(pipe, asked)
        network = pipe.components.get("unet", pipe.components.get("transformer"))
        config = network.peft_config["default_0"]
        drawn[f"{name}/rank"] = np.array([config.r, config.lora_alpha])
assert not any(name.split(".")[0] == "mmalign" for name in sys.modules)
np.savez(sys.argv[2], **drawn)
"""


def draw(pipe: Any, **asked: int) -> Any:
    options: dict[str, Any] = {"num_inference_steps": 2, "guidance_scale": 2.0, "output_type": "np"}
    options |= {"height": 16, "width": 16, "return_dict": False} | asked
    return pipe("a red shirt", generator=torch.Generator().manual_seed(0), **options)[0][0]


def aligned(kind: str, with_lora: bool, folder: Path, **options: Any) -> Any:
    pipe = pipeline("dpo", kind)
    pipe.set_progress_bar_config(disable=True)
    settings = {"max_steps": 2, "learning_rate": 1e-2 if with_lora else 1e-4, "save_strategy": "no"}
    peft_config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=["to_q", "to_v"]) if with_lora else None
    result = pipe.align(
        data_for(kind),
        output_dir=folder,
        peft_config=peft_config,
        per_device_train_batch_size=2,
        resolution=16,
        use_cpu=True,
        disable_tqdm=True,
        logging_steps=1,
        **settings | ASKED.get(kind, {}) | options,
    )
    return pipe, result


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Any]]:
    """Name → the folder with base, run and saved pipeline, and what the aligned pipeline draws."""
    made = {}
    for name, (kind, with_lora) in TRAINED.items():
        folder = tmp_path_factory.mktemp(name)
        tiny_pipeline(kind).save_pretrained(folder / "base")
        pipe, _ = aligned(kind, with_lora, folder / "run")
        pipe.save_pretrained(folder / "pipe")
        made[name] = folder, draw(pipe, **ASKED.get(kind, {}))
    return made


@pytest.fixture(scope="module")
def plain(folders: dict[str, tuple[Path, Any]], tmp_path_factory: pytest.TempPathFactory) -> Any:
    out = tmp_path_factory.mktemp("plain") / "drawn.npz"
    named = {
        name: (str(folder), LOADERS[name], ASKED.get(TRAINED[name][0], {})) for name, (folder, _) in folders.items()
    }
    subprocess.run([sys.executable, "-c", PLAIN, json.dumps(named), str(out)], check=True, timeout=280, cwd="/")
    return np.load(out)


@pytest.mark.parametrize("name", TRAINED)
def test_plain_diffusers_draws_the_same_picture(name: str, folders: Any, plain: Any) -> None:
    ours, kind = folders[name][1], TRAINED[name][0]
    for loader in LOADERS[name]:
        assert np.abs(plain[f"{name}/{loader}"] - ours).max() < 1e-5
    assert f"{name}/class/{type(tiny_pipeline(kind)).__name__}" in plain
    assert np.abs(draw(tiny_pipeline(kind), **ASKED.get(kind, {})) - ours).max() > 1e-4


@pytest.mark.parametrize("name", [name for name in TRAINED if name.endswith("lora")])
def test_the_lora_loads_with_rank_and_alpha(name: str, folders: Any, plain: Any) -> None:
    assert np.abs(plain[f"{name}/lora"] - folders[name][1]).max() < 1e-6
    assert np.abs(plain[f"{name}/lora"] - plain[f"{name}/base"]).max() > 1e-4
    assert plain[f"{name}/rank"].tolist() == [RANK, ALPHA]


def test_what_a_run_leaves_in_its_folder(folders: Any) -> None:
    assert {p.name for p in (folders["sd-lora"][0] / "run").iterdir()} == {
        "pytorch_lora_weights.safetensors", "README.md", "history.json"
    }  # fmt: skip
    assert {p.name for p in (folders["sd-full"][0] / "run").iterdir()} == {"unet", "README.md", "history.json"}
    saved = {p.name for p in (folders["sd-lora"][0] / "pipe").iterdir()}
    assert {"model_index.json", "unet", "vae", "pytorch_lora_weights.safetensors"} <= saved
    assert "pytorch_lora_weights.safetensors" not in {p.name for p in (folders["sd-full"][0] / "pipe").iterdir()}
    for folder, _ in folders.values():
        assert not [p for p in folder.rglob("*") if p.name.endswith((".part", ".tmp")) or "unfinished" in p.name]
        assert not [p for p in folder.rglob("*") if p.suffix in (".bin", ".pt", ".pth", ".ckpt")]


def test_saving_changes_nothing_in_the_pipeline(folders: Any, tmp_path: Path) -> None:
    from mmalign import DiffusionDPOPipeline

    pipe = DiffusionDPOPipeline.from_pretrained(folders["sd-lora"][0] / "base")
    pipe.load_lora_weights(folders["sd-lora"][0] / "run", adapter_name="mine")
    before = draw(pipe)
    pipe.save_pretrained(tmp_path / "again")
    assert np.array_equal(draw(pipe), before) and "mine" in pipe.unet.peft_config
    # An adapter that training did not make is merged, and not written once more.
    assert not (tmp_path / "again" / "pytorch_lora_weights.safetensors").exists()
    assert np.abs(draw(DiffusionDPOPipeline.from_pretrained(tmp_path / "again")) - before).max() < 1e-5


def test_a_full_disk_leaves_the_old_folder_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = pipeline()
    pipe.save_pretrained(tmp_path / "saved")
    (tmp_path / "saved" / "mine.txt").write_text("kept")
    before = {p: p.read_bytes() for p in (tmp_path / "saved").rglob("*") if p.is_file()}

    def fails(*args: Any, **kwargs: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(type(pipe.unet), "save_pretrained", fails)
    for folder in ("saved", "new"):
        with pytest.raises(OSError, match="no space left on the disk that holds"):
            pipe.save_pretrained(tmp_path / folder)
    assert {p: p.read_bytes() for p in (tmp_path / "saved").rglob("*") if p.is_file()} == before
    assert not (tmp_path / "new").exists()


def test_a_push_takes_the_folders_own_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = {}

    def create_repo(repo_id: str, **options: Any) -> Any:
        asked["repo"] = repo_id
        raise ConnectionError

    monkeypatch.setattr(diffusers.pipelines.pipeline_utils, "create_repo", create_repo)
    with pytest.raises(ConnectionError):
        pipeline().save_pretrained(tmp_path / "my-model", push_to_hub=True)
    assert asked == {"repo": "my-model"} and not (tmp_path / "my-model").exists()


def test_a_trainer_pushes_weights_card_and_history_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers.trainer
    from training.runs import trainer

    pushed: list[dict[str, Any]] = []

    class Api:
        def create_repo(self, *args: Any, **kwargs: Any) -> Any:
            return type("Repo", (), {"repo_id": "me/aligned"})

        def upload_folder(self, **options: Any) -> str:
            pushed.append(options | {"names": sorted(p.name for p in Path(options["folder_path"]).iterdir())})
            return "done"

    monkeypatch.setattr(transformers.trainer, "hf_api", Api)
    run = trainer(tmp_path, push_to_hub=True, hub_model_id="me/aligned", save_strategy="steps", save_steps=1)
    run.train()
    assert pushed == []
    run.save_model()
    assert len(pushed) == 1 and {"README.md", "history.json", "pytorch_lora_weights.safetensors"} <= set(
        pushed[0]["names"]
    )
    assert "training_args.bin" not in pushed[0]["names"] and "checkpoint-*" in pushed[0]["ignore_patterns"]
    assert "aligned by Diffusion-DPO" in (tmp_path / "README.md").read_text()


def test_lora_of_a_warm_start_is_kept(tmp_path: Path) -> None:
    pipe, _ = aligned("sd", True, tmp_path / "run")
    before = draw(pipe)
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    result = pipe.align(
        pairs(), output_dir=tmp_path / "more", peft_config=lora(), max_steps=1, per_device_train_batch_size=2, use_cpu=True,
        disable_tqdm=True, logging_steps=1, save_strategy="no",
    )  # fmt: skip
    # The fused model is the new reference: the start is ln 2, and one step later the picture has hardly moved.
    assert result.metrics["loss"] == pytest.approx(0.693147, abs=1e-5)
    assert np.abs(draw(pipe) - before).max() < 1e-2
