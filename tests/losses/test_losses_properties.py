"""Symmetries and invariances, over random inputs."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmalign import losses

SIGNED = [key for key in losses.names() if not losses.get(key).no_strength and key not in ("sdpo",)]
QUICK = settings(max_examples=15, deadline=None, derandomize=True)
VALUE = st.floats(-30, 30, allow_nan=False, width=32)
UP_TO_FOUR = st.integers(1, 4)


def tensors(count, size=UP_TO_FOUR):
    """`count` float64 vectors of one common length."""
    return size.flatmap(
        lambda n: st.tuples(*[st.lists(VALUE, min_size=n, max_size=n).map(lambda x: torch.tensor(x).double())] * count)
    )


def pair(chosen, rejected, reference_chosen, reference_rejected):
    lengths = torch.full_like(chosen, 3), torch.full_like(chosen, 3)
    return losses.PairLogProbs(chosen, rejected, reference_chosen, reference_rejected, *lengths)


def swapped(logps):
    return losses.PairLogProbs(
        logps.policy_rejected,
        logps.policy_chosen,
        logps.reference_rejected,
        logps.reference_chosen,
        logps.rejected_length,
        logps.chosen_length,
    )


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("name", SIGNED)
@given(values=tensors(4))
@QUICK
def test_a_swapped_pair_with_negative_strength_is_the_same_pair(name, values):
    logps = pair(*values)
    close(losses.compute(name, swapped(logps), strength=-1.0), losses.compute(name, logps))


@given(values=tensors(4))
@QUICK
def test_swapping_changes_the_logistic_loss_by_its_margin(values):
    logps = pair(*values)
    difference = losses.compute("sigmoid", swapped(logps), beta=0.5) - losses.compute("sigmoid", logps, beta=0.5)
    close(difference, 0.5 * logps.margin)


@given(values=tensors(4))
@QUICK
def test_swapping_a_smoothed_label_swaps_the_smoothing(values):
    logps = pair(*values)
    close(
        losses.compute("cdpo", swapped(logps), label_smoothing=0.8), losses.compute("cdpo", logps, label_smoothing=0.2)
    )


@pytest.mark.parametrize("name", [*SIGNED, "sdpo", "aot", "aot_unpaired"])
@given(values=tensors(4), shift=VALUE)
@QUICK
def test_margin_losses_do_not_see_what_both_sides_share(name, values, shift):
    """A prompt's own constant cancels: in policy and in reference."""
    logps = pair(*values)
    hyper = {"rejected_scale": torch.ones(len(logps))} if name == "sdpo" else {}
    moved = pair(values[0] + shift, values[1] + shift, values[2] - 2 * shift, values[3] - 2 * shift)
    torch.testing.assert_close(
        losses.compute(name, moved, **hyper), losses.compute(name, logps, **hyper), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("name", ["nca_pair", "bco_pair", "sppo_hard", "apo_zero", "apo_down"])
def test_absolute_losses_do_see_it(at_ratios, name):
    assert not torch.allclose(
        losses.compute(name, at_ratios(1.0, 0.5), beta=1.0), losses.compute(name, at_ratios(2.0, 1.5), beta=1.0)
    )


@given(values=tensors(4, size=st.just(4)), order=st.permutations(range(4)), other=st.permutations(range(4)))
@QUICK
def test_transport_does_not_see_the_order_of_either_side(values, order, other):
    """`aot` sorts policy and reference margins, `aot_unpaired` the chosen and the rejected log-ratios."""
    chosen, rejected, reference_chosen, reference_rejected = values
    mixed = pair(
        chosen[list(order)], rejected[list(order)], reference_chosen[list(other)], reference_rejected[list(other)]
    )
    close(losses.compute("aot", mixed), losses.compute("aot", pair(*values)))
    mixed = pair(
        chosen[list(order)], rejected[list(other)], reference_chosen[list(order)], reference_rejected[list(other)]
    )
    close(losses.compute("aot_unpaired", mixed), losses.compute("aot_unpaired", pair(*values)))


def rows(logps, index):
    """The record of some of its items."""
    fields = [getattr(logps, name) for name in logps.__dataclass_fields__]
    if isinstance(logps, losses.UnpairedLogProbs):
        return losses.UnpairedLogProbs(*(x[index] for x in fields[:3]), kl=logps.kl)
    return losses.PairLogProbs(*(x[index] for x in fields))


@pytest.mark.parametrize("name", [name for name in losses.names() if not name.startswith("aot")])
def test_items_do_not_touch_each_other(draw, name):
    """One batch is the concatenation of its items; state (kl, δ) is given. Sorted batches are tested above."""
    logps, hyper = draw(name, 4)
    scale = hyper.pop("rejected_scale", None)
    alone = [
        losses.compute(name, rows(logps, [i]), **hyper, **({} if scale is None else {"rejected_scale": scale[[i]]}))
        for i in range(4)
    ]
    together = losses.compute(name, logps, **hyper, **({} if scale is None else {"rejected_scale": scale}))
    close(together, torch.cat(alone))


def test_what_the_table_calls_batch_coupled_is(draw, key):
    """Raising one item lets another one's loss move, for exactly the losses that say so (`kto` by its mean `kl`)."""
    logps, hyper = draw(key, 3)
    hyper.pop("delta", None)
    fields = {name: getattr(logps, name) for name in logps.__dataclass_fields__}
    if key == "diffusion_kto":
        fields |= {"kl": None, "policy": fields["reference"] + 0.5}
    moved = "kl" if key == "kto" else "policy_chosen" if "policy_chosen" in fields else "policy"
    before = losses.compute(key, type(logps)(**fields), **hyper)
    touched = False
    for row in range(3):
        change = {moved: fields[moved] - 2.5 * (torch.arange(3) == row)}
        after = losses.compute(key, type(logps)(**fields | change), **hyper)
        others = torch.arange(3) != row
        touched |= not torch.equal(before[others], after[others])
    assert touched == losses.get(key).batch_coupled


@given(values=tensors(4, size=st.just(3)), weight=st.lists(st.floats(0, 5), min_size=3, max_size=3))
@QUICK
def test_weight_multiplies_the_loss(values, weight):
    weight = torch.tensor(weight).double()
    logps = pair(*values)
    for name in ("sigmoid", "apo_zero", "sft", ["hinge", "ipo"]):
        assert torch.equal(losses.compute(name, logps, weight=weight), weight * losses.compute(name, logps))


@given(values=tensors(4), a=st.floats(-2, 2), b=st.floats(-2, 2))
@QUICK
def test_a_list_is_the_weighted_sum(values, a, b):
    logps = pair(*values)
    expected = a * losses.compute("sigmoid", logps, beta=0.3) + b * losses.compute("nca_pair", logps, beta=0.3)
    close(losses.compute(["sigmoid", "nca_pair"], logps, beta=0.3, loss_weights=[a, b]), expected)


@given(values=tensors(4))
@QUICK
def test_beta_to_zero_tends_to_the_start(values):
    close(losses.compute("sigmoid", pair(*values), beta=1e-12), torch.full_like(values[0], 0.6931471805599453))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(draw, key, dtype):
    exact, hyper = draw(key, 3)
    fields = {name: getattr(exact, name) for name in exact.__dataclass_fields__}
    half = {name: x.to(dtype) if torch.is_tensor(x) and x.is_floating_point() else x for name, x in fields.items()}
    single = {name: x.float() if torch.is_tensor(x) and x.is_floating_point() else x for name, x in half.items()}
    loss = losses.compute(key, type(exact)(**half), **hyper)
    assert loss.dtype in (torch.float32, torch.float64)
    assert torch.equal(loss, losses.compute(key, type(exact)(**single), **hyper))


def test_float64_stays_float64(draw, key):
    logps, hyper = draw(key, 2)
    assert losses.compute(key, logps, **hyper).dtype == torch.float64


def test_autocast_does_not_lower_the_precision(draw, key):
    logps, hyper = draw(key, 2, dtype=torch.float32)
    plain = losses.compute(key, logps, **hyper)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = losses.compute(key, logps, **hyper)
    assert torch.equal(plain, cast) and cast.dtype == plain.dtype


def test_nan_stays_nan(draw, key):
    """A NaN in any input that the loss reads comes out as NaN in its item (somewhere in the batch if coupled)."""
    logps, hyper = draw(key, 3)
    fields = {name: getattr(logps, name) for name in logps.__dataclass_fields__}
    optional = losses.get(key).optional if key != "cpo" else ()
    for name in (*losses.get(key).inputs, *optional):
        if name == "label" or name.endswith("length"):
            continue
        broken = fields[name].clone()
        broken[0] = float("nan")
        loss = losses.compute(key, type(logps)(**fields | {name: broken}), **hyper)
        assert loss.isnan().any() if losses.get(key).batch_coupled else loss.isnan().tolist() == [True, False, False]


def test_nan_in_weight_and_strength_stays_nan(draw):
    logps, _ = draw("sigmoid", 2)
    broken = torch.tensor([float("nan"), 1.0])
    for option in ("weight", "strength"):
        assert losses.compute("sigmoid", logps, **{option: broken}).isnan().tolist() == [True, False]
