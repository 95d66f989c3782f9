"""The user classifier on embeddings that tell users apart and on such that do not; the judge that is asked twice."""

import pytest
import torch
from PIL import Image

from mmalign.data.users import Group, Shot, UserEmbeddings
from mmalign.evaluation.user_judge import Question, judge_for_users
from mmalign.evaluation.user_probe import probe_users


def embeddings(num_users=6, groups=20, noise=0.3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(num_users, 1, 2, 8, generator=generator)
    tokens = centres + noise * torch.randn(num_users, groups, 2, 8, generator=generator)
    made = [Group(f"u{user}", (), ()) for user in range(num_users) for _ in range(groups)]
    return UserEmbeddings(made, tokens.flatten(0, 1), {})


def test_the_probe_tells_users_apart_where_their_tokens_do():
    found = probe_users(embeddings(), learning_rates=(1e-3,), epochs=15)
    assert found.num_users == 6 and found.num_held_out == 12
    assert found.top[1] > 0.8
    assert sorted(found.top) == [1, 2, 4]
    assert "chance 16.7%" in str(found)


def test_the_probe_finds_nothing_where_there_is_nothing():
    told = embeddings(noise=0.0)
    shuffled = torch.randperm(len(told.tokens), generator=torch.Generator().manual_seed(1))
    found = probe_users(UserEmbeddings(told.groups, told.tokens[shuffled], {}), learning_rates=(1e-3,))
    assert found.top[1] < 0.6
    assert found.top[4] >= found.top[2] >= found.top[1]


def test_the_probe_reads_the_token_that_it_is_told():
    told = embeddings(noise=0.1)
    told.tokens[:, 1] = 0.0
    options = {"learning_rates": (1e-3,), "epochs": 15}
    assert probe_users(told, **options).top[1] == probe_users(told, token="mean", **options).top[1] > 0.8
    assert probe_users(told, token=0, **options).top[1] > 0.8
    assert probe_users(told, token=-1, **options).top[1] < 0.5
    told.made_by["encoder"] = "vision-language"
    assert probe_users(told, **options).top[1] < 0.5
    with pytest.raises(ValueError, match="token 2 is none of the 2"):
        probe_users(told, token=2)


def test_users_with_few_groups_do_not_count():
    with pytest.raises(ValueError, match="two users with 10 groups"):
        probe_users(embeddings(groups=9))


def picture(value):
    return Image.new("L", (4, 4), value).convert("RGB")


def questions(*pairs):
    shots = tuple(Shot("a thing", picture(200), picture(20)) for _ in range(6))
    return [Question(f"u{i}", shots, "a thing", picture(a), picture(b)) for i, (a, b) in enumerate(pairs)]


def level(image):
    return image.getpixel((0, 0))[0]


def likes_bright(examples, prompt, first, second):
    """Reads from the examples whether bright pictures are liked."""
    liked = [level(e.first if e.chosen == 1 else e.second) > 100 for e in examples]
    assert all(liked)
    return "1" if level(first) > level(second) else "2"


def test_a_judge_that_reads_pictures_is_counted_and_its_order_does_not_matter():
    found = judge_for_users(likes_bright, questions((200, 10), (10, 200), (90, 30), (80, 20)))
    assert found.verdicts == ("target", "other", "target", "target")
    assert found.win_rate.rate == 0.75 and found.inconsistent == found.unreadable == 0


def test_a_judge_that_answers_by_place_is_never_counted_as_a_win():
    found = judge_for_users(lambda *asked: "1", questions((200, 10), (10, 200)))
    assert found.verdicts == ("inconsistent", "inconsistent")
    assert found.win_rate is None and found.inconsistent == 1
    assert "none was answered alike" in str(found) and "100.0% of 2 changed" in str(found)


def test_what_is_neither_answer_is_told_by_itself():
    def unsure(examples, prompt, first, second):
        return "both" if 10 in (level(first), level(second)) else likes_bright(examples, prompt, first, second) + "\n"

    found = judge_for_users(unsure, questions((200, 10), (90, 30)))
    assert found.verdicts == ("unreadable", "target")
    assert found.unreadable == 0.5 and found.win_rate.num_comparisons == 1


def test_examples_stand_in_either_order_and_the_same_for_both_questions():
    seen = []

    def watch(examples, prompt, first, second):
        seen.append([e.chosen for e in examples])
        return "1"

    judge_for_users(watch, questions(*[(1, 2)] * 4))
    assert {1, 2} == {place for asked in seen for place in asked}
    assert seen[0::2] == seen[1::2]
