"""RRPO's loss: what it is at the reference, which tokens move it and which way, what it is made of, and a run on tiny models."""

import copy
import json
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tiny_vlm import clip, tiny_vlm
from torch import Tensor, nn

from mmalign import losses
from mmalign.data.answer_records import AnswerPair, Turn
from mmalign.data.records import InvalidRow
from mmalign.likelihood.answers import AnswerScores, token_weights
from mmalign.likelihood.token_head import TokenHead
from mmalign.likelihood.tokens import score_tokens
from mmalign.pipelines.video.rrpo import RRPOConfig, RRPOPipeline, RRPOTrainer, phrase_weights, rrpo_loss
from mmalign.training.token_data import prepare_answers
from mmalign.training.token_measurement import AnswerMeasurement

B, T, V = 2, 9, 13
DRAW = torch.Generator().manual_seed(0)
LABELS = torch.randint(V, (2 * B, T), generator=DRAW)
SUPERVISED = torch.arange(T).expand(2 * B, T) >= torch.tensor([3, 2, 4, 5])[:, None]
# Two phrases in the first chosen answer, one in each other.
MARKED = torch.zeros(2 * B, T, dtype=torch.bool)
for _row, _places in enumerate(((3, 4, 7), (5,), (6, 7), (8,))):
    MARKED[_row, list(_places)] = True


def config(**options: Any) -> RRPOConfig:
    return RRPOConfig("unused", report_to="none", beta=0.3, **options)


def logits(seed: int, dtype: torch.dtype = torch.float32, scale: float = 2.0) -> Tensor:
    return (torch.randn(2 * B, T, V, generator=torch.Generator().manual_seed(seed)) * scale).to(dtype)


def measured(policy: Tensor, reference: Tensor, args: RRPOConfig, marked: Tensor = MARKED) -> AnswerMeasurement:
    """Both models' logits at the tokens' own places, scored as a model's hidden states are."""
    head = nn.Linear(V, V, bias=False, dtype=policy.dtype).requires_grad_(False)
    head.weight.copy_(torch.eye(V))

    def placed(values: Tensor) -> Tensor:
        return values.new_zeros(2 * B, T).masked_scatter(SUPERVISED, values)

    told, labels = TokenHead(head), LABELS[SUPERVISED]
    found = score_tokens(policy[SUPERVISED], labels, told, reference=(reference[SUPERVISED], told))
    assert found.kl is not None
    with torch.no_grad():
        expected = score_tokens(reference[SUPERVISED], labels, told).log_prob
    weights = phrase_weights(SUPERVISED, marked, args)
    scores = AnswerScores(placed(found.log_prob), placed(found.kl))
    return AnswerMeasurement(scores, placed(expected), weights, SUPERVISED, marked, torch.ones(B))


def loss(policy: Tensor, reference: Tensor, marked: Tensor = MARKED, **options: Any) -> Tensor:
    args = config(**options)
    return rrpo_loss(measured(policy, reference, args, marked), args)


def raised(policy: Tensor, places: Tensor, by: float = 0.5) -> Tensor:
    """The policy with the logits of these tokens' labels raised."""
    return policy + by * nn.functional.one_hot(LABELS, V) * places[..., None]


@pytest.mark.parametrize("normalize", ["none", "phrase_tokens", "response_tokens"])
@pytest.mark.parametrize("kl_on", ["chosen", "both"])
def test_at_the_reference_the_loss_is_ln_2_and_nothing_diverges(normalize: str, kl_on: str):
    policy = logits(1).requires_grad_()
    found = loss(policy, logits(1), normalize=normalize, kl_on=kl_on, alpha=0.5)
    torch.testing.assert_close(found, torch.full((B,), math.log(2)), atol=1e-6, rtol=0)


