"""The loss of a step: ln 2 where policy and reference agree, the mean of its pairs, and what a hand-written loop computes."""

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny import ASKED, KINDS, tiny_pipeline
from torch import Tensor
from training.runs import METHODS, batch, gradients, history, lora, losses, moved_lora, pairs, trainer

from mmalign.denoisers import adapter_for
from mmalign.likelihood import draws
from mmalign.training.measurement import draw, dropped_prompts

PAIR_METHODS = ("dpo", "inpo", "smpo")
LN2 = math.log(2)


@pytest.mark.parametrize("method", PAIR_METHODS)
@pytest.mark.parametrize("peft_config", ["lora", None], ids=["lora", "full"])
def test_policy_equal_to_reference_gives_ln2(method: str, peft_config: Any, tmp_path: Path, brightness: Any) -> None:
    options = {"comparison": "smoothed"} if method == "smpo" else {}
    run = trainer(tmp_path, method, peft_config=peft_config, **options)
    loss, measured, pairs_ = run.pair_losses(run.model, batch(run), epoch=0)
    z = pairs_.strength * run.args.beta * measured.logps.margin
    assert z.abs().max() < 1e-6
    assert (loss - LN2).abs().max() < 1e-7
    if method == "smpo":
        assert (pairs_.strength != 1).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_a_step_on_every_family(method: str, kind: str, tmp_path: Path) -> None:
    options: dict[str, Any] = {"kind": kind, "max_steps": 1, "learning_rate": 1e-2, "resolution": 16}
    options |= ASKED.get(kind, {})
    if method == "inpo" and kind in ("sd3", "flux", "wan"):
        with pytest.raises(ValueError, match="a flow model needs inversion_eta=0"):
            trainer(tmp_path, method, **options)
        options["inversion_eta"] = 0.0
    run = trainer(tmp_path, method, **options)
    before = {name: p.clone() for name, p in run.network.named_parameters()}
    run.train()
    moved = {name for name, p in run.network.named_parameters() if not torch.equal(p, before[name])}
    assert moved and all("lora_" in name for name in moved)
    if method != "sft":
        assert history(run)[0] == pytest.approx(LN2, abs=1e-6)


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("dpo", {}),
        ("inpo", {}),
        ("smpo", {"comparison": "smoothed"}),
        ("sft", {}),
        ("dpo", {"loss_type": "sdpo", "sdpo_mu": 0.9}),
    ],
    ids=["dpo", "inpo", "smpo", "sft", "sdpo"],
)
def test_a_batch_is_the_mean_of_its_pairs(
    method: str, options: dict[str, Any], tmp_path: Path, brightness: Any
) -> None:
    run = trainer(tmp_path, method, dtype=torch.float64, peft_config=moved_lora(), **options)
    items = (0, 2, 5)
    loss = losses(run, items)
    loss.mean().backward()
    together = gradients(run)
    alone = []
    run.network.zero_grad()
    for item in items:
        single = losses(run, (item,))
        (single.sum() / len(items)).backward()
        alone.append(single.item())
    assert loss.dtype == torch.float64 and loss.unique().numel() == 3
    torch.testing.assert_close(loss.detach(), torch.tensor(alone, dtype=torch.float64), rtol=1e-9, atol=1e-12)
    for name, gradient in gradients(run).items():
        torch.testing.assert_close(together[name], gradient, rtol=1e-7, atol=1e-12)


def test_a_pair_shares_prompt_dropout_timestep_and_in_dpo_the_noise(tmp_path: Path) -> None:
    run = trainer(tmp_path, prompt_dropout=0.5, per_device_train_batch_size=6)
    _, measured, pairs_ = run.pair_losses(run.model, batch(run, range(6)), epoch=0)
    first, second = measured.point.timestep.chunk(2)
    assert torch.equal(first, second) and first.unique().numel() > 1
    assert torch.equal(*measured.point.target.chunk(2))
    text, other = pairs_.conditioning.prompt_embeds.chunk(2)
    assert torch.equal(text, other)
    empty = run._train.encoded.empty.prompt_embeds
    dropped = (text == empty).flatten(1).all(1)
    assert torch.equal(dropped, dropped_prompts(pairs_.rows, seed=run.args.seed, epoch=0, share=0.5))
    assert 0 < dropped.sum() < 6

    apart = trainer(tmp_path, share_noise=False)
    chosen, rejected = apart.pair_losses(apart.model, batch(apart), epoch=0)[1].point.target.chunk(2)
    assert not torch.equal(chosen, rejected)


