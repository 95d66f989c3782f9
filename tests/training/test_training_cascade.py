"""Training on Stable Cascade's prior: PPD from folder to folder, other methods in full, and what is refused with its reason."""

import math
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import cascade_decoder, tiny_pipeline
from training.runs import batch, history, losses, trained, trainer
from training.test_training_ppd import embeddings, rows

import mmalign
from mmalign.denoisers.user_attention import user_attention
from mmalign.likelihood.reference import Reference
from mmalign.training.checkpoints import MANIFEST


def run(folder, prior, data=None, **options):
    folder.mkdir(exist_ok=True)
    given = {
        "output_dir": str(folder), "max_steps": 2, "per_device_train_batch_size": 2, "logging_steps": 1,
        "save_strategy": "no", "use_cpu": True, "disable_tqdm": True, "resolution": 64, "learning_rate": 1e-2,
        "users": embeddings(folder / "users.safetensors"),
    }  # fmt: skip
    return mmalign.PPDTrainer(
        model=mmalign.PPDPipeline.from_pretrained(prior),
        args=mmalign.PPDConfig(**given | options),
        train_dataset=data or rows(),
    )


def move(made):
    with torch.no_grad():
        for parameter in user_attention(made.network).parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))


@pytest.mark.parametrize("beta", [1.0, 5000.0])
def test_starts_at_the_reference_for_any_beta_although_the_network_has_dropout(tmp_path, cascade_folder, beta):
    made = run(tmp_path, cascade_folder, beta=beta)
    assert any(isinstance(part, torch.nn.Dropout) and part.p > 0 for part in made.network.modules())
    made.model.train()
    found = losses(made)
    torch.testing.assert_close(found, torch.full((2,), math.log(2)), rtol=0, atol=1e-6)
    move(made)
    first, again = losses(made), losses(made)
    assert torch.equal(first, again) and not torch.allclose(first, found)


def test_trains_the_user_attention_and_nothing_else_with_and_without_checkpointing(tmp_path, cascade_folder):
    plain, again = (
        run(tmp_path / str(on), cascade_folder, gradient_checkpointing=on, max_steps=3) for on in (False, True)
    )
    base = Reference("copy", tiny_pipeline("cascade").prior).fingerprint()
    assert plain.reference.fingerprint() == base
    for made in (plain, again):
        made.train()
    np.testing.assert_allclose(history(plain), history(again), rtol=1e-4)
    assert history(plain)[0] == pytest.approx(math.log(2), abs=1e-5) != history(plain)[-1]
    assert plain.reference.fingerprint() == base
    assert all("user_attention." in name for name in trained(plain))
    for name, weight in trained(plain).items():
        torch.testing.assert_close(weight, trained(again)[name], rtol=1e-3, atol=1e-4)


def test_swapping_the_sides_flips_the_margin_and_a_dropped_user_teaches_nothing(tmp_path, cascade_folder):
    made = run(tmp_path, cascade_folder)
    move(made)
    inputs = batch(made)
    swapped = {**inputs, "chosen": inputs["rejected"], "rejected": inputs["chosen"]}
    _, one, _ = made.pair_losses(made.model, inputs, epoch=0)
    _, other, _ = made.pair_losses(made.model, swapped, epoch=0)
    assert one.logps.margin.abs().min() > 0
    torch.testing.assert_close(one.logps.margin, -other.logps.margin)
    made.args.user_dropout = 0.999
    found = losses(made)
    torch.testing.assert_close(found, torch.full((2,), math.log(2)), rtol=0, atol=1e-6)
    found.sum().backward()
    assert not any(p.grad.any() for p in user_attention(made.network).parameters())


def test_beta_of_stable_diffusion_xl_is_703_on_the_latents_of_768_pixels():
    elements = math.prod(mmalign.denoisers.adapter_for(tiny_pipeline("cascade")).latent_shape(768, 768))
    config = mmalign.PPDConfig.preset("cascade", output_dir="unused", users="x.safetensors", bf16=False, use_cpu=True)
    assert elements == 9216 and config.beta_of(elements) == pytest.approx(703, abs=0.5)


def test_aligned_saved_loaded_and_trained_on_it_is_the_same_model(tmp_path, cascade_folder):
    users = embeddings(tmp_path / "users.safetensors")
    pipe = mmalign.PPDPipeline.from_pretrained(cascade_folder)
    result = pipe.align(
        rows(), output_dir=tmp_path / "run", users=users, user_rank=2, max_steps=2, resolution=64, logging_steps=1,
        per_device_train_batch_size=2, learning_rate=1e-2, save_strategy="no", use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    assert math.isfinite(result.metrics["loss"])
    assert "draws the base's pictures" in (tmp_path / "run" / "README.md").read_text()

    def draw(pipe, **options):
        pipe.set_progress_bar_config(disable=True)
        given = {"height": 85, "width": 85, "num_inference_steps": 2, "generator": torch.Generator().manual_seed(0)}
        return pipe("a red shirt", **given | options).image_embeddings

    expected = draw(pipe, user="ann")
    assert not torch.allclose(expected, draw(pipe))
    pipe.save_pretrained(tmp_path / "saved")
    onto = mmalign.PPDPipeline.from_pretrained(cascade_folder)
    onto.load_aligned(tmp_path / "run")
    for again in (onto, mmalign.PPDPipeline.from_pretrained(tmp_path / "saved")):
        again.users = pipe.users
        assert torch.equal(draw(again, user="ann"), expected)
        assert torch.equal(draw(again), draw(tiny_pipeline("cascade")))


def test_resumed_it_goes_on_as_if_it_had_not_stopped(tmp_path, cascade_folder):
    users = embeddings(tmp_path / "users.safetensors")
    options = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4, "users": users}
    whole = run(tmp_path / "whole", cascade_folder, **options)
    whole.train()
    assert (tmp_path / "whole" / "checkpoint-2" / MANIFEST).is_file()
    parted = run(tmp_path / "whole", cascade_folder, **options)
    parted.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert history(parted) == history(whole)
    for name, weight in trained(whole).items():
        assert torch.equal(weight, trained(parted)[name]), name


