"""Preference training of models that answer: what is measured, learnt, resumed, and told of bad rows."""

import copy
import logging
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny_vlm import clip, tiny_vlm
from torch import nn
from training import worker
from training.runs import trained
from training.token_runs import batch, losses_of, moved_lora, pipeline, plain_log_probs, rows, trainer
from transformers import TrainerCallback

from mmalign.likelihood.reference import base_state
from mmalign.training.token_measurement import AnswerPolicy, reference_scores
from mmalign.training.token_parts import default_lora
from mmalign.training.token_trainer import TokenTrainer
from mmalign.training.token_weights import without_adapters

KINDS = ("lfm2", "lfm2_vl", "llava_onevision")


@pytest.mark.parametrize("kind", KINDS)
def test_it_starts_at_ln_2_and_raises_the_margin(kind: str, tmp_path: Path) -> None:
    run = trainer(tmp_path, kind, gradient_checkpointing=kind == "lfm2_vl")
    run.train()
    history = [entry for entry in run.state.log_history if "loss" in entry]
    assert history[0]["loss"] == pytest.approx(math.log(2), abs=1e-6) and history[0]["rewards/margins"] == 0
    assert history[-1]["rewards/margins"] > 0.01 and history[-1]["rewards/accuracies"] == 1
    assert history[-1]["loss"] < history[0]["loss"]
    tokens = [entry["num_tokens"] for entry in history]
    assert all(0 < a < b for a, b in zip(tokens, tokens[1:], strict=False))
    assert 0 < history[0]["entropy"] < math.log(len(run.processor.tokenizer if kind != "lfm2" else run.processor))


@pytest.mark.parametrize(
    ("peft_config", "trained_parts", "learns"),
    [
        (None, "lm", ("language_model",)),
        (None, "lm+projector", ("language_model", "multi_modal_projector")),
        (None, "all", ("language_model", "multi_modal_projector", "vision_tower")),
        ("default", "lm", ("language_model",)),
        ("default", "all", ("language_model", "multi_modal_projector", "vision_tower")),
    ],
)
def test_what_is_trained_is_what_changes(
    peft_config: Any, trained_parts: str, learns: tuple[str, ...], tmp_path: Path
) -> None:
    pipe = pipeline("lfm2_vl")
    if peft_config == "default":
        peft_config = default_lora(pipe.model, trained_parts)  # type: ignore[arg-type]
    before = {name: value.clone() for name, value in pipe.model.state_dict().items()}
    run = trainer(tmp_path, "lfm2_vl", pipe, peft_config=peft_config, trained_parts=trained_parts, max_steps=2)
    run.train()
    after = pipe.model.state_dict()
    changed = {name for name in after if name not in before or not torch.equal(after[name], before[name])}
    changed = {name for name in changed if ".base_layer." not in name and "lm_head" not in name}
    assert {
        part for part in ("language_model", "multi_modal_projector", "vision_tower") if any(part in n for n in changed)
    } == set(learns)


def test_with_the_adapter_off_it_is_the_base_bit_for_bit(tmp_path: Path) -> None:
    base = tiny_vlm("lfm2_vl")[0]
    run = trainer(tmp_path, "lfm2_vl", max_steps=2)
    run.train()
    inputs = batch(run)["batch"]
    told, _ = reference_scores(run.network, run.reference, inputs, None)
    plain = trainer(tmp_path, "lfm2_vl", peft_config=None, reference="copy")
    expected, _ = reference_scores(plain.network, plain.reference, inputs, None)
    assert torch.equal(told, expected)
    assert not torch.equal(run.measure(run.model, inputs, epoch=0, data=run._train).policy.log_prob, told)
    assert base_state(run.network).keys() == base.state_dict().keys()
    assert all(torch.equal(value, base.state_dict()[name]) for name, value in base_state(run.network).items())


