"""A conversation as the model's chat template writes it: the prompt, and what stands around an answer to it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mmalign.data.answer_records import Picture, Turn

# Their templates add the words of these turns to strings: a list of parts fails, or is printed as it is.
_PLAIN = ("Lfm2VlProcessor",)
# What no answer says, to find where the template puts one.
_ANSWER = "\ue000the answer\ue000"


@dataclass(frozen=True, slots=True)
class WrittenAnswer:
    """before + text + after is what the template writes behind the prompt; text is the answer from its character `start` on."""

    before: str
    text: str
    after: str
    start: int


def write_prompt(turns: Sequence[Turn], processor: Any, options: Mapping[str, Any]) -> str:
    """The conversation up to where the model goes on; one placeholder for each picture and clip."""
    return _render(_messages(turns, processor), processor, options, add_generation_prompt=True)


def write_answer(
    turns: Sequence[Turn], prompt: str, answer: str, processor: Any, options: Mapping[str, Any]
) -> WrittenAnswer:
    """What follows the prompt once it is answered; ValueError if the template writes the prompt or the answer otherwise then."""

    def behind(said: str) -> str:
        messages = _messages([*turns, Turn("assistant", (said,))], processor)
        whole = _render(messages, processor, options, add_generation_prompt=False)
        if not whole.startswith(prompt):
            raise ValueError(
                "the chat template writes the prompt otherwise once it is answered; one for thinking models needs "
                "template_kwargs={'enable_thinking': False} (of encode_answers), or to be replaced in the processor"
            )
        return whole[len(prompt) :]

    before, _, after = behind(_ANSWER).partition(_ANSWER)
    written = behind(answer)
    stop = len(written) - len(after)
    text = written[len(before) : stop]
    # Templates may strip; marks then count from where the answer begins in its text.
    if text not in answer or text.strip() != answer.strip():
        raise ValueError("the chat template changes the answer's words")
    return WrittenAnswer(before, text, after, answer.find(text))


def _messages(turns: Sequence[Turn], processor: Any) -> list[dict[str, Any]]:
    plain = not hasattr(processor, "tokenizer")
    system_plain = plain or type(processor).__name__ in _PLAIN
    return [
        {"role": turn.role, "content": _content(turn, plain or (system_plain and turn.role != "user"))}
        for turn in turns
    ]


def _content(turn: Turn, plain: bool) -> Any:
    if plain and not turn.media:
        return "".join(part for part in turn.parts if isinstance(part, str))
    return [
        {"type": "text", "text": part}
        if isinstance(part, str)
        else {"type": "image" if isinstance(part, Picture) else "video"}
        for part in turn.parts
    ]


def _render(
    messages: list[dict[str, Any]], processor: Any, options: Mapping[str, Any], add_generation_prompt: bool
) -> str:
    from jinja2 import TemplateError

    try:
        text: str = processor.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=add_generation_prompt, **options
        )
    except TemplateError as error:
        raise ValueError(f"the chat template refuses the conversation: {error}") from error
    return text
