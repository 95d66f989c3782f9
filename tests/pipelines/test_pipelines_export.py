"""What is exported loads in plain diffusers and peft, with mmalign not importable, and draws the same picture at any strength."""

import errno
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig
from safetensors import safe_open
from safetensors.torch import load_file
from tiny import tiny_pipeline

from mmalign.training.export import export
from mmalign.training.kohya import to_kohya
from mmalign.training.lora import Lora, lora_in, lora_of
from mmalign.training.weights import aligned_network, save_trained

RANK, ALPHA = 4, 7
ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
UNET = [*ATTENTION, "ff.net.0.proj", "ff.net.2", "proj_in", "conv1", "conv_shortcut", "time_emb_proj", "conv_in"]
DOUBLE_ONLY = r"transformer_blocks\.\d+\.(attn\.(to_q|to_k|to_out\.0|add_v_proj)|ff\.net\.2)"
# Name → family, layers with a LoRA, formats. Diffusers reads the single blocks of a kohya file in FLUX's own widths alone.
CASES: dict[str, tuple[str, Any, tuple[str, ...]]] = {
    "sd": ("sd", UNET, ("diffusers", "peft", "kohya", "comfy", "merged")),
    "sdxl": ("sdxl", UNET, ("diffusers", "peft", "kohya", "comfy", "merged")),
    "sd3": ("sd3", ATTENTION, ("diffusers", "peft", "comfy", "merged")),
    "flux": ("flux", ATTENTION, ("diffusers", "peft", "comfy", "merged")),
    "flux-double": ("flux", DOUBLE_ONLY, ("kohya",)),
}
FILES = ("kohya", "comfy")
EXPORTS = [(name, format) for name, (_, _, formats) in CASES.items() for format in formats]

# Runs where mmalign cannot be imported. For every export: what it draws at full strength and at half.
PLAIN = """
import json, sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "mmalign":
            raise ImportError(f"{name} is blocked")
sys.meta_path.insert(0, Blocked())
import numpy as np, torch
from diffusers import AutoPipelineForText2Image, DiffusionPipeline
from peft import PeftModel
from peft.helpers import rescale_adapter_scale
torch.set_num_threads(1)
def draw(pipe):
    pipe.set_progress_bar_config(disable=True)
    options = dict(num_inference_steps=2, guidance_scale=2.0, output_type="np", height=16, width=16)
    return pipe("a red shirt", generator=torch.Generator().manual_seed(0), **options).images[0]
drawn = {}
for name, (base, exports) in json.loads(sys.argv[1]).items():
    pipe = DiffusionPipeline.from_pretrained(base)
    network = pipe.components.get("unet") or pipe.components["transformer"]
    for format, path in exports.items():
        key = f"{name}/{format}"
        if format == "merged":
            drawn[f"{key}/1"] = draw(AutoPipelineForText2Image.from_pretrained(path, use_safetensors=True))
        elif format == "peft":
            wrapped = PeftModel.from_pretrained(network, path)
            drawn[f"{key}/1"] = draw(pipe)
            with rescale_adapter_scale(wrapped, 0.5):
                drawn[f"{key}/0.5"] = draw(pipe)
            wrapped.unload()
            network._hf_peft_config_loaded = False
        else:
            pipe.load_lora_weights(path, adapter_name="theirs")
            drawn[f"{key}/1"] = draw(pipe)
            if format == "diffusers":
                drawn[f"{key}/rank"] = np.array([network.peft_config["theirs"].r, network.peft_config["theirs"].lora_alpha])
            pipe.set_adapters("theirs", 0.5)
            drawn[f"{key}/0.5"] = draw(pipe)
            pipe.unload_lora_weights()
assert not any(name.split(".")[0] == "mmalign" for name in sys.modules)
np.savez(sys.argv[2], **drawn)
"""


def draw(pipe: Any) -> Any:
    options: dict[str, Any] = {"num_inference_steps": 2, "guidance_scale": 2.0, "output_type": "np"}
    options |= {"height": 16, "width": 16}
    return pipe("a red shirt", generator=torch.Generator().manual_seed(0), **options).images[0]


def with_lora(kind: str = "sd", targets: Any = ATTENTION, **options: Any) -> Any:
    """A tiny pipeline whose LoRA changes the picture; α is not the rank."""
    pipe = tiny_pipeline(kind)
    settings = {"r": RANK, "lora_alpha": ALPHA, "target_modules": targets, "init_lora_weights": False}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        aligned_network(pipe)[1].add_adapter(LoraConfig(**settings | options))  # type: ignore[operator]
    return pipe