def by_hand(run: TokenTrainer, form: str) -> torch.Tensor:
    """Two rows' losses from full logits of the model with and without its adapter, by each paper's formula."""
    beta, policy = run.args.beta, plain_log_probs(run.network, run)
    if form == "simpo":
        means = torch.tensor([[float(side.mean()) for side in sides] for sides in policy])
        return -F.logsigmoid(beta * (means[:, 0] - means[:, 1]) - 0.5)
    with run.reference.model(run.network) as frozen:
        reference = plain_log_probs(frozen, run)
    ratios = [[p - r for p, r in zip(*sides, strict=True)] for sides in zip(policy, reference, strict=True)]
    sums = torch.tensor([[float(ratio.sum()) for ratio in sides] for sides in ratios])
    if form == "sum":
        return -F.logsigmoid(beta * (sums[:, 0] - sums[:, 1]))
    if form == "mean":
        means = torch.tensor([[float(ratio.mean()) for ratio in sides] for sides in ratios])
        return -F.logsigmoid(beta * (means[:, 0] - means[:, 1]))
    assert form == "ld"
    weighed = torch.zeros(len(ratios), 2)
    for row, sides in enumerate(ratios):
        shared = min(map(len, sides))
        for side, ratio in enumerate(sides):
            weighed[row, side] = ratio[:shared].sum() + 0.3 * ratio[shared:].sum()
    return -F.logsigmoid(beta * (weighed[:, 0] - weighed[:, 1]))


@pytest.mark.parametrize(
    ("form", "options"),
    [
        ("sum", {}),
        ("mean", {"logps": "mean", "beta": 2.0}),
        ("ld", {"logps": "ld", "ld_alpha": 0.3}),
        ("simpo", {"loss_type": "simpo", "beta": 2.0, "simpo_gamma": 0.5}),
        ("sum", {"share_prompt": True}),
    ],
)
def test_losses_are_those_of_full_logits(form: str, options: dict[str, Any], tmp_path: Path) -> None:
    run = trainer(tmp_path, peft_config="moved", **options)
    found = run.row_losses(run.model.eval(), batch(run), epoch=0, data=run._train)
    expected = by_hand(run, form)
    assert run.reference.kind == ("none" if form == "simpo" else "adapter") and found.loss.std() > 0
    torch.testing.assert_close(found.loss.detach(), expected, rtol=1e-4, atol=1e-5)
    assert found.rows == [0, 1]


def test_joint_counts_the_words_of_the_prompt_and_no_picture(tmp_path: Path) -> None:
    plain, joint = (trainer(tmp_path, "lfm2_vl", joint=joint) for joint in (False, True))
    given = batch(joint)["batch"]
    counted = joint.measure(joint.model, given, epoch=0, data=joint._train).supervised
    ids = given.inputs["input_ids"]
    prompts = counted & ~given.supervised
    assert (counted | given.supervised).equal(counted) and not counted[:, 0].any()
    assert (
        not (prompts & (ids == joint.processor.image_token_id)).any() and (ids == joint.processor.image_token_id).any()
    )
    first = given.supervised.int().argmax(1)
    images = (ids == joint.processor.image_token_id).sum(1)
    assert prompts.sum(1).tolist() == (first - 1 - images).tolist()
    assert plain.measure(plain.model, given, epoch=0, data=plain._train).supervised.equal(given.supervised)


@pytest.mark.parametrize("share_prompt", [False, True])
def test_tokens_are_counted_as_they_are_read(share_prompt: bool, tmp_path: Path) -> None:
    run = trainer(tmp_path, train_dataset=rows(number=2), max_steps=2, share_prompt=share_prompt)
    run.train()
    encoded = [run._train.dataset[index]["encoded"] for index in range(2)]
    read = sum(len(one.prompt) + len(answer.ids) for one in encoded for answer in one.answers)
    told = [entry["num_tokens"] for entry in run.state.log_history if "loss" in entry]
    assert told == [read, 2 * read]


