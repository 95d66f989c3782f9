"""The verbs for real, on a tiny random Stable Diffusion and eight made-up pairs: train, go on, draw, invert, evaluate."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny import save_tiny, tiny_tokenizer

from mmalign import cli

PROMPTS = ("a red shirt", "a blue bag on white", "a green dress", "black sneaker on red background")
SMALL = ["--lora-r", "2", "--per-device-train-batch-size", "2", "--logging-steps", "1", "--use-cpu", "--disable-tqdm"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a model, pairs, a scorer and prompts; everything that runs write lies in it too."""
    folder = tmp_path_factory.mktemp("cli")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("MMALIGN_CACHE", str(folder / "cache"))
        patch.setenv("HF_HUB_OFFLINE", "1")
        for name in ("WORLD_SIZE", "RANK", "MMALIGN_LAUNCHED"):
            patch.delenv(name, raising=False)
        save_tiny("sd", folder / "model")
        save_pairs(folder / "pairs")
        save_clip(folder / "clip")
        (folder / "prompts.txt").write_text("\n".join(PROMPTS))
        yield folder


def save_pairs(folder, number=8):
    rng = np.random.default_rng(0)
    folder.mkdir()
    rows = []
    for i in range(number):
        for side, (low, high) in {"chosen": (60, 255), "rejected": (0, 200)}.items():
            Image.fromarray(rng.integers(low, high, (16, 20, 3), dtype=np.uint8)).save(folder / f"{i}-{side}.png")
        rows.append({"prompt": PROMPTS[i % 4], "chosen": f"{i}-chosen.png", "rejected": f"{i}-rejected.png"})
        rows[-1] |= {"chosen_score": i, "rejected_score": 3}
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))


def save_clip(folder):
    import torch
    from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel

    tokenizer = tiny_tokenizer()
    tokenizer.model_max_length = 16
    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    special = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    text = small | special | {"vocab_size": len(tokenizer), "max_position_embeddings": 16}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = CLIPConfig(
            text_config=text, vision_config=small | {"image_size": 16, "patch_size": 8}, projection_dim=8
        )
        CLIPModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    size = {"height": 16, "width": 16}
    CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size=size).save_pretrained(folder)


def train(method, folder, *words):
    return cli.main(
        ["train", method, "--model", "model", "--data", "pairs", "--output-dir", str(folder), *SMALL, *words]
    )


def losses(folder):
    history = json.loads((Path(folder) / "history.json").read_text())
    return [entry["loss"] for entry in history if "loss" in entry]


@pytest.fixture(scope="module")
def run(place):
    """A finished run of Diffusion-DPO: four steps, a checkpoint at two and at four."""
    assert train("dpo", "run", "--max-steps", "4", "--save-steps", "2", "--learning-rate", "1e-3") == 0
    return place / "run"


def test_a_run_says_where_everything_is_and_what_to_type_next(place, capsys):
    words = ["--max-steps", "1", "--comparison", "smoothed", "--scorer", "clip:clip", "--inversion-steps", "2"]
    assert train("smpo", "smpo run", *words) == 0
    shown = capsys.readouterr().out
    for name in ("pytorch_lora_weights.safetensors", "history.json", "smoothing.json", "checkpoint-1"):
        assert name in shown and (place / "smpo run" / name).exists()
    assert "mmalign generate --model model --lora 'smpo run' --prompts prompts.txt" in shown
    assert "mmalign evaluate" in shown and "--trained-on clip:clip" in shown


def test_a_reward_of_the_data_judges_nothing_that_the_run_draws(place, capsys):
    words = ["--max-steps", "1", "--comparison", "relabel", "--scorer", "column:score"]
    assert train("dpo", "column run", *words) == 0
    assert "mmalign evaluate" in (shown := capsys.readouterr().out) and "--trained-on" not in shown


def test_a_run_from_yaml_is_the_run_from_the_command_line(place, run, capsys):
    words = ["--max-steps", "2", "--learning-rate", "1e-3", "--output-dir", "again"]
    base = ["train", "dpo", "--model", "model", "--data", "pairs", *SMALL]
    assert cli.main([*base, *words, "--print-config"]) == 0
    (place / "run.yaml").write_text(capsys.readouterr().out)
    assert cli.main(["train", "dpo", "--config", "run.yaml"]) == 0
    assert losses("again") == losses(run)[:2]