def test_the_loss_is_its_formula():
    policy, reference = logits(1, torch.float64), logits(2, torch.float64)
    delta = (policy.log_softmax(-1) - reference.log_softmax(-1)).gather(-1, LABELS[..., None])[..., 0]
    chosen, rejected = (delta * MARKED).sum(1).chunk(2)
    prior = reference.log_softmax(-1)
    kl = ((prior.exp() * (prior - policy.log_softmax(-1))).sum(-1) * SUPERVISED).sum(1)
    expected = -nn.functional.logsigmoid(0.3 * (chosen - rejected)) + 0.07 * kl[:B]
    torch.testing.assert_close(loss(policy, reference, alpha=0.07), expected, atol=1e-12, rtol=0)
    both = expected + 0.07 * kl[B:]
    torch.testing.assert_close(loss(policy, reference, alpha=0.07, kl_on="both"), both, atol=1e-12, rtol=0)


def test_phrases_for_themselves_sum_to_the_mask():
    args, phrases = config(), [torch.zeros_like(MARKED), torch.zeros_like(MARKED)]
    phrases[0][0, [3, 4]], phrases[1][0, 7] = True, True
    rest = MARKED & ~phrases[0] & ~phrases[1]
    parts = [measured(logits(1), logits(2), args, part).pairs().margin for part in (*phrases, rest)]
    torch.testing.assert_close(sum(parts), measured(logits(1), logits(2), args).pairs().margin)


def test_each_kind_of_token_moves_the_loss_its_own_way():
    policy, chosen = logits(1), torch.arange(2 * B)[:, None] < B
    unmarked = SUPERVISED & ~MARKED
    here = loss(policy, policy, alpha=0.1)
    assert (loss(raised(policy, MARKED & chosen), policy, alpha=0.0) < here).all()
    assert (loss(raised(policy, MARKED & ~chosen), policy, alpha=0.0) > here).all()
    # The divergence costs, whichever way the policy moves.
    assert (loss(raised(policy, unmarked & chosen), policy, alpha=0.1) > here).all()
    assert (loss(raised(policy, unmarked & chosen, by=-0.5), policy, alpha=0.1) > here).all()
    for same in (unmarked & ~chosen, ~SUPERVISED):
        torch.testing.assert_close(loss(raised(policy, same), policy, alpha=0.1), here)
    assert (loss(raised(policy, unmarked & ~chosen), policy, alpha=0.1, kl_on="both") > here).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gap_of_120_between_logits_leaves_loss_and_gradient_finite(dtype: torch.dtype):
    policy, reference = logits(1, dtype), logits(2, dtype)
    policy[..., 0], reference[..., 1] = 120.0, 120.0
    policy.requires_grad_()
    found = loss(policy, reference, alpha=0.05)
    found.sum().backward()
    assert found.isfinite().all() and policy.grad is not None and policy.grad.isfinite().all()


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 1000), beta=st.floats(0.05, 5))
def test_with_everything_marked_and_no_divergence_it_is_dpo(seed: int, beta: float):
    policy, reference, args = logits(seed), logits(seed + 1), replace(config(alpha=0.0), beta=beta)
    found = measured(policy, reference, args, torch.ones_like(MARKED))
    logps = found.pairs()
    dpo = losses.compute("sigmoid", replace_weights(found).pairs(), beta=beta)
    torch.testing.assert_close(rrpo_loss(found, args), dpo, atol=1e-6, rtol=0)
    unrefined = config(alpha=0.0, refined=False)
    torch.testing.assert_close(
        rrpo_loss(measured(policy, reference, replace(unrefined, beta=beta)), replace(unrefined, beta=beta)), dpo
    )
    assert (logps.chosen_length == SUPERVISED[:B].sum(1)).all()


def replace_weights(found: AnswerMeasurement) -> AnswerMeasurement:
    return replace(found, weights=token_weights(SUPERVISED))


def test_half_precision_is_exact_in_its_own_numbers():
    policy, reference = logits(1, torch.bfloat16), logits(2, torch.bfloat16)
    found, exact = (loss(policy.to(d), reference.to(d), alpha=0.05) for d in (torch.bfloat16, torch.float32))
    torch.testing.assert_close(found, exact, atol=1e-5, rtol=0)
    assert loss(policy, policy, alpha=1.0).sub(math.log(2)).abs().max() < 1e-6