def test_rows_without_pictures_teach_no_encoder(tmp_path: Path) -> None:
    data = [{name: value for name, value in row.items() if name != "image"} for row in rows("lfm2_vl")]
    trainer(tmp_path, "lfm2_vl", train_dataset=data, peft_config=None, trained_parts="all", max_steps=1).train()


def test_a_head_that_is_not_known_stops_the_run(tmp_path: Path) -> None:
    pipe = pipeline()
    pipe.model.config.logits_scaling = 2.0
    with pytest.raises(ValueError, match="it scales or caps them in a way that is not known here"):
        trainer(tmp_path, "lfm2", pipe).train()


def test_a_models_own_dropout_stays_off_and_a_loras_does_not() -> None:
    network = nn.ModuleDict({"own": nn.Dropout(0.5), "lora_dropout": nn.ModuleDict({"default": nn.Dropout(0.5)})})
    policy = AnswerPolicy(nn.ModuleDict({"layer": network})).train()
    assert [module.training for module in policy.modules() if isinstance(module, nn.Dropout)] == [False, True]


def test_sharing_the_prompt_changes_no_gradient(tmp_path: Path) -> None:
    told = {}
    for share in (False, True):
        run = trainer(tmp_path, "lfm2_vl", peft_config="moved", share_prompt=share, train_dataset=rows("lfm2_vl", 4))
        loss = run.row_losses(run.model, batch(run, 3), epoch=0, data=run._train).loss
        loss.sum().backward()
        told[share] = (loss.detach(), {n: p.grad for n, p in run.network.named_parameters() if p.grad is not None})
    torch.testing.assert_close(told[True], told[False], rtol=1e-3, atol=1e-5)


def test_kto_takes_a_pair_as_a_liked_and_a_disliked_answer(tmp_path: Path) -> None:
    run = trainer(tmp_path, peft_config="moved", loss_type="kto", desirable_weight=1.5)
    run.model.eval()
    inputs = batch(run, 3)
    found = run.row_losses(run.model, inputs, epoch=0, data=run._train)
    policy = plain_log_probs(run.network, run, 3)
    with run.reference.model(run.network) as frozen:
        reference = plain_log_probs(frozen, run, 3)
    chosen, rejected = (
        torch.stack([(p[side] - r[side]).sum() for p, r in zip(policy, reference, strict=True)]) for side in (0, 1)
    )
    baseline = torch.tensor(found.panel["kl_baseline"][0]).clamp(min=0)
    # The prompts with the next row's preferred answer.
    rounds = [run._train.dataset[index]["encoded"] for index in range(3)]
    mixed = [
        replace(one, answers=other.answers[:1]) for one, other in zip(rounds, [*rounds[1:], rounds[0]], strict=True)
    ]
    others = [{"encoded": one} for one in mixed]
    with run.reference.model(run.network) as frozen:
        kept = plain_log_probs(frozen, run, items=others)
    gaps = [
        float((p[0] - r[0]).sum()) for p, r in zip(plain_log_probs(run.network, run, items=others), kept, strict=True)
    ]
    assert baseline == pytest.approx(max(0.0, sum(gaps) / 3), rel=1e-3) and found.panel["kl_baseline"][
        0
    ] == pytest.approx(sum(gaps) / 3, rel=1e-3)
    beta = run.args.beta
    expected = torch.cat([1.5 * torch.sigmoid(beta * (baseline - chosen)), torch.sigmoid(beta * (rejected - baseline))])
    torch.testing.assert_close(found.loss.detach(), expected, rtol=1e-4, atol=1e-5)
    assert found.rows == [0, 1, 2] * 2


def single_answers(seed: int = 0) -> list[dict[str, Any]]:
    """The pairs of `rows`, each as one that is liked and one that is not."""
    return [
        {"prompt": row["prompt"], "completion": row[side], "label": side == "chosen"}
        for row in rows(seed=seed)
        for side in ("chosen", "rejected")
    ]


