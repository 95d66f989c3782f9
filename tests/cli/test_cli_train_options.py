"""`mmalign train METHOD`: every field of the config is an option, foreign spellings arrive, presets are written out."""

import dataclasses

import pytest
import yaml

from mmalign import cli
from mmalign.cli import aliases, fields, train
from mmalign.cli.options import UsageError, switch
from mmalign.cli.trained import how_to_go_on
from mmalign.pipelines.image.dpo import DiffusionDPOConfig
from mmalign.pipelines.image.inpo import InPOConfig
from mmalign.pipelines.image.ppd import PPDConfig
from mmalign.pipelines.image.sft import DiffusionSFTConfig
from mmalign.pipelines.image.smpo import SmPOConfig
from mmalign.training.inherited import REFUSED

CONFIGS = {
    "smpo": SmPOConfig,
    "inpo": InPOConfig,
    "dpo": DiffusionDPOConfig,
    "sft": DiffusionSFTConfig,
    "ppd": PPDConfig,
}
MODEL = ["--model", "m", "--data", "d"]


@pytest.fixture(autouse=True)
def one_process(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)


def read(method, *words):
    return train.make_command(method, CONFIGS[method]).read([*MODEL, *words])


def options(method, *words):
    return train.config_options(read(method, *words), CONFIGS[method])


@pytest.mark.parametrize("method", CONFIGS)
def test_help_shows_the_method_before_the_inherited_options(method, capsys):
    assert cli.main(["train", method, "--help"]) == 0
    shown = capsys.readouterr().out
    places = [
        shown.index(f"\n  {text} ") for text in ("--model", "--lora-r", "--beta", "--max-steps", "--num-processes")
    ]
    assert places == sorted(places) and f"example: mmalign train {method}" in shown
    assert "--neftune-noise-alpha" not in shown and "--adam-beta1" not in shown


def test_help_without_a_method_lists_them(capsys):
    for words in (["train", "--help"], ["train"]):
        assert cli.main(words) == 0
        shown = capsys.readouterr().out
        assert all(f"  {method} " in shown for method in CONFIGS) and "mmalign train smpo --help" in shown


@pytest.mark.parametrize("method", CONFIGS)
def test_every_field_of_the_config_is_an_option_with_its_default(method):
    verb = train.make_command(method, CONFIGS[method])
    named = {item.name: item for item in dataclasses.fields(CONFIGS[method])}
    assert set(named) - set(verb.by_name) == {"local_rank"}
    plain = CONFIGS[method](output_dir="x")
    for name in fields.own_fields(CONFIGS[method]):
        assert verb.by_name[name].default == getattr(plain, name), name


def test_every_option_of_ours_is_explained():
    verb = train.make_command("smpo", SmPOConfig)
    unexplained = [name for name in fields.own_fields(SmPOConfig) if not verb.by_name[name].help]
    assert unexplained == []


@pytest.mark.parametrize(
    ("words", "name", "value"),
    [
        (["--max_steps", "3"], "max_steps", 3),
        (["--learning-rate", "1e-6"], "learning_rate", 1e-6),
        (["--save-steps", "50"], "save_steps", 50),
        (["--warmup-steps", "0.1"], "warmup_steps", 0.1),
        (["--loss-type", "sigmoid", "sft", "--loss-weights", "1", "0.5"], "loss_weights", [1.0, 0.5]),
        (["--scorer", "none", "--comparison", "human"], "scorer", None),
        (["--eval-strategy", "no"], "eval_strategy", "no"),
        (["--report-to", "none"], "report_to", ["none"]),
        (["--lr-scheduler-kwargs", '{"num_cycles": 2}'], "lr_scheduler_kwargs", {"num_cycles": 2}),
        (["--no-share-noise", "--latents", "forward"], "share_noise", False),
        (["--inversion-steps", "4"], "inversion_steps", 4),
        (["--validation-prompts", "a red bag", "a blue bag"], "validation_prompts", ["a red bag", "a blue bag"]),
        (["--resolution", "512"], "resolution", 512),
        (["--beta", "100"], "beta", 100.0),
        (["--beta", "auto"], "beta", "auto"),
        (["--debug", "underflow_overflow"], "debug", ["underflow_overflow"]),
    ],
)
def test_fields_are_read_in_their_types(words, name, value):
    chosen = options("smpo", *words)
    assert chosen[name] == value and type(chosen[name]) is type(value)