def test_normalised_rewards_are_means():
    policy, reference = logits(1), logits(2)
    for normalize, among in (("phrase_tokens", MARKED), ("response_tokens", SUPERVISED)):
        args = config(normalize=normalize)
        sums = measured(policy, reference, config()).pairs()
        means = measured(policy, reference, args).pairs()
        lengths = among.sum(1).chunk(2)
        torch.testing.assert_close(means.chosen_logratio, sums.chosen_logratio / lengths[0])
        torch.testing.assert_close(means.rejected_logratio, sums.rejected_logratio / lengths[1])
        # The divergence is then per token of the whole answer, whatever is marked.
        summed = measured(policy, reference, args).policy.kl
        assert summed is not None
        per_token = (summed.sum(1) / SUPERVISED.sum(1))[:B]
        added = loss(policy, reference, normalize=normalize, alpha=0.5) - loss(
            policy, reference, normalize=normalize, alpha=0.0
        )
        torch.testing.assert_close(added, 0.5 * per_token)


def test_the_panel_tells_both_divergences_and_the_share_of_marked_tokens():
    args = config(alpha=0.1)
    found = measured(logits(1), logits(2), args)
    run = object.__new__(RRPOTrainer)
    run.args = args
    told = run.panel(found, torch.ones(B))
    assert found.policy.kl is not None and told["marked"] == (int(MARKED.sum()), int(SUPERVISED.sum()))
    sums = found.policy.kl.sum(1).double()
    assert told["kl/chosen"] == (pytest.approx(sums[:B].sum().item()), B)
    assert told["kl/rejected"] == (pytest.approx(sums[B:].sum().item()), B)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"alpha": -0.1}, "alpha must not be negative"),
        ({"alpha": 0.0, "kl_on": "both"}, "kl_on has no effect"),
        ({"refined": False, "normalize": "phrase_tokens"}, "phrase_tokens"),
        ({"refined": False, "insertions": "skip"}, "insertions has no effect"),
        ({"logps": "mean"}, "leave logps out"),
        ({"joint": True}, "joint"),
        ({"loss_type": "sigmoid_norm", "normalize": "phrase_tokens"}, "normalize divides by tokens"),
        ({"loss_type": "ipo", "normalize": "response_tokens"}, "normalize divides by tokens"),
        ({"loss_type": "kto"}, "two answers"),
        ({"reference_cache": True}, "reference_cache"),
    ],
)
def test_options_that_contradict_each_other_are_refused(options: dict[str, Any], told: str):
    with pytest.raises(ValueError, match=told):
        config(**options)


def pair(chosen: str, rejected: str, **marks: Any) -> AnswerPair:
    return AnswerPair(4, (Turn("user", ("What happens?",)),), chosen, rejected, **marks)


def test_marks_of_the_data_stay_and_others_are_found():
    taken = config().taken(
        pair("a red bag falls", "a blue bag falls", chosen_marks=((2, 5),), rejected_marks=((2, 6),))
    )
    assert (taken.chosen_marks, taken.rejected_marks) == (((2, 5),), ((2, 6),))
    found = config().taken(pair("a red bag falls", "a blue bag falls"))
    assert (found.chosen_marks, found.rejected_marks) == (((2, 5),), ((2, 6),))
    assert config(refined=False).taken(pair("same", "same")).chosen_marks is None
    added = pair("a bag falls", "a blue bag falls")
    assert config().taken(added).chosen_marks == ((0, 1),)
    with pytest.raises(InvalidRow, match="row 4, chosen: no phrase is marked in it"):
        config(insertions="skip").taken(added)
    with pytest.raises(InvalidRow, match="row 4, rejected: no phrase is marked in it"):
        config(deletions="skip").taken(added)


@pytest.mark.parametrize(
    ("row", "told"),
    [
        (pair("same", "same"), "row 4, chosen: both answers are the same"),
        (pair("one", "two", chosen_marks=((0, 3),), rejected_marks=()), "row 4, rejected: no phrase is marked in it"),
        (pair("one", "two", chosen_marks=(), rejected_marks=()), "row 4, chosen: no phrase is marked in either"),
    ],
)
def test_a_row_without_a_phrase_is_named(row: AnswerPair, told: str):
    with pytest.raises(InvalidRow, match=told):
        config().taken(row)


