"""PPD's trainer: starts at the reference, trains the user attention alone, keeps support and query apart, tells users apart."""

import json
import math

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import tiny_pipeline
from training.runs import PROMPTS, Brightness, Watch, batch, history, losses, trained

import mmalign
from mmalign.data import load_pairs
from mmalign.data.users import Group, UserEmbeddings, pair_key
from mmalign.denoisers.user_attention import user_attention
from mmalign.likelihood.reference import Reference
from mmalign.pipelines.image import ppd


def picture(rng, low, high):
    return Image.fromarray(rng.integers(low, high, (16, 16, 3), dtype=np.uint8))


def rows(number=8, users=("ann", "bob"), seed=0):
    """Pairs of a bright and a dark picture: the first user prefers bright ones, the second dark ones."""
    rng = np.random.default_rng(seed)
    found = []
    for i in range(number):
        sides = [picture(rng, 150, 255), picture(rng, 0, 100)]
        likes_bright = i % len(users) == 0
        found.append(
            {
                "prompt": PROMPTS[i // 2 % len(PROMPTS)],
                "chosen": sides[0 if likes_bright else 1],
                "rejected": sides[1 if likes_bright else 0],
                "user_id": users[i % len(users)],
            }
        )
    return found


def embeddings(path, users=("ann", "bob"), groups=2, width=4, pairs=()):
    generator = torch.Generator().manual_seed(3)
    made = [Group(user, tuple(pairs), PROMPTS) for user in users for _ in range(groups)]
    tokens = torch.randn(len(users), 1, 2, width, generator=generator).expand(-1, groups, -1, -1).flatten(0, 1)
    UserEmbeddings(made, tokens, {"encoder": "random"}).save(path)
    return str(path)


def run(folder, *, kind="sd", data=None, eval_dataset=None, callbacks=None, pipe=None, **options):
    folder.mkdir(exist_ok=True)
    given = {
        "output_dir": str(folder), "max_steps": 2, "per_device_train_batch_size": 2, "logging_steps": 1,
        "save_strategy": "no", "use_cpu": True, "disable_tqdm": True,
    }  # fmt: skip
    if not {"users", "user_scorers"} & set(options):
        given["users"] = embeddings(folder / "users.safetensors")
    return mmalign.PPDTrainer(
        model=pipe or mmalign.PPDPipeline._adopt(tiny_pipeline(kind)),
        args=mmalign.PPDConfig(**given | options),
        train_dataset=rows() if data is None else data,
        eval_dataset=eval_dataset,
        callbacks=callbacks,
    )


@pytest.mark.parametrize("beta", [1.0, 5000.0])
@pytest.mark.parametrize("latents", ["forward", "ddim"])
def test_starts_at_the_reference_for_any_beta(tmp_path, beta, latents):
    options = {"latents": latents, "inversion_steps": 2} if latents == "ddim" else {}
    found = losses(run(tmp_path, beta=beta, **options))
    torch.testing.assert_close(found, torch.full((2,), math.log(2)), rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", ["sdxl", "flux"])
def test_trains_the_user_attention_and_nothing_else(tmp_path, kind):
    watch = Watch()
    made = run(tmp_path, kind=kind, callbacks=[watch], learning_rate=1e-2)
    before = {name: p.detach().clone() for name, p in made.network.named_parameters()}
    made.train()
    after = dict(made.network.named_parameters())
    moved = {name for name, p in before.items() if not torch.equal(p, after[name])}
    assert moved and all("user_attention." in name for name in moved)
    values = {name for name in after if ".value." in name}
    assert values <= moved
    # At the first step the values are zero and keys have no gradient; then both learn.
    assert not any(g.any() for name, g in watch.gradients[0].items() if ".key." in name)
    assert any(g.any() for name, g in watch.gradients[1].items() if ".key." in name)


def test_gradient_checkpointing_changes_no_loss(tmp_path):
    plain, again = (
        run(tmp_path / str(on), gradient_checkpointing=on, learning_rate=1e-2, max_steps=3) for on in (False, True)
    )
    plain.train()
    again.train()
    np.testing.assert_allclose(history(plain), history(again), rtol=1e-5)


def test_swapping_the_sides_flips_the_margin(tmp_path):
    made = run(tmp_path)
    with torch.no_grad():
        for parameter in user_attention(made.network).parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    inputs = batch(made)
    swapped = {**inputs, "chosen": inputs["rejected"], "rejected": inputs["chosen"]}
    _, one, _ = made.pair_losses(made.model, inputs, epoch=0)
    _, other, _ = made.pair_losses(made.model, swapped, epoch=0)
    assert one.logps.margin.abs().min() > 0
    torch.testing.assert_close(one.logps.margin, -other.logps.margin)


def test_a_dropped_user_teaches_nothing(tmp_path):
    made = run(tmp_path, user_dropout=0.999)
    with torch.no_grad():
        for parameter in user_attention(made.network).parameters():
            parameter.add_(1.0)
    found = losses(made)
    torch.testing.assert_close(found, torch.full((2,), math.log(2)), rtol=0, atol=1e-6)
    found.sum().backward()
    assert not any(p.grad.any() for p in user_attention(made.network).parameters())


def test_the_reference_is_the_base_after_training_too(tmp_path):
    made = run(tmp_path, learning_rate=1e-2)
    base = Reference("copy", tiny_pipeline("sd").unet).fingerprint()
    assert made.reference.fingerprint() == base
    made.train()
    assert made.reference.fingerprint() == base


def test_a_pair_is_never_told_of_a_group_that_it_made(tmp_path):
    data = rows()
    records = list(load_pairs(data))
    keys = [pair_key(record) for record in records]
    flipped = [{**row, "chosen": row["rejected"], "rejected": row["chosen"]} for row in data]
    assert [pair_key(record) for record in load_pairs(flipped)] == keys
    # ann's pairs are rows 0, 2, 4, 6: two in each of her groups; bob has one group, of rows 1 and 3.
    groups = [Group("ann", (keys[0], keys[2]), PROMPTS), Group("ann", (keys[4], keys[6]), PROMPTS)]
    groups.append(Group("bob", (keys[1], keys[3]), PROMPTS))
    UserEmbeddings(groups, torch.randn(3, 1, 4), {}).save(tmp_path / "u.safetensors")
    made = run(tmp_path, users=str(tmp_path / "u.safetensors"), data=data)
    assert made._train.groups == {0: [1], 2: [1], 4: [0], 6: [0], 5: [2], 7: [2]}
    assert {item["row"] for item in made._train.dataset} == {0, 2, 4, 5, 6, 7}


def test_which_group_tells_of_a_user_changes_between_epochs_and_not_within_one(tmp_path):
    data = run(tmp_path, users=embeddings(tmp_path / "many.safetensors", groups=20))._train
    object.__setattr__(data.users, "tokens", torch.arange(40.0)[:, None, None].expand(-1, 1, 4))
    seen = [data.told([0, 1], seed=0, epoch=epoch)[0][:, 0, 0].tolist() for epoch in range(12)]
    assert len({first for first, _ in seen}) > 3
    assert all(first < 20 <= second for first, second in seen)
    assert data.told([1], seed=0, epoch=3)[0][0, 0, 0] == seen[3][1]
    others = data.told([0, 1], seed=0, epoch=0, others=True)[0][:, 0, 0].tolist()
    assert others[1] < 20 <= others[0]


def test_scorers_as_users_compare_every_pair_each_in_their_own_way(tmp_path, monkeypatch):
    class Darkness(Brightness):
        name, fingerprint = "dark", "darkness"

        def score(self, images, prompts):
            return -super().score(images, prompts)

    judges = {"bright": Brightness(), "dark": Darkness()}
    monkeypatch.setattr(ppd, "scorer", lambda name, **options: judges[name])
    data = run(tmp_path, user_scorers=["bright", "dark"], data=rows(4))._train
    assert [item["row"] for item in data.dataset] == list(range(8))
    assert data.dataset.compared.first.tolist() == [0, 1, 0, 1, 1, 0, 1, 0]
    tokens, weight = data.told([0, 5], seed=0, epoch=0)
    assert torch.equal(tokens[:, 0], torch.eye(2)) and weight.tolist() == [1.0, 1.0]


def test_scorers_tokens_are_saved_with_the_run_and_draw(tmp_path, monkeypatch):
    data = [
        {"caption": row["prompt"], "jpg_0": row["chosen"], "jpg_1": row["rejected"], "label_0": 1.0}
        | {"ps_score_0": float(i % 2), "ps_score_1": 0.5}
        for i, row in enumerate(rows(4))
    ]
    monkeypatch.setattr(ppd, "scorer", lambda name, **options: Brightness())
    made = run(tmp_path / "run", user_scorers=["column:ps_score", "bright"], data=data, learning_rate=1e-2)
    assert made._train.dataset.compared.first.tolist() == [1, 0, 1, 0, 0, 1, 0, 1]
    made.train()
    made.save_model()
    users = UserEmbeddings.load(tmp_path / "run" / "users.safetensors")
    assert list(users.of_user) == ["column:ps_score", "bright"]
    with pytest.raises(ValueError, match="user_scorers='column:nothing': the data have no such column"):
        run(tmp_path, user_scorers=["column:nothing"], data=data)


def test_a_clip_like_scorer_reads_the_users_when_training_starts(tmp_path):
    data = run(tmp_path, users="playground", user_shots=2)._train
    assert data.users.made_by["encoder"] == "clip-patch-difference"
    assert {user: len(groups) for user, groups in data.users.of_user.items()} == {"ann": 2, "bob": 2}
    keys = {record.row: pair_key(record) for record in load_pairs(rows())}
    assert sorted(data.groups) == list(range(8))
    for row, (group,) in data.groups.items():
        assert keys[row] not in data.users.groups[group].pairs


def test_users_without_an_embedding_are_left_out_and_nobody_left_is_an_error(tmp_path):
    made = run(tmp_path, users=embeddings(tmp_path / "ann.safetensors", users=("ann",)))
    assert {item["row"] for item in made._train.dataset} == {0, 2, 4, 6}
    with pytest.raises(ValueError, match="no pair .* has a user with an embedding"):
        run(tmp_path, users=embeddings(tmp_path / "eve.safetensors", users=("eve",)))


def test_resumed_it_goes_on_as_if_it_had_not_stopped(tmp_path):
    options = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4, "learning_rate": 1e-2, "ema_decay": 0.5}
    users = embeddings(tmp_path / "users.safetensors")
    whole = run(tmp_path / "whole", users=users, **options)
    whole.train()
    parted = run(tmp_path / "whole", users=users, **options)
    parted.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert history(parted) == history(whole)
    for name, weight in trained(whole).items():
        assert torch.equal(weight, trained(parted)[name]), name


def test_one_adapter_learns_opposite_preferences_on_the_same_points_by_the_tokens_alone(tmp_path):
    made = run(tmp_path, data=rows(4), beta=2000.0, prompt_dropout=0.0)
    inputs = batch(made, (0, 2))
    swapped = {**inputs, "chosen": inputs["rejected"], "rejected": inputs["chosen"]}
    optimizer = torch.optim.Adam([p for p in made.network.parameters() if p.requires_grad], lr=3e-3)
    for _ in range(30):
        own = losses_of(made, inputs, others=False)
        # Ann's pairs, at her draws, with bob's tokens and the opposite choice.
        opposite = losses_of(made, swapped, others=True)
        optimizer.zero_grad()
        (own.mean() + opposite.mean()).backward()
        optimizer.step()
    # Whatever does not depend on the user has margins z and −z here, whose losses are ln 2 or more on average.
    assert own.max() < 0.4 and opposite.max() < 0.4


def test_ties_are_not_trained_on(tmp_path):
    data = [
        {"caption": row["prompt"], "jpg_0": row["chosen"], "jpg_1": row["rejected"], "label_0": 1.0}
        | {"user_id": row["user_id"]}
        for row in rows()
    ]
    data[2]["label_0"] = data[5]["label_0"] = 0.5
    assert sorted(run(tmp_path, data=data)._train.groups) == [0, 1, 3, 4, 6, 7]


def losses_of(made, inputs, *, others):
    made._others = others
    found = made.pair_losses(made.model, inputs, epoch=0)[0]
    made._others = False
    return found


@pytest.mark.parametrize("alike", [False, True])
def test_evaluation_tells_what_another_users_tokens_are_worth(tmp_path, alike):
    users = UserEmbeddings.load(embeddings(tmp_path / "u.safetensors"))
    if alike:
        users.tokens[:] = users.tokens[:1].clone()
    made = run(tmp_path, users=str(users.save(tmp_path / "used.safetensors")), eval_dataset=rows(24, seed=9))
    with torch.no_grad():
        for parameter in user_attention(made.network).parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2)))
    metrics = made.evaluate()
    right, shuffled = metrics["eval_rewards/accuracies"], metrics["eval_users/shuffled_accuracies"]
    assert metrics["eval_users/gap"] == pytest.approx(right - shuffled)
    assert (right == shuffled) == alike


