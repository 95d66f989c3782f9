"""Builds everything in `assets/` from the photographs: `python -m mmalign.playground.build STEP --work-dir DIR`.

Steps, in order: photographs, autoencoder, judges, reward, base, guidance, pairs, scene-base, scene-guidance, vision-base, video-base,
mistakes. Each writes its result, its loss curve and what was measured on held-out photographs; each can be stopped and resumed.
Everything together takes a few hours on two CPU cores.
"""

import argparse
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file, save
from transformers import CLIPImageProcessorPil

from mmalign.files import write_file, write_json
from mmalign.playground import (
    answer_pairs,
    answering,
    autoencoder,
    base,
    judges,
    measure,
    pairs,
    photographs,
    reward,
    scene_base,
    scene_text,
    video_base,
    vision_base,
)
from mmalign.playground.answer_worlds import WorldName
from mmalign.playground.paths import ASSETS, CURVES, PAIRS, REWARD_CLIP, SCENES, STABLE_DIFFUSION, VIDEO, VISION
from mmalign.training.loading import load_base, scene_vae
from mmalign.training.token_pipeline import TokenPipeline


def build_photographs(work_dir: Path) -> None:
    """Writes the photographs that ship with the package."""
    photographs.write_shipped()


def build_autoencoder(work_dir: Path) -> None:
    """Trains the autoencoder."""
    model, curve = autoencoder.train(work_dir)
    _replace_folder(STABLE_DIFFUSION / "vae", lambda folder: model.half().save_pretrained(folder))
    write_json(CURVES / "autoencoder.json", curve)


def build_judges(work_dir: Path) -> None:
    """Trains judges A and B."""
    for half in ("A", "B"):
        judge, curve = judges.train(half, work_dir / f"judge-{half}.pt")
        judges.save(judge)
        write_json(CURVES / f"judge-{half}.json", curve)
    write_json(CURVES / "judges-measured.json", measure.judges_on_photographs())


def build_reward(work_dir: Path) -> None:
    """Trains the reward CLIP."""
    model, vocabulary, curve = reward.train(work_dir / "reward.pt")
    processor = CLIPImageProcessorPil(
        do_resize=True,
        size={"height": 32, "width": 32},
        do_center_crop=False,
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )

    def write(folder: Path) -> None:
        model.half().save_pretrained(folder)
        vocabulary.save_pretrained(folder)
        processor.save_pretrained(folder)

    _replace_folder(REWARD_CLIP, write)
    write_json(CURVES / "reward.json", curve)
    write_json(CURVES / "reward-measured.json", measure.reward_on_photographs())


def build_base(work_dir: Path) -> None:
    """Trains the Stable Diffusion."""
    vae = AutoencoderKL.from_pretrained(STABLE_DIFFUSION / "vae", torch_dtype=torch.float32)
    vae.register_to_config(_name_or_path="")
    pipe, curve = base.train(vae, work_dir / "base.pt")
    _replace_folder(STABLE_DIFFUSION, lambda folder: pipe.to(torch.float16).save_pretrained(folder))
    write_json(CURVES / "base.json", curve)


def build_guidance(work_dir: Path) -> None:
    """Chooses the base's own guidance scale on training prompts, before any alignment, and measures it on test prompts."""
    pipe = StableDiffusionPipeline.from_pretrained(STABLE_DIFFUSION, torch_dtype=torch.float32)
    write_json(CURVES / "base-measured.json", measure.choose_guidance(pipe))


def build_pairs(work_dir: Path) -> None:
    """Draws and compares the preference pairs."""
    pipe = StableDiffusionPipeline.from_pretrained(STABLE_DIFFUSION, torch_dtype=torch.float32)
    for split, number in (("train", pairs.NUM_TRAIN), ("test", pairs.NUM_TEST)):
        pairs.save(pairs.build(pipe, measure.chosen_guidance(), split, number), PAIRS / f"{split}.parquet")
    write_json(CURVES / "pairs-measured.json", measure.pairs())