def test_draws_belong_to_rows_not_to_places_in_a_batch() -> None:
    schedule = adapter_for(tiny_pipeline("sd")).schedule
    options: dict[str, Any] = dict(seed=3, epoch=1, schedule=schedule, share_noise=True, share_eta_noise=False)
    one, two = draw([7, 2, 9], **options), draw([9, 7], **options)
    assert one.timestep[0] == two.timestep[1] and one.timestep[2] == two.timestep[0]
    assert torch.equal(draws.randn(one.noise[:1], (3,)), draws.randn(two.noise[1:2], (3,)))
    assert not torch.equal(draw([7, 2, 9], **options | {"epoch": 2}).timestep, one.timestep)
    assert not torch.equal(draw([7, 2, 9], **options | {"seed": 4}).timestep, one.timestep)
    shared = draw([7, 2, 9], **options, one_timestep=True).timestep
    assert shared.unique().numel() == 1 and shared[0] == one.timestep[1]


# A loop of its own: the same draws, everything else written out.


def by_hand(run: Any, unet: torch.nn.Module, items: tuple[int, ...], *, sides: int) -> Tensor:
    """Errors (sides · B,) of a network on the draws of these items."""
    inputs = batch(run, items)
    rows = inputs["row"]
    drawn = draw(
        rows, seed=run.args.seed, epoch=0, schedule=run.denoiser.schedule, share_noise=True, share_eta_noise=False
    )
    noise = draws.randn(drawn.noise[: len(rows)], (4, 8, 8)).double().repeat(sides, 1, 1, 1)
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    t = drawn.timestep.repeat(sides)
    alpha = torch.cumprod(1 - betas.double(), 0)[t].view(-1, 1, 1, 1)
    clean = torch.cat([inputs["chosen"], inputs["rejected"]][:sides]).double()
    prompts = [run._train.encoded.prompts[index] for index in inputs["prompt_index"]]
    keep = ~dropped_prompts(rows, seed=run.args.seed, epoch=0, share=run.args.prompt_dropout)
    texts = [prompt if kept else "" for prompt, kept in zip(prompts, keep, strict=True)]
    with torch.no_grad():
        embeds = run.pipe.encode_prompt(texts, "cpu", 1, False)[0].repeat(sides, 1, 1)
    predicted = unet(alpha.sqrt() * clean + (1 - alpha).sqrt() * noise, t, embeds).sample
    return (predicted - noise).pow(2).mean(dim=(1, 2, 3))


def test_dpo_step_equals_a_bare_loop(tmp_path: Path) -> None:
    options: dict[str, Any] = dict(beta=700.0, learning_rate=1e-3, weight_decay=0.1, max_grad_norm=0.5, max_steps=1)
    run = trainer(tmp_path, dtype=torch.float64, peft_config=moved_lora(), **options)
    unet, base = copy.deepcopy(run.network), tiny_pipeline("sd").unet.double()
    run.train()

    items = tuple(list(run._get_train_sampler())[:2])
    errors = by_hand(run, unet, items, sides=2)
    with torch.no_grad():
        reference = by_hand(run, base, items, sides=2)
    (mw, ml), (rw, rl) = errors.chunk(2), reference.chunk(2)
    loss = -F.logsigmoid(-0.5 * 700.0 * ((mw - rw) - (ml - rl))).mean()
    assert abs(loss.item() - LN2) > 1e-3
    assert history(run)[0] == pytest.approx(loss.item(), rel=1e-6)

    trained = [p for p in unet.parameters() if p.requires_grad]
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(trained, 0.5)
    assert history(run, "grad_norm")[0] == pytest.approx(norm.item(), rel=1e-6)
    torch.optim.AdamW(trained, lr=1e-3, weight_decay=0.1).step()
    updated = dict(run.network.named_parameters())
    for name, parameter in unet.named_parameters():
        torch.testing.assert_close(updated[name].data, parameter.data, rtol=1e-6, atol=1e-12)


