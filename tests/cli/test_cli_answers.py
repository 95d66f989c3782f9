"""Models that answer on the command line: trained, asked and graded, on a tiny model in a folder."""

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from tiny_vlm import picture, tiny_vlm

from mmalign.cli import answer_data, train
from mmalign.cli.dispatch import main
from mmalign.pipelines.video.rrpo import RRPOConfig
from mmalign.pipelines.vision.lfm2_vl import LFM2VLConfig
from mmalign.training.token_pipeline import TokenConfig

CONFIGS = {"rrpo": RRPOConfig, "lfm2-vl": LFM2VLConfig, "token-dpo": TokenConfig}
TINY = ["--use-cpu", "--disable-tqdm", "--save-strategy", "no", "--per-device-train-batch-size", "4"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    for part in tiny_vlm("lfm2_vl"):
        part.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """pairs.jsonl, held_out.jsonl and questions.jsonl about eight pictures."""
    folder = tmp_path_factory.mktemp("data")
    for at in range(8):
        picture(24, 24, seed=at).image.save(folder / f"{at}.png")
    pairs = [
        {
            "prompt": "What is it?",
            "image": f"{at}.png",
            "chosen": f"A red bag, number {at}.",
            "rejected": f"A blue bag, number {at}.",
        }
        for at in range(8)
    ]
    questions = [
        {
            "question": f"Is there a {thing}?",
            "image": f"{at // 2}.png",
            "answer": answer,
            "kind": thing,
            "pair": at // 2,
        }
        for at in range(16)
        for thing, answer in [("bag", "yes") if at % 2 else ("shirt", "no")]
    ]
    for name, rows in (("pairs", pairs), ("held_out", pairs[:3]), ("questions", questions)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_a_run_from_pairs_to_a_graded_comparison(model: Path, data: Path, tmp_path: Path, capsys: Any) -> None:
    run, report = tmp_path / "run", tmp_path / "report"
    command = [
        "train",
        "token-dpo",
        "--model",
        str(model),
        "--data",
        str(data / "pairs.jsonl"),
        "--output-dir",
        str(run),
    ]
    assert main([*command, *TINY, "--max-steps", "3", "--learning-rate", "0.01", "--lora-r", "4"]) == 0
    told = capsys.readouterr().out
    assert f"mmalign evaluate-answers --model {model} --lora {run} --data questions.jsonl" in told
    assert json.loads((run / "adapter_config.json").read_text())["lora_alpha"] == 8
    assert (run / "adapter_model.safetensors").is_file() and "adapter_model.safetensors" in told

    questions = ["--data", str(data / "questions.jsonl"), "--max-new-tokens", "4", "--device", "cpu"]
    aligned = ["--model", str(model), "--lora", str(run)]
    assert main(["answer", *aligned, *questions, "--output", str(tmp_path / "answers.jsonl")]) == 0
    assert "16 answers in" in capsys.readouterr().out
    lines = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert [line["row"] for line in lines] == list(range(16)) and lines[0]["question"] == "Is there a shirt?"

    also = ["--given-answers", str(data / "held_out.jsonl"), "--retention-data", str(data / "questions.jsonl")]
    also += ["--retention-tolerance", "0.05", "--output-dir", str(report)]
    assert main(["evaluate-answers", *aligned, *questions, *also]) == 0
    told = capsys.readouterr().out
    assert "No difference is shown: aligned answers" in told and "Retention " in told and "KL from the base" in told
    found = json.loads((report / "report.json").read_text())
    assert found["overall"]["aligned"]["num_questions"] == 16 and found["overall"]["aligned"]["num_clusters"] == 8
    assert [group["name"] for group in found["kinds"]] == ["shirt", "bag"] and found["pairs"]["aligned"][
        "num_questions"
    ] == 8
    # Training moved the model towards the pairs that it was trained on.
    assert found["likelihoods"]["ranking"]["value"] == 1 and found["likelihoods"]["kl"]["value"] > 0
    assert found["aligned_fingerprint"] != found["base_fingerprint"]
    # Everything is inside, and nothing asks for anything outside.
    page = (report / "report.html").read_text()
    assert "data:image/png" in page and not re.search(r'(src|href)="(?!data:)', page)

    single = [*questions, "--max-rows", "4", "--output-dir", str(tmp_path / "single")]
    assert main(["evaluate-answers", "--model", str(model), *single]) == 0
    assert capsys.readouterr().out.startswith("The model answers ")

    # The base's answers are those of the base alone, and stand there for the next LoRA.
    alone = tmp_path / "base.jsonl"
    assert main(["answer", "--model", str(model), *questions, "--output", str(alone)]) == 0
    said, base = (
        [json.loads(line)["answer"] for line in path.read_text().splitlines()]
        for path in (alone, report / "answers-base.jsonl")
    )
    assert said == base
    before = (report / "answers-base.jsonl").read_bytes()
    assert main(["evaluate-answers", *aligned, *questions, *also]) == 0
    assert (report / "answers-base.jsonl").read_bytes() == before


def test_rrpo_trains_every_weight_and_says_what_to_type_next(
    model: Path, data: Path, tmp_path: Path, capsys: Any
) -> None:
    run = tmp_path / "run"
    command = ["train", "rrpo", "--model", str(model), "--data", str(data / "pairs.jsonl"), "--max-rows", "6", "--full"]
    command += [
        "--eval-data",
        str(data / "held_out.jsonl"),
        "--eval-strategy",
        "steps",
        "--eval-steps",
        "1",
        "--alpha",
        "0.02",
    ]
    assert main([*command, "--output-dir", str(run), *TINY, "--max-steps", "1", "--logging-steps", "1"]) == 0
    assert f"--model {run} --base {model}" in capsys.readouterr().out
    history = json.loads((run / "history.json").read_text())
    assert any("kl/chosen" in entry for entry in history) and any(
        "eval_rewards/accuracies" in entry for entry in history
    )
    assert (run / "model.safetensors").is_file() and (run / "processor_config.json").is_file()
    report = tmp_path / "report"
    graded = ["evaluate-answers", "--model", str(run), "--base", str(model), "--data", str(data / "questions.jsonl")]
    assert main([*graded, "--max-new-tokens", "2", "--device", "cpu", "--output-dir", str(report)]) == 0
    assert "same model fingerprint" not in capsys.readouterr().out


@pytest.mark.parametrize("method", CONFIGS)
def test_every_option_of_the_config_is_explained_and_read(method: str) -> None:
    verb = train.make_command(method, CONFIGS[method])
    given = verb.read(["--model", "m", "--data", "d", "--beta", "0.5", "--processor-kwargs", '{"max_pixels": 9}'])
    assert given is not None
    options = train.config_options(given, CONFIGS[method])
    assert options["beta"] == 0.5 and options["processor_kwargs"] == {"max_pixels": 9}
    assert [name for name, option in verb.by_name.items() if not option.hidden and not option.help] == []
    assert not {"vae", "streaming", "base_quantization", "base_class"} & set(verb.by_name)


def test_an_image_budget_is_kept_with_the_run_and_answered_with(
    model: Path, data: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mmalign.cli import answer_models
    from mmalign.pipelines.vision.image_budget import ImageBudget, budget_of

    asked = json.dumps({"min_tokens": 4, "max_tokens": 8})
    command = ["train", "lfm2-vl", "--model", str(model), "--data", str(data / "pairs.jsonl"), "--max-steps", "1"]
    command += ["--image-budget", asked, "--output-dir", str(tmp_path / "run"), *TINY]
    assert main([*command, "--print-config"]) == 0
    (tmp_path / "run.yaml").write_text(capsys.readouterr().out)
    assert main(["train", "lfm2-vl", "--config", str(tmp_path / "run.yaml")]) == 0
    assert "max_tokens=8 with split=True makes pictures dearer" in capsys.readouterr().err

    loaded, plain = [], answer_models.load_answering
    monkeypatch.setattr("mmalign.cli.answer.load_answering", lambda *a, **o: loaded.append(plain(*a, **o)) or loaded[0])
    questions = ["--data", str(data / "questions.jsonl"), "--max-rows", "1", "--max-new-tokens", "1", "--device", "cpu"]
    words = ["answer", "--model", str(model), "--lora", str(tmp_path / "run"), *questions]
    assert main([*words, "--output", str(tmp_path / "answers.jsonl")]) == 0
    assert budget_of(loaded[0].processor) == ImageBudget(min_tokens=4, max_tokens=8, split=True)


def test_rows_that_are_opened_here_are_opened_as_the_options_say(model: Path, data: Path, monkeypatch: Any) -> None:
    from mmalign.training.token_pipeline import TokenPipeline

    aligned: list[dict[str, Any]] = []

    def align(self: Any, source: Any, *, eval_dataset: Any, **options: Any) -> None:
        aligned.append(
            {"rows": len(source), "held_out": len(eval_dataset), "frames": source.reading.num_frames, **options}
        )

    monkeypatch.setattr(TokenPipeline, "align", align)
    asked: list[Any] = []
    plain = answer_data.load_answers
    monkeypatch.setattr(answer_data, "load_answers", lambda *a, **o: asked.append(o.pop("split")) or plain(*a, **o))
    words = ["train", "token-dpo", "--model", str(model), "--data", str(data / "pairs.jsonl"), "--use-cpu"]
    words += ["--eval-data", str(data / "held_out.jsonl"), "--train-split", "fit", "--eval-split", "held"]
    assert main([*words, "--max-rows", "5", "--num-frames", "4"]) == 0
    assert (aligned[0]["rows"], aligned[0]["held_out"], aligned[0]["frames"]) == (5, 3, 4) and asked == ["fit", "held"]
    # The trainer would refuse to open them otherwise once more.
    assert [aligned[0][name] for name in ("train_split", "eval_split", "num_frames")] == [None, None, None]


def test_the_lora_of_rrpo_s_paper_is_what_the_documentation_types(model: Path) -> None:
    from mmalign.cli.train_answers import _lora
    from mmalign.training.token_loading import load_answering_model

    words = ["--model", "m", "--data", "d", "--preset", "llava-video", "--lora-r", "128"]
    given = train.make_command("rrpo", RRPOConfig).read(words)
    assert given is not None
    args = train.checked_config(train.config_options(given, RRPOConfig) | {"bf16": False}, RRPOConfig)
    lora = _lora(given, SimpleNamespace(model=load_answering_model(model)[0]), args)
    assert (lora.r, lora.lora_alpha, lora.lora_dropout) == (128, 256, 0.0)


@pytest.mark.parametrize(
    ("words", "targets"),
    [
        (["q_proj"], {"q_proj"}),
        (["q_proj", "w1"], {"q_proj", "w1"}),
        ([r".*\.(q|k)_proj"], r".*\.(q|k)_proj"),
        (["all-linear"], "all-linear"),
    ],
)
def test_a_layer_s_name_is_no_regular_expression(words: list[str], targets: Any) -> None:
    from peft import LoraConfig

    given = train.make_command("token-dpo", TokenConfig).read(
        ["--model", "m", "--data", "d", "--lora-target-modules", *words]
    )
    assert given is not None
    assert train.as_asked(LoraConfig(), given, alpha=2).target_modules == targets


def test_a_preset_is_written_out_and_read_back(capsys: Any, tmp_path: Path) -> None:
    assert main(["train", "rrpo", "--model", "m", "--data", "d", "--preset", "longvu", "--print-config"]) == 0
    shown = capsys.readouterr().out
    written = yaml.safe_load(shown)
    assert (written["alpha"], written["beta"], written["num_frames"]) == (0.05, 0.5, 16)
    (tmp_path / "run.yaml").write_text(shown)
    assert main(["train", "rrpo", "--config", str(tmp_path / "run.yaml"), "--beta", "0.7", "--print-config"]) == 0
    again = yaml.safe_load(capsys.readouterr().out)
    assert (again["alpha"], again["beta"]) == (0.05, 0.7)


def test_spellings_of_trl_are_understood() -> None:
    words = [
        "--model_name_or_path",
        "m",
        "--dataset_name",
        "d",
        "--dataset_train_split",
        "test",
        "--torch_dtype",
        "bfloat16",
    ]
    given = train.make_command("token-dpo", TokenConfig).read(words)
    assert given is not None
    assert (given["model"], given["data"], given["train_split"], given["dtype"]) == ("m", "d", "test", "bfloat16")


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["train", "token-dpo", "--model", "m", "--data", "d", "--streaming"], "streaming"),
        (["train", "token-dpo", "--model", "m", "--data", "d", "--full", "--lora-r", "4"], "so --lora-r has no effect"),
        (["train", "token-dpo", "--model", "m", "--data", "d", "--logps", "ld"], "ld_alpha go together"),
        (["train", "rrpo", "--model", "m", "--data", "d", "--preset", "sdxl"], "takes one of llava-video, longvu, videochat2"),
        (["train", "lfm2-vl", "--model", "m", "--data", "d", "--image-budget", "tiny"], "must be one of quality, balanced, fast"),
        (["train", "token-dpo", "--model", "m", "--data", "d", "--image-budget", "fast"], "unknown option --image-budget"),
        (["probe", "rrpo", "--model", "m", "--data", "d"], "a model that answers has none"),
        (["evaluate-answers", "--model", "m", "--data", "d", "--given-answers", "x"], "--given-answers compares with a base"),
        (["evaluate-answers", "--model", "m", "--base", "b", "--data", "d", "--retention-data", "x"], "go together"),
        (["evaluate-answers", "--model", "m", "--data", "d", "--grader", "yes"], "(did you mean yes-no?)"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_told_before_anything_is_loaded(words: list[str], told: str, capsys: Any) -> None:
    assert main(words) == 2
    assert told in capsys.readouterr().err


def test_what_cannot_be_graded_or_compared_is_told_before_anything_is_answered(
    model: Path, data: Path, tmp_path: Path, capsys: Any
) -> None:
    import copy

    (tmp_path / "open.jsonl").write_text('{"question": "Why?"}\n')
    (tmp_path / "alone.jsonl").write_text('{"question": "Why?", "answer": "so", "pair": 1}\n')
    network, processor = (copy.deepcopy(part) for part in tiny_vlm("lfm2_vl"))
    processor.tokenizer.add_tokens(["[Q]"])
    for part in (network, processor):
        part.save_pretrained(tmp_path / "base")
    good = ["--data", str(data / "questions.jsonl"), "--base", str(tmp_path / "base")]
    for words, told in (
        (["--data", str(tmp_path / "open.jsonl")], "row 0, answer: nothing tells what is right"),
        (["--data", str(tmp_path / "alone.jsonl")], "row 0, pair: no other question has '1'"),
        (
            [*good, "--retention-data", str(tmp_path / "open.jsonl"), "--retention-tolerance", "0.1"],
            "row 0, answer: nothing tells what is right",
        ),
        ([*good, "--given-answers", str(tmp_path / "open.jsonl")], "not preference data of answers"),
        ([*good, "--given-answers", str(data / "held_out.jsonl")], "of the same tokens, and these have different ones"),
    ):
        report = ["--device", "cpu", "--output-dir", str(tmp_path / "report")]
        assert main(["evaluate-answers", "--model", str(model), *words, *report]) == 2, told
        assert told in capsys.readouterr().err
    assert not (tmp_path / "report").exists()


def test_a_lora_of_another_model_is_refused_and_not_left_out(
    model: Path, data: Path, tmp_path: Path, capsys: Any
) -> None:
    import copy

    from peft import LoraConfig

    other = copy.deepcopy(tiny_vlm("lfm2")[0])
    other.add_adapter(LoraConfig(r=2, target_modules=["q_proj"]))
    other.save_pretrained(tmp_path / "lora")
    words = ["answer", "--model", str(model), "--lora", str(tmp_path / "lora"), "--data", str(data / "questions.jsonl")]
    assert main(words) == 2
    assert f"lora was trained from another model than {model}: " in capsys.readouterr().err


def test_a_whole_model_is_no_lora(model: Path, data: Path, capsys: Any) -> None:
    words = ["answer", "--model", str(model), "--lora", str(model), "--data", str(data / "questions.jsonl")]
    assert main(words) == 2
    assert "holds no adapter_model.safetensors: give a whole model to --model" in capsys.readouterr().err


def test_the_embedded_models_train_on_their_mistakes_and_are_graded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    words = [
        "train",
        "rrpo",
        "--model",
        "playground-video",
        "--data",
        "playground-video",
        "--eval-data",
        "playground-video",
    ]
    assert main([*words, "--max-rows", "8", "--max-steps", "1", "--output-dir", str(run), *TINY]) == 0
    told = capsys.readouterr().out
    assert f"mmalign evaluate-answers --model playground-video --lora {run} --data playground-video" in told
    assert json.loads((run / "adapter_config.json").read_text())["base_model_name_or_path"] == "playground-video"
    assert 'from_pretrained("playground-video")' in (run / "README.md").read_text().replace("'", '"')
    asked = ["--data", "playground-video", "--max-rows", "8", "--given-answers", "playground-video"]
    out = ["--output-dir", str(tmp_path / "graded"), "--num-resamples", "100"]
    assert main(["evaluate-answers", "--model", "playground-video", "--lora", str(run), *asked, *out]) == 0
    assert "8 questions" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["train", "rrpo", "--model", "playground", "--data", "playground-video"], "draws and does not answer"),
        (["train", "dpo", "--model", "playground-video", "--data", "playground"], "answers and does not draw"),
        (["train", "rrpo", "--model", "playground-video", "--data", "playground-video", "--num-frames", "4"], "num_frames=4"),
        (["answer", "--model", "playground-video", "--data", "playground-video", "--split", "dev"], "splits 'train' and 'test'"),
    ],
)  # fmt: skip
def test_what_the_embedded_models_cannot_do_is_said(
    words: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words) != 0
    assert told in capsys.readouterr().err


def test_validate_data_reads_the_embedded_mistakes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["validate-data", "playground-vision", "--max-rows", "20", "--output-dir", str(tmp_path)]
    assert main(words) == 0
    assert "20 pictures, 0 clips; 20 pairs with marked phrases" in capsys.readouterr().out
