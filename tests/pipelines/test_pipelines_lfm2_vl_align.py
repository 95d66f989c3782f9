"""LFM2-VL asked, aligned, distilled and saved, on a tiny random one."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_vlm import picture, tiny_vlm
from torch import Tensor

from mmalign import LFM2VLConfig, LFM2VLPipeline, LFM2VLTrainer
from mmalign.likelihood.token_head import head_of, trunk_of
from mmalign.losses.distillation import decoupled_top_k, top_k_of
from mmalign.pipelines.vision.image_budget import ImageBudget
from mmalign.training.model_merging import merge_models

_WORDS = ("red", "green", "blue", "black")


def pipeline(kind: str = "lfm2_vl") -> LFM2VLPipeline:
    model, processor = tiny_vlm(kind)
    return LFM2VLPipeline.from_parts(copy.deepcopy(model), copy.deepcopy(processor))


def rows(number: int = 4, sees: bool = True) -> list[dict[str, Any]]:
    made = [
        {"prompt": f"Which colour, {word}?", "chosen": "A bag.", "rejected": f"The {word} dress!"} for word in _WORDS
    ]
    shown = [{"image": picture(40, 24, seed=seed).image} if sees else {} for seed in range(number)]
    return [row | image for row, image in zip(made[:number], shown, strict=True)]


def options(**changes: Any) -> dict[str, Any]:
    usual: dict[str, Any] = dict(
        max_steps=5,
        learning_rate=1e-2,
        per_device_train_batch_size=2,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        gradient_checkpointing=False,
        loss_type="ln_pref",
        beta=5.0,
    )
    return usual | changes


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("teacher")
    model, processor = copy.deepcopy(tiny_vlm("lfm2_vl", seed=1))
    with torch.no_grad():
        # A random model finds all tokens alike, and hardly anything would be nearer to it or further.
        model.model.language_model.embedding_norm.weight *= 20
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return str(folder)


def test_it_is_aligned_and_saved_for_plain_transformers_and_for_other_runtimes(tmp_path: Path) -> None:
    from transformers import AutoModelForImageTextToText, AutoProcessor

    pipe = pipeline()
    pipe.image_budget = ImageBudget(min_tokens=4, max_tokens=8, split=False)
    pipe.save_pretrained(tmp_path / "base")
    told = pipe.align(rows(), output_dir=tmp_path / "run", **options(ln_pref_lambda=0.1)).history
    margins = [entry["rewards/margins"] for entry in told if "rewards/margins" in entry]
    assert margins[0] == pytest.approx(0, abs=1e-4) and margins[-1] > 0.1
    pipe.save_pretrained(tmp_path / "saved")
    config = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert config["text_config"]["architectures"] == ["Lfm2ForCausalLM"]
    assert config["text_config"]["block_ff_dim"] == config["text_config"]["intermediate_size"]
    processor = AutoProcessor.from_pretrained(tmp_path / "saved")
    inputs = processor(images=[[picture(100, 60).image]], text=["<image>What is it?"], return_tensors="pt")
    assert int((inputs["input_ids"] == processor.image_token_id).sum()) == pipe.predicted_tokens(60, 100)
    plain = AutoModelForImageTextToText.from_pretrained(tmp_path / "saved")
    torch.testing.assert_close(plain(**inputs).logits, pipe.model(**inputs).logits, rtol=1e-4, atol=1e-5)
    assert (plain(**inputs).logits - tiny_vlm("lfm2_vl")[0](**inputs).logits).abs().max() > 1e-3
    # The run's folder holds its LoRA, which merging reads.
    merged = AutoModelForImageTextToText.from_pretrained(
        merge_models(tmp_path / "base", [tmp_path / "run"], tmp_path / "merged")
    )
    torch.testing.assert_close(merged(**inputs).logits, plain(**inputs).logits, rtol=1e-4, atol=1e-5)


def test_all_weights_of_a_run_are_noted_for_other_runtimes_too(tmp_path: Path) -> None:
    pipeline().align(rows(), output_dir=tmp_path, peft_config=None, **options(max_steps=1))
    assert "block_ff_dim" in json.loads((tmp_path / "config.json").read_text())["text_config"]


@pytest.mark.parametrize("kind", ["lfm2", "lfm2_moe"])
def test_models_that_only_read_are_aligned_too(kind: str, tmp_path: Path) -> None:
    pipe = pipeline(kind)
    result = pipe.align(rows(sees=False), output_dir=tmp_path, **options())
    assert result.metrics["train_loss"] < 0.69 and isinstance(pipe("Which colour?", max_new_tokens=2), str)
    with pytest.raises(ValueError, match=f"{kind} only reads: it has no image budget"):
        pipe.image_budget = "fast"
    with pytest.raises(ValueError, match="only reads"):
        pipe.predicted_tokens(5, 5)


def test_it_answers_as_the_cards_recommend_unless_told_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe, asked = pipeline(), []
    speak = pipe.model.generate
    monkeypatch.setattr(pipe.model, "generate", lambda **given: asked.append(given) or speak(**given))
    shown = picture(40, 24).image
    pipe("What is it?", images=[shown], max_new_tokens=2)
    pipe("What is it?", images=[shown], max_new_tokens=2, temperature=0.7)
    greedy = [pipe("What is it?", images=[shown], max_new_tokens=4, do_sample=False) for _ in range(2)]
    assert [given.get("temperature") for given in asked] == [0.1, 0.7, None, None]
    assert asked[0]["min_p"] == 0.15 and asked[0]["do_sample"] and not asked[2]["do_sample"]
    assert greedy[0] == greedy[1]


def test_a_system_message_in_parts_becomes_words() -> None:
    """The released templates take nothing else: this one fails on a list, as they do."""
    pipe = pipeline()
    pipe.processor.chat_template = (
        "{% for message in messages %}{{ message['role'] + ': ' + message['content'] }}{% endfor %}"
    )
    told = [
        pipe(
            [{"role": "system", "content": content}, {"role": "user", "content": "Hi"}],
            max_new_tokens=3,
            do_sample=False,
        )
        for content in ("Be brief.", [{"type": "text", "text": "Be "}, {"type": "text", "text": "brief."}])
    ]
    assert told[0] == told[1]


def test_a_budget_is_set_by_name_or_by_number(tmp_path: Path) -> None:
    pipe = pipeline()
    pipe.save_pretrained(tmp_path)
    assert LFM2VLPipeline.from_pretrained(tmp_path, image_budget="fast").image_budget == ImageBudget(
        min_tokens=32, max_tokens=64, split=False
    )
    assert LFM2VLPipeline.from_pretrained(tmp_path).image_budget == pipe.image_budget
    pipe.image_budget = {"min_tokens": 4, "max_tokens": 8, "split": False}
    assert pipe.image_budget == ImageBudget(min_tokens=4, max_tokens=8, split=False)
    with pytest.raises(
        ValueError, match="image_budget must be one of quality, balanced, fast, or have min_tokens, .*; got 'low'"
    ):
        pipe.image_budget = "low"


# Distillation.


def trainer(folder: Path, pipe: LFM2VLPipeline | None = None, **changes: Any) -> LFM2VLTrainer:
    args = LFM2VLConfig(output_dir=str(folder), **options(**changes))
    return LFM2VLTrainer(model=pipe or pipeline(), args=args, train_dataset=rows(), peft_config=None)


def losses(run: LFM2VLTrainer) -> Tensor:
    batch = run.collate([run._train.dataset[index] for index in range(2)])
    return run.loss_of(run.measure(run.model, batch["batch"], epoch=0, data=run._train))


def by_hand(run: LFM2VLTrainer, teacher: Any, row: int, **how: Any) -> Tensor:
    """DTK per token of one row's chosen answer, from all logits of two plain passes."""
    encoded = run._train.dataset[row]["encoded"]
    answer = encoded.answers[0]
    ids = torch.cat([encoded.prompt, answer.ids])[None]
    own = torch.cat([torch.zeros(len(encoded.prompt), dtype=torch.bool), answer.supervised])
    found = []
    for model in (run.network, teacher):
        hidden = trunk_of(model)(input_ids=ids, attention_mask=torch.ones_like(ids), **encoded.media).last_hidden_state[
            0
        ]
        found.append(head_of(model)(hidden[own.nonzero()[:, 0] - 1]))
    return decoupled_top_k(found[0], top_k_of(found[1], how.pop("k")), **how).mean()


