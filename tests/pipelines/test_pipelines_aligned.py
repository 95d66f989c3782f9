"""Every form in which alignments are released goes onto its base and draws its source's picture; what does not fit is named."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from tiny import tiny_pipeline

from mmalign import SmPOPipeline
from mmalign.training.aligned import load_aligned
from mmalign.training.export import export

FILE = "diffusion_pytorch_model.safetensors"
ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]


def draw(pipe: Any) -> Any:
    options: dict[str, Any] = {"num_inference_steps": 2, "guidance_scale": 2.0, "output_type": "np"}
    options |= {"height": 16, "width": 16}
    return pipe("a red shirt", generator=torch.Generator().manual_seed(0), **options).images[0]


def theirs() -> Any:
    """The base with another UNet: what somebody aligned."""
    pipe = tiny_pipeline("sd")
    pipe.unet.load_state_dict(tiny_pipeline("sd", seed=3).unet.state_dict())
    return pipe


@pytest.fixture(scope="module")
def released(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A folder with every form, and the picture they all draw."""
    folder, pipe = tmp_path_factory.mktemp("released"), theirs()
    pipe.save_pretrained(folder / "pipeline")
    # Beside merged weights a LoRA file says what was merged; it must not be applied once more.
    save_file({"unet.conv_in.lora_A.weight": torch.ones(1)}, folder / "pipeline" / "pytorch_lora_weights.safetensors")
    pipe.unet.save_pretrained(folder / "subfolder" / "unet")
    pipe.unet.save_pretrained(folder / "root")
    pipe.unet.save_pretrained(folder / "shards", max_shard_size="200KB")
    pipe.unet.save_pretrained(folder / "variants")
    half = {key: value.half() for key, value in tiny_pipeline("sd").unet.state_dict().items()}
    save_file(half, folder / "variants" / "diffusion_pytorch_model.fp16.safetensors")
    (folder / "pickled").mkdir()
    torch.save(pipe.unet.state_dict(), folder / "pickled" / "unet.pth")
    return folder, draw(pipe)


@pytest.mark.parametrize(
    "form", ["pipeline", "subfolder", "root", f"root/{FILE}", "shards", "variants", "pickled", "pickled/unet.pth"]
)
def test_a_whole_network_draws_its_sources_picture(form: str, released: tuple[Path, Any]) -> None:
    folder, picture = released
    if form == "shards":
        assert len(list((folder / "shards").glob("*.safetensors"))) > 1
    pipe = tiny_pipeline("sd")
    assert np.abs(draw(pipe) - picture).max() > 1e-3
    assert load_aligned(pipe, folder / form, allow_pickle="pickled" in form) is None
    assert np.array_equal(draw(pipe), picture)


def test_only_the_asked_variant_is_taken_where_there_is_no_other(released: tuple[Path, Any], tmp_path: Path) -> None:
    folder, picture = released
    half = {key: value.half() for key, value in load_file(folder / "root" / FILE).items()}
    (tmp_path / "unet").mkdir()
    save_file(half, tmp_path / "unet" / "diffusion_pytorch_model.fp16.safetensors")
    pipe = tiny_pipeline("sd")
    load_aligned(pipe, tmp_path)
    # The base keeps its precision; the weights keep what half left of them.
    assert pipe.unet.dtype == torch.float32 and 0 < np.abs(draw(pipe) - picture).max() < 0.05


@pytest.mark.parametrize("kind", ["sd", "flux"])
@pytest.mark.parametrize("format", ["diffusers", "peft", "kohya", "comfy"])
def test_a_lora_of_any_kind_draws_its_sources_picture(kind: str, format: Any, tmp_path: Path) -> None:
    source = tiny_pipeline(kind)
    network = source.unet if kind == "sd" else source.transformer
    targets = ATTENTION if kind == "sd" else r"transformer_blocks\.\d+\.attn\.(to_q|to_k|to_out\.0)"
    config = LoraConfig(r=4, lora_alpha=7, target_modules=targets, init_lora_weights=False)
    network.add_adapter(config)
    path = tmp_path / ("lora.safetensors" if format in ("kohya", "comfy") else "lora")
    export(source, path, format=format)
    pipe = SmPOPipeline.from_pipe(tiny_pipeline(kind))
    before = draw(pipe)
    pipe.load_aligned(path, adapter_name="mine")
    assert np.abs(draw(pipe) - draw(source)).max() < 1e-5 and np.abs(draw(pipe) - before).max() > 1e-3
    pipe.set_adapters("mine", 0.5)
    source.set_adapters("default", 0.5)
    assert np.abs(draw(pipe) - draw(source)).max() < 1e-5
    # And round again, under the name it has here.
    pipe.export(tmp_path / "again", format="diffusers")
    pipe.delete_adapters("mine")
    pipe.load_aligned(tmp_path / "again")
    source.set_adapters("default", 1.0)
    assert np.abs(draw(pipe) - draw(source)).max() < 1e-5