@pytest.mark.parametrize(
    ("words", "name", "value"),
    [
        (["--pretrained_model_name_or_path", "x"], "model", "x"),
        (["--dataset_split_name", "validation"], "train_split", "validation"),
        (["--train_batch_size", "2"], "per_device_train_batch_size", 2),
        (["--max_train_steps", "9"], "max_steps", 9),
        (["--checkpointing_steps", "9"], "save_steps", 9),
        (["--checkpoints_total_limit", "2"], "save_total_limit", 2),
        (["--beta_dpo", "5000"], "beta", 5000.0),
        (["--rank", "8"], "lora_r", 8),
        (["--mixed_precision", "bf16"], "bf16", True),
        (["--mixed_precision", "no"], "fp16", False),
        (["--lr_warmup_steps", "5"], "warmup_steps", 5),
        (["--lr_scheduler", "cosine"], "lr_scheduler_type", "cosine"),
        (["--proportion_empty_prompts", "0.3"], "prompt_dropout", 0.3),
        (["--allow_tf32"], "tf32", True),
        (["--use_8bit_adam"], "optim", "adamw_bnb_8bit"),
        (["--use_adafactor"], "optim", "adafactor"),
        (["--use_ema"], "ema_decay", 0.9999),
        (["--choice_model", "pickscore"], "comparison", "relabel"),
        (["--choice_model", "pickscore"], "scorer", "pickscore"),
        (["--validation_prompt", "a", "b"], "validation_prompts", ["a", "b"]),
        (["--adam_weight_decay", "0"], "weight_decay", 0.0),
    ],
)
def test_spellings_of_image_trainers_arrive(words, name, value):
    verb = train.make_command("dpo", DiffusionDPOConfig)
    given = verb.read([*(MODEL if name != "model" else MODEL[2:]), *words])
    assert given[name] == value and name in given.explicit


def test_smpo_keeps_its_own_comparison_under_choice_model():
    given = read("smpo", "--choice_model", "clip")
    assert given["comparison"] == "smoothed" and given["scorer"] == "clip:laion/CLIP-ViT-H-14-laion2B-s32B-b79K"


@pytest.mark.parametrize("name", sorted(aliases.REFUSED))
def test_what_has_no_counterpart_is_refused_with_its_reason(name, capsys):
    assert cli.main(["train", "dpo", *MODEL, f"--{name}", "1"]) == 2
    shown = capsys.readouterr().err
    assert "is refused: " + aliases.REFUSED[name] in shown and shown.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--choice_model", "aes"], "--choice-model has no scorer 'aes' here; it takes pickscore, clip"),
        (["--mixed_precision", "fp8"], "--mixed-precision takes one of no, fp16, bf16"),
        (["--center_crop", "false"], "pictures are encoded with a centre crop, always"),
        (["--run_validation"], "set --validation-steps"),
        (["--use_fsdp"], "sharded training is not supported yet"),
        (["--beat", "3"], "unknown option --beat (did you mean --beta"),
        (["--preset", "sd3"], "--preset takes one of sd15, sdxl, npo-sd15, npo-sdxl, playground, not 'sd3'"),
        (["--neftune-noise-alpha", "5"], "neftune_noise_alpha=5.0 is refused: it perturbs token embeddings"),
        (["--beta", "-1"], "beta must be positive"),
        (["--beta", "car"], "--beta takes a number, not 'car', nor 'auto'"),
        (["--comparison", "human", "--scorer", "playground"], "scorer has no effect with comparison='human'"),
        (["--optim", "adamm"], "adamm is not a valid OptimizerNames"),
        (["--full", "--lora-r", "4"], "--full trains every weight, so --lora-r has no effect"),
        (["--full", "--base-quantization", "nf4"], "--full trains every weight, and quantised ones cannot be trained"),
        (["--save-pipeline", "--base-quantization", "int8"], "--save-pipeline merges the LoRA, which a quantised"),
        (["--base-quantization", "int4"], "--base-quantization takes one of nf4, int8, not 'int4'"),
        (["--resume-from-checkpoint", "checkpoint-7"], "no checkpoint checkpoint-7; runs/none holds none"),
        (["--vae", "x", "--base-class", "StableDiffusionXLPipeline"], "--base-class belongs to a single"),
    ],
)
def test_mistakes_are_one_line(words, message, capsys, monkeypatch):
    monkeypatch.setattr("diffusers.AutoencoderKL.from_pretrained", lambda *args, **kwargs: None)
    method = "smpo" if "--comparison" in words else "dpo"
    assert cli.main(["train", method, *MODEL, "--output-dir", "runs/none", *words]) == 2
    shown = capsys.readouterr().err
    assert message in shown and shown.count("\n") == 1, shown