@pytest.mark.parametrize("share_prompt", [False, True])
def test_the_teacher_adds_its_distance_on_the_chosen_answers(tmp_path: Path, teacher: str, share_prompt: bool) -> None:
    plain = losses(trainer(tmp_path))
    how = {"kd_top_k": 7, "kd_temperature": 2.0, "kd_tau_squared": True}
    run = trainer(tmp_path, teacher=teacher, kd_weight=0.5, share_prompt=share_prompt, **how)
    found = losses(run)
    expected = torch.stack(
        [by_hand(run, run._teacher, row, k=7, temperature=2.0, tau_squared=True) for row in range(2)]
    )
    torch.testing.assert_close(found, plain + 0.5 * expected, rtol=1e-4, atol=1e-5)
    assert (expected > 0.05).all()
    found.sum().backward()
    assert all(parameter.grad is None for parameter in run._teacher.parameters())
    assert not any("teacher" in name for name, _ in run.model.named_parameters())


def test_of_single_answers_those_that_are_liked_are_distilled_on(tmp_path: Path, teacher: str) -> None:
    singles = [
        {"prompt": row["prompt"], "image": row["image"], "completion": row[side], "label": side == "chosen"}
        for row in rows(2)
        for side in ("chosen", "rejected")
    ]
    found = {}
    for name, changes in (("plain", {}), ("distilled", {"teacher": teacher, "kd_weight": 0.5})):
        args = LFM2VLConfig(output_dir=str(tmp_path), **options(loss_type="bco", beta=0.1, **changes))
        run = LFM2VLTrainer(model=pipeline(), args=args, train_dataset=singles, peft_config=None)
        batch = run.collate([run._train.dataset[index] for index in range(4)])
        found[name] = run.row_losses(run.model.eval(), batch, epoch=0, data=run._train)
    added = found["distilled"].loss - found["plain"].loss
    expected = torch.stack([by_hand(run, run._teacher, row, k=32) for row in (0, 2)])
    torch.testing.assert_close(added[[0, 2]], 0.5 * expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(added[[1, 3]], torch.zeros(2), rtol=0, atol=1e-6)
    assert found["distilled"].panel["dtk"] == pytest.approx((expected.sum().item(), 2.0), rel=1e-4)


def test_a_small_budget_for_training_alone_warns_as_the_pipeline_does(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    keywords = {"min_image_tokens": 32, "max_image_tokens": 64, "do_image_splitting": True}
    with caplog.at_level("WARNING"):
        trainer(tmp_path, processor_kwargs=keywords)
    assert "processor_kwargs: max_tokens=64 with split=True makes pictures dearer" in caplog.text
    caplog.clear()
    trainer(tmp_path, processor_kwargs=keywords | {"do_image_splitting": False})
    assert "dearer" not in caplog.text


def test_a_teacher_that_is_the_model_itself_adds_nothing(tmp_path: Path) -> None:
    pipe = pipeline()
    pipe.save_pretrained(tmp_path / "same")
    torch.testing.assert_close(
        losses(trainer(tmp_path, teacher=str(tmp_path / "same"), kd_weight=3.0)),
        losses(trainer(tmp_path)),
        rtol=0,
        atol=1e-5,
    )


def test_training_comes_nearer_to_the_teacher(tmp_path: Path, teacher: str) -> None:
    run = trainer(tmp_path, teacher=teacher, kd_weight=5.0, max_steps=8)
    run.train()
    told = [entry["dtk"] for entry in run.state.log_history if "dtk" in entry]
    assert len(told) == 8 and told[-1] < 0.8 * told[0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"teacher": "x"}, "teacher and kd_weight go together"),
        ({"kd_weight": 0.5}, "teacher and kd_weight go together"),
        ({"kd_top_k": 5}, "kd_top_k has no effect without a teacher"),
        ({"teacher": "x", "kd_weight": -1.0}, "kd_weight must not be negative"),
        ({"teacher": "x", "kd_weight": float("nan")}, "kd_weight must not be negative"),
        ({"teacher": "x", "kd_weight": 1.0, "kd_temperature": 0.0}, "kd_temperature above 0"),
    ],
)
def test_options_that_cannot_act_are_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        LFM2VLConfig(output_dir=str(tmp_path), **options(**changes))


@pytest.mark.parametrize("preset", sorted(LFM2VLConfig.presets))
def test_presets_are_configs(preset: str, tmp_path: Path) -> None:
    args = LFM2VLConfig.preset(preset, output_dir=str(tmp_path), report_to="none", use_cpu=True)
    known = {"report": (5.0, ["ln_pref"]), "leap": (0.1, ["sigmoid"]), "playground": (2.0, ["sigmoid"])}
    assert (args.beta, args.loss_type) == known[preset]


def test_a_teacher_with_another_tokenizer_is_refused(tmp_path: Path) -> None:
    model, tokenizer = tiny_vlm("lfm2")
    model.save_pretrained(tmp_path / "other")
    tokenizer.save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="other has another tokenizer"):
        trainer(tmp_path, teacher=str(tmp_path / "other"), kd_weight=1.0)
    qwen = copy.deepcopy(tiny_vlm("qwen2_5_vl")[0])
    with pytest.raises(ValueError, match="this is for LFM2: .* got 'qwen2_5_vl'"):
        LFM2VLPipeline.from_parts(qwen, None)
