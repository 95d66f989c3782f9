"""The playground's CLIP tokenizer: byte-level BPE whose merges are learned from the world's own captions."""

import json

from tokenizers import Tokenizer, models, pre_tokenizers, trainers
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
    learner = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    learner.pre_tokenizer = pre_tokenizers.Whitespace()
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=700, initial_alphabet=letters, end_of_word_suffix="</w>", show_progress=False
    )
    learner.train_from_iterator(captions, trainer)
    merges = [tuple(merge) for merge in _merges(learner)]
    tokens = letters + [letter + "</w>" for letter in letters] + ["".join(merge) for merge in merges]
    tokens = list(dict.fromkeys([*tokens, "<|startoftext|>", "<|endoftext|>"]))
    vocabulary = {token: index for index, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=MAX_LENGTH)


def _merges(learner: Tokenizer) -> list[list[str]]:
    merges = json.loads(learner.to_str())["model"]["merges"]
    return [merge.split(" ") if isinstance(merge, str) else merge for merge in merges]
