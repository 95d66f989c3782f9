"""MaxSim by hand, and a tiny LFM2 in PyLate's layout that reads texts as PyLate does."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from tiny_vlm import tiny_vlm
from torch.nn.functional import normalize

from mmalign.rewards import MaxSimScorer
from mmalign.rewards.maxsim import Reading, max_sim

WIDTH = 6
READING = {
    "query_prefix": "[Q] ",
    "document_prefix": "[D] ",
    "query_length": 12,
    "document_length": 40,
    "do_query_expansion": True,
    "attend_to_expansion_tokens": False,
    "skiplist_words": [".", "?"],
}


def test_max_sim_by_hand() -> None:
    """Two of three query tokens count; the second document token, which would be the best match, does not."""
    query = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [9.0, 9.0]]])
    document = torch.tensor([[[0.6, 0.8], [50.0, 50.0], [-1.0, 0.0]]])
    found = max_sim(query, document, torch.tensor([[True, True, False]]), torch.tensor([[True, False, True]]))
    assert found.tolist() == pytest.approx([0.6 + 0.8])
    # A best match below 0 stays below 0: padding must not offer a 0.
    alone = max_sim(query, document, torch.tensor([[True, False, False]]), torch.tensor([[False, False, True]]))
    assert alone.tolist() == [-1.0]


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 999), tokens=st.tuples(st.integers(1, 5), st.integers(1, 7)))
def test_max_sim_is_the_sum_of_best_matches(seed: int, tokens: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(seed)
    query, document = (torch.randn(1, count, 4, generator=generator) for count in tokens)
    expected = sum(max(float(q @ d) for d in document[0]) for q in query[0])
    masks = [torch.ones(1, count, dtype=torch.bool) for count in tokens]
    assert max_sim(query, document, *masks).item() == pytest.approx(expected, abs=1e-5)


def save_colbert(folder: Path, **changes: Any) -> Path:
    """A tiny LFM2 trunk with its two marks, and a projection, as PyLate saves them."""
    import copy

    from transformers import AutoTokenizer

    causal, tokenizer = tiny_vlm("lfm2")
    tokenizer.save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens([READING["query_prefix"], READING["document_prefix"]])
    trunk = copy.deepcopy(causal.model)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        trunk.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        dense = torch.randn(WIDTH, trunk.config.hidden_size)
    trunk.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "1_Dense").mkdir()
    save_file({"linear.weight": dense}, folder / "1_Dense" / "model.safetensors")
    about = {"in_features": 32, "out_features": WIDTH, "bias": False}
    identity = {"activation_function": "torch.nn.modules.linear.Identity"}
    (folder / "1_Dense" / "config.json").write_text(json.dumps(about | identity))
    (folder / "config_sentence_transformers.json").write_text(json.dumps(READING | changes))
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_colbert(tmp_path_factory.mktemp("colbert") / "tiny")


QUERIES = ["What is in the picture?", "Which way does it move?", "Is there a bag?"]
DOCUMENTS = ["A red bag. It is on a blue background.", "It moves to the left, then stops.", "No."]


def by_hand(scorer: MaxSimScorer, query: str, document: str) -> float:
    """One pair, alone, without a mask or padding; the fillings of the query are appended and cut off from what attends."""
    reading, tokenizer = scorer.reading, scorer.tokenizer
    trunk, weight = scorer.model["trunk"], scorer.model["projection"].weight
    marks = [tokenizer.convert_tokens_to_ids(mark) for mark in (reading.query_prefix, reading.document_prefix)]
    asked, told = (tokenizer(text).input_ids for text in (query, document))
    asked, told = [asked[0], marks[0], *asked[1:]], [told[0], marks[1], *told[1:]]
    mask = [1] * len(asked)
    if reading.do_query_expansion:
        mask += [int(reading.attend_to_expansion_tokens)] * (reading.query_length - len(asked))
        asked += [tokenizer.eos_token_id] * (reading.query_length - len(asked))
    vectors = []
    for ids, seen in ((asked, mask), (told, [1] * len(told))):
        hidden = trunk(torch.tensor([ids]), attention_mask=torch.tensor([seen])).last_hidden_state[0]
        vectors.append(normalize(hidden @ weight.T, dim=-1))
    skipped = {tokenizer.convert_tokens_to_ids(word) for word in reading.skiplist_words}
    kept = [place for place, token in enumerate(told) if token not in skipped]
    assert len(kept) < len(told)
    return float((vectors[0] @ vectors[1][kept].T).amax(-1).sum())


@pytest.mark.parametrize(
    "changes",
    [{}, {"attend_to_expansion_tokens": True}, {"do_query_expansion": False}, {"skiplist_words": ["."]}],
    ids=lambda changes: next(iter(changes), "published"),
)
def test_scores_are_those_of_each_pair_read_alone(folder: Path, changes: dict[str, Any]) -> None:
    (folder / "config_sentence_transformers.json").write_text(json.dumps(READING | changes))
    scorer = MaxSimScorer.from_pretrained(folder, batch_size=2)
    expected = [by_hand(scorer, *pair) for pair in zip(QUERIES, DOCUMENTS, strict=True)]
    assert scorer.score(QUERIES, DOCUMENTS).tolist() == pytest.approx(expected, abs=1e-5)
    assert scorer.score([], []).shape == (0,)


def test_what_the_file_says_changes_the_score_and_the_fingerprint(folder: Path) -> None:
    seen = {}
    for changes in (
        {},
        {"query_length": 16},
        {"skiplist_words": []},
        {"document_prefix": ""},
        {"query_prefix": "[D] "},
    ):
        (folder / "config_sentence_transformers.json").write_text(json.dumps(READING | changes))
        scorer = MaxSimScorer.from_pretrained(folder)
        seen[scorer.fingerprint] = tuple(round(score, 5) for score in scorer.score(QUERIES, DOCUMENTS).tolist())
    assert len(seen) == len(set(seen.values())) == 5
    (folder / "config_sentence_transformers.json").write_text(json.dumps(READING))
    assert MaxSimScorer.from_pretrained(folder).fingerprint == next(iter(seen))


def test_a_text_finds_itself_best(folder: Path) -> None:
    """With one mark and no filling, a text's own vectors are the only ones that reach 1 for each token."""
    (folder / "config_sentence_transformers.json").write_text(
        json.dumps(
            READING | {"do_query_expansion": False, "query_prefix": "[D] ", "query_length": 40, "skiplist_words": []}
        )
    )
    scorer = MaxSimScorer.from_pretrained(folder)
    same, other = scorer.score([DOCUMENTS[0]] * 2, DOCUMENTS[:2]).tolist()
    assert same == pytest.approx(len(scorer.tokenizer(DOCUMENTS[0]).input_ids) + 1, abs=1e-4) and other < same