def test_stopped_and_resumed_is_uninterrupted(place, run):
    words = ["--save-steps", "2", "--learning-rate", "1e-3"]
    assert train("dpo", "resumed", "--max-steps", "2", *words) == 0
    assert train("dpo", "resumed", "--max-steps", "4", "--resume_from_checkpoint", "latest", *words) == 0
    assert losses("resumed") == pytest.approx(losses(run), rel=1e-6)


def test_an_earlier_run_is_not_written_over(run, capsys):
    assert train("dpo", "run", "--max-steps", "4") == 2
    assert "run already holds checkpoint-4: go on with --resume-from-checkpoint latest" in capsys.readouterr().err


def test_interrupted_says_how_to_go_on(run, capsys, monkeypatch):
    from mmalign.training.trainer import DenoiserTrainer

    def stop(self, *args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(DenoiserTrainer, "train", stop)
    words = ["--max-steps", "6", "--resume-from-checkpoint", "checkpoint-2"]
    assert train("dpo", "run", *words) == 130
    shown = capsys.readouterr().err
    assert "checkpoint-4 is whole. Go on with:" in shown
    assert shown.rstrip().endswith("--max-steps 6 --resume-from-checkpoint latest")
    assert train("dpo", "fresh", "--max-steps", "6") == 130
    assert "before the first checkpoint" in capsys.readouterr().err


def test_full_fine_tuning_saves_a_pipeline_that_plain_diffusers_loads(place, capsys):
    from diffusers import DiffusionPipeline

    assert train("sft", "full", "--max-steps", "1", "--full", "--save-strategy", "no") == 2
    assert "--full trains every weight, so --lora-r has no effect" in capsys.readouterr().err
    base = ["train", "sft", "--model", "model", "--data", "pairs", "--output-dir", "full", *SMALL[2:]]
    assert cli.main([*base, "--max-steps", "1", "--full", "--save-strategy", "no", "--max-rows", "4"]) == 0
    assert type(DiffusionPipeline.from_pretrained("full/pipeline")).__name__ == "StableDiffusionPipeline"
    assert "mmalign generate --model full/pipeline" in capsys.readouterr().out


def test_generate_writes_pictures_that_depend_on_prompt_and_seed_only(place, run, capsys):
    words = ["generate", "--model", "model", "--lora", "run", "--steps", "2", "--guidance-scale", "2"]
    assert cli.main([*words, "--prompt", *PROMPTS[:2], "--seeds", "3", "4", "--output-dir", "four"]) == 0
    assert "4 pictures in four/; all on one sheet: four/grid.png" in capsys.readouterr().out
    assert sorted(path.name for path in (place / "four").iterdir()) == [
        "0000-seed3-a-red-shirt.png",
        "0001-seed4-a-red-shirt.png",
        "0002-seed3-a-blue-bag-on-white.png",
        "0003-seed4-a-blue-bag-on-white.png",
        "grid.png",
        "metadata.jsonl",
    ]
    assert cli.main([*words, "--prompt", PROMPTS[1], "--seed", "4", "--no-grid", "--output-dir", "one"]) == 0
    one, four = (np.asarray(Image.open(place / name)).astype(int) for name in (
        "one/0000-seed4-a-blue-bag-on-white.png",
        "four/0003-seed4-a-blue-bag-on-white.png",
    ))  # fmt: skip
    assert np.abs(one - four).max() <= 1
    assert cli.main([*words[:3], "--prompt", PROMPTS[1], "--seed", "4", "--steps", "2", "--output-dir", "base"]) == 0
    base = np.asarray(Image.open(place / "base/0000-seed4-a-blue-bag-on-white.png")).astype(int)
    assert np.abs(base - one).max() > 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--prompt", "a", "--lora", "pairs"], "pairs holds no LoRA (found: 0-chosen.png"),
        (["--prompt", "a", "--model", "pairs"], "pairs is no diffusers pipeline"),
        (["--prompt", "a", "--model", "run"], "run holds a LoRA, not a pipeline"),
        (["--prompts", "nowhere.txt"], "nowhere.txt: no such prompt file"),
        ([], 'no prompts: give --prompt "…"'),
        (["--prompt", "a", "--seed", "1", "--seeds", "1", "2"], "--seed and --seeds both say"),
        (["--prompt", "a", "--num-frames", "9"], "num_frames=9 has no effect: StableDiffusionPipeline draws pictures"),
        (
            ["--prompt", "a", "--frames-per-second", "9"],
            "--frames-per-second must be positive, and is for video models",
        ),
    ],
)
def test_what_generate_refuses(run, words, message, capsys):
    assert cli.main(["generate", "--model", "model", *words]) == 2
    assert message in capsys.readouterr().err


