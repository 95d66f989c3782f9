"""Users as tokens of a few of their pairs: groups that share no pair, files that come back, scorers as users, and who reads them."""

from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from mmalign.data import load_pairs
from mmalign.data import users as users_module
from mmalign.data.clip_users import ClipUserEncoder, clip_scorer
from mmalign.data.reward_columns import column_scores
from mmalign.data.unfinished import Unfinished
from mmalign.data.users import (
    Group,
    Profile,
    UserEmbeddings,
    embed_user,
    embed_users,
    judged_by_scorers,
    one_persons,
    pair_key,
    scorer_users,
    shot_of,
)


def rows(number=14, users=("ann", "bob", "cy"), seed=0):
    rng = np.random.default_rng(seed)

    def picture():
        return Image.fromarray(rng.integers(0, 255, (32, 32, 3), dtype=np.uint8))

    return [
        {"prompt": f"a thing {i % 3}", "chosen": picture(), "rejected": picture(), "user_id": users[i % len(users)]}
        for i in range(number)
    ]


class Counts:
    """Tokens that tell how bright the preferred pictures are; keeps what it was shown."""

    made_by = {"encoder": "counts"}

    def __init__(self):
        self.seen = []

    def encode(self, shots):
        self.seen.append(shots)
        return Profile(torch.tensor([[float(np.asarray(shot.preferred).mean()) for shot in shots]]), "text", "end")


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 4), st.integers(1, 3), st.integers(0, 5))
def test_groups_are_disjoint_whole_and_at_most_as_many_as_asked(shots, per_user, seed):
    source = load_pairs(rows())
    encoder = Counts()
    users = embed_users(source, encoder, shots=shots, per_user=per_user, seed=seed, progress=False)
    mine = {pair_key(record): record.user_id for record in source}
    used = [key for group in users.groups for key in group.pairs]
    assert len(used) == len(set(used)) and set(used) <= set(mine)
    for group in users.groups:
        assert len(group.pairs) == shots
        assert {mine[key] for key in group.pairs} == {group.user}
    number = {"ann": 5, "bob": 5, "cy": 4}
    assert {user: len(places) for user, places in users.of_user.items()} == {
        user: min(per_user, count // shots) for user, count in number.items() if count >= shots
    }
    assert users.groups[0].text == "text" and users.made_by["shots"] == shots


def test_the_preferred_picture_is_the_one_that_the_label_prefers_and_ties_say_nothing():
    data = rows(6, users=("ann",))
    turned = [
        {"caption": row["prompt"], "jpg_0": row["rejected"], "jpg_1": row["chosen"], "label_0": 0.0, "user_id": "ann"}
        for row in data
    ]
    one, other = Counts(), Counts()
    embed_users(load_pairs(data), one, shots=2, progress=False)
    embed_users(load_pairs(turned), other, shots=2, progress=False)
    assert [shot.prompt for shots in one.seen for shot in shots] == [
        shot.prompt for shots in other.seen for shot in shots
    ]
    for mine, yours in zip(one.seen, other.seen, strict=True):
        assert all(a.preferred.tobytes() == b.preferred.tobytes() for a, b in zip(mine, yours, strict=True))
    turned[0]["label_0"] = 0.5
    users = embed_users(load_pairs(turned), Counts(), shots=5, progress=False)
    tie = next(iter(load_pairs(turned)))
    assert pair_key(tie) not in users.groups[0].pairs
    with pytest.raises(ValueError, match="tie"):
        shot_of(tie)
    with pytest.raises(ValueError, match="no user of .* has 6 pairs"):
        embed_users(load_pairs(turned), Counts(), shots=6, progress=False)


def test_a_file_of_users_comes_back(tmp_path):
    users = embed_users(load_pairs(rows()), Counts(), shots=2, progress=False)
    again = UserEmbeddings.load(users.save(tmp_path / "u.safetensors"))
    assert torch.equal(again.tokens, users.tokens)
    assert again.groups == users.groups and again.made_by == users.made_by
    assert again.fingerprint == users.fingerprint
    moved = UserEmbeddings(users.groups, users.tokens + 1, users.made_by)
    assert moved.fingerprint != users.fingerprint
    assert torch.equal(users.user("bob", 1), users.tokens[users.of_user["bob"][1]])
    with pytest.raises(ValueError, match="no user 'eve'"):
        users.user("eve")
    with pytest.raises(ValueError, match="group 7"):
        users.user("bob", 7)
    (tmp_path / "x.safetensors").write_bytes(b"nothing of the sort")
    with pytest.raises(ValueError, match="make it anew"):
        UserEmbeddings.load(tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match="no such file"):
        UserEmbeddings.load(tmp_path / "y.safetensors")
    with pytest.raises(ValueError, match="not finite"):
        UserEmbeddings([Group("a", (), ())], torch.full((1, 1, 2), float("nan")), {})


class Stops(Counts):
    """Is killed while it reads its `after`-th group."""

    def __init__(self, after):
        super().__init__()
        self.after = after

    def encode(self, shots):
        if len(self.seen) == self.after:
            raise KeyboardInterrupt
        return super().encode(shots)


def test_a_stopped_pass_goes_on_and_its_file_is_whole_or_absent(tmp_path, monkeypatch):
    monkeypatch.setattr(users_module, "Unfinished", partial(Unfinished, seconds=0.0))
    path, options = tmp_path / "u.safetensors", {"shots": 2, "progress": False}
    whole = embed_users(load_pairs(rows()), Counts(), **options)
    with pytest.raises(KeyboardInterrupt):
        embed_users(load_pairs(rows()), Stops(3), output=path, **options)
    assert not path.exists() and len(list((tmp_path / "u.safetensors.unfinished").iterdir())) == 3
    rest = Counts()
    users = embed_users(load_pairs(rows()), rest, output=path, **options)
    assert len(rest.seen) == len(whole.groups) - 3
    again = UserEmbeddings.load(path)
    assert again.fingerprint == users.fingerprint == whole.fingerprint and again.made_by == whole.made_by
    assert [entry.name for entry in tmp_path.iterdir()] == ["u.safetensors"]


@pytest.mark.parametrize("change", ["seed", "data", "encoder"])
def test_what_another_pass_left_is_not_taken(tmp_path, monkeypatch, change):
    monkeypatch.setattr(users_module, "Unfinished", partial(Unfinished, seconds=0.0))
    path, options = tmp_path / "u.safetensors", {"shots": 2, "progress": False}
    with pytest.raises(KeyboardInterrupt):
        embed_users(load_pairs(rows()), Stops(3), output=path, **options)
    encoder, data = Counts(), rows(seed=1) if change == "data" else rows()
    if change == "seed":
        options["seed"] = 5
    if change == "encoder":
        encoder.made_by = {"encoder": "another"}
    users = embed_users(load_pairs(data), encoder, output=path, **options)
    assert len(encoder.seen) == len(users.groups) == 6
    assert users.fingerprint == embed_users(load_pairs(data), encoder, **options).fingerprint


def test_data_without_users_are_refused():
    nameless = [{name: value for name, value in row.items() if name != "user_id"} for row in rows(4)]
    with pytest.raises(ValueError, match="user_id"):
        embed_users(load_pairs(nameless), Counts(), progress=False)
    users = embed_users(one_persons(load_pairs(nameless), "me"), Counts(), shots=2, progress=False)
    assert list(users.of_user) == ["me"] and len(users.groups) == 2


def test_every_scorer_is_a_user_who_prefers_what_it_scores_higher():
    source = load_pairs(rows(3))
    scores = {
        "first": torch.tensor([[1.0, 0.0], [0.0, 1.0], [2.0, 2.0]]),
        "second": torch.tensor([[0.0, 1.0], [0.0, 1.0], [float("nan"), 1.0]]),
    }
    judged = judged_by_scorers(source, scores)
    assert [(record.user_id, record.label) for record in judged] == [
        ("first", 1.0), ("first", 0.0), ("first", 0.5), ("second", 0.0), ("second", 0.0), ("second", 0.5),
    ]  # fmt: skip
    assert judged.opinions() == [(record.user_id, record.label) for record in judged]
    assert [record.image_0.tobytes() for record in judged][3:] == [record.image_0.tobytes() for record in source]
    assert judged.prompts() == source.prompts() * 2
    other = judged_by_scorers(source, scores | {"second": 1 - scores["second"]})
    assert len({judged.fingerprint, other.fingerprint, source.fingerprint}) == 3
    # A part of it keeps its judges, and differs from the same part of the other.
    assert judged.select([4, 0], "part")[0].user_id == "second"
    assert judged.select([4], "part").fingerprint != other.select([4], "part").fingerprint
    users = scorer_users(list(scores))
    assert torch.equal(torch.cat([users.user(name) for name in scores]), torch.eye(2))
    with pytest.raises(ValueError, match="must be"):
        judged_by_scorers(source, {"first": torch.zeros(2, 2)})


def test_a_column_of_the_data_may_be_a_user():
    data = [
        {
            "caption": row["prompt"],
            "jpg_0": row["chosen"],
            "jpg_1": row["rejected"],
            "label_0": 1.0,
            "ps_score_0": value,
        }
        | {"ps_score_1": 0.5}
        for row, value in zip(rows(3), (0.7, None, 0.1), strict=True)
    ]
    source = load_pairs(data)
    scores = column_scores(source, "column:ps_score")
    torch.testing.assert_close(scores[[0, 2]], torch.tensor([[0.7, 0.5], [0.1, 0.5]]))
    judged = judged_by_scorers(source, {"column:ps_score": scores})
    assert [record.label for record in judged] == [1.0, 0.5, 0.0]
    with pytest.raises(ValueError, match="user_scorers='column:score': .* they have column:ps_score"):
        column_scores(source, "column:score")


def test_clip_reads_a_pair_as_the_difference_of_its_pictures():
    encoder = ClipUserEncoder(clip_scorer("playground"))
    records = list(load_pairs(rows(4)))
    tokens = embed_user(records, encoder)
    assert tokens.shape == (4, 96)
    swapped = [{**row, "chosen": row["rejected"], "rejected": row["chosen"]} for row in rows(4)]
    torch.testing.assert_close(embed_user(load_pairs(swapped), encoder), -tokens)
    torch.testing.assert_close(embed_user(records[::-1], encoder), tokens.flip(0), rtol=1e-4, atol=1e-5)