def test_long_texts_are_cut_and_told(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    (folder / "config_sentence_transformers.json").write_text(json.dumps(READING))
    scorer = MaxSimScorer.from_pretrained(folder)
    with caplog.at_level(logging.WARNING):
        scorer.score(QUERIES[:1] * 2, ["word " * 200, "short"])
        scorer.score(QUERIES[:1], ["word " * 200])
    vectors, matched = scorer.embed(["word " * 200], is_query=False)
    assert vectors.shape == (1, 40, WIDTH) and matched.all()
    assert caplog.text.count("reads the beginning of long texts only: 1 of 2 were cut") == 1
    assert scorer.num_truncated == 3
    torch.testing.assert_close(vectors.norm(dim=-1), torch.ones(1, 40))


def test_pylate_s_defaults_fill_what_a_file_leaves_open(tmp_path: Path) -> None:
    (tmp_path / "config_sentence_transformers.json").write_text(
        json.dumps({"query_length": 48, "skiplist_words": None})
    )
    assert Reading.of(tmp_path) == Reading(query_length=48)
    assert len(Reading().skiplist_words) == 32 and Reading().document_length == 180


def edit(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda folder: edit(folder / "config.json", architectures=["Lfm2BidirectionalModel"]), "is a Lfm2Bidirect.*has not"),
        (lambda folder: edit(folder / "1_Dense" / "config.json", activation_function="torch.nn.Tanh"), "projects through Tanh"),
        (lambda folder: edit(folder / "config_sentence_transformers.json", query_prefix="[X] "), "has no token '.X. '"),
        (lambda folder: (folder / "1_Dense" / "model.safetensors").unlink(), "model.safetensors is no file"),
        (
            lambda folder: save_file(
                {"linear.weight": torch.zeros(6, 32), "linear.bias": torch.zeros(6)}, folder / "1_Dense" / "model.safetensors"
            ),
            "bias is not part of it",
        ),
    ],
)  # fmt: skip
def test_other_layouts_are_refused(tmp_path: Path, break_it: Any, message: str) -> None:
    break_it(save_colbert(tmp_path / "odd"))
    with pytest.raises(ValueError, match=message):
        MaxSimScorer.from_pretrained(tmp_path / "odd")


def test_words_that_are_no_tokens_are_not_skipped_and_texts_without_words_are_named(tmp_path: Path) -> None:
    bare = {"document_prefix": "", "query_prefix": "", "do_query_expansion": False}
    plain = MaxSimScorer.from_pretrained(save_colbert(tmp_path / "plain", **bare, skiplist_words=["."]))
    more = MaxSimScorer.from_pretrained(
        save_colbert(tmp_path / "more", **bare, skiplist_words=["supercalifragilistic", "."])
    )
    assert more.score(QUERIES, DOCUMENTS).tolist() == plain.score(QUERIES, DOCUMENTS).tolist()
    assert plain.score(["", "a"], ["a bag", "a bag"])[0] == 0
    for text in ("", "."):
        with pytest.raises(ValueError, match="document 1 has no token that a query is matched with"):
            plain.score(["a", "a"], ["a bag", text])


def test_wrong_calls_are_refused(folder: Path) -> None:
    scorer = MaxSimScorer.from_pretrained(folder)
    with pytest.raises(ValueError, match="put it into a list"):
        scorer.score("abc", "xyz")
    with pytest.raises(ValueError, match="1 queries and 2 documents"):
        scorer.score(["a"], ["b", "c"])
    with pytest.raises(ValueError, match="revision has no effect on the folder"):
        MaxSimScorer.from_pretrained(folder, revision="main")
    with pytest.raises(ValueError, match="batch_size must be at least 1"):
        MaxSimScorer.from_pretrained(folder, batch_size=0)
