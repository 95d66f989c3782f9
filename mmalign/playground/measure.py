"""What the playground's parts can do, measured on photographs and prompts that none of them was trained on."""

import io
import json
from typing import Any, Literal

import torch
from datasets import Dataset
from diffusers import AutoencoderKL, StableDiffusionPipeline
from PIL import Image

from mmalign import rewards
from mmalign.playground import judges, photographs, scene_judges, scene_prompts, scenes, world
from mmalign.playground import pairs as preference_pairs
from mmalign.playground.paths import CURVES, PAIRS

_TEST_STREAM = 901
GUIDANCE_SCALES = (1.0, 1.5, 2.0, 3.0, 4.0)
SCENE_GUIDANCE_SCALES = (2.0, 4.0, 6.0)


def test_pictures(number: int) -> tuple[torch.Tensor, world.Scenes]:
    """Pictures composed from test photographs."""
    data, rows = photographs.load("test"), torch.arange(number)
    scenes = world.draw_scenes(data.labels, rows, seed=_TEST_STREAM)
    return world.compose(data, rows, scenes), scenes


def judges_on_photographs(number: int = 4000) -> dict[str, Any]:
    """Held-out accuracy of both judges, how well they see damage, and how often they agree."""
    images, scenes = test_pictures(number)
    harmed, level = judges.damaged(images, torch.Generator().manual_seed(0))
    result: dict[str, Any] = {"pictures": number}
    readings = {}
    for name in ("A", "B"):
        judge = judges.load(name)
        readings[name] = judge.read(images)
        matched = judges.match(readings[name], scenes.captions())
        clean = judge.read(harmed).clean
        result[name] = {
            "garment_accuracy": _share(matched.garment),
            "colour_accuracy": _share(matched.colour),
            "background_accuracy": _share(matched.background),
            "all_three": _share(matched.all),
            "clean_correlation_with_damage": round(float(torch.corrcoef(torch.stack([clean, level]))[0, 1]), 4),
        }
    result["garment_agreement"] = _share(readings["A"].garment.argmax(1) == readings["B"].garment.argmax(1))
    return result


def reward_on_photographs(number: int = 2000) -> dict[str, Any]:
    """How often the reward prefers the true caption to one in which the garment, colour or background is another."""
    images, scenes = test_pictures(number)
    scorer = rewards.scorer("playground")
    pictures = [Image.fromarray((image.movedim(0, -1) * 255).round().byte().numpy()) for image in images]
    true = scorer.score(pictures, scenes.captions())
    result: dict[str, Any] = {"pictures": number}
    shown = torch.stack([scenes.garment, scenes.colour, scenes.background], 1)
    for part, name in enumerate(("garment", "colour", "background")):
        captions = []
        for i in range(number):
            asked = shown[i].clone()
            asked[part] = (asked[part] + 1 + i % 6) % 8
            if asked[1] == asked[2]:
                asked[part] = (asked[part] + 1) % 8
            garment, colour, background = asked.tolist()
            captions.append(world.caption(garment, colour, background, int(scenes.template[i])))
        changed = torch.tensor([c != t for c, t in zip(captions, scenes.captions(), strict=True)])
        result[f"prefers_true_{name}"] = _share((true > scorer.score(pictures, captions))[changed])
    return result


def base_accuracy(
    pipe: StableDiffusionPipeline, prompts: list[str], guidance_scale: float, seed: int, judge: photographs.Half
) -> dict[str, float]:
    """How often the pipeline draws what was asked, and how clean its pictures are."""
    seeds = list(range(seed, seed + len(prompts)))
    images = preference_pairs.draw(pipe, prompts, seeds, guidance_scale)
    reading = judges.load(judge).read(judges.to_tensor(images))
    matched = judges.match(reading, prompts)
    parts = {
        "garment": matched.garment,
        "colour": matched.colour,
        "background": matched.background,
        "all_three": matched.all,
    }
    clean = {
        "clean": round(float(reading.clean.mean()), 4),
        "score": round(float(judges.score(reading, matched).mean()), 4),
    }
    return {name: _share(part) for name, part in parts.items()} | clean


