"""The door: names, descriptions, errors, shapes, and the style of the folder."""

import ast
import importlib
import inspect
import re
import sys
from pathlib import Path

import pytest
import torch
from jaxtyping import install_import_hook

from mmalign import losses
from mmalign.losses.table import LOSSES

FOLDER = Path(losses.__file__).parent
KEYS = {
    *("sigmoid", "sigmoid_norm", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot"),
    *("aot_unpaired", "apo_zero", "apo_down", "discopop", "sft"),
    *("cdpo", "ln_dpo", "simpo", "cpo", "orpo", "kto", "bco", "diffusion_kto", "mapo", "sdpo", "apo_zero_unpaired"),
    "ln_pref",
}


def pairs(batch=3, **fields):
    values = [torch.full((batch,), float(-i)) for i in range(4)]
    names = ("policy_chosen", "policy_rejected", "reference_chosen", "reference_rejected")
    return losses.PairLogProbs(**dict(zip(names, values, strict=True)) | fields)


def without_reference():
    return pairs(reference_chosen=None, reference_rejected=None)


def test_public_names():
    assert losses.__all__ == sorted(losses.__all__, key=str)
    assert set(losses.__all__) == {"LossInfo", "PairLogProbs", "UnpairedLogProbs", "compute", "get", "names"}


def test_every_promised_key_is_there():
    assert set(losses.names()) >= KEYS and losses.names() == sorted(losses.names())


@pytest.mark.parametrize("batch", [1, 3])
def test_one_number_per_item(draw, key, batch):
    logps, hyper = draw(key, batch)
    assert losses.compute(key, logps, **hyper).shape == (batch,)


def test_documentation_of_each_loss(key):
    """Formula first, an arXiv id, shapes; nothing positional after the record; at most 40 lines."""
    function, info = LOSSES[key].function, losses.get(key)
    text = inspect.getdoc(function)
    assert f"arXiv:{info.arxiv}" in text and "Shapes:" in text
    assert re.search(r"[σφπρ(]", text.splitlines()[0])
    first, *rest = inspect.signature(function).parameters.values()
    assert first.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD
    assert all(p.kind is inspect.Parameter.KEYWORD_ONLY for p in rest)
    assert info.key == key and info.meaning and re.fullmatch(r"\d{4}\.\d{5}", info.arxiv)


def test_info_agrees_with_what_the_loss_reads(draw, key):
    """Only `inputs` are needed; without any of them the error names it."""
    logps, hyper = draw(key, 2)
    info = losses.get(key)
    fields = {name: getattr(logps, name) for name in logps.__dataclass_fields__}
    always = {"policy_chosen", "policy_rejected", "policy", "reference", "label"} if info.unpaired else set()
    always |= {"policy_chosen", "policy_rejected"}
    least = {name: x for name, x in fields.items() if name in always or name in info.inputs}
    assert losses.compute(key, type(logps)(**least), **hyper).shape == (2,)
    for name in set(info.inputs) - always:
        with pytest.raises(ValueError, match=f"^'{key}' needs {name}") as error:
            losses.compute(key, type(logps)(**fields | {name: None}), **hyper)
        assert "\n" not in str(error.value)


def test_info_lists_the_hyper_parameters_with_their_defaults(draw, key):
    logps, hyper = draw(key, 2)
    info = losses.get(key)
    needed = {name: hyper[name] for name in info.required}
    explicit = losses.compute(key, logps, **needed, **info.hyper)
    assert torch.equal(explicit, losses.compute(key, logps, **needed))
    assert all(option in hyper for option in info.required)


def test_info_of_some_losses():
    robust = losses.get("robust")
    assert dict(robust.hyper) == {
        "beta": 0.1,
        "label_smoothing": 0.1,
        "f_divergence_type": "reverse_kl",
        "f_alpha_divergence_coef": 0.5,
    }
    assert robust.inputs == ("policy_chosen", "policy_rejected", "reference_chosen", "reference_rejected")
    free = {key for key in losses.names() if losses.get(key).reference_free}
    assert free == {"sft", "simpo", "cpo", "orpo", "mapo"}
    unpaired = {key for key in losses.names() if losses.get(key).unpaired}
    assert unpaired == {"kto", "apo_zero_unpaired", "bco", "diffusion_kto"}
    assert losses.get("orpo").modalities == ("token",) and losses.get("mapo").modalities == ("denoiser",)
    assert losses.get("sdpo").required == ("rejected_scale",)


def test_published_betas_without_the_half_are_doubled():
    printed = {(b.printed, b.here) for key in ("diffusion_kto", "sigmoid") for b in losses.get(key).betas}
    assert {(1000, 2000), (2500, 5000), (5000, 5000)} <= printed


# ---- errors: one line, and it says what to do

WRONG = [
    (lambda: losses.get("dpo"), "did you mean sigmoid"),
    (lambda: losses.get("simppo"), "did you mean simpo"),
    (lambda: losses.get("????"), "there are aot, "),
    (lambda: losses.compute("sigmod", pairs()), "did you mean sigmoid"),
    (lambda: losses.compute("hinge", pairs(), label_smoothing=0.1), "'hinge' takes no label_smoothing; losses that do"),
    (lambda: losses.compute("sigmoid", pairs(), label_smoothing=0.1), "losses that do: aot, aot_unpaired, cdpo"),
    (lambda: losses.compute("robust", pairs(), label_smothing=0.1), "did you mean label_smoothing"),
    (lambda: losses.compute("robust", pairs(), label_smoothing=0.5), r"\[0, 0.5\)"),
    (lambda: losses.compute("cdpo", pairs(), label_smoothing=torch.tensor([0, 0, 1.5])), r"\[0, 1\].*0 to 1.5"),
    (lambda: losses.compute("exo_pair", pairs(), label_smoothing=0.0), r"\(0, 1\).*1e-3"),
    (lambda: losses.compute("aot", pairs(), label_smoothing=torch.zeros(3)), "one number"),
    (lambda: losses.compute("sigmoid", pairs(), beta=0.0), "beta must be a finite number above 0"),
    (lambda: losses.compute("sigmoid", pairs(), beta=-0.1), "beta must be"),
    (lambda: losses.compute("discopop", pairs(), discopop_tau=0.0), "discopop_tau must be"),
    (lambda: losses.compute("cpo", pairs(), cpo_alpha=-1.0), "cpo_alpha must not be negative"),
    (lambda: losses.compute("aot", pairs(), weight=torch.ones(3)), "'aot' takes no weight: its items are order"),
    (lambda: losses.compute("aot_unpaired", pairs(), weight=torch.ones(3)), "takes no weight"),
    (lambda: losses.compute("apo_zero", pairs(), strength=1.0), "'apo_zero' takes no strength: it is not"),
    (lambda: losses.compute("sft", pairs(), strength=1.0), "takes no strength: its likelihood term"),
    (lambda: losses.compute(["sigmoid", "sft"], pairs(), strength=1.0), "'sft' takes no strength"),
    (lambda: losses.compute(["sigmoid", "aot"], pairs(), weight=1.0), "'aot' takes no weight"),
    (lambda: losses.compute("sigmoid", pairs(), weight=torch.tensor([1.0, -1.0, 1.0])), "must not be negative, got -1"),
    (lambda: losses.compute("sigmoid", pairs(), weight=torch.ones(2)), r"weight has shape \(2,\), expected \(3,\)"),
    (lambda: losses.compute("sigmoid", pairs(), strength=torch.ones(3, 1)), "strength has shape"),
    (lambda: losses.compute("sdpo", pairs()), "'sdpo' needs rejected_scale="),
    (lambda: losses.compute("sdpo", pairs(), rejected_scale=torch.ones(1)), "rejected_scale has shape"),
    (lambda: losses.compute("sdpo", pairs(), rejected_scale=torch.full((3,), 1.1)), "1 - rejected_scale must not"),
    (lambda: losses.compute("sdpo", pairs(), rejected_scale=torch.ones(3), strength=-1.0), "strength of 'sdpo'"),
    (lambda: losses.compute("sigmoid", without_reference()), "'sigmoid' needs reference_chosen, .*reference-free"),
    (lambda: without_reference().margin, "this loss needs reference_chosen"),
    (lambda: losses.compute("simpo", pairs()), "'simpo' needs chosen_length, .*ones for a denoiser"),
    (lambda: losses.compute("ipo", pairs(chosen_length=torch.ones(3))), "needs rejected_length"),
    (lambda: losses.compute("kto", pairs()), "'kto' takes UnpairedLogProbs, got PairLogProbs"),
    (lambda: losses.compute("sigmoid", liked()), "'sigmoid' takes PairLogProbs, got UnpairedLogProbs"),
    (lambda: losses.compute("kto", liked()), "'kto' needs kl, .*mismatched"),
    (lambda: losses.compute("kto", liked(kl=0.0), strength=1.0), "'kto' takes no strength: its items are single"),
    (lambda: losses.compute("diffusion_kto", liked(), utility="risk"), "utility must be one of sigmoid, loss_averse"),
    (lambda: losses.compute("sigmoid", pairs(), f_divergence_type="kl"), "must be one of reverse_kl, forward_kl"),
    (lambda: losses.compute("sigmoid", pairs(), f_alpha_divergence_coef=0.3), "acts with 'alpha_divergence' only"),
    (lambda: losses.compute("apo_zero", pairs(), f_divergence_type="forward_kl"), "takes no f_divergence_type"),
    (
        lambda: losses.compute(["sigmoid", "bco_pair"], pairs(), f_divergence_type="forward_kl"),
        "no valid form for 'bco_pair'",
    ),
    (lambda: losses.compute("sigmoid", pairs(), loss_weights=[1.0]), "loss_weights go with a list"),
    (lambda: losses.compute(["sigmoid", "sft"], pairs(), loss_weights=[1.0]), "2 losses and 1 loss_weights"),
    (lambda: losses.compute([], pairs()), "0 losses"),
    (lambda: losses.compute(lambda logps: logps.margin.mean(), pairs()), r"returned shape \(\), expected \(3,\)"),
    (lambda: losses.compute(lambda logps: logps.margin, pairs(), strength=1.0), "no such parameter"),
    (lambda: pairs(policy_rejected=torch.zeros(2)), r"policy_rejected has shape \(2,\), expected \(3,\)"),
    (lambda: pairs(policy_chosen=torch.zeros(3, 1)), r"policy_chosen has shape \(3, 1\)"),
    (lambda: pairs(reference_chosen=torch.zeros(3, dtype=torch.long)), "reference_chosen must be floating point"),
    (lambda: pairs(policy_chosen=[0.0] * 3), "policy_chosen must be a tensor"),
    (lambda: losses.PairLogProbs(torch.zeros(3), None), "policy_rejected must be a tensor"),
    (lambda: liked(label=torch.ones(3)), "label must be boolean or integer"),
    (lambda: liked(kl=torch.zeros(3, 2)), "kl has shape"),
]


def liked(**fields):
    label = torch.tensor([True, False, True])
    return losses.UnpairedLogProbs(**{"policy": torch.zeros(3), "reference": torch.ones(3), "label": label} | fields)


@pytest.mark.parametrize(("call", "message"), WRONG, ids=[message[:40] for _, message in WRONG])
def test_errors(call, message):
    with pytest.raises(ValueError, match=message) as error:
        call()
    assert "\n" not in str(error.value)


def test_a_hyper_parameter_goes_to_the_members_that_take_it():
    mixed = losses.compute(["robust", "hinge"], pairs(), beta=0.3, label_smoothing=0.2)
    apart = losses.compute("robust", pairs(), beta=0.3, label_smoothing=0.2) + losses.compute(
        "hinge", pairs(), beta=0.3
    )
    assert torch.equal(mixed, apart)
    with pytest.raises(ValueError, match="'sigmoid' . 'hinge' takes no label_smoothing"):
        losses.compute(["sigmoid", "hinge"], pairs(), label_smoothing=0.2)


def test_a_divergence_may_stand_beside_a_loss_without_reference():
    both = losses.compute(["sigmoid", "sft"], pairs(), f_divergence_type="forward_kl")
    alone = losses.compute("sigmoid", pairs(), f_divergence_type="forward_kl") + losses.compute("sft", pairs())
    assert torch.equal(both, alone)


def test_a_callable_is_accepted_wherever_a_name_is():
    def exponential(logps, *, beta=1.0, strength=1.0):
        return torch.exp(-beta * strength * logps.margin)

    logps = pairs()
    assert torch.equal(losses.compute(exponential, logps, beta=0.5), torch.exp(-0.5 * logps.margin))
    both = losses.compute([exponential, "sigmoid"], logps, beta=0.5, strength=2.0, weight=3.0, loss_weights=[2, 1])
    expected = 3 * (2 * torch.exp(-logps.margin) + losses.compute("sigmoid", logps, beta=1.0))
    torch.testing.assert_close(both, expected)
    with pytest.raises(ValueError, match="'exponential' takes no tau"):
        losses.compute(exponential, logps, tau=1.0)


def test_records_are_frozen_and_hold_no_extra_fields():
    logps = pairs()
    with pytest.raises(AttributeError):
        logps.policy_chosen = torch.zeros(3)
    assert not hasattr(logps, "__dict__") and len(logps) == 3


# ---- the folder


def test_imports_nothing_but_torch_and_jaxtyping():
    allowed = sys.stdlib_module_names | {"torch", "jaxtyping"}
    for path in FOLDER.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            modules = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            modules += [node.module] if isinstance(node, ast.ImportFrom) else []
            for module in modules:
                assert module.split(".")[0] in allowed or module.startswith("mmalign.losses"), (path.name, module)


def test_functions_and_files_are_short():
    for path in FOLDER.glob("*.py"):
        text = path.read_text()
        assert len(text.splitlines()) <= 400, path.name
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno - node.lineno < 40, (path.name, node.name)


def test_shapes_hold_at_run_time(draw, key, typed_losses):
    """Every annotation checked by beartype while the loss runs."""
    logps, hyper = draw(key, 3)
    fields = {name: getattr(logps, name) for name in logps.__dataclass_fields__}
    record = getattr(typed_losses, type(logps).__name__)
    extra = {} if losses.get(key).no_strength else {"strength": torch.ones(3)}
    loss = typed_losses.compute(key, record(**fields), **hyper, **extra)
    torch.testing.assert_close(loss, losses.compute(key, logps, **hyper))


@pytest.fixture(scope="module")
def typed_losses():
    """A second copy of the package, imported with run-time shape checks."""
    pytest.importorskip("beartype")
    ours = {name: module for name, module in sys.modules.items() if name.startswith("mmalign.losses")}
    for name in ours:
        del sys.modules[name]
    try:
        with install_import_hook("mmalign.losses", "beartype.beartype"):
            return importlib.import_module("mmalign.losses")
    finally:
        for name in [name for name in sys.modules if name.startswith("mmalign.losses")]:
            del sys.modules[name]
        sys.modules.update(ours)
        sys.modules["mmalign"].losses = ours["mmalign.losses"]