def build_scene_base(work_dir: Path) -> None:
    """Trains the scene world's Stable Diffusion, all but its autoencoder, which is the first world's and not stored again."""
    text_encoder, text_curve = scene_text.train(work_dir / "scene-text.pt")
    unet = UNet2DConditionModel.from_pretrained(STABLE_DIFFUSION / "unet", torch_dtype=torch.float32)
    unet.register_to_config(_name_or_path="")
    pipe, curve = scene_base.train(scene_vae(torch.float32), unet, text_encoder, work_dir)

    def write(folder: Path) -> None:
        pipe.to(torch.float16).save_pretrained(folder)
        shutil.rmtree(folder / "vae")
        store_in_8_bits(folder / "unet" / "diffusion_pytorch_model.safetensors", dimensions=4, entries=20_000)

    _replace_folder(SCENES, write)
    write_json(CURVES / "scene-text.json", text_curve)
    write_json(CURVES / "scene-base.json", curve)


def store_in_8_bits(file: Path, *, dimensions: int, entries: int) -> None:
    """Rounds the weights of a file with so many dimensions and over so many entries to float8 (e4m3): `assets/` has room for 25 MiB."""
    rounded = {
        name: weight.to(torch.float8_e4m3fn) if weight.ndim == dimensions and weight.numel() > entries else weight
        for name, weight in load_file(file).items()
    }
    write_file(file, save(rounded, metadata={"format": "pt"}))


def build_scene_guidance(work_dir: Path) -> None:
    """Measures the autoencoder on scenes; chooses the guidance scale on training prompts, and measures it on test prompts."""
    pipe = load_base("playground-scenes")
    measured = {"autoencoder": measure.scene_autoencoder(pipe.vae)}
    pipe.vae.disable_tiling()
    measured["autoencoder_without_tiles"] = measure.scene_autoencoder(pipe.vae)
    pipe.vae.enable_tiling()
    write_json(CURVES / "scene-base-measured.json", measured | measure.choose_scene_guidance(pipe))


def build_vision_base(work_dir: Path) -> None:
    """Trains the LFM2-VL that answers about pictures, and measures it on held-out photographs."""
    _build_answers("vision", VISION, *vision_base.train(work_dir))


def build_video_base(work_dir: Path) -> None:
    """Trains the LLaVA-OneVision that answers about clips, and measures it likewise."""
    _build_answers("video", VIDEO, *video_base.train(work_dir))


def _build_answers(world: WorldName, target: Path, model: Any, processor: Any, curve: list[dict[str, float]]) -> None:
    def write(folder: Path) -> None:
        model.half().save_pretrained(folder)
        store_in_8_bits(folder / "model.safetensors", dimensions=2, entries=4_000)
        processor.save_pretrained(folder)

    _replace_folder(target, write)
    write_json(CURVES / f"{world}-base.json", curve)
    write_json(CURVES / f"{world}-base-measured.json", answering.held_out(TokenPipeline.from_pretrained(target), world))


def build_mistakes(work_dir: Path) -> None:
    """Collects the mistakes of both as preference pairs, about what they see clean and perturbed."""
    measured = {}
    for world in get_args(WorldName):
        pipe = TokenPipeline.from_pretrained(f"playground-{world}")
        for split, number in answer_pairs.NUMBER.items():
            kept = []
            for view, perturbed in (("clean", False), ("perturbed", True)):
                found, counted = answer_pairs.find(
                    pipe.model, pipe.processor, world, split, number, perturbed=perturbed
                )
                kept += found
                measured[f"{world} ({split}, {view})"] = counted
            answer_pairs.save(world, split, kept)
    write_json(CURVES / "mistakes-measured.json", measured)


STEPS: dict[str, Callable[[Path], None]] = {
    "photographs": build_photographs,
    "autoencoder": build_autoencoder,
    "judges": build_judges,
    "reward": build_reward,
    "base": build_base,
    "guidance": build_guidance,
    "pairs": build_pairs,
    "scene-base": build_scene_base,
    "scene-guidance": build_scene_guidance,
    "vision-base": build_vision_base,
    "video-base": build_video_base,
    "mistakes": build_mistakes,
}


def _replace_folder(target: Path, write: Callable[[Path], object]) -> None:
    part = target.with_name(target.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    write(part)
    shutil.rmtree(target, ignore_errors=True)
    part.rename(target)


def main() -> None:
    """Runs the named steps."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("steps", nargs="+", choices=[*STEPS, "all"])
    parser.add_argument(
        "--work-dir", type=Path, default=Path("build/playground"), help="where unfinished training is kept"
    )
    args = parser.parse_args()
    ASSETS.mkdir(exist_ok=True)
    args.work_dir.mkdir(parents=True, exist_ok=True)
    for step in STEPS if "all" in args.steps else args.steps:
        STEPS[step](args.work_dir)


if __name__ == "__main__":
    main()