def test_refused_inherited_options_are_not_printed_but_accepted():
    verb = train.make_command("smpo", SmPOConfig)
    assert all(verb.by_name[name].hidden and not verb.by_name[name].printed for name in REFUSED if name in verb.by_name)


@pytest.mark.parametrize("method", CONFIGS)
def test_presets_are_written_out_and_read_back(method, tmp_path, capsys):
    preset = next(iter(CONFIGS[method].presets))
    # On a CPU the presets' float16 would be refused.
    words = ["--preset", preset, "--learning-rate", "3e-6", "--hub-token", "secret", "--no-fp16"]
    assert cli.main(["train", method, *MODEL, *words, "--print-config"]) == 0
    printed = capsys.readouterr().out
    assert f"(preset {preset}, written out)" in printed and "secret" not in printed
    content = yaml.safe_load(printed)
    expected = CONFIGS[method].presets[preset] | {"learning_rate": 3e-6, "fp16": False}
    assert {name: content[name] for name in expected if name != "learning_rate"} == {
        name: value for name, value in expected.items() if name != "learning_rate"
    }
    assert float(content["learning_rate"]) == 3e-6
    file = tmp_path / "run.yaml"
    file.write_text(printed)
    assert cli.main(["train", method, "--config", str(file), "--print-config"]) == 0
    again = yaml.safe_load(capsys.readouterr().out)
    assert again == content
    given = train.make_command(method, CONFIGS[method]).read(["--config", str(file)])
    chosen = train.config_options(given, CONFIGS[method])
    direct = CONFIGS[method](output_dir=f"runs/{method}", **expected)
    reread = CONFIGS[method](**chosen)
    for name in (*fields.own_fields(CONFIGS[method]), "learning_rate", "max_steps", "optim", "report_to", "save_steps"):
        assert getattr(reread, name) == getattr(direct, name), name


def test_the_playgrounds_pairs_bring_their_preset():
    playground = ["--model", "playground", "--data", "playground"]
    verb = train.make_command("smpo", SmPOConfig)
    given = verb.read([*playground, "--beta", "77"])
    assert (given["scorer"], given["max_steps"], given["inversion_steps"], given["beta"]) == ("playground", 100, 2, 77)
    assert "preset playground" in verb.to_yaml(given)
    assert "scorer" not in verb.read([*playground, "--comparison", "human", "--latents", "forward"]).explicit
    assert verb.read(["--model", "m", "--data", "d"])["scorer"] == "pickscore"


def test_an_explicit_precision_replaces_the_presets():
    given = read("smpo", "--preset", "sd15", "--bf16")
    assert (given["bf16"], given["fp16"]) == (True, False)
    assert read("smpo", "--preset", "sd15")["fp16"] is True