def test_sft_reads_the_chosen_side_only_and_equals_a_bare_loop(tmp_path: Path) -> None:
    run = trainer(tmp_path, "sft", dtype=torch.float64, peft_config=moved_lora())
    errors = by_hand(run, run.network, (1, 4), sides=1)
    torch.testing.assert_close(losses(run, (1, 4)), errors, rtol=1e-9, atol=1e-12)

    changed = pairs()
    for row, other in zip(changed, pairs(seed=9), strict=True):
        row["rejected"] = other["rejected"]
    other = trainer(tmp_path, "sft", dtype=torch.float64, peft_config=moved_lora(), data=changed)
    torch.testing.assert_close(losses(other, (1, 4)), losses(run, (1, 4)), rtol=0, atol=0)
    assert run.reference.kind == "none"


@pytest.mark.parametrize(
    "options",
    [
        {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.5]},
        {"loss_type": "sdpo", "sdpo_mu": 0.6},
        {"loss_type": "mapo", "beta": 0.1},
        {"loss_type": "aot"},
        {"loss_type": "ipo"},
        {"loss_type": "simpo", "beta": 50.0, "simpo_gamma": 0.5},
        {"loss_type": "robust", "label_smoothing": 0.2},
        {"loss_type": "sigmoid_norm"},
    ],
    ids=lambda options: "+".join(
        [options["loss_type"]] if isinstance(options["loss_type"], str) else options["loss_type"]
    ),
)
def test_other_losses_train(options: dict[str, Any], tmp_path: Path) -> None:
    run = trainer(tmp_path, **options)
    run.train()
    assert all(math.isfinite(loss) for loss in history(run))
    assert (run.reference.kind == "none") == (options["loss_type"] in ("mapo", "simpo"))
    assert any(p.abs().sum() > 0 for name, p in run.network.named_parameters() if "lora_B" in name)


def test_a_weighted_sum_is_the_sum_of_its_members(tmp_path: Path) -> None:
    def of(**options: Any) -> Tensor:
        return losses(trainer(tmp_path, peft_config=moved_lora(), **options)).detach()

    total = of(loss_type=["sigmoid", "sft"], loss_weights=[2.0, 0.5])
    torch.testing.assert_close(total, 2 * of() + 0.5 * of(loss_type="sft"))


def test_aot_sorts_at_one_timestep(tmp_path: Path) -> None:
    run = trainer(tmp_path, loss_type="aot")
    assert run.pair_losses(run.model, batch(run, range(4)), epoch=0)[1].point.timestep.unique().numel() == 1


@pytest.mark.parametrize("method", PAIR_METHODS)
def test_the_reference_never_gets_a_gradient(method: str, tmp_path: Path) -> None:
    for peft_config in (lora(), None):
        run = trainer(tmp_path, method, peft_config=peft_config, max_steps=1)
        before = run.reference.fingerprint()
        run.train()
        losses(run).mean().backward()
        assert run.reference.fingerprint() == before
        named = run.reference.module.named_parameters()
        assert all(p.grad is None and not p.requires_grad for name, p in named if "lora_" not in name)


def test_steps_on_two_pairs_learn_them(tmp_path: Path) -> None:
    run = trainer(tmp_path, data=pairs(2), learning_rate=3e-3, beta=500.0, max_steps=12, prompt_dropout=0.0)

    def total() -> float:
        return sum(losses(run, epoch=epoch).sum().item() for epoch in range(6))

    before = total()
    run.train()
    assert total() < 0.95 * before
