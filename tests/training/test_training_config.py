"""Every option acts or raises: the fields that our configs declare, and those they inherit from transformers."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from training.runs import Brightness, config, gradients, losses, moved_lora, pairs, pipeline, trainer
from transformers import TrainingArguments

import mmalign
from mmalign.training import prepare as preparing
from mmalign.training.config import DenoiserConfig
from mmalign.training.samples import draw

CONFIGS = [getattr(mmalign, f"{name}Config") for name in ("DiffusionDPO", "InPO", "SmPO", "DiffusionSFT")]
OWN = {
    field.name
    for kind in (DenoiserConfig, *CONFIGS)
    for field in dataclasses.fields(kind)
    if field.name not in TrainingArguments.__dataclass_fields__
}

# Options that change the losses of a first batch: name → (what it is set on top of, two values).
SMOOTHED = {"method": "smpo", "comparison": "smoothed"}
DDIM = {"latents": "ddim", "inversion_steps": 3}
TALL = [row | {side: row[side].resize((16, 32)) for side in ("chosen", "rejected")} for row in pairs(2)]
RENOISE = {"latents": "renoise", "inversion_steps": 3}
CHANGES_LOSSES: dict[str, tuple[dict[str, Any], Any, Any]] = {
    "beta": ({}, 100.0, 200.0),
    "loss_type": ({}, "sigmoid", "hinge"),
    "loss_weights": ({"loss_type": ["sigmoid", "ipo"]}, [1.0, 1.0], [1.0, 0.5]),
    "label_smoothing": ({"loss_type": "robust"}, 0.1, 0.3),
    "f_divergence_type": ({}, "reverse_kl", "js_divergence"),
    "f_alpha_divergence_coef": ({"f_divergence_type": "alpha_divergence"}, 0.5, 0.1),
    "discopop_tau": ({"loss_type": "discopop"}, 0.05, 5.0),
    "simpo_gamma": ({"loss_type": "simpo", "beta": 10.0}, 1.0, 0.2),
    "cpo_alpha": ({"loss_type": "cpo", "beta": 10.0}, 1.0, 0.2),
    "ln_pref_omega": ({"loss_type": "ln_pref"}, 1.0, 0.2),
    "ln_pref_lambda": ({"loss_type": "ln_pref"}, 0.0, 0.2),
    "ln_pref_margin": ({"loss_type": "ln_pref"}, 0.0, 0.5),
    "latents": ({"inversion_steps": 10}, "ddim", "renoise"),
    "share_noise": ({}, True, False),
    "inversion_steps": ({"latents": "ddim"}, 2, 5),
    "inversion_renoise_steps": (RENOISE, 1, 2),
    "inversion_combine": (RENOISE, "mean", "last"),
    "inversion_solver": (DDIM, "euler", "heun"),
    "inversion_eta": (DDIM, 0.0, 0.5),
    "inversion_eta_form": (DDIM | {"inversion_eta": 0.5}, "bayes", "published"),
    "inversion_share_eta_noise": (DDIM | {"inversion_eta": 0.5}, False, True),
    "inversion_compat": (DDIM, None, "official-0.20"),
    "inversion_fp16_alphas": (DDIM | {"inversion_compat": "official-0.20"}, False, True),
    "inversion_model": (DDIM, "policy", "reference"),
    "inversion_landings": (DDIM, "last", "all"),
    "comparison": ({"method": "smpo", "scorer": "pickscore"}, "relabel", "smoothed"),
    "smoothing_gamma": (SMOOTHED, 10.0, 3.0),
    "smoothing_normalizer": (SMOOTHED, "extrema", "official"),
    "prompt_dropout": ({}, 0.0, 1.0),
    "loss_space": ({}, "epsilon", "velocity"),
    "resolution": ({}, 16, 32),
    "num_frames": ({"kind": "cogvideox"}, 1, 9),
    "aspect_buckets": ({"data": TALL}, False, True),
}


@pytest.fixture
def split() -> dict[str, Any]:
    return {"train": pairs(4), "extra": pairs(6, seed=3), "held": pairs(3, seed=4)}


@pytest.mark.parametrize("name", CHANGES_LOSSES)
def test_an_option_changes_the_losses(name: str, tmp_path: Path, brightness: Any) -> None:
    base, *values = CHANGES_LOSSES[name]
    # The default value of the option itself is left out, as a user would.
    seen = [losses(trainer(tmp_path, peft_config=moved_lora(), **base | {name: value})).detach() for value in values]
    assert torch.isfinite(torch.cat(seen)).all()
    assert seen[0].shape != seen[1].shape or (seen[0] - seen[1]).abs().max() > 1e-7


def test_sdpo_mu_changes_gradients_and_no_loss(tmp_path: Path) -> None:
    seen = []
    for mu in (0.1, 1.0):
        run = trainer(tmp_path, peft_config=moved_lora(), loss_type="sdpo", sdpo_mu=mu)
        loss = losses(run, (0, 1, 2))
        loss.mean().backward()
        seen.append((loss.detach(), gradients(run)))
    torch.testing.assert_close(seen[0][0], seen[1][0])
    assert any(not torch.allclose(seen[0][1][name], seen[1][1][name]) for name in seen[0][1])


def test_reference_chooses_the_reference(tmp_path: Path) -> None:
    kinds = {value: trainer(tmp_path, reference=value).reference.kind for value in ("auto", "adapter", "copy")}
    assert kinds == {"auto": "adapter", "adapter": "adapter", "copy": "copy"}
    with pytest.raises(ValueError, match="needs a LoRA"):
        trainer(tmp_path, reference="adapter", peft_config=None)


def test_scorer_is_the_one_that_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(preparing, "scorer", lambda name, device: asked.append((name, device)) or Brightness())
    trainer(tmp_path, comparison="relabel", scorer="clip:mine")
    assert asked == [("clip:mine", torch.device("cpu"))]


def test_ties_and_weak_pairs_are_kept_or_dropped(tmp_path: Path, brightness: Any) -> None:
    rows = [
        {"caption": r["prompt"], "jpg_0": r["chosen"], "jpg_1": r["rejected"], "label_0": 0.5 if i % 3 == 0 else 1.0}
        for i, r in enumerate(pairs(6))
    ]

    def kept(**options: Any) -> int:
        return len(trainer(tmp_path, "smpo", data=rows, comparison="smoothed", **options)._train.dataset)

    assert kept() == 4 and kept(keep_human_ties=True) == 6
    run = trainer(tmp_path, "smpo", data=rows, comparison="smoothed", keep_human_ties=True)
    strengths = run._train.dataset.compared.strength
    assert kept(keep_human_ties=True, min_abs_strength=float(strengths.sort().values[2]) + 1e-4) == 3


def test_splits_choose_rows(split: dict[str, Any], tmp_path: Path) -> None:
    run = trainer(tmp_path, data=split, train_split="extra", eval_dataset=split, eval_split="held")
    assert (len(run._train.dataset), len(run._eval.dataset)) == (6, 3)
    assert len(trainer(tmp_path, data=split)._train.dataset) == 4
    with pytest.raises(ValueError, match="eval_split has no effect"):
        trainer(tmp_path, data=split, eval_split="held")


def test_cache_dir_holds_the_cache(tmp_path: Path) -> None:
    run = trainer(tmp_path / "run", cache_dir=str(tmp_path / "mine"))
    assert run._train.encoded.folder.parent == tmp_path / "mine"


def test_validation_options_change_the_pictures(tmp_path: Path) -> None:
    pipe = pipeline()
    given: dict[str, Any] = {
        "validation_steps": 1,
        "validation_prompts": ["a red shirt"],
        "validation_inference_steps": 2,
    }

    def picture(**options: Any) -> bytes:
        return bytes(draw(pipe, config("dpo", tmp_path, **given | options))[0].tobytes())

    assert picture() == picture()
    for name, value in {
        "validation_prompts": ["a blue bag"],
        "validation_seed": 5,
        "validation_inference_steps": 4,
        "validation_guidance_scale": 1.0,
    }.items():
        assert picture(**{name: value}) != picture(), name
    # Nothing set: the pipeline's own default.
    assert picture(validation_guidance_scale=7.5) == picture()


def test_every_field_of_ours_is_flipped_by_a_test() -> None:
    elsewhere = {
        "sdpo_mu", "reference", "reference_cache", "inversion_refresh", "strength_sampling", "ema_decay", "scorer",
        "keep_human_ties", "min_abs_strength", "train_split", "eval_split",
        "cache_dir", "validation_prompts", "validation_seed", "validation_inference_steps", "validation_guidance_scale",
        "validation_steps", "beta_saturation", "beta_calibration_steps",
        "long_prompts", "long_prompts_tokens", "long_prompts_pack", "long_prompts_compat",
        "swap_pairs",
    }  # fmt: skip
    assert CHANGES_LOSSES.keys() | elsewhere == OWN
    assert not CHANGES_LOSSES.keys() & elsewhere


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("dpo", {"beta": 0.0}, "beta must be positive"),
        ("dpo", {"beta": float("nan")}, "beta must be positive"),
        ("dpo", {"prompt_dropout": 1.5}, "prompt_dropout must lie in 0 … 1"),
        ("dpo", {"latents": "dim"}, "latents must be one of 'forward', 'ddim', 'renoise'; got 'dim'"),
        ("dpo", {"comparison": "best"}, "comparison must be one of"),
        ("dpo", {"reference": "cpoy"}, "reference must be one of"),
        ("dpo", {"loss_space": "x"}, "loss_space must be one of"),
        ("dpo", {"loss_type": "sigmoyd"}, "no loss is named 'sigmoyd'; did you mean sigmoid"),
        ("dpo", {"loss_type": "orpo"}, "'orpo' is for token models, not denoisers"),
        ("dpo", {"loss_type": "kto"}, "'kto' reads single labelled samples"),
        ("dpo", {"loss_type": "mapo"}, r"'mapo' has none: set beta \(published for it: 0.1\)"),
        ("dpo", {"loss_type": ["sigmoid", "mapo"], "beta": 1.0}, "one beta cannot serve"),
        ("dpo", {"loss_type": "sft", "beta": 1.0}, "beta has no effect"),
        ("dpo", {"loss_type": ["sigmoid", "ipo"], "loss_weights": [1.0]}, "2 losses and 1 loss_weights"),
        ("dpo", {"loss_type": "sdpo"}, "sdpo_mu go together"),
        ("dpo", {"sdpo_mu": 0.5}, "sdpo_mu go together"),
        ("dpo", {"loss_type": "sdpo", "sdpo_mu": 2.0}, "sdpo_mu must lie in 0 … 1"),
        ("dpo", {"label_smoothing": 0.1}, "takes no label_smoothing"),
        ("dpo", {"f_divergence_type": "js_divergence", "loss_type": "aot"}, "takes no f_divergence_type"),
        ("dpo", {"f_alpha_divergence_coef": 0.3}, "belongs to f_divergence_type"),
        ("dpo", {"inversion_steps": 3}, "inversion_steps has no effect with latents='forward'"),
        ("dpo", {"inversion_eta": 0.3}, "inversion_eta has no effect"),
        ("inpo", {"inversion_renoise_steps": 3}, "inversion_renoise_steps has no effect"),
        ("inpo", {"share_noise": False}, "share_noise=False belongs to latents='forward'"),
        ("inpo", {"inversion_eta": 2.0}, "eta must lie in 0 … 1"),
        ("dpo", {"inversion_model": "reference"}, "needs latents 'ddim' or 'renoise'"),
        ("dpo", {"inversion_landings": "all"}, "inversion_landings has no effect"),
        ("smpo", {"inversion_landings": "all", "inversion_compat": "official-0.20"}, "needs exact landings"),
        ("smpo", {"inversion_landings": "all", "loss_type": "aot"}, "sorts its batch"),
        ("dpo", {"scorer": "playground"}, "scorer has no effect"),
        ("dpo", {"comparison": "relabel"}, "needs a scorer"),
        ("dpo", {"keep_human_ties": True}, "needs a comparison by a scorer"),
        ("dpo", {"min_abs_strength": 0.1}, "min_abs_strength needs"),
        ("dpo", {"smoothing_gamma": 3.0}, "smoothing_gamma has no effect"),
        ("smpo", {"comparison": "smoothed", "smoothing_gamma": -1.0}, "smoothing_gamma must be positive"),
        ("smpo", {"comparison": "smoothed", "smoothing_normalizer": "official", "scorer": "playground"}, "pickscore"),
        ("smpo", {"comparison": "smoothed", "loss_type": "nca_pair"}, "'nca_pair' takes no strength"),
        ("dpo", {"validation_steps": 5}, "validation_steps needs validation_prompts"),
        ("dpo", {"validation_prompts": ["a"]}, "validation_prompts have no effect"),
        ("dpo", {"validation_seed": 3}, "validation_seed has no effect with validation_steps=0"),
        ("dpo", {"resolution": 0}, "resolution must be positive"),
        ("dpo", {"optim": "adafactor", "adam_beta1": 0.5}, "adam_beta1 has no effect with optim='adafactor'"),
        ("dpo", {"loss_type": "mapo", "beta": 0.1, "reference": "copy"}, "reference has no effect"),
        ("sft", {"beta": 100.0}, "beta has no effect on supervised fine-tuning"),
        ("sft", {"loss_type": "ipo"}, "loss_type has no effect on supervised"),
        ("sft", {"share_noise": False}, "share_noise has no effect on supervised"),
        ("sft", {"comparison": "smoothed", "scorer": "playground"}, "no strength"),
    ],
)
def test_an_option_without_effect_or_sense_is_refused(
    method: str, options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        config(method, tmp_path, **options)
    assert "\n" not in str(caught.value)


def test_one_axis_flips_without_the_others(tmp_path: Path) -> None:
    smpo = mmalign.SmPOConfig
    assert smpo(output_dir=str(tmp_path), comparison="human").scorer is None
    assert smpo(output_dir=str(tmp_path), latents="forward").inversion() is None
    assert mmalign.InPOConfig(output_dir=str(tmp_path), latents="forward").inversion() is None
    assert smpo(output_dir=str(tmp_path), loss_type="ipo").loss_type == ["ipo"]


def test_a_copy_of_a_config_is_equal(tmp_path: Path) -> None:
    args = config("inpo", tmp_path, eval_strategy="steps", gradient_checkpointing=True, warmup_steps=0.1)
    copied = dataclasses.replace(args)
    assert copied.to_dict() == args.to_dict() and copied.identity() == args.identity()


# Presets and what is printed.


@pytest.mark.parametrize("kind", CONFIGS)
def test_presets_expand(kind: Any, tmp_path: Path) -> None:
    for name, options in kind.presets.items():
        args = kind.preset(
            name, output_dir=str(tmp_path), use_cpu=True, fp16=False, beta=77.0 if kind.needs_pairs else kind.beta
        )
        for option, value in options.items():
            if option not in ("fp16", "beta"):
                assert getattr(args, option) == value
        assert args.beta == (77.0 if kind.needs_pairs else kind.beta)
    with pytest.raises(ValueError, match="has no preset 'sd99'; it has .*playground, sd15"):
        kind.preset("sd99", output_dir=str(tmp_path))


def test_a_preset_gives_way_to_what_is_asked_for(tmp_path: Path) -> None:
    asked = {"output_dir": str(tmp_path), "use_cpu": True, "beta": 77.0}
    args = mmalign.SmPOConfig.preset("playground", **asked)
    assert (args.beta, args.inversion_steps, args.scorer) == (77.0, 2, "playground")
    # What the preset says of an inversion or a scorer has no effect here, and must not count as asked for.
    args = mmalign.SmPOConfig.preset("playground", **asked, latents="forward", comparison="human")
    assert (args.inversion_steps, args.scorer) == (10, None)
    with pytest.raises(ValueError, match="inversion_steps has no effect"):
        mmalign.SmPOConfig.preset("playground", **asked, latents="forward", inversion_steps=3)


def test_published_presets_are_those_of_the_papers() -> None:
    dpo, inpo, smpo = ({name: kind.presets[name] for name in ("sd15", "sdxl")} for kind in CONFIGS[:3])
    assert {name: preset["beta"] for name, preset in smpo.items()} == {"sd15": 2000.0, "sdxl": 5000.0}
    for presets, pairs_a_step, steps in ((dpo, 2048, 2000), (inpo, 1024, 400), (smpo, 1024, 200)):
        for preset in presets.values():
            assert preset["per_device_train_batch_size"] * preset["gradient_accumulation_steps"] == pairs_a_step
            assert preset["max_steps"] == steps
            # The launchers' 1e-8, scaled by the batch.
            assert preset["learning_rate"] == pytest.approx(1e-8 * pairs_a_step)
    assert all(preset.get("optim") == "adafactor" for preset in (dpo["sdxl"], inpo["sdxl"], smpo["sdxl"]))


def test_describe_tells_batch_rate_and_the_conventions_of_beta(tmp_path: Path) -> None:
    options = {
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 3,
        "learning_rate": 2e-5,
        "warmup_steps": 7,
    }
    told = config("smpo", tmp_path, comparison="smoothed", beta=2000.0, **options).describe(2, elements=16384)
    for part in (
        "smpo: latents=renoise, comparison=smoothed, loss=sigmoid",
        "batch 24 pairs a step = 4 × 3 accumulated × 2 process(es)",
        "effective learning rate 2e-05 (the batch does not scale it), constant_with_warmup, warm-up 7 steps",
        "beta 2000 multiplies −½ · (mean squared error); scripts that leave out the ½ call this 1000",
        "for errors summed over 16,384 elements it is 0.061",
        "renoise_steps=1",
        "from pickscore: gamma 10, normaliser extrema",
    ):
        assert part in told
    sft = config("sft", tmp_path).describe()
    assert "loss=denoising error" in sft and "beta" not in sft
    mapo = config("dpo", tmp_path, loss_type="mapo", beta=0.1).describe()
    assert "beta 0.1 as the loss's own paper defines it" in mapo
    both = config("dpo", tmp_path, loss_type=["sigmoid", "sft"], loss_weights=[1.0, 0.5]).describe()
    assert "loss=sigmoid + 0.5·sft" in both