def test_from_the_hub_only_what_is_read_is_fetched(released: tuple[Path, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    folder, picture = released
    asked: list[Any] = []

    def download(repo: str, allow_patterns: list[str]) -> str:
        asked.append((repo, allow_patterns))
        return str(folder / "pipeline")

    files = [path.relative_to(folder / "pipeline").as_posix() for path in (folder / "pipeline").rglob("*.*")]
    monkeypatch.setattr(huggingface_hub, "list_repo_files", lambda repo: [*files, "v1-5-pruned.safetensors"])
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    pipe = tiny_pipeline("sd")
    load_aligned(pipe, "somebody/aligned")
    assert np.array_equal(draw(pipe), picture)
    assert asked == [("somebody/aligned", [f"unet/{FILE}", "adapter_config.json"])]


# What does not fit.


@pytest.fixture
def base() -> Any:
    return tiny_pipeline("sd")


def refused(message: str, pipe: Any, path: Any, **options: Any) -> None:
    """One line, and the pipeline as it was."""
    before = {key: value.clone() for key, value in pipe.unet.state_dict().items()}
    with pytest.raises(ValueError, match=message) as caught:
        load_aligned(pipe, path, **options)
    assert "\n" not in str(caught.value)
    after = pipe.unet.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[key], before[key]) for key in before)


def test_another_network_is_told_by_its_first_key_and_its_kind(base: Any, tmp_path: Path) -> None:
    tiny_pipeline("sdxl").unet.save_pretrained(tmp_path / "xl")
    refused(
        r"does not fit the pipeline's UNet2DConditionModel: add_embedding.linear_1.bias is not in it. It seems to be the UNet of "
        "Stable Diffusion XL",
        base,
        tmp_path / "xl",
    )
    base.vae.save_pretrained(tmp_path / "vae")
    refused("decoder.* is not in it. It seems to be a VAE", base, tmp_path / "vae")
    state = base.unet.state_dict()
    save_file({f"model.diffusion_model.{key}": value for key, value in state.items()}, tmp_path / "ldm.safetensors")
    refused("It seems to be a single-file checkpoint: load it as the base", base, tmp_path / "ldm.safetensors")
    save_file({key: value for key, value in state.items() if key != "conv_out.bias"}, tmp_path / "less.safetensors")
    refused("conv_out.bias is missing. It seems to be a UNet", base, tmp_path / "less.safetensors")
    save_file(state | {"conv_in.bias": torch.zeros(3)}, tmp_path / "wide.safetensors")
    refused(r"conv_in.bias is \(3,\) there and \(8,\) here", base, tmp_path / "wide.safetensors")


def test_a_lora_of_another_model_is_told(base: Any, tmp_path: Path) -> None:
    xl = tiny_pipeline("sdxl")
    xl.unet.add_adapter(LoraConfig(r=2, target_modules=["attn2.to_k"], init_lora_weights=False))
    for format, name in (("diffusers", "xl"), ("peft", "xl-peft"), ("kohya", "xl.safetensors")):
        export(xl, tmp_path / name, format=format)  # type: ignore[arg-type]
        refused(
            r"attn2.to_k.lora_A.weight is 32 wide and .*attn2.to_k is 16. It seems to be a LoRA", base, tmp_path / name
        )
    (tmp_path / "xl-peft" / "adapter_config.json").unlink()
    lone = {"base_model.model.mid_block.attentions.0.transformer_blocks.0.attn2.to_k.lora_A.weight": torch.ones(2, 16)}
    save_file(lone, tmp_path / "lone.safetensors")
    refused("needs the adapter_config.json that peft wrote beside it", base, tmp_path / "lone.safetensors")
    save_file({"transformer.x.lora_A.weight": torch.ones(1, 1)}, tmp_path / "other.safetensors")
    refused("no key starts with unet., the first is transformer.x.lora_A.weight", base, tmp_path / "other.safetensors")
    save_file({"unet.x.lora_A.weight": torch.ones(1, 1)}, tmp_path / "odd.safetensors")
    refused("x is not in it. It seems to be a LoRA", base, tmp_path / "odd.safetensors")
    save_file({"lora_unet_x.alpha": torch.ones(())}, tmp_path / "junk.safetensors")
    refused("is a LoRA that diffusers cannot read for StableDiffusionPipeline", base, tmp_path / "junk.safetensors")


def test_pickles_are_read_only_when_asked_for_and_only_tensors(released: Any, base: Any, tmp_path: Path) -> None:
    folder, _ = released
    refused(r"holds pickled weights only \(unet.pth\).*allow_pickle=True", base, folder / "pickled")
    torch.save({"x": Path("x")}, tmp_path / "unet.pth")
    refused("holds more than tensors, and reading it could run code", base, tmp_path / "unet.pth", allow_pickle=True)
    shutil.copytree(folder / "pickled", tmp_path / "old" / "unet")
    save_file({"x": torch.ones(1)}, tmp_path / "old" / "v1-5.safetensors")
    refused(r"holds pickled weights only \(unet/unet.pth\)", base, tmp_path / "old")


def test_a_place_that_holds_nothing_is_told(base: Any, tmp_path: Path) -> None:
    refused("no such file or folder, and no Hub id", base, tmp_path / "nowhere")
    (tmp_path / "notes.txt").write_text("x")
    refused(r"holds no LoRA \(found: notes.txt\), and no unet/", base, tmp_path)
    refused(r"holds no LoRA \(found: notes.txt\)", base, tmp_path / "notes.txt")
    for name in ("a", "b"):
        save_file({"x": torch.ones(1)}, tmp_path / f"{name}.safetensors")
    refused(r"holds several weight files \(a.safetensors, b.safetensors\): name one", base, tmp_path)


def test_a_network_does_not_go_under_a_lora(released: Any, base: Any) -> None:
    base.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"]))
    refused("the pipeline carries a LoRA: load the whole network before it", base, released[0] / "root")