def test_the_divergence_needs_the_reference_that_a_loss_may_not(tmp_path: Any):
    args = RRPOConfig(
        str(tmp_path), report_to="none", loss_type="simpo", beta=2.0, reference="copy", use_cpu=True,
        per_device_train_batch_size=2, disable_tqdm=True,
    )  # fmt: skip
    pipe = RRPOPipeline.from_parts(*copy.deepcopy(tiny_vlm("lfm2")))
    data = [{"prompt": "Which?", "chosen": f"It is {word}.", "rejected": "It is blue."} for word in ("red", "white")]
    run = RRPOTrainer(pipe, args, data)
    assert args.is_reference_free and run.reference.kind == "copy"
    found = run.measure(run.model, run.collate([run._train.dataset[0]])["batch"], epoch=0, data=run._train)
    assert found.policy.kl is not None
    with pytest.raises(ValueError, match="reference has no effect"):
        RRPOConfig("unused", report_to="none", loss_type="simpo", beta=2.0, reference="copy", alpha=0.0)


def test_a_row_whose_phrases_were_cut_off_is_a_bad_one(tmp_path: Any):
    model, processor = tiny_vlm("lfm2")
    ends = [f"It stands there for a long while, and it is {colour}" for colour in ("red", "blue")]
    data = [{"prompt": "Which?", "chosen": ends[0], "rejected": ends[1]}]
    answers = {}
    for length in (30, 60):
        args = config(max_length=length, truncate="answer", on_bad_row="skip", disable_tqdm=True)
        try:
            answers[length] = prepare_answers(data, processor, model.config, args).dataset[0]["encoded"].answers
        except ValueError as error:
            answers[length] = str(error)
    assert answers[30] == (
        "no usable rows in list: 1 of 1 rows cannot be used: row 0, chosen: prompt (14 tokens) and answer (29) are longer than "
        "max_length (30), and no marked phrase would be left; raise it"
    )
    assert all(answer.marked.any() for answer in answers[60])


def test_the_presets_are_the_released_scripts(tmp_path: Any):
    args = RRPOConfig.preset("videochat2", output_dir=str(tmp_path), report_to="none", fp16=False)
    assert (args.alpha, args.beta, args.learning_rate) == (0.01, 0.9, 2e-5)
    # Down to one per cent, without a warm-up.
    assert args.lr_scheduler_type == "cosine_with_min_lr" and args.lr_scheduler_kwargs == {"min_lr_rate": 0.01}
    assert args.warmup_steps == 0 and args.num_frames == 16


def rows(number: int = 8) -> list[dict[str, Any]]:
    """Clips of noise, one answer marked, the next not."""
    made = []
    for row in range(number):
        frames: list[Image.Image] = list(clip(seed=row).frames)
        tags = ("<MASK>left</MASK>", "<MASK>right</MASK>") if row % 2 else ("left", "right")
        chosen, rejected = (f"It moves to the {word}, then it stops." for word in tags)
        made.append({"prompt": "Which way does it move?", "videos": [frames], "chosen": chosen, "rejected": rejected})
    return made


@pytest.mark.parametrize("kind", ["llava_onevision", "qwen2_5_vl", "smolvlm"])
def test_a_run_tells_phrases_apart_and_stays_near_the_reference(kind: str, tmp_path: Any):
    model, processor = copy.deepcopy(tiny_vlm(kind))
    pipe = RRPOPipeline.from_parts(model, processor)
    options = dict(
        per_device_train_batch_size=4, report_to="none", save_strategy="no", logging_steps=1, disable_tqdm=True, use_cpu=True,
        learning_rate=5e-3, beta=0.5, num_frames=4,
    )  # fmt: skip
    result = pipe.align(rows(), output_dir=tmp_path / "run", max_steps=6, alpha=0.05, **options)
    told = [entry for entry in result.history if "loss" in entry]
    assert told[0]["loss"] == pytest.approx(math.log(2), abs=1e-5) and told[0]["kl/chosen"] == pytest.approx(
        0, abs=1e-5
    )
    assert told[-1]["rewards/margins"] > 0.01 > told[0]["rewards/margins"]
    assert 0 < told[0]["marked"] < 0.5 and told[-1]["kl/chosen"] > 0
    assert json.loads((tmp_path / "run" / "history.json").read_text())