def test_invert_reports_the_round_trip(place, capsys):
    words = ["invert", "--model", "model", "--prompt", PROMPTS[0], "--output-dir", "inverted", "--timestep", "300"]
    assert cli.main([*words, "--image", "pairs/0-chosen.png", "pairs/1-chosen.png", "--num-steps", "20"]) == 0
    content = json.loads((place / "inverted" / "inversion.json").read_text())
    assert content["settings"]["num_steps"] == 20 and len(content["pictures"]) == 2
    for row in content["pictures"]:
        # What the VAE loses comes before what the inversion loses.
        assert row["latent_rmse"] < 1 and row["pixel_rmse"] == pytest.approx(row["vae_pixel_rmse"], abs=0.2)
    assert Image.open(place / "inverted" / "inversion.png").width > 300
    assert "0-chosen.png" in capsys.readouterr().out
    assert cli.main([*words, "--image", "pairs/0-chosen.png", "--prompt", "a", "b"]) == 2


def test_a_video_model_is_trained_on_clips_and_draws_them(place, capsys):
    from mmalign.data.clips import read_clip

    save_tiny("cogvideox", place / "video")
    (place / "clips").mkdir()
    rng = np.random.default_rng(0)
    for number in range(3):
        for side, (low, high) in {"chosen": (60, 255), "rejected": (0, 200)}.items():
            first, *rest = map(Image.fromarray, rng.integers(low, high, (9 - (number == 2), 16, 20, 3), dtype=np.uint8))
            first.save(place / "clips" / f"{number}_{side}.gif", save_all=True, append_images=rest)
        (place / "clips" / f"{number}.txt").write_text(PROMPTS[number])
    assert (
        cli.main(["validate-data", "clips", "--num-frames", "9", "--resolution", "16", "--output-dir", "checked"]) == 1
    )
    shown = capsys.readouterr().out
    assert "usable:   2 pairs" in shown and "holds 8 frame(s), and 9 are asked for" in shown
    words = ["--model", "video", "--data", "clips", "--output-dir", "video run", *SMALL, "--max-steps", "1"]
    assert cli.main(["train", "dpo", *words]) == 0
    shown = capsys.readouterr().out
    assert "mmalign generate --model video --lora 'video run'" in shown and "mmalign evaluate" not in shown
    draw = [
        "generate",
        "--model",
        "video",
        "--lora",
        "video run",
        "--steps",
        "1",
        "--prompt",
        PROMPTS[0],
        "--output-dir",
        "drawn",
    ]
    assert cli.main([*draw, "--num-frames", "17", "--frames-per-second", "16"]) == 0
    assert "1 clips in drawn/; all on one sheet" in capsys.readouterr().out
    clip = read_clip("0000-seed0-a-red-shirt.webp", 17, roots=(place / "drawn",))
    assert clip[0].size == (16, 16) and len({frame.tobytes() for frame in clip}) > 8
    assert cli.main(["evaluate", *draw[1:7], "--prompt", PROMPTS[0], "--scorers", "clip:clip"]) == 2
    assert "CogVideoXPipeline draws clips" in capsys.readouterr().err
    assert cli.main(["invert", "--model", "video", "--image", "pairs/0-chosen.png", "--prompt", "a"]) == 2
    assert "clips are inverted in Python" in capsys.readouterr().err


def test_evaluate_writes_the_report_and_marks_the_scorer_of_the_training(place, run, capsys):
    words = ["evaluate", "--model", "model", "--lora", "run", "--prompts", "prompts.txt", "--num-prompts", "3"]
    words += ["--scorers", "clip:clip", "--trained-on", "clip:clip", "--steps", "2", "--num-resamples", "100"]
    assert cli.main([*words, "--output-dir", "judged"]) == 0
    assert "report: judged/report.html" in capsys.readouterr().out
    report = json.loads((place / "judged" / "report.json").read_text())
    assert [row["seen_in_training"] for row in report["scorers"]] == [True]
    assert len(report["history"]) == len(json.loads((run / "history.json").read_text()))