def test_rows_that_are_evaluated_later_must_suit_the_loss_too(tmp_path: Path) -> None:
    pairs = trainer(tmp_path)
    with pytest.raises(ValueError, match="holds single answers, and loss_type='sigmoid' compares pairs"):
        pairs.evaluate(single_answers())
    kto = trainer(tmp_path, loss_type="kto")
    with pytest.raises(ValueError, match="a batch would have one row: change per_device_eval_batch_size"):
        kto.evaluate(rows(seed=1)[:3])
    with pytest.raises(ValueError, match="differ: one holds pairs, the other single answers"):
        kto.evaluate(single_answers())


def test_kto_learns_from_single_answers(tmp_path: Path) -> None:
    single = single_answers()
    run = trainer(tmp_path, train_dataset=single, loss_type="kto", per_device_train_batch_size=4, max_steps=6)
    run.train()
    last = [entry for entry in run.state.log_history if "loss" in entry][-1]
    assert last["rewards/chosen"] > last["rewards/rejected"]
    with pytest.raises(ValueError, match="holds single answers, and loss_type='sigmoid' compares pairs"):
        trainer(tmp_path, train_dataset=single)


class Killed(Exception):
    """In the middle of a run."""


class Kill(TrainerCallback):
    """After the third step."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 3:
            raise Killed


@pytest.mark.parametrize("options", [{}, {"peft_config": None}, {"loss_type": "bco", "gradient_checkpointing": True}])
def test_a_killed_run_goes_on_with_the_same_losses(options: dict[str, Any], tmp_path: Path) -> None:
    def run(folder: str, **more: Any) -> TokenTrainer:
        pipe = pipeline("lfm2_vl")
        lora = default_lora(pipe.model)
        lora.lora_dropout = 0.2
        usual = {"peft_config": lora, "save_strategy": "steps", "save_steps": 2}
        return trainer(tmp_path / folder, "lfm2_vl", pipe, **usual | options | more)

    whole = run("whole")
    whole.train()

    first = run("killed")
    first.add_callback(Kill())
    with pytest.raises(Killed):
        first.train()
    second = run("killed")
    second.train(resume_from_checkpoint=True)
    assert losses_of(second) == losses_of(whole)
    assert second.state.num_input_tokens_seen == whole.state.num_input_tokens_seen
    for (name, value), other in zip(
        second.network.state_dict().items(), whole.network.state_dict().values(), strict=True
    ):
        assert torch.equal(value, other), name


def test_two_processes_train_as_one_does(tmp_path: Path) -> None:
    options: dict[str, Any] = {
        "train_dataset": rows("lfm2_vl", 8),
        "eval_dataset": rows("lfm2_vl", 3, seed=1),
        "peft_config": "moved",
        "reference_cache": True,
        "cache_dir": str(tmp_path / "kept"),
        "max_steps": 2,
        "learning_rate": 1e-3,
    }
    ranks = worker.together(2, tmp_path / "two", options, target=worker.share_answers)
    alone = trainer(tmp_path / "one", "lfm2_vl", gradient_accumulation_steps=2, **options)
    alone.train()
    expected = trained(alone)
    for rank in ranks:
        for name, value in rank["trained"].items():
            torch.testing.assert_close(value, expected[name], rtol=1e-3, atol=1e-6, msg=name)
    told = [entry["num_tokens"] for entry in ranks[0]["history"] if "loss" in entry]
    assert told == [entry["num_tokens"] for entry in alone.state.log_history if "loss" in entry]
    assert ranks[0]["metrics"]["eval_loss"] == pytest.approx(alone.evaluate()["eval_loss"], rel=1e-4)
    assert ranks[0]["metrics"] == ranks[1]["metrics"]


def test_a_process_without_a_row_to_evaluate_writes_as_the_others_do(tmp_path: Path) -> None:
    """Were it to write fewer tables, its next message would be taken for one of them."""
    options: dict[str, Any] = {
        "train_dataset": rows("lfm2_vl", 4),
        "eval_dataset": rows("lfm2_vl", 1, seed=1),
        "reference_cache": True,
        "cache_dir": str(tmp_path / "kept"),
        "max_steps": 1,
        "eval_strategy": "steps",
        "eval_steps": 1,
    }
    ranks = worker.together(2, tmp_path / "two", options, target=worker.share_answers)
    assert ranks[0]["metrics"] == ranks[1]["metrics"]
    assert len(list((tmp_path / "kept").glob("answers-*.safetensors"))) == 2


def test_workers_read_the_same_rows(tmp_path: Path) -> None:
    told = []
    for workers in (0, 1):
        run = trainer(tmp_path, dataloader_num_workers=workers, max_steps=2)
        run.train()
        told.append(losses_of(run))
    assert told[0] == told[1]


def test_a_bad_row_is_named_or_left_out_and_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    data = rows("lfm2_vl")
    data[2]["chosen"] = ""
    data[4]["prompt"] = "<image> and <image>?"
    with pytest.raises(ValueError, match="2 of 6 rows cannot be used: row 2, chosen: .*row 4, .*on_bad_row='skip'"):
        trainer(tmp_path, "lfm2_vl", train_dataset=data)
    with caplog.at_level(logging.WARNING, logger="mmalign"):
        run = trainer(tmp_path, "lfm2_vl", train_dataset=data, on_bad_row="skip", max_steps=2)
    assert "2 of 6 rows left out: row 2" in caplog.text
    assert run._train.dataset.rows == [0, 1, 3, 5]
    run.train()
    run.save_model()
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert "Not every row was trained on: 2 of 6 rows left out: row 2, chosen" in card


def test_clips_that_cannot_share_a_batch_are_told_before_the_first_step(tmp_path: Path) -> None:
    data = rows("llava_onevision")
    data[4]["video"]["frames"] = data[4]["video"]["frames"][:2]
    said = (
        r"rows 0 and 4 cannot share a batch: pixel_values_videos of \(4, 3, 16, 16\) and \(2, 3, 16, 16\); .*num_frames"
    )
    with pytest.raises(ValueError, match=said):
        trainer(tmp_path, "llava_onevision", train_dataset=data)
    alone = trainer(tmp_path, "llava_onevision", train_dataset=data, per_device_train_batch_size=1)
    with pytest.raises(ValueError, match=said):
        alone.evaluate([{**row, "prompt": f"Again, {row['prompt']}"} for row in data])
    assert len(trainer(tmp_path, "llava_onevision", train_dataset=data, num_frames=2)._train.dataset) == 6
    # Qwen's clips are one after the other.
    data[4]["video"] = {"frames": list(clip(6).frames), "fps": 2.0}
    assert len(trainer(tmp_path, "qwen2_5_vl", train_dataset=data)._train.dataset) == 6


def test_a_row_that_is_too_long_is_a_bad_row_or_is_cut(tmp_path: Path) -> None:
    data = rows()
    data[1]["chosen"] = "A bag. " * 40
    with pytest.raises(ValueError, match="row 1, chosen: .*longer than max_length"):
        trainer(tmp_path, train_dataset=data, max_length=100)
    run = trainer(tmp_path, train_dataset=data, max_length=100, truncate="answer")
    assert run._train.longest == 100 and len(run._train.dataset) == 6


def test_a_trained_weight_without_a_gradient_stops_the_run(tmp_path: Path) -> None:
    pipe = pipeline()
    pipe.model.model.idle = nn.Linear(2, 2)
    run = trainer(tmp_path, "lfm2", pipe, peft_config=None)
    with pytest.raises(ValueError, match="2 trained weights got no gradient at the first step .model.idle"):
        run.train()


def test_the_order_of_the_rows_is_the_seeds(tmp_path: Path) -> None:
    orders = [list(trainer(tmp_path, seed=seed).sampler(trainer(tmp_path, seed=seed).args)) for seed in (1, 1, 2)]
    assert orders[0] == orders[1] != orders[2]


def test_evaluation_tells_the_kl_and_is_the_same_every_time(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    held_out = [*rows(seed=1)[:2], rows()[0]]
    with caplog.at_level(logging.WARNING, logger="mmalign"):
        run = trainer(tmp_path, peft_config="moved", eval_dataset=held_out)
    assert "1 of 3 evaluation prompts also occur in training" in caplog.text
    told = run.evaluate()
    again = run.evaluate()
    assert told == again
    rows_apart = [run.evaluate([row])["eval_loss"] for row in held_out]
    assert told["eval_loss"] == pytest.approx(sum(rows_apart) / 3, rel=1e-4)
    with pytest.raises(ValueError, match="eval_dataset is the training data"):
        trainer(tmp_path, eval_dataset=rows())


def test_the_kl_is_that_of_whole_distributions_and_teaches(tmp_path: Path) -> None:
    run = trainer(tmp_path, peft_config="moved")
    run.args.needs_kl = True  # type: ignore[misc]
    measured = run.measure(run.model, batch(run)["batch"], epoch=0, data=run._train)
    policy = plain_log_probs(run.network, run, whole=True)
    with run.reference.model(run.network) as frozen:
        reference = plain_log_probs(frozen, run, whole=True)
    expected = [
        (r[side].exp() * (r[side] - p[side])).sum(-1) for side in (0, 1) for p, r in zip(policy, reference, strict=True)
    ]
    kl = measured.policy.kl
    assert kl is not None
    torch.testing.assert_close(kl[measured.supervised].detach(), torch.cat(expected), rtol=1e-3, atol=1e-6)
    kl.sum().backward()
    assert all(p.grad is not None for p in run.network.parameters() if p.requires_grad)
    assert trainer(tmp_path, eval_dataset=rows(seed=1)).evaluate()["eval_kl"] == pytest.approx(0, abs=1e-6)


def test_where_the_constructor_raises_the_model_is_as_it_was(tmp_path: Path) -> None:
    pipe = pipeline()
    before = copy.deepcopy(pipe.model)
    pipe.model.model.embed_tokens.weight.requires_grad_(False)
    with pytest.raises(ValueError, match="does not use ref_model"):
        trainer(tmp_path, "lfm2", pipe, loss_type="simpo", beta=2.0, ref_model=before)
    assert [name for name, _ in pipe.model.named_modules()] == [name for name, _ in before.named_modules()]
    frozen = [name for name, parameter in pipe.model.named_parameters() if not parameter.requires_grad]
    assert frozen == ["model.embed_tokens.weight"] and not hasattr(pipe.model, "peft_config")


def test_adapters_come_off_without_a_trace(tmp_path: Path) -> None:
    pipe = pipeline("lfm2_vl")
    base = tiny_vlm("lfm2_vl")[0]
    pipe.model.add_adapter(moved_lora(pipe))
    without_adapters(pipe.model)
    ours, theirs = pipe.model.state_dict(), base.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("loss_type", ["sigmoid", "ln_pref"])
def test_rewards_are_told_as_the_loss_reads_them(loss_type: str, tmp_path: Path) -> None:
    run = trainer(tmp_path, "lfm2", loss_type=loss_type, beta=2.0, max_steps=3)
    run.train()
    last = [entry for entry in run.state.log_history if "loss" in entry][-1]
    inputs = batch(run)
    measured = run.measure(run.model, inputs["batch"], epoch=-1, data=run._train)
    pairs = measured.pairs()
    lengths = (pairs.chosen_length, pairs.rejected_length) if loss_type == "ln_pref" else (1, 1)
    expected = 2.0 * (pairs.chosen_logratio / lengths[0] - pairs.rejected_logratio / lengths[1])
    told = run.panel(measured, run.loss_of(measured).detach())["rewards/margins"]
    assert told[0] / told[1] == pytest.approx(float(expected.mean()), rel=1e-5)
    torch.testing.assert_close(run.loss_of(measured), F.softplus(-expected))
    assert last["rewards/margins"] > 0