def path_of(folder: Path, format: str) -> Path:
    return folder / f"{format}.safetensors" if format in FILES else folder / format


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, dict[str, Any]]]:
    """Name → the folder with the exports, and what the pipeline draws at full strength, at half, and without its LoRA."""
    made = {}
    for name, (kind, targets, formats) in CASES.items():
        folder = tmp_path_factory.mktemp(name)
        tiny_pipeline(kind).save_pretrained(folder / "base")
        pipe = with_lora(kind, targets)
        drawn = {"1": draw(pipe)}
        for format in formats:
            assert export(pipe, path_of(folder, format), format=format) == path_of(folder, format)  # type: ignore[arg-type]
        pipe.set_adapters("default", 0.5)
        drawn["0.5"] = draw(pipe)
        pipe.disable_lora()
        drawn["base"] = draw(pipe)
        made[name] = folder, drawn
    return made


@pytest.fixture(scope="module")
def plain(exported: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    out = tmp_path_factory.mktemp("plain") / "drawn.npz"
    asked = {
        name: (str(folder / "base"), {format: str(path_of(folder, format)) for format in CASES[name][2]})
        for name, (folder, _) in exported.items()
    }
    subprocess.run([sys.executable, "-c", PLAIN, json.dumps(asked), str(out)], check=True, timeout=280, cwd="/")
    return np.load(out)


@pytest.mark.parametrize(("name", "format"), EXPORTS)
def test_plain_libraries_draw_the_same_picture(name: str, format: str, exported: Any, plain: Any) -> None:
    ours = exported[name][1]
    assert np.abs(ours["1"] - ours["base"]).max() > 1e-3 and np.abs(ours["1"] - ours["0.5"]).max() > 1e-3
    assert np.abs(plain[f"{name}/{format}/1"] - ours["1"]).max() < 1e-5
    if format != "merged":
        assert np.abs(plain[f"{name}/{format}/0.5"] - ours["0.5"]).max() < 1e-5


@pytest.mark.parametrize("name", ["sd", "sdxl", "sd3", "flux"])
def test_rank_and_alpha_stand_in_the_files(name: str, exported: Any, plain: Any) -> None:
    folder = exported[name][0]
    assert plain[f"{name}/diffusers/rank"].tolist() == [RANK, ALPHA]
    config = json.loads((folder / "peft" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["peft_type"]) == (RANK, ALPHA, "LORA")
    assert {path.name for path in (folder / "peft").iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    assert {path.name for path in (folder / "diffusers").iterdir()} == {"pytorch_lora_weights.safetensors"}


def test_kohya_files_say_dim_alpha_and_module(exported: Any) -> None:
    for name, module in (("sd", "networks.lora"), ("flux-double", "networks.lora_flux")):
        file = exported[name][0] / "kohya.safetensors"
        with safe_open(file, framework="pt") as opened:
            told = opened.metadata()
        assert told == {
            "format": "pt",
            "ss_network_module": module,
            "ss_network_dim": str(RANK),
            "ss_network_alpha": str(float(ALPHA)),
        }
    state = load_file(exported["sd"][0] / "kohya.safetensors")
    assert all(key.startswith("lora_unet_") and key.count(".") in (1, 2) for key in state)
    assert {float(value) for key, value in state.items() if key.endswith(".alpha")} == {ALPHA}


def test_of_a_unet_the_comfy_file_is_the_kohya_file(exported: Any) -> None:
    for name in ("sd", "sdxl"):
        kohya, comfy = (load_file(exported[name][0] / f"{format}.safetensors") for format in FILES)
        assert kohya.keys() == comfy.keys() and all(torch.equal(kohya[key], comfy[key]) for key in kohya)


def test_a_comfy_file_of_a_transformer_needs_no_alpha(exported: Any) -> None:
    state = load_file(exported["sd3"][0] / "comfy.safetensors")
    assert all(key.startswith("transformer.transformer_blocks.") for key in state)
    assert {key.split(".lora_")[1] for key in state} == {"A.weight", "B.weight"}


@pytest.mark.parametrize("options", [
    {"rank_pattern": {"to_k": 2}, "alpha_pattern": {"to_k": 5, "attn1.to_v": 3}},
    {"use_rslora": True},
])  # fmt: skip
def test_every_layers_own_strength_survives(options: dict[str, Any], tmp_path: Path) -> None:
    pipe = with_lora("sd", **options)
    layers = lora_of(pipe).layers()
    modules = dict(pipe.unet.named_modules())
    assert layers.keys() == {
        name for name, module in modules.items() if name.endswith(tuple(ATTENTION)) and hasattr(module, "lora_A")
    }
    for name, layer in layers.items():
        assert layer.scale == pytest.approx(modules[name].scaling["default"])
    plain = tiny_pipeline("sd")
    plain.load_lora_weights(export(pipe, tmp_path / "lora.safetensors", format="kohya"))
    assert np.abs(draw(plain) - draw(pipe)).max() < 1e-5


# FLUX in its own widths.


def flux_lora(modules: dict[str, tuple[int, int]], **config: Any) -> Lora:
    """A LoRA of FLUX's widths: module → (inputs, outputs)."""
    generator = torch.Generator().manual_seed(0)
    ranks = config.get("rank_pattern", {})
    weights = {}
    for module, (inputs, outputs) in modules.items():
        rank = ranks.get(module.rpartition(".")[2], RANK)
        weights[f"{module}.lora_A.weight"] = torch.randn(rank, inputs, generator=generator)
        weights[f"{module}.lora_B.weight"] = torch.randn(outputs, rank, generator=generator)
    settings = {"r": RANK, "lora_alpha": ALPHA} | config
    return Lora("transformer", "FluxTransformer2DModel", settings, weights)


@pytest.mark.parametrize("config", [{}, {"rank_pattern": {"to_k": 2}, "alpha_pattern": {"to_k": 3}}])
def test_diffusers_takes_fused_layers_of_flux_apart_again(config: dict[str, Any], tmp_path: Path) -> None:
    from diffusers import FluxPipeline
    from safetensors.torch import save_file

    width = 3072
    double = {f"transformer_blocks.18.attn.{part}": (width, width) for part in ("to_q", "to_k", "to_v", "add_k_proj")}
    single = {f"single_transformer_blocks.37.attn.{part}": (width, width) for part in ("to_q", "to_k")}
    others = {
        "single_transformer_blocks.0.proj_mlp": (width, 4 * width),
        "single_transformer_blocks.0.proj_out": (5 * width, width),
        "single_transformer_blocks.0.norm.linear": (width, 3 * width),
    }
    lora = flux_lora(double | single | others, **config)
    tensors, _ = to_kohya(lora)
    save_file(tensors, tmp_path / "lora.safetensors")
    read = FluxPipeline.lora_state_dict(tmp_path / "lora.safetensors")
    for module, layer in lora.layers().items():
        x = torch.randn(layer.down.shape[1], generator=torch.Generator().manual_seed(1))
        theirs = read[f"transformer.{module}.lora_B.weight"] @ (read[f"transformer.{module}.lora_A.weight"] @ x)
        ours = layer.scale * layer.up @ (layer.down @ x)
        assert torch.allclose(theirs, ours, rtol=1e-4, atol=1e-4 * float(ours.abs().max()))
    # Parts of a fused layer that had no LoRA get one that does nothing.
    silent = {key for key in read if key.endswith("lora_B.weight")} - {
        f"transformer.{m}.lora_B.weight" for m in lora.layers()
    }
    assert silent and all(not read[key].any() or not read[key.replace("_B", "_A")].any() for key in silent)


# From a run's folder.


@pytest.mark.parametrize("kind", ["sd", "sd3", "flux"])
def test_a_runs_folder_exports_what_its_pipeline_does(kind: str, tmp_path: Path) -> None:
    pipe = with_lora(kind)
    save_trained(pipe, aligned_network(pipe)[1], tmp_path / "run")
    for format in ("diffusers", "peft", "comfy", *(("kohya",) if kind != "sd3" else ())):
        ours, theirs = path_of(tmp_path / "pipe", format), path_of(tmp_path / "folder", format)
        export(pipe, ours, format=format)  # type: ignore[arg-type]
        export(tmp_path / "run", theirs, format=format)  # type: ignore[arg-type]
        files = [ours] if format in FILES else sorted(ours.glob("*.safetensors"))
        for file in files:
            one, two = load_file(file), load_file(theirs if format in FILES else theirs / file.name)
            assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)


def test_an_old_file_without_metadata_has_its_rank_for_alpha(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    pipe = with_lora("sd")
    save_trained(pipe, pipe.unet, tmp_path)
    file = tmp_path / "pytorch_lora_weights.safetensors"
    save_file(load_file(file), file)
    assert {layer.scale for layer in lora_in(tmp_path).layers().values()} == {1.0}


# Precision and strength.


def test_another_precision_is_the_files_alone(tmp_path: Path) -> None:
    pipe = with_lora("sd")
    before = draw(pipe)
    export(pipe, tmp_path / "lora.safetensors", format="kohya", dtype=torch.float16)
    state = load_file(tmp_path / "lora.safetensors")
    assert {value.dtype for key, value in state.items() if "alpha" not in key} == {torch.float16}
    export(pipe, tmp_path / "merged", format="merged", dtype=torch.float16)
    for part in ("unet", "vae", "text_encoder"):
        file = next((tmp_path / "merged" / part).glob("*.safetensors"))
        assert torch.float32 not in {value.dtype for value in load_file(file).values()}
    assert np.array_equal(draw(pipe), before) and pipe.vae.dtype == torch.float32


def test_a_merge_is_as_strong_as_the_lora_acts(tmp_path: Path) -> None:
    from diffusers import DiffusionPipeline

    pipe = with_lora("sd")
    full = draw(pipe)
    pipe.set_adapters("default", 0.5)
    half = draw(pipe)
    export(pipe, tmp_path / "merged", format="merged")
    assert np.abs(draw(DiffusionPipeline.from_pretrained(tmp_path / "merged")) - half).max() < 1e-5
    # A LoRA file is not: its strength is chosen where it is loaded.
    plain = tiny_pipeline("sd")
    plain.load_lora_weights(export(pipe, tmp_path / "lora", format="diffusers"))
    assert np.abs(draw(plain) - full).max() < 1e-5


# What cannot be exported.


def refused(message: str, path: Path, source: Any, **options: Any) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        export(source, path, **options)
    assert "\n" not in str(caught.value) and not path.exists()


def test_what_cannot_be_exported_says_why(tmp_path: Path) -> None:
    pipe, file, folder = with_lora("sd"), tmp_path / "lora.safetensors", tmp_path / "lora"
    refused("format must be one of diffusers, peft", folder, pipe, format="webui")
    refused("kohya is written as one file: give a path that ends in .safetensors", folder, pipe, format="kohya")
    refused("peft is written as a folder, not a .safetensors file", file, pipe, format="peft")
    refused("unet carries no LoRA .*: export it as merged", file, tiny_pipeline("sd"), format="kohya")
    refused("no kohya file for a SD3Transformer2DModel", file, with_lora("sd3"), format="kohya")
    refused(
        "context_embedder has no place in a kohya file", file, with_lora("flux", ["context_embedder"]), format="kohya"
    )
    refused("lora_magnitude_vector is more than a low-rank pair", file, with_lora("sd", use_dora=True), format="comfy")
    save_trained(pipe, pipe.unet, tmp_path / "run")
    refused("merging .* needs its base", folder, tmp_path / "run", format="merged")
    sd3 = with_lora("sd3")
    save_trained(sd3, sd3.transformer, tmp_path / "sd3")
    refused("does not tell Stable Diffusion 3 from FLUX", file, tmp_path / "sd3", format="kohya")
    tiny_pipeline("sd").unet.save_pretrained(tmp_path / "full" / "unet")
    refused(r"holds no pytorch_lora_weights.safetensors \(found: unet\)", folder, tmp_path / "full", format="diffusers")
    pipe.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"]), adapter_name="second")
    refused("carries the LoRAs default, second: delete all but one", file, pipe, format="kohya")
    sd3.text_encoder.add_adapter(LoraConfig(r=2, target_modules=["q_proj"]))
    refused("text_encoder carries a LoRA too, which would be lost", file, sd3, format="comfy")
    refused("text_encoder carries a LoRA too", folder, sd3, format="merged")


@pytest.mark.parametrize("format", ["diffusers", "peft", "kohya", "merged"])
def test_a_full_disk_leaves_nothing_and_spoils_nothing(format: Any, tmp_path: Path, monkeypatch: Any) -> None:
    import diffusers.models.modeling_utils
    import safetensors.torch

    pipe, path = with_lora("sd"), path_of(tmp_path, format)

    def fails(*args: Any, **kwargs: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(safetensors.torch, "save_file", fails)
        patch.setattr(diffusers.models.modeling_utils.ModelMixin, "save_pretrained", fails)
        with pytest.raises(OSError, match="no space left on the disk"):
            export(pipe, path, format=format)
    assert list(tmp_path.iterdir()) == []
