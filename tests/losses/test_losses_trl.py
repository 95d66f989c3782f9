"""Agreement with TRL: its own methods run on a stub that hands out given log-probabilities."""

import os
import re
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch

from mmalign import losses

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
pytest.importorskip("trl")

from trl.experimental.cpo.cpo_trainer import CPOTrainer
from trl.experimental.orpo.orpo_trainer import ORPOTrainer
from trl.trainer.dpo_config import DPOConfig
from trl.trainer.dpo_trainer import DPOTrainer
from trl.trainer.kto_trainer import KTOTrainer

PROMPT, TOKENS, PAIRS = 2, 7, 4
LENGTHS = torch.tensor([3, 5, 1, 4, 4, 2, 5, 1])  # chosen, then rejected
WITH_DIVERGENCE = {"sigmoid", "sigmoid_norm", "hinge", "ipo", "exo_pair", "robust", "discopop"}
LOSS_TYPES = sorted(re.findall(r"'(\w+)'", DPOConfig.__dataclass_fields__["loss_type"].metadata["help"]))

ACCELERATOR = SimpleNamespace(
    device=torch.device("cpu"), gather_for_metrics=lambda x: x, gather=lambda x: x, num_processes=1
)


def batch(rows=range(PAIRS), dtype=torch.float64):
    """Per-token log-probabilities (2B, T − 1) of the policy, with gradient, the sums of the reference, and masks."""
    generator = torch.Generator().manual_seed(7)
    rows = torch.tensor([*rows, *(row + PAIRS for row in rows)])
    position = torch.arange(TOKENS)
    completion = ((position >= PROMPT) & (position < PROMPT + LENGTHS[:, None])).long()[rows]
    values = -2 * torch.rand(2 * PAIRS, TOKENS - 1, generator=generator, dtype=torch.float64)
    reference = values.mul(completion_shift(LENGTHS)).sum(1) + torch.randn(2 * PAIRS, generator=generator).double()
    tokens = (values[rows] * completion[:, 1:]).to(dtype).requires_grad_()
    return tokens, reference[rows].to(dtype), completion


def completion_shift(lengths):
    position = torch.arange(1, TOKENS)
    return (position >= PROMPT) & (position < PROMPT + lengths[:, None])


def fake_outputs(tokens):
    return SimpleNamespace(
        log_probs=tokens,
        entropy=torch.zeros_like(tokens),
        mean_logits=torch.zeros_like(tokens),
        is_top1=torch.ones_like(tokens, dtype=torch.bool),
    )


def trl_dpo(names, tokens, reference, completion, *, weights=None, tau=0.05, **options):
    settings = {"beta": 0.1, "label_smoothing": 0.0, "f_divergence_type": "reverse_kl", "f_alpha_divergence_coef": 0.5}
    stub = SimpleNamespace(
        **(settings | options),
        model=SimpleNamespace(training=False),
        accelerator=ACCELERATOR,
        args=SimpleNamespace(discopop_tau=tau),
        loss_types=names,
        loss_weights=weights or [1.0] * len(names),
        precompute_ref_logps=True,
        aux_loss_enabled=False,
        ld_alpha=None,
        use_weighting=False,
        _metrics={"eval": defaultdict(list)},
        _total_train_tokens=0,
    )
    chosen, rejected = reference.chunk(2)
    inputs = {
        "input_ids": torch.zeros_like(completion),
        "attention_mask": torch.ones_like(completion),
        "completion_mask": completion,
        "ref_chosen_logps": chosen,
        "ref_rejected_logps": rejected,
    }
    return DPOTrainer._compute_loss(stub, lambda **_: fake_outputs(tokens), inputs, False)


def ours(names, tokens, reference, completion, **options):
    logps = losses.PairLogProbs(*tokens.sum(1).chunk(2), *reference.chunk(2), *completion.sum(1).chunk(2))
    return losses.compute(names, logps, **options)


def options_of(name):
    smoothing = {"exo_pair": 1e-3, "robust": 0.15, "aot": 0.2, "aot_unpaired": 0.2}
    return {"label_smoothing": smoothing[name]} if name in smoothing else {}


def settings_of(name):
    return options_of(name) | ({} if name == "sft" else {"beta": 0.35})


def both(name, rows=range(PAIRS), dtype=torch.float64, **options):
    """(TRL's scalar, our mean), and the gradients of both with respect to the tokens."""
    found = []
    for run in (trl_dpo, ours):
        tokens, reference, completion = batch(rows, dtype)
        loss = run([name], tokens, reference, completion, **options).mean()
        (gradient,) = torch.autograd.grad(loss, tokens)
        found.append((loss, gradient * completion[:, 1:]))
    return found


def test_every_loss_type_of_trl_is_here():
    assert len(LOSS_TYPES) == 15 and set(LOSS_TYPES) <= set(losses.names())