def test_evaluate_sweeps_the_lora_and_tells_retention(place, run, capsys):
    (place / "other.csv").write_text("caption\na yellow hat\na grey boot\n")
    words = ["evaluate", "--model", "model", "--lora", "run", "--prompts", "prompts.txt", "--num-prompts", "2"]
    words += ["--scorers", "clip:clip", "--steps", "1", "--num-resamples", "100", "--lora-scales", "0", "1"]
    words += ["--retention-prompts", "other.csv", "--retention-tolerance", "2.5", "--num-samples", "1"]
    assert cli.main([*words, "--output-dir", "asked"]) == 0
    shown = capsys.readouterr().out
    assert "clip:clip (held out): " in shown and "Retention kept: by clip:clip the mean score changed by" in shown
    assert "  LoRA scale 0: 50.0% (" in shown and "  LoRA scale 1: " in shown
    report = json.loads((place / "asked" / "report.json").read_text())
    assert report["retention"]["tolerance"] == 2.5 and report["retention"]["difference"]["num_clusters"] == 2
    assert [point["scale"] for point in report["sweep"]] == [0, 1]
    assert (
        report["sweep"][1]["scorers"] == report["scorers"] and report["sweep"][0]["scorers"][0]["win_rate"]["ties"] == 2
    )
    assert (place / "asked" / "report.html").read_text().count('<figure class="pair"') <= 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "nothing to compare with: give --base"),
        (["--base", "model", "--lora-scales", "0", "1"], "--lora-scales needs --lora"),
        (["--base", "model", "--retention-prompts", "prompts.txt"], "--retention-prompts needs --retention-tolerance"),
        (["--base", "model", "--retention-tolerance", "1"], "--retention-tolerance belongs to --retention-prompts"),
        (["--base", "model", "--retention-scorer", "x"], "--retention-scorer belongs to --retention-prompts"),
        (["--base", "model", "--retention-prompts", "none.txt", "--retention-tolerance", "1"], "no such prompt file"),
    ],
)
def test_evaluate_refuses_half_a_question(place, capsys, words, message):
    assert cli.main(["evaluate", "--model", "model", "--prompt", "a", *words]) == 2
    assert message in capsys.readouterr().err


def test_the_cache_is_shown_and_cleared(run, capsys):
    assert cli.main(["cache", "--json"]) == 0
    ours = json.loads(capsys.readouterr().out)["places"][0]
    assert ours["bytes"] > 0 and ours["folder"].endswith("cache")
    other = Path(ours["folder"]) / "not-ours.txt"
    other.write_text("kept")
    assert cli.main(["cache", "--verify"]) == 0
    assert "is whole: 8 pairs of 4 prompts" in capsys.readouterr().out
    shard = next(Path(ours["folder"]).glob("*/latents-*.safetensors"))
    content = shard.read_bytes()
    shard.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert cli.main(["cache", "--verify"]) == 1 and f"{shard.name} is damaged" in capsys.readouterr().out
    assert cli.main(["cache", "--clear"]) == 0
    assert "freed" in capsys.readouterr().out and other.exists()
    assert cli.main(["cache", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["places"][0]["bytes"] == 0


@pytest.mark.parametrize("launcher", ["mmalign", "accelerate"])
def test_two_processes_train_as_one_with_twice_the_batch(place, launcher):
    """`mmalign train --num_processes 2` and `accelerate launch -m mmalign train`, on a CPU."""
    options = ["--model", "model", "--data", "pairs", "--lora-r", "2", "--logging-steps", "1", "--max-steps", "2"]
    # Adam divides by the gradient's size and so turns rounding into steps; plain descent does not.
    options += ["--learning-rate", "1e-4", "--optim", "sgd", "--save-strategy", "no", "--use-cpu", "--disable-tqdm"]
    assert cli.main(["train", "dpo", *options, "--train_batch_size", "4", "--output-dir", f"{launcher}-one"]) == 0
    two = [*options, "--train_batch_size", "2", "--output-dir", f"{launcher}-two"]
    if launcher == "mmalign":
        words = ["-m", "mmalign", "train", "--num_processes", "2", "dpo", *two]
    else:
        words = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "-m", "mmalign"]
        words += ["train", "dpo", *two]
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("saved in") == 1
    assert losses(f"{launcher}-two") == pytest.approx(losses(f"{launcher}-one"), rel=1e-5)