def test_beta_is_scaled_to_the_latent(tmp_path):
    made = run(tmp_path, beta=1000.0, beta_elements=512)
    assert made.elements == 256
    assert made.beta == 500.0
    plain = run(tmp_path / "plain", beta=500.0)
    for one in (made, plain):
        with torch.no_grad():
            for parameter in user_attention(one.network).parameters():
                parameter.fill_(0.1)
    torch.testing.assert_close(losses(made), losses(plain))


def test_the_output_folder_holds_the_attention_and_a_card(tmp_path):
    made = run(tmp_path / "run", users=embeddings(tmp_path / "people.safetensors"))
    made.train()
    made.save_model()
    folder = tmp_path / "run"
    assert {path.name for path in (folder / "user_attention").iterdir()} == {
        "user_attention.safetensors",
        "config.json",
    }
    assert not (folder / "users.safetensors").exists()
    assert json.loads((folder / "user_attention" / "config.json").read_text())["width"] == 4
    card = (folder / "README.md").read_text()
    assert "PPDPipeline" in card and "draws the base's pictures" in card


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"users": None}, "say who compares"),
        ({"user_scorers": ["playground"], "users": "x.safetensors"}, "say who compares"),
        ({"users": "x.safetensors", "user_shots": 3}, "belong to a scorer"),
        ({"users": "x.safetensors", "user_dropout": 1.0}, "user_dropout"),
        ({"users": "x.safetensors", "beta_elements": 4, "beta": "auto"}, "beta_elements"),
        ({"users": "x.safetensors", "reference": "copy"}, "reference has no effect"),
        ({"users": "x.safetensors", "validation_steps": 1, "validation_prompts": ["a"]}, "validation_user"),
    ],
)
def test_options_that_contradict_are_refused(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        mmalign.PPDConfig(output_dir=str(tmp_path), use_cpu=True, **options)


def test_other_methods_refuse_a_pipeline_with_users(tmp_path):
    from training.runs import trainer

    made = run(tmp_path)
    with pytest.raises(ValueError, match="carries a user attention"):
        trainer(tmp_path, pipe=made.pipe)
