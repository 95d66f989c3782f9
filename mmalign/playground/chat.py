"""The tokenizer and the chat form of the playground's models that answer: ChatML turns, words of the worlds, other text by bytes."""

from collections.abc import Iterable, Sequence
from functools import cached_property

import torch
from jaxtyping import Int
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from mmalign.playground.questions import Question

PAD, BOS, END_OF_TEXT, TURN, END = "<|pad|>", "<|startoftext|>", "<|endoftext|>", "<|im_start|>", "<|im_end|>"
IMAGE, IMAGE_START, IMAGE_END, THUMBNAIL = "<image>", "<|image_start|>", "<|image_end|>", "<|img_thumbnail|>"
VIDEO = "<video>"
SPECIAL = (PAD, BOS, END_OF_TEXT, TURN, END, IMAGE, IMAGE_START, IMAGE_END, THUMBNAIL, VIDEO)
IGNORED = -100
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['content'] is string %}{% set parts = [{'type': 'text', 'text': message['content']}] %}"
    "{% else %}{% set parts = message['content'] %}{% endif %}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{% for part in parts %}{{ part['text'] }}{% endfor %}{{ '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{% for part in parts %}"
    "{% if part['type'] == 'image' %}{{ '<image>' }}{% elif part['type'] == 'video' %}{{ '<video>' }}"
    "{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{{ '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def build_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer in which every word of `texts` is one token. The pad token's id is 0, as LFM2's."""
    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    learner.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=2_000, initial_alphabet=alphabet, special_tokens=list(SPECIAL), show_progress=False
    )
    learner.train_from_iterator([*texts, "user", "assistant", "system"], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=learner,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=END,
        extra_special_tokens={
            "image_token": IMAGE,
            "image_start_token": IMAGE_START,
            "image_end_token": IMAGE_END,
            "image_thumbnail_token": THUMBNAIL,
            "video_token": VIDEO,
        },
        clean_up_tokenization_spaces=False,
    )


class Chat:
    """Writes dialogues as token ids, each text looked up once. `media`: what the processor puts where a picture or a clip stands."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, media: str) -> None:
        self.tokenizer, self.media = tokenizer, media
        self._known: dict[str, list[int]] = {}

    def ids(self, text: str) -> list[int]:
        """The tokens of a text that stands by itself."""
        if text not in self._known:
            self._known[text] = self.tokenizer(text, add_special_tokens=False).input_ids
        return self._known[text]

    @cached_property
    def summary(self) -> int:
        """The place of the last token of a dialogue's picture or clip."""
        return len(self.ids(f"{BOS}{TURN}user\n{self.media}")) - 1

    def dialogue(self, turns: Sequence[Question]) -> tuple[list[int], list[int]]:
        """Ids and labels of questions with their answers, the picture or clip before the first; only answers are labelled."""
        ids, labels = [*self.ids(BOS)], [IGNORED]
        for number, turn in enumerate(turns):
            media = "" if number else self.media
            asked = self.ids(f"{TURN}user\n{media}{turn.text}{END}\n{TURN}assistant\n")
            answered = self.ids(f"{turn.answer}{END}")
            ids += [*asked, *answered, *self.ids("\n")]
            labels += [IGNORED] * len(asked) + answered + [IGNORED]
        return ids, labels

    def batch(self, dialogues: Sequence[Sequence[Question]]) -> tuple[Int[Tensor, "B T"], Int[Tensor, "B T"]]:
        """Dialogues padded on the right."""
        rows = [self.dialogue(turns) for turns in dialogues]
        length = max(len(ids) for ids, _ in rows)
        pad = self.tokenizer.pad_token_id
        ids = torch.tensor([ids + [pad] * (length - len(ids)) for ids, _ in rows])
        return ids, torch.tensor([labels + [IGNORED] * (length - len(labels)) for _, labels in rows])
