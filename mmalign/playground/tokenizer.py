"""The playground's CLIP tokenizers: byte-level BPE whose merges are learned from a world's own captions."""

import json
from collections.abc import Iterable

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import CLIPTokenizer

from mmalign.playground.photographs import GARMENTS
from mmalign.playground.world import COLOURS, NUM_TEMPLATES, caption

MAX_LENGTH = 24


def build() -> CLIPTokenizer:
    """A tokenizer in which every word of the grammar is one token; other text falls back to letters."""
    captions = [
        caption(g, c, b, t)
        for g in range(len(GARMENTS))
        for c in range(len(COLOURS))
        for b in range(len(COLOURS))
        for t in range(NUM_TEMPLATES)
        if b != c
    ]
    return learn(captions, vocab_size=700, max_length=MAX_LENGTH)


def learn(captions: Iterable[str], *, vocab_size: int, max_length: int) -> CLIPTokenizer:
    """A tokenizer with merges learned until `vocab_size` pieces (letters counted once) are known: the fewer, the longer a text."""
    learner = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    learner.normalizer = normalizers.Lowercase()
    learner.pre_tokenizer = pre_tokenizers.Whitespace()
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, initial_alphabet=letters, end_of_word_suffix="</w>", show_progress=False
    )
    learner.train_from_iterator(captions, trainer)
    merges = [tuple(merge) for merge in _merges(learner)]
    tokens = letters + [letter + "</w>" for letter in letters] + ["".join(merge) for merge in merges]
    tokens = list(dict.fromkeys([*tokens, "<|startoftext|>", "<|endoftext|>"]))
    vocabulary = {token: index for index, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=max_length)


def _merges(learner: Tokenizer) -> list[list[str]]:
    merges = json.loads(learner.to_str())["model"]["merges"]
    return [merge.split(" ") if isinstance(merge, str) else merge for merge in merges]