def test_latents_of_another_encoder_are_not_taken_from_the_cache(tmp_path, cascade_folder):
    few = rows(2)
    one, again = (run(tmp_path / str(n), cascade_folder, few)._train.encoded for n in range(2))
    assert one.key == again.key
    shutil.copytree(cascade_folder, tmp_path / "moved")
    file = tmp_path / "moved" / "effnet_encoder.safetensors"
    state = load_file(file)
    save_file(state | {"mapper.1.running_mean": state["mapper.1.running_mean"] + 1}, file)
    other = run(tmp_path / "other", tmp_path / "moved", few)._train.encoded
    assert other.key != one.key
    moved, here = (found.latents(torch.arange(2)) for found in (other, one))
    torch.testing.assert_close(moved, here - 1 / (state["mapper.1.running_var"] + 1e-5).sqrt().view(-1, 1, 1))


@pytest.mark.parametrize(("method", "latents"), [("dpo", "forward"), ("smpo", "renoise")])
def test_other_methods_train_every_weight(tmp_path, cascade_folder, method, latents):
    pipe = getattr(mmalign, f"{'SmPO' if method == 'smpo' else 'DiffusionDPO'}Pipeline").from_pretrained(cascade_folder)
    made = trainer(tmp_path, method, pipe=pipe, peft_config=None, latents=latents, resolution=64, learning_rate=1e-4)
    made.model.train()
    torch.testing.assert_close(losses(made).mean(), torch.tensor(math.log(2)), rtol=0, atol=1e-5)
    before = {name: weight.clone() for name, weight in trained(made).items()}
    made.train()
    after = trained(made)
    assert sum(not torch.equal(before[name], after[name]) for name in before) > 0.5 * len(before)
    made.save_model()
    assert (tmp_path / "prior" / "diffusion_pytorch_model.safetensors").is_file()
    fresh = type(pipe).from_pretrained(cascade_folder)
    fresh.load_aligned(tmp_path)
    assert all(torch.equal(weight, after[name]) for name, weight in fresh.prior.named_parameters())


def test_inversion_finds_its_way_back(cascade_folder, monkeypatch):
    from PIL import Image

    from mmalign.denoisers.stable_cascade import StableCascadeDenoiser

    monkeypatch.setattr(StableCascadeDenoiser, "native_size", (64, 64))
    pipe = mmalign.SmPOPipeline.from_pretrained(cascade_folder)
    with torch.no_grad():
        # A network of small outputs: what is left is the walk through the table.
        pipe.prior.clf[1].weight.mul_(0.02)
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8))
    trip = pipe.invert(picture, "a red shirt", timestep=499, num_steps=20)
    assert trip.rmse.item() < 0.05


# What is refused.


def test_a_lora_is_refused_with_what_can_be_trained_instead(tmp_path, cascade_folder):
    pipe = mmalign.DiffusionDPOPipeline.from_pretrained(cascade_folder)
    # Before any picture is read.
    with pytest.raises(ValueError, match="diffusers puts no LoRA on StableCascadeUNet: .*--full"):
        trainer(tmp_path, pipe=pipe, data="no such data", resolution=64)


def test_sample_pictures_need_the_decoder(tmp_path, cascade_folder):
    options = {"validation_steps": 1, "validation_prompts": ["a red shirt"], "validation_user": "ann"}
    with pytest.raises(ValueError, match="draws features and no pictures"):
        run(tmp_path, cascade_folder, **options)
    made = run(tmp_path, cascade_folder)
    made.pipe.decoder = cascade_decoder()
    made.args.validation_steps = 1
    made.check_arguments(made.args, rows(), None, None)


def test_methods_that_decode_or_guide_are_refused(tmp_path, cascade_folder):
    given = {"output_dir": str(tmp_path), "max_steps": 1, "use_cpu": True, "disable_tqdm": True, "resolution": 64}
    prompts = ["a red shirt", "a blue bag"]
    with pytest.raises(ValueError, match="stable-cascade reads prompts"):
        mmalign.LongAlignPipeline.from_pretrained(cascade_folder)
    for kind in (mmalign.SelfNPOPipeline, mmalign.DiffusionNPOPipeline):
        pipe = kind.from_pretrained(cascade_folder)
        for peft_config in ("default", None):
            with pytest.raises(ValueError, match="StableCascadeUNet"):
                pipe.align(prompts, peft_config=peft_config, **given)