def test_yaml_under_the_command_line(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("model: m\ndata: d\nlearning_rate: 1e-6\nmax_train_steps: 5\nlora-r: 4\n")
    given = train.make_command("smpo", SmPOConfig).read(["--config", str(file), "--max-steps", "6"])
    assert (given["learning_rate"], given["max_steps"], given["lora_r"]) == (1e-6, 6, 4)


def test_scale_lr_multiplies_and_says_so(capsys, monkeypatch):
    monkeypatch.setattr(train, "world_size", lambda: 2)
    words = ["--scale_lr", "--learning-rate", "1e-8", "--train_batch_size", "4", "--gradient_accumulation_steps", "8"]
    assert options("dpo", *words)["learning_rate"] == pytest.approx(64e-8)
    assert "learning rate 1e-08 × 64 pairs a step = 6.4e-07 (--scale-lr)" in capsys.readouterr().out


def test_lora_options():
    lora = train.lora_of(read("smpo", "--rank", "8"))
    assert (lora.r, lora.lora_alpha, lora.lora_dropout) == (8, 8, 0.0)
    assert set(lora.target_modules) == {"to_q", "to_k", "to_v", "to_out.0"}
    lora = train.lora_of(read("smpo", "--lora-alpha", "4", "--lora-target-modules", "to_q", "to_k"))
    assert (lora.r, lora.lora_alpha, set(lora.target_modules)) == (16, 4, {"to_q", "to_k"})
    assert train.lora_of(read("smpo", "--lora-target-modules", "all-linear")).target_modules == "all-linear"
    assert train.lora_of(read("smpo", "--full")) is None


@pytest.mark.parametrize(
    ("words", "method", "left"),
    [
        (["smpo", "--beta", "2"], "smpo", ["--beta", "2"]),
        (["--num_processes", "2", "dpo", "--beta", "2"], "dpo", ["--num_processes", "2", "--beta", "2"]),
        (["sft", "--run-name", "smpo"], "sft", ["--run-name", "smpo"]),
        (["--help"], None, ["--help"]),
    ],
)
def test_where_the_method_may_stand(words, method, left):
    assert train.method_of(words) == (method, left)


@pytest.mark.parametrize("words", [["smop", "--beta", "2"], ["--beta", "2"]])
def test_a_missing_method_lists_them(words):
    with pytest.raises(UsageError, match="the methods are smpo, inpo, dpo, sft"):
        train.method_of(words)


def test_evaluation_of_the_playground_is_on_its_held_out_pairs():
    assert read("smpo", "--eval-data", "playground")["eval_split"] == "test"
    assert read("smpo", "--eval-data", "playground", "--eval-split", "train")["eval_split"] == "train"
    assert read("smpo", "--eval-data", "d")["eval_split"] is None


def test_resume_finds_the_newest_and_protects_an_earlier_run(tmp_path):
    def resume(*words):
        return train.resume_from(read("smpo", "--output-dir", str(tmp_path), *words))

    assert resume() is None
    assert resume("--resume_from_checkpoint", "latest") == "latest"
    for step in (9, 10, 100):
        (tmp_path / f"checkpoint-{step}").mkdir()
    (tmp_path / "checkpoint-best").mkdir()
    assert resume("--resume_from_checkpoint", "latest") == "latest"
    assert resume("--resume_from_checkpoint", "checkpoint-9") == str(tmp_path / "checkpoint-9")
    assert resume("--resume_from_checkpoint", str(tmp_path / "checkpoint-10")) == str(tmp_path / "checkpoint-10")
    with pytest.raises(ValueError, match="already holds checkpoint-100: go on with --resume-from-checkpoint latest"):
        resume()
    assert resume("--overwrite") is None
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-best"]


def test_how_to_go_on_repeats_the_command(tmp_path):
    (tmp_path / "checkpoint-4").mkdir()
    words = ["--model", "my model", "--overwrite", "--max-steps", "9"]
    said = how_to_go_on("smpo", words, tmp_path)
    assert said.endswith("mmalign train smpo --model 'my model' --max-steps 9 --resume-from-checkpoint latest")
    assert "before the first checkpoint" in how_to_go_on("smpo", words, tmp_path / "none")


def test_switches_of_the_config_are_switches():
    verb = train.make_command("smpo", SmPOConfig)
    for name in ("fp16", "gradient_checkpointing", "tf32", "share_noise", "push_to_hub"):
        assert verb.by_name[name].convert is switch


def test_how_data_are_read_reaches_load_pairs(tmp_path):
    from PIL import Image

    (tmp_path / "pictures").mkdir()
    for name, colour in (("a", "red"), ("b", "blue")):
        Image.new("RGB", (4, 4), colour).save(tmp_path / "pictures" / f"{name}.png")
    (tmp_path / "pairs.jsonl").write_text('{"prompt": "x", "chosen": "a.png", "rejected": "b.png"}\n' * 3)
    words = ["--model", "m", "--data", str(tmp_path / "pairs.jsonl")]
    verb = train.make_command("dpo", DiffusionDPOConfig)
    source = train.source_of(verb.read([*words, "--root", str(tmp_path / "pictures"), "--max-rows", "2"]))
    assert len(source) == 2 and source[0].image_0.getpixel((0, 0)) == (255, 0, 0)
    with pytest.raises(ValueError, match="streaming=True does not apply to a local path"):
        train.source_of(verb.read([*words, "--streaming"]))
    assert train.source_of(verb.read(words)) == str(tmp_path / "pairs.jsonl")
    assert options("dpo", "--aspect-buckets")["aspect_buckets"] is True