@pytest.mark.parametrize("name", LOSS_TYPES)
def test_each_pair_agrees_with_trl(name):
    for row in range(PAIRS):
        (theirs, their_gradient), (mine, gradient) = both(name, [row], **settings_of(name))
        torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(gradient, their_gradient, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", sorted(set(LOSS_TYPES) - {"sft"}))
def test_the_mean_over_a_batch_agrees_with_trl(name):
    (theirs, their_gradient), (mine, gradient) = both(name, **settings_of(name))
    torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(gradient, their_gradient, rtol=1e-6, atol=1e-6)


def test_sft_agrees_with_trl_by_its_token_weighted_mean():
    tokens, reference, completion = batch()
    lengths = completion.sum(1)[:PAIRS]
    item = ours("sft", tokens, reference, completion)
    theirs = trl_dpo(["sft"], tokens, reference, completion)
    torch.testing.assert_close((item * lengths).sum() / lengths.sum(), theirs, rtol=1e-12, atol=0)


@pytest.mark.parametrize("kind", ["forward_kl", "js_divergence", "alpha_divergence"])
@pytest.mark.parametrize("name", sorted(WITH_DIVERGENCE))
def test_divergences_agree_with_trl(name, kind):
    single = kind == "alpha_divergence"  # TRL has its clamp for half and single precision only
    dtype, tolerance = (torch.float32, 1e-5) if single else (torch.float64, 1e-6)
    options = settings_of(name) | {"f_divergence_type": kind} | ({"f_alpha_divergence_coef": 0.3} if single else {})
    (theirs, their_gradient), (mine, gradient) = both(name, dtype=dtype, **options)
    torch.testing.assert_close(mine, theirs, rtol=tolerance, atol=1e-6)
    torch.testing.assert_close(gradient, their_gradient, rtol=tolerance, atol=1e-6)


@pytest.mark.parametrize("name", sorted(set(LOSS_TYPES) - WITH_DIVERGENCE))
def test_divergences_are_refused_where_trl_refuses_them(name):
    with pytest.raises(ValueError, match="f_divergence_type"):
        ours(name, *batch(), f_divergence_type="forward_kl")


@pytest.mark.parametrize("tau", [0.02, 0.3])
def test_discopop_tau_agrees_with_trl(tau):
    theirs = trl_dpo(["discopop"], *batch(), beta=0.35, tau=tau)
    torch.testing.assert_close(ours("discopop", *batch(), beta=0.35, discopop_tau=tau).mean(), theirs)


def test_a_weighted_list_agrees_with_trl():
    """MPO's mixture, on one pair, where the mean over tokens is the same for both."""
    names, weights = ["sigmoid", "bco_pair", "sft"], [0.8, 0.2, 1.0]
    theirs = trl_dpo(names, *batch([1]), beta=0.2, weights=weights)
    mine = ours(names, *batch([1]), beta=0.2, loss_weights=weights)
    torch.testing.assert_close(mine.mean(), theirs)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("kind", ["simpo", "sigmoid"])
def test_simpo_and_cpo_agree_with_trl(draw, kind, smoothing):
    logps, _ = draw("simpo", 5)
    stub = SimpleNamespace(
        alpha=0.0, beta=0.7, simpo_gamma=0.4, label_smoothing=smoothing, loss_type=kind, accelerator=ACCELERATOR
    )
    policy = logps.policy_chosen, logps.policy_rejected
    if kind == "simpo":
        policy = policy[0] / logps.chosen_length, policy[1] / logps.rejected_length
        mine = losses.compute("simpo", logps, beta=0.7, simpo_gamma=0.4, label_smoothing=smoothing)
    else:
        mine = losses.compute("cpo", logps, beta=0.7, cpo_alpha=0.0, label_smoothing=smoothing)
    torch.testing.assert_close(mine, CPOTrainer.cpo_loss(stub, *policy)[0])


def test_orpo_agrees_with_trl(draw):
    logps, _ = draw("orpo", 6, dtype=torch.float32)
    policy = logps.policy_chosen / logps.chosen_length, logps.policy_rejected / logps.rejected_length
    stub = SimpleNamespace(beta=0.25, accelerator=ACCELERATOR)
    theirs = losses.compute("sft", logps) - ORPOTrainer.odds_ratio_loss(stub, *policy)[0]
    torch.testing.assert_close(losses.compute("orpo", logps, beta=0.25), theirs, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["kto", "apo_zero_unpaired"])
@pytest.mark.parametrize("drift", [0.7, -0.7])
def test_kto_agrees_with_trl(name, drift):
    tokens, reference, completion = batch()
    label = torch.tensor([1, 0, 0, 1, 1, 0, 1, 0]).bool()
    mismatched = torch.randn(8, generator=torch.Generator().manual_seed(1)).double() + drift
    stub = SimpleNamespace(
        model=SimpleNamespace(training=False),
        accelerator=ACCELERATOR,
        aux_loss_enabled=False,
        precompute_ref_logps=True,
        calculate_KL=name == "kto",
        loss_type=name,
        beta=0.35,
        desirable_weight=1.3,
        undesirable_weight=0.8,
        _compute_kl_logps=lambda model, inputs: mismatched,
        _metrics={"eval": defaultdict(list)},
        _total_train_tokens=0,
    )
    inputs = {
        "input_ids": torch.zeros_like(completion),
        "attention_mask": torch.ones_like(completion),
        "completion_mask": completion,
        "label": label,
        "ref_logps": reference,
        "ref_KL_logps": torch.zeros(8, dtype=torch.float64),
    }
    theirs = KTOTrainer._compute_loss(stub, lambda **_: fake_outputs(tokens), inputs, False)
    logps = losses.UnpairedLogProbs(tokens.sum(1), reference, label, kl=mismatched)
    mine = losses.compute(name, logps, beta=0.35, desirable_weight=1.3, undesirable_weight=0.8)
    torch.testing.assert_close(mine.mean(), theirs, rtol=1e-9, atol=0)
