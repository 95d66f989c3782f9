"""Weight files are read without running what is in them, and their absence ends with a remedy."""

import errno
import os
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError

from mmalign.rewards import AestheticScorer, ImageRewardScorer, scorer
from mmalign.rewards.checkpoints import absence_explained, fit_weights, read_checkpoint


class Harmful:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (os.environ["HARM"],)


def test_files_run_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    harm = tmp_path / "harm"
    monkeypatch.setenv("HARM", str(harm))
    torch.save({"state_dict": {"a": torch.ones(1)}, "more": Harmful()}, tmp_path / "bad.pt")
    with pytest.raises(ValueError, match="save its state dict as .safetensors"):
        read_checkpoint(tmp_path / "bad.pt")
    assert not harm.exists()


def test_files_with_and_without_a_wrapper_are_the_same(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    tensors = {"a": torch.arange(3.0), "b": torch.ones(2, 2, dtype=torch.float16)}
    torch.save(tensors, tmp_path / "bare.pth")
    torch.save({"epoch": 3, "state_dict": tensors}, tmp_path / "wrapped.pt")
    save_file(tensors, tmp_path / "file.safetensors")
    for name in ("bare.pth", "wrapped.pt", "file.safetensors"):
        read = read_checkpoint(tmp_path / name)
        assert read.keys() == tensors.keys() and all(torch.equal(read[key], tensors[key]) for key in tensors)


def test_what_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is no file: give the path"):
        scorer(f"hpsv2:{tmp_path / 'none.pt'}")
    for content in (torch.ones(2), {"epoch": 3}, {"state_dict": [torch.ones(1)]}):
        torch.save(content, tmp_path / "odd.pt")
        with pytest.raises(ValueError, match="holds no state dict"):
            read_checkpoint(tmp_path / "odd.pt")


def test_weights_keep_their_dtype_and_replace_those_on_meta() -> None:
    layer = torch.nn.Linear(3, 2, device="meta")
    fit_weights(layer, {"weight": torch.ones(2, 3, dtype=torch.float16), "bias": torch.zeros(2)}, "a layer")
    assert layer.weight.dtype == torch.float16 and layer.bias.device.type == "cpu"


@pytest.mark.parametrize(
    ("name", "repo", "file"),
    [
        ("hpsv2", "xswu/HPSv2", "HPS_v2_compressed.pt"),
        ("hpsv2.1", "xswu/HPSv2", "HPS_v2.1_compressed.pt"),
        ("hpsv3", "MizzenAI/HPSv3", "HPSv3.safetensors"),
        ("aesthetic", "trl-lib/ddpo-aesthetic-predictor", "aesthetic-model.pth"),
        ("imagereward", "THUDM/ImageReward", "ImageReward.pt"),
    ],
)
def test_absent_weights_name_the_remedy(monkeypatch: pytest.MonkeyPatch, name: str, repo: str, file: str) -> None:
    def unreachable(*_: Any, **__: Any) -> None:
        raise LocalEntryNotFoundError("no network")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", unreachable)
    with pytest.raises(ValueError, match=f"run `hf download {repo} {file} .* and ask for '{name}:<file>'"):
        scorer(name)


def test_absent_second_parts_name_the_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers

    from mmalign.rewards import aesthetic, imagereward

    def unreachable(*_: Any, **__: Any) -> None:
        raise OSError("We couldn't connect")

    monkeypatch.setattr(aesthetic, "read_checkpoint", lambda path: {})
    monkeypatch.setattr(aesthetic, "linear_head", lambda state, what: None)
    monkeypatch.setattr(transformers.CLIPModel, "from_pretrained", unreachable)
    with pytest.raises(
        ValueError, match="download openai/clip-vit-large-patch14 from the Hub and pass .*clip=<folder>"
    ):
        AestheticScorer.from_file(tmp_path)
    monkeypatch.setattr(imagereward, "read_checkpoint", lambda path: {"blip": torch.ones(1)})
    for name in ("part_of", "_vision", "_text", "linear_head"):
        monkeypatch.setattr(imagereward, name, lambda *_: torch.nn.Identity())
    monkeypatch.setattr(transformers.BertTokenizer, "from_pretrained", unreachable)
    with pytest.raises(ValueError, match="download google-bert/bert-base-uncased .* pass .*tokenizer=<folder>"):
        ImageRewardScorer.from_file(tmp_path)


def test_absent_clips_name_the_remedy(clip_folder: Path, tmp_path: Path) -> None:
    from transformers import CLIPModel

    with pytest.raises(
        ValueError, match="^[^\n]*no file named model.safetensors[^\n]*: download [^\n]* pass its folder$"
    ):
        (tmp_path / "config.json").write_bytes((clip_folder / "config.json").read_bytes())
        scorer(f"clip:{tmp_path}")
    CLIPModel.from_pretrained(clip_folder).save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match="^[^\n]*: download tokenizer and preprocessing of .* pass processor=<folder>$"
    ):
        scorer(f"clip:{tmp_path}")


def test_faults_of_the_machine_pass_unchanged() -> None:
    with pytest.raises(OSError, match="No space left") as caught, absence_explained("download it"):
        raise OSError(errno.ENOSPC, "No space left")
    assert not isinstance(caught.value, ValueError)