def choose_guidance(pipe: StableDiffusionPipeline, number: int = 128) -> dict[str, Any]:
    """Sweeps guidance on training prompts, takes judge A's best mean score, and has B measure that scale on test prompts."""
    prompts = preference_pairs.prompts()
    train, test = prompts.train[:: len(prompts.train) // number][:number], prompts.test
    sweep = {str(scale): base_accuracy(pipe, train, scale, 10_000, "A") for scale in GUIDANCE_SCALES}
    best = max(sweep, key=lambda scale: sweep[scale]["score"])
    measured = base_accuracy(pipe, test, float(best), 20_000, "B")
    return {
        "guidance_scale": float(best),
        "sweep": {"judge": "A", "prompts": len(train), "by_scale": sweep},
        "test": {"judge": "B", "prompts": len(test), **measured},
    }


def chosen_guidance(model: Literal["base", "scene-base"] = "base") -> float:
    """The guidance scale that was fixed for a world's base."""
    return json.loads((CURVES / f"{model}-measured.json").read_text())["guidance_scale"]


def pairs() -> dict[str, Any]:
    """What the preference set holds, and how often its labels agree with judges A and B."""
    result: dict[str, Any] = {}
    for split in ("train", "test"):
        data = Dataset.from_parquet(str(PAIRS / f"{split}.parquet"), keep_in_memory=True)
        label = torch.tensor(data["label_0"])
        images = [judges.to_tensor([Image.open(io.BytesIO(x)) for x in data[column]]) for column in ("jpg_0", "jpg_1")]
        result[split] = {"pairs": len(data), "ties": _share(label == 0.5), "users": len(set(data["user_id"]))}
        for name in ("A", "B"):
            judge = judges.load(name)
            scores = []
            for part in images:
                reading = judge.read(part)
                scores.append(judges.score(reading, judges.match(reading, list(data["caption"]))))
            agree = ((scores[0] > scores[1]).float() == label)[label != 0.5]
            result[split][f"labels_agree_with_{name}"] = _share(agree)
    return result


def scene_autoencoder(vae: AutoencoderKL, number: int = 500) -> dict[str, Any]:
    """What is left of scenes of test photographs that went through the autoencoder, by judge B; and of those that did not."""
    data, rows = photographs.load("test"), torch.arange(number)
    cells = scenes.draw_scenes(data.labels, rows, seed=_TEST_STREAM)
    pixels = scenes.compose(data, rows, cells)
    with torch.no_grad():
        drawn = torch.cat([vae.decode(vae.encode(part * 2 - 1).latent_dist.mean).sample for part in pixels.split(50)])
    drawn = (drawn / 2 + 0.5).clamp(0, 1)
    result: dict[str, Any] = {"scenes": number, "mean_absolute_error": round(float((drawn - pixels).abs().mean()), 4)}
    for name, images in (("composed", pixels), ("through_autoencoder", drawn)):
        matched = judges.match(judges.load("B").read(scenes.split(images)), cells.captions())
        result[name] = {
            "garment": _share(matched.garment),
            "colour": _share(matched.colour),
            "background": _share(matched.background),
        }
    return result


def scene_accuracy(
    pipe: StableDiffusionPipeline, captions: list[str], guidance_scale: float, seed: int, judge: photographs.Half
) -> dict[str, Any]:
    """The share of stated attributes that the pipeline draws; `chance`: that the same pictures show of the next row's caption."""
    images = preference_pairs.draw(pipe, captions, list(range(seed, seed + len(captions))), guidance_scale)
    reader = scene_judges.load(judge)
    shown = reader.read(images, captions)
    garment, colour, background = (_share(part) for part in shown.stated.unbind(1))
    return {
        "share": round(shown.share(), 4),
        "garment": garment,
        "colour": colour,
        "background": background,
        "by_sentence": [round(share, 4) for share in shown.by_position().tolist()],
        "chance": round(reader.read(images, captions[1:] + captions[:1]).share(), 4),
    }


def choose_scene_guidance(pipe: StableDiffusionPipeline, number: int = 96) -> dict[str, Any]:
    """Sweeps guidance on training prompts by judge A's share, and has B measure the best scale on test prompts of every length.

    Long prompts are cut at 77 tokens, as everywhere in Stable Diffusion: what alignment has to make good.
    """
    train = scene_prompts.short_prompts("train", number, 2)
    sweep = {str(scale): scene_accuracy(pipe, train, scale, 30_000, "A") for scale in SCENE_GUIDANCE_SCALES}
    best = max(sweep, key=lambda scale: sweep[scale]["share"])
    test = {
        "one_sentence": scene_prompts.short_prompts("test", 2 * number, 1),
        "two_sentences": scene_prompts.short_prompts("test", 2 * number, 2),
        "four_sentences_cut": scene_prompts.prompts().test[: 2 * number],
    }
    measured = {name: scene_accuracy(pipe, captions, float(best), 40_000, "B") for name, captions in test.items()}
    return {
        "guidance_scale": float(best),
        "sweep": {"judge": "A", "prompts": number, "by_scale": sweep},
        "test": {"judge": "B", "prompts": 2 * number, **measured},
    }


def _share(values: torch.Tensor) -> float:
    return round(float(values.float().mean()), 4)
