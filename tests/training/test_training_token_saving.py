"""What a run and a pipeline of a model that answers leave on disk, and the reference that is kept there."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_vlm import VIDEO_KINDS, clip, picture, tiny_vlm
from training.token_runs import batch, config, losses_of, pipeline, rows, trainer
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor, TrainerCallback

from mmalign import LFM2VLPipeline
from mmalign.data.shards import read_notes
from mmalign.pipelines.video.rrpo import RRPOConfig
from mmalign.training.answer_cache import ReferenceTokens
from mmalign.training.token_data import prepare_answers
from mmalign.training.token_measurement import media_features, reference_scores, states
from mmalign.training.token_pipeline import TokenPipeline
from mmalign.training.token_trainer import TokenTrainer


def hidden(model: torch.nn.Module, run: TokenTrainer) -> torch.Tensor:
    inputs = batch(run)["batch"]
    with torch.no_grad():
        return states(model.eval(), inputs, media_features(model, inputs))


@pytest.mark.parametrize(("kind", "peft_config"), [("lfm2", "moved"), ("lfm2_vl", "moved"), ("lfm2_vl", None)])
def test_a_saved_pipeline_is_plain_transformers(kind: str, peft_config: Any, tmp_path: Path) -> None:
    pipe = pipeline(kind)
    run = trainer(tmp_path / "run", kind, pipe, peft_config=peft_config, max_steps=1)
    run.train()
    run.save_model()
    expected = hidden(pipe.model, run)
    pipe.save_pretrained(tmp_path / "saved")
    loader: Any = AutoModelForCausalLM if kind == "lfm2" else AutoModelForImageTextToText
    plain, told = loader.from_pretrained(tmp_path / "saved", output_loading_info=True)
    assert not told["missing_keys"] and not told["unexpected_keys"]
    torch.testing.assert_close(hidden(plain, run), expected, rtol=1e-4, atol=1e-5)
    assert AutoProcessor.from_pretrained(tmp_path / "saved").chat_template == pipe.processor.chat_template
    # The pipeline itself still carries what it carried.
    assert torch.equal(hidden(pipe.model, run), expected)
    if peft_config is None:
        assert not (tmp_path / "saved" / "adapter").exists()
        again = loader.from_pretrained(tmp_path / "run")
    else:
        assert not torch.allclose(hidden(tiny_vlm(kind)[0], run), expected, atol=1e-3)
        for folder in (tmp_path / "saved" / "adapter", tmp_path / "run"):
            again = pipeline(kind).model
            again.load_adapter(str(folder))
            assert torch.equal(hidden(again, run), expected)
        from peft import PeftModel

        again = PeftModel.from_pretrained(pipeline(kind).model, str(tmp_path / "run")).base_model.model
    assert torch.equal(hidden(again, run), expected)
    loaded = TokenPipeline.from_pretrained(tmp_path / "saved")
    assert type(loaded.model) is type(pipe.model) and type(loaded.processor) is type(pipe.processor)


def test_a_pipeline_answers_as_generate_does(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = pipeline("lfm2_vl")
    image = picture(40, 24).image
    asked: dict[str, Any] = {}
    plain = type(pipe.model).generate

    def recording(model: Any, **options: Any) -> Any:
        asked.update(options)
        return plain(model, **options)

    monkeypatch.setattr(type(pipe.model), "generate", recording)
    answer = pipe("What is it?", images=[image], max_new_tokens=5)
    assert asked["do_sample"] is False and asked["max_new_tokens"] == 5 and "pixel_values" in asked
    placeholders = (asked["input_ids"] == pipe.processor.image_token_id).sum()
    assert placeholders == asked["spatial_shapes"].prod(-1).sum() / 4
    chat = [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": "What is it?"}]}]
    assert pipe(chat, max_new_tokens=5) == answer
    ids = asked["input_ids"]
    with torch.no_grad():
        more = {name: asked[name] for name in ("pixel_values", "pixel_attention_mask", "spatial_shapes")}
        for _ in range(5):
            ids = torch.cat([ids, pipe.model(input_ids=ids, **more).logits[:, -1:].argmax(-1)], dim=1)
    assert pipe.processor.tokenizer.decode(ids[0, -5:], skip_special_tokens=True).strip() == answer
    with pytest.raises(ValueError, match="leave images and videos out"):
        pipe(chat, images=[image])
    with pytest.raises(ValueError, match="Lfm2ForCausalLM only reads"):
        pipeline("lfm2")("What?", images=[image])


@pytest.mark.parametrize("kind", VIDEO_KINDS)
def test_a_pipeline_shows_every_frame_of_a_clip(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe, seen = pipeline(kind), []
    plain = type(pipe.processor.video_processor).__call__

    def recording(self: Any, *clips: Any, **options: Any) -> Any:
        seen.append(options)
        return plain(self, *clips, **options)

    monkeypatch.setattr(type(pipe.processor.video_processor), "__call__", recording)
    frames = list(clip(4).frames)
    assert isinstance(pipe("What moves?", videos=[frames], max_new_tokens=2), str)
    assert [options["do_sample_frames"] for options in seen] == [False]


def test_what_is_no_model_is_said_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora" / "adapter_config.json").write_text("{}")
    model, tokenizer = tiny_vlm("lfm2")
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "half")
    weights = tmp_path / "half" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    for path, message in (
        ("none", "no such folder"),
        ("lora", "holds a LoRA, not a model"),
        ("", "it has no config.json"),
        ("half", "half could not be loaded"),
    ):
        for pipeline_class in (TokenPipeline, LFM2VLPipeline):
            with pytest.raises(ValueError, match=message) as caught:
                pipeline_class.from_pretrained(tmp_path / path)
            assert "\n" not in str(caught.value)


def test_a_model_s_own_code_runs_only_when_asked(tmp_path: Path) -> None:
    for part in tiny_vlm("lfm2"):
        part.save_pretrained(tmp_path / "own")
    (tmp_path / "own" / "own_code.py").write_text(
        "from transformers import Lfm2Config, Lfm2ForCausalLM\n"
        "class OwnConfig(Lfm2Config):\n    model_type = 'own'\n"
        "class Own(Lfm2ForCausalLM):\n    config_class = OwnConfig\n"
    )
    path = tmp_path / "own" / "config.json"
    named = {"AutoConfig": "own_code.OwnConfig", "AutoModelForCausalLM": "own_code.Own"}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_type": "own", "auto_map": named}))
    with pytest.raises(ValueError, match="could not be loaded: .*trust_remote_code=True"):
        TokenPipeline.from_pretrained(tmp_path / "own")
    loaded = TokenPipeline.from_pretrained(tmp_path / "own", trust_remote_code=True)
    assert type(loaded.model).__name__ == "Own"


def counted(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """The rows of every pass of the reference from now on."""
    from mmalign.training import token_measurement

    calls: list[list[int]] = []
    plain = token_measurement.reference_scores

    def recording(network: Any, reference: Any, batch: Any, features: Any) -> Any:
        calls.append(batch.rows)
        return plain(network, reference, batch, features)

    monkeypatch.setattr(token_measurement, "reference_scores", recording)
    return calls


def test_a_kept_reference_gives_the_same_losses_and_is_asked_no_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = counted(monkeypatch)
    data = rows("lfm2_vl", 10)

    def run(folder: str, max_steps: int = 5, **options: Any) -> list[float]:
        calls.clear()
        options |= {"train_dataset": data, "max_steps": max_steps, "cache_dir": str(tmp_path / "kept")}
        made = trainer(tmp_path / folder, "lfm2_vl", **options)
        made.train()
        return losses_of(made)

    live = run("live")
    assert len(calls) == 5
    assert run("first", max_steps=10, reference_cache=True)[:5] == pytest.approx(live, abs=1e-5)
    # The second epoch finds what the first one kept.
    assert len(calls) == 5
    assert run("second", reference_cache=True) == pytest.approx(live, abs=1e-5)
    # Eight rows of a file that was found are compared with the reference itself.
    assert len(calls) == 4
    # Per token, so another form needs no more.
    run("mean", reference_cache=True, logps="mean")
    assert len(calls) == 4
    run("longer", reference_cache=True, max_length=300)
    assert len(calls) == 5 and len(list((tmp_path / "kept").glob("answers-*.safetensors"))) == 2


def test_with_all_rows_kept_no_copy_of_the_reference_is_made(tmp_path: Path) -> None:
    options: dict[str, Any] = {
        "peft_config": None,
        "reference_cache": True,
        "cache_dir": str(tmp_path / "kept"),
        "save_strategy": "steps",
        "save_steps": 2,
        "eval_dataset": rows("lfm2_vl", 2, seed=1),
    }
    first = trainer(tmp_path / "first", "lfm2_vl", **options)
    assert first.reference.kind == "copy"
    first.train()
    first.evaluate()
    first._write_kept()
    second = trainer(tmp_path / "second", "lfm2_vl", **options)
    assert second.reference.kind == "none" and second.facts == first.facts
    second.train()
    assert losses_of(second) == pytest.approx(losses_of(first), abs=1e-5)
    assert second.evaluate()["eval_loss"] == pytest.approx(first.evaluate()["eval_loss"], abs=1e-5)
    third = trainer(tmp_path / "first", "lfm2_vl", **options)
    third.train(resume_from_checkpoint=str(tmp_path / "first" / "checkpoint-2"))
    assert losses_of(third)[2:] == pytest.approx(losses_of(first)[2:], abs=1e-5)
    with pytest.raises(ValueError, match="the reference of row 0 is not in .*, and no copy of it was made"):
        second.evaluate(rows("lfm2_vl", 2, seed=2))
    assert second._kept is not None
    table = second._kept.of(second._train)
    table._table = {key: value + 0.01 for key, value in table._table.items()}
    table._new = True
    table.path.unlink()
    table.write()
    with pytest.raises(ValueError, match="does not hold what the reference says now"):
        trainer(tmp_path / "fourth", "lfm2_vl", **options)


def test_a_kept_reference_that_is_wrong_is_refused(tmp_path: Path) -> None:
    options: dict[str, Any] = {"reference_cache": True, "cache_dir": str(tmp_path / "kept"), "max_steps": 3}
    run = trainer(tmp_path / "run", **options)
    run.train()
    assert run._kept is not None
    cache = run._kept.of(run._train)
    wrong = ReferenceTokens(tmp_path / "wrong", cache._parts)
    for (row, side), value in cache._table.items():
        wrong._table[row, side] = value + 0.01
    wrong._new = True
    wrong.write()
    wrong.path.replace(cache.path)
    with pytest.raises(ValueError, match="does not hold what the reference says now"):
        trainer(tmp_path / "again", **options).train()
    tensors, notes = load_file(cache.path), read_notes(cache.path)
    tensors["log_probs"][0] += 1e-6
    save_file(tensors, cache.path, {"notes": json.dumps(notes)})
    with pytest.raises(ValueError, match="was changed after it was written"):
        trainer(tmp_path / "again", **options).train()
    save_file(tensors, cache.path)
    with pytest.raises(ValueError, match="is damaged: delete it"):
        trainer(tmp_path / "again", **options).train()
    cache.path.write_bytes(cache.path.read_bytes()[:300])
    with pytest.raises(ValueError, match="is damaged: delete it"):
        trainer(tmp_path / "again", **options).train()


def test_what_a_reference_says_hangs_on_what_is_counted_and_in_which_precision(tmp_path: Path) -> None:
    """Every run finds its own table, or makes one."""
    for number, options in enumerate(({}, {"joint": True}, {"bf16": True}, {"joint": True}), 1):
        trainer(tmp_path, reference_cache=True, cache_dir=str(tmp_path / "kept"), max_steps=1, **options).train()
        assert len(list((tmp_path / "kept").glob("answers-*.safetensors"))) == min(number, 3)


def test_a_table_joins_what_several_runs_found_and_knows_its_rows(tmp_path: Path) -> None:
    supervised = torch.tensor([[False, True, True], [False, False, True]])
    told = torch.tensor([[0.0, -1.0, -2.0], [0.0, 0.0, -3.0]])
    runs = [ReferenceTokens(tmp_path, {"rows": "a"}) for _ in range(2)]
    for row, run in enumerate(runs):
        run.keep([row], told + row * supervised, supervised)
        run.write()
    table = ReferenceTokens(tmp_path, {"rows": "a"})
    assert table.holds([0, 1], 2) and not table.holds([2], 2)
    found = table.find([1, 0], supervised.repeat_interleave(2, 0))
    assert found is not None
    torch.testing.assert_close(found, torch.stack([told[0] + supervised[0], told[0], told[1] + supervised[1], told[1]]))
    assert table.find([1, 2], supervised.repeat_interleave(2, 0)) is None
    with pytest.raises(ValueError, match="has 2 tokens of row 0, not 1: delete it"):
        table.find([0], ~supervised)


def test_a_run_that_was_stopped_kept_what_its_checkpoint_saw(tmp_path: Path) -> None:
    class Stop(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 3:
                raise KeyboardInterrupt

    options: dict[str, Any] = {"reference_cache": True, "cache_dir": str(tmp_path / "kept"), "save_strategy": "steps"}
    run = trainer(tmp_path / "run", save_steps=2, **options)
    run.add_callback(Stop())
    with pytest.raises(KeyboardInterrupt):
        run.train()
    (path,) = (tmp_path / "kept").glob("answers-*.safetensors")
    # Two steps of two pairs.
    assert len(load_file(path)["keys"]) == 8


def test_what_was_kept_is_what_is_measured_with(tmp_path: Path) -> None:
    """Within the tolerance, so that a run that goes on sees the numbers of the one that was stopped."""
    options: dict[str, Any] = {"reference_cache": True, "cache_dir": str(tmp_path / "kept"), "max_steps": 3}
    run = trainer(tmp_path / "run", **options)
    run.train()
    assert run._kept is not None
    table = run._kept.of(run._train)
    table._table = {key: value + 1e-4 for key, value in table._table.items()}
    table._new = True
    table.write()
    again = trainer(tmp_path / "again", **options)
    given = batch(again)["batch"]
    live, _ = reference_scores(again.network, again.reference, given, None)
    for _ in range(6):
        measured = again.measure(again.model, given, epoch=0, data=again._train)
        assert measured.reference is not None
        gap = (measured.reference - live)[given.supervised]
        torch.testing.assert_close(gap, torch.full_like(gap, 1e-4), rtol=0, atol=2e-6)


def test_a_lora_that_is_switched_off_is_saved_so(tmp_path: Path) -> None:
    pipe = pipeline()
    run = trainer(tmp_path / "run", "lfm2", pipe, peft_config="moved", max_steps=1)
    run.train()
    pipe.model.disable_adapters()
    pipe.save_pretrained(tmp_path / "saved")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert torch.equal(hidden(plain, run), hidden(tiny_vlm("lfm2")[0], run))


def test_pushing_uploads_what_is_saved(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    seen: dict[str, Any] = {}

    class Api:
        def __init__(self, token: str | None) -> None:
            seen["token"] = token

        def create_repo(self, name: str, **options: Any) -> None:
            seen["repo"] = name, options

        def upload_folder(self, *, repo_id: str, folder_path: str) -> str:
            seen["files"] = {path.name for path in Path(folder_path).iterdir()}
            return f"https://hub/{repo_id}"

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    assert pipeline().push_to_hub("me/mine", private=True, token="t") == "https://hub/me/mine"
    assert seen["repo"] == ("me/mine", {"private": True, "exist_ok": True}) and seen["token"] == "t"
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= seen["files"]


def test_the_reference_may_be_a_model_of_its_own(tmp_path: Path) -> None:
    other = pipeline("lfm2_vl")
    for parameter in other.model.model.vision_tower.parameters():
        parameter.data += 0.3
    run = trainer(tmp_path, "lfm2_vl", ref_model=other)
    measured = run.measure(run.model, batch(run)["batch"], epoch=0, data=run._train)
    theirs = trainer(tmp_path, "lfm2_vl", other, peft_config=None, reference="copy")
    expected = theirs.measure(theirs.model, batch(run)["batch"], epoch=0, data=theirs._train).policy.log_prob
    assert measured.reference is not None
    torch.testing.assert_close(measured.reference, expected.detach())
    assert (measured.policy.log_prob.detach() - measured.reference).abs().max() > 1e-3
    other.model.half()
    with pytest.raises(ValueError, match="ref_model has another dtype"):
        trainer(tmp_path, "lfm2_vl", ref_model=other)


def test_what_decides_about_tokens_decides_about_the_fingerprint(tmp_path: Path) -> None:
    model, processor = tiny_vlm("lfm2")
    told = set()
    base: dict[str, Any] = {"output_dir": str(tmp_path), "report_to": "none", "use_cpu": True}
    for options in ({}, {"insertions": "skip"}, {"max_length": 99}, {"processor_kwargs": {"text_kwargs": {}}}):
        told.add(prepare_answers(rows(), processor, model.config, RRPOConfig(**base, **options)).fingerprint)
    told.add(prepare_answers(rows(number=5), processor, model.config, RRPOConfig(**base)).fingerprint)
    assert len(told) == 5
    again = prepare_answers(rows(), processor, model.config, RRPOConfig(**base, beta=3.0))
    assert again.fingerprint in told


def test_a_split_is_the_training_data_s_or_the_evaluation_data_s(tmp_path: Path) -> None:
    from datasets import Dataset, DatasetDict

    both = {name: Dataset.from_list(rows(number=number)) for name, number in (("fit", 4), ("held", 3))}
    DatasetDict(both).save_to_disk(tmp_path / "data")
    model, processor = tiny_vlm("lfm2")
    args = config(tmp_path, train_split="fit", eval_split="held")
    sizes = [
        len(prepare_answers(tmp_path / "data", processor, model.config, args, evaluated=evaluated).dataset)
        for evaluated in (False, True)
    ]
    assert sizes == [4, 3]
